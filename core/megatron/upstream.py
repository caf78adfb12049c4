"""The names of Megatron-Core that this package uses, looked up in one place, and its functions that are patched."""

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


PATCHED: dict[str, Callable[..., Any]] = {}
"""Every function and method of Megatron-Core that ours stand around, by its full name, and what stands there now."""


def patch(owner: str, name: str, ours: Callable[..., Any]) -> None:
    """Let Megatron-Core call ``ours(original, ...)`` where it calls its function ``name``. A second call changes nothing.

    Args:
        owner: A module, or a class in one: ``module:Class``.
        name: The function, or method.
        ours: Called with the original function first, then with the arguments, of a method the instance too.

    Raises:
        ImportError: when there is no such function.
    """
    module, _, cls = owner.partition(":")
    home = lookup(module, cls)[0] if cls else import_module(module)
    original = getattr(home, name, None) if cls else lookup(module, name)[0]
    full = f"{owner}.{name}".replace(":", ".")
    if original is None:
        raise _missing(full, name)
    if hasattr(original, "shardstep"):
        return

    @wraps(original)
    def function(*args: Any, **kwargs: Any) -> Any:
        return ours(original, *args, **kwargs)

    function.shardstep = True  # type: ignore[attr-defined]
    setattr(home, name, function)
    PATCHED[full] = function


def lookup(module: str, *names: str) -> list[Any]:
    """Objects called ``names`` in a module of Megatron-Core.

    Raises:
        ImportError: when Megatron-Core is not installed, or this version of it has no such names.
    """
    try:
        version("megatron-core")
    except ModuleNotFoundError:
        raise ImportError(
            f"shardstep.core.megatron needs Megatron-Core: pip install '{RUN_WITH}', or shardstep[megatron]."
        ) from None
    try:
        home = import_module(module)
        return [getattr(home, name) for name in names]
    except (ModuleNotFoundError, AttributeError) as error:
        raise _missing(f"{module} with {', '.join(names)}", str(error)) from None


def _missing(what: str, why: str) -> ImportError:
    return ImportError(
        f"Megatron-Core {version('megatron-core')} has no {what} ({why}), which shardstep's optimizers need. Install a version "
        f"that they were run with: pip install '{RUN_WITH}'. To train without them, leave out shardstep's launcher and "
        f"SHARDSTEP_MEGATRON."
    )
