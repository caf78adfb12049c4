"""Learning-rate schedules: pure functions from the number of finished steps to a factor of the peak learning rate.

`make_schedule` finds them by name, and `ScheduleLR` sets the learning rates of any optimizer by them. `resumable` and
`optimizer_param_scheduler` hold schedulers with the arguments and states of those in other systems.
"""

from .curves import COEFFICIENTS, FALLS, fall
from .one_cycle import one_cycle, one_cycle_momentum
from .optimizer_param_scheduler import LR_STYLES, OptimizerParamScheduler
from .phases import Phase, phases
from .registry import Schedule, get_scheduler, list_schedulers, make_schedule, register_scheduler, schedule_parameters
from .resumable import CosineLRScheduler, InfiniteLRScheduler, WSDScheduler, resumed_start
from .scheduler import ScheduleLR, for_groups
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
    "CosineLRScheduler",
    "InfiniteLRScheduler",
    "OptimizerParamScheduler",
    "Phase",
    "Schedule",
    "ScheduleLR",
    "WSDScheduler",
    "constant",
    "cosine",
    "cosine_with_restarts",
    "exponential",
    "fall",
    "for_groups",
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
    "step_decay",
    "wsd",
]
