"""The names of Megatron-Core that this package uses, looked up in one place, and its functions that are patched.

Beside the functions in :data:`PATCHED`, two tables of Megatron-Core get further entries: its registry of optimizers
(:mod:`.registration`) and the attributes that copies of a parameter keep (:mod:`.parameter_tags`).
"""

import inspect
from collections.abc import Callable
from functools import partial, wraps
from importlib import import_module
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
"""Every function and method of Megatron-Core that was patched, by its full name, and what of ours is called in its place."""


def patch(owner: str, name: str, ours: Callable[..., Any]) -> None:
    """Let Megatron-Core call ``ours(original, ...)`` where it calls its function ``name``. A second call changes nothing.

    Args:
        owner: A module, or a class in one: ``module:Class``.
        name: The function, or method.
        ours: Called with the original function first, then with the arguments, of a method the instance too. The first line of
            its docstring says what it is for.

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
    PATCHED[full] = ours


def reasons() -> dict[str, str]:
    """Each patched function by its full name → the first line of the docstring of what is called in its place."""
    return {name: _first_line(ours.args[0] if isinstance(ours, partial) else ours) for name, ours in PATCHED.items()}


def _first_line(function: Callable[..., Any]) -> str:
    return (inspect.getdoc(function) or "").partition("\n")[0]


def installed() -> str:
    """The version of Megatron-Core, also of one that is no installed package but a checkout on Python's path.

    Raises:
        ImportError: when there is none.
    """
    try:
        # What follows "+" is the commit of whatever repository the process was started in.
        return str(import_module("megatron.core.package_info").__version__).partition("+")[0]
    except ModuleNotFoundError:
        raise ImportError(
            f"shardstep.core.megatron needs Megatron-Core: pip install '{RUN_WITH}', or shardstep[megatron]."
        ) from None


def lookup(module: str, *names: str) -> list[Any]:
    """Objects called ``names`` in a module of Megatron-Core.

    Raises:
        ImportError: when Megatron-Core is not installed, or this version of it has no such names.
    """
    installed()
    try:
        home = import_module(module)
        return [getattr(home, name) for name in names]
    except (ModuleNotFoundError, AttributeError) as error:
        raise _missing(f"{module} with {', '.join(names)}", str(error)) from None


def _missing(what: str, why: str) -> ImportError:
    return ImportError(
        f"Megatron-Core {installed()} has no {what} ({why}), which shardstep's optimizers need. Install a version "
        f"that they were run with: pip install '{RUN_WITH}'. To train without them, leave out shardstep's launcher and "
        f"SHARDSTEP_MEGATRON."
    )
