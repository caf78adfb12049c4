# The front door: what ``from shardstep import …`` and ``from core import …`` offer. core/__init__.py reads it at run time.
from .checkpoint import Background as Background
from .checkpoint import CheckpointError as CheckpointError
from .checkpoint import latest_step as latest_step
from .checkpoint import load as load
from .checkpoint import save as save
from .faults import Guard as Guard
from .optimizer.chained import ChainedOptimizer as ChainedOptimizer
from .optimizer.early_step import EarlyStep as EarlyStep
from .optimizer.emerging_optimizers import EmergingOptimizerEntry as EmergingOptimizerEntry
from .optimizer.emerging_optimizers import TensorParallelAdaptiveMuon as TensorParallelAdaptiveMuon
from .optimizer.emerging_optimizers import TensorParallelMuon as TensorParallelMuon
from .optimizer.emerging_optimizers import get_optimizer as get_optimizer
from .optimizer.emerging_optimizers import list_optimizers as list_optimizers
from .optimizer.emerging_optimizers import register_optimizer as register_optimizer
from .optimizer.forgather_state import from_forgather_state as from_forgather_state
from .optimizer.functional.builders import make_transformation as make_transformation
from .optimizer.memory import memory_report as memory_report
from .optimizer.optimizer_config import OptimizerConfig as OptimizerConfig
from .optimizer.optimizer_config import ParamKey as ParamKey
from .optimizer.optimizer_config import ParamPredicate as ParamPredicate
from .optimizer.optimizer_config import ParamWithNamePredicate as ParamWithNamePredicate
from .optimizer.probe import probe as probe
from .optimizer.rules.parts.subspace_projectors import OnlinePCAProjector as OnlinePCAProjector
from .optimizer.rules.parts.subspace_projectors import RandProjector as RandProjector
from .optimizer.speculative_step import SpeculativeStep as SpeculativeStep
from .optimizer.steps.torch_class import on_whole_tensors as on_whole_tensors
from .process_groups_config import ProcessGroupCollection as ProcessGroupCollection
from .schedule import OptimizerParamScheduler as OptimizerParamScheduler
from .schedule import ScheduleLR as ScheduleLR
from .schedule import for_groups as for_groups

__version__: str
