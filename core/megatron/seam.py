"""The names of Megatron-Core that this package holds on to, looked up in one place."""

from importlib import import_module
from importlib.metadata import version
from typing import Any

REGISTRY = "megatron.core.optimizer.emerging_optimizers"
CONFIG = "megatron.core.optimizer.optimizer_config"
LAYERS = "megatron.core.tensor_parallel.layers"
ARGUMENTS = "megatron.training.arguments"
GLOBALS = "megatron.training.global_vars"
CHECKPOINT = "megatron.core.dist_checkpointing.optimizer"
MAPPING = "megatron.core.dist_checkpointing.mapping"
TESTED = "0.19.2"


def seam(module: str, *names: str) -> list[Any]:
    """Objects called ``names`` in a module of Megatron-Core.

    Raises:
        ImportError: when Megatron-Core is not installed, or this version of it has no such names.
    """
    try:
        found = version("megatron-core")
    except ModuleNotFoundError:
        raise ImportError(
            f"shardstep.core.megatron needs Megatron-Core: pip install megatron-core=={TESTED}, or shardstep[megatron]."
        ) from None
    try:
        home = import_module(module)
        return [getattr(home, name) for name in names]
    except (ModuleNotFoundError, AttributeError) as error:
        raise ImportError(
            f"Megatron-Core {found} has no {module} with {', '.join(names)} ({error}); install the version that shardstep was "
            f"run with, megatron-core=={TESTED}."
        ) from None
