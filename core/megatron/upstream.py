"""The names of Megatron-Core that this package holds on to, looked up in one place."""

import sys
from collections.abc import Callable
from functools import wraps
from importlib import import_module
from importlib.metadata import version
from typing import Any

REGISTRY = "megatron.core.optimizer.emerging_optimizers"
CONFIG = "megatron.core.optimizer.optimizer_config"
FACTORY = "megatron.core.optimizer"
PARALLEL = "megatron.core.parallel_state"
LAYERS = "megatron.core.tensor_parallel.layers"
ARGUMENTS = "megatron.training.arguments"
GLOBALS = "megatron.training.global_vars"
CHAIN = "megatron.core.optimizer.optimizer"
LAYER_WISE = "megatron.core.optimizer.layer_wise_optimizer"
DISTRIBUTED = "megatron.core.optimizer.distrib_optimizer"
CHECKPOINT = "megatron.core.dist_checkpointing.optimizer"
LOADING = "megatron.core.dist_checkpointing"
MAPPING = "megatron.core.dist_checkpointing.mapping"
RUN_WITH = "megatron-core>=0.18,<0.20"
"""What pip would install. Before 0.18 there is no registry of optimizers to add to."""


def around(module: str, name: str, ours: Callable[..., Any]) -> None:
    """Let Megatron-Core call ``ours(theirs, ...)`` where it calls its function ``name``, ``theirs``. Again it does nothing new.

    Raises:
        ImportError: when there is no such function.
    """
    (theirs,) = seam(module, name)
    if hasattr(theirs, "shardstep"):
        return

    @wraps(theirs)
    def function(*args: Any, **kwargs: Any) -> Any:
        return ours(theirs, *args, **kwargs)

    function.shardstep = True  # type: ignore[attr-defined]
    setattr(sys.modules[module], name, function)


def seam(module: str, *names: str) -> list[Any]:
    """Objects called ``names`` in a module of Megatron-Core.

    Raises:
        ImportError: when Megatron-Core is not installed, or this version of it has no such names.
    """
    try:
        found = version("megatron-core")
    except ModuleNotFoundError:
        raise ImportError(
            f"shardstep.core.megatron needs Megatron-Core: pip install '{RUN_WITH}', or shardstep[megatron]."
        ) from None
    try:
        home = import_module(module)
        return [getattr(home, name) for name in names]
    except (ModuleNotFoundError, AttributeError) as error:
        raise ImportError(
            f"Megatron-Core {found} has no {module} with {', '.join(names)} ({error}), which shardstep's optimizers need. "
            f"Install a version that they were run with: pip install '{RUN_WITH}'. To train without them, leave out "
            f"shardstep's launcher and SHARDSTEP_MEGATRON."
        ) from None
