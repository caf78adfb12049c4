"""Learning-rate schedules: pure functions from the number of finished steps to a factor of the peak learning rate.

`make_schedule` finds them by name, and `ScheduleLR` sets the learning rates of any optimizer by them. `resumable` and
`optimizer_param_scheduler` hold schedulers with the arguments and states of those in other systems. `scheduler_builders` and
`rates` hold schedules in learning rates, with the configs of other systems.
"""

from .curves import COEFFICIENTS, FALLS, fall
from .one_cycle import one_cycle, one_cycle_momentum
from .optimizer_param_scheduler import LR_STYLES, OptimizerParamScheduler
from .phases import Phase, phases
from .rates import CosineAnnealingWarmRestarts, LinearScheduler
from .registry import Schedule, get_scheduler, list_schedulers, make_schedule, register_scheduler, schedule_parameters
from .resumable import CosineLRScheduler, InfiniteLRScheduler, WSDScheduler, resumed_start
from .scheduler import ScheduleLR, for_groups, get_lr, set_lr
from .scheduler_builders import (
    ConstantSchedulerBuilder,
    CosineSchedulerBuilder,
    LinearSchedulerBuilder,
    RateSchedule,
    SchedulerBuilder,
    build_scheduler,
)
from .scheduler_config import SchedulerConfig, WarmRestartConfig
from .schedules import (
    constant,
    cosine,
    cosine_with_restarts,
    exponential,
    infinite,
    inverse_square_root,
    linear,
    polynomial,
    step_decay,
    wsd,
)

WSD_DECAY_STYLES = FALLS

__all__ = [
    "COEFFICIENTS",
    "FALLS",
    "LR_STYLES",
    "WSD_DECAY_STYLES",
    "ConstantSchedulerBuilder",
    "CosineAnnealingWarmRestarts",
    "CosineLRScheduler",
    "CosineSchedulerBuilder",
    "InfiniteLRScheduler",
    "LinearScheduler",
    "LinearSchedulerBuilder",
    "OptimizerParamScheduler",
    "Phase",
    "RateSchedule",
    "Schedule",
    "ScheduleLR",
    "SchedulerBuilder",
    "SchedulerConfig",
    "WSDScheduler",
    "WarmRestartConfig",
    "build_scheduler",
    "constant",
    "cosine",
    "cosine_with_restarts",
    "exponential",
    "fall",
    "for_groups",
    "get_lr",
    "get_scheduler",
    "infinite",
    "inverse_square_root",
    "linear",
    "list_schedulers",
    "make_schedule",
    "one_cycle",
    "one_cycle_momentum",
    "phases",
    "polynomial",
    "register_scheduler",
    "resumed_start",
    "schedule_parameters",
    "set_lr",
    "step_decay",
    "wsd",
]
