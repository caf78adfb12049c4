"""Masks that say which parameters get weight decay: by pattern, by function, or by name as a tree of True and False."""

import inspect
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

from torch import nn

from ..process_groups_config import ProcessGroupCollection
from .steps.argument_checks import unknown

Tree = Mapping[str, Any]
"""Parameter name → True or False. A nested mapping or list stands for the names that begin with its key and a dot."""

Mask = Callable[[str, nn.Parameter], bool] | Callable[[Mapping[str, nn.Parameter]], Tree] | str | Collection[str] | Tree
"""Selection of the parameters with weight decay: ``mask(name, param)``; ``mask(params)``, which returns a tree for the parameters
``{name: param}`` of this rank; glob patterns of names (:func:`.routing.mask_overrides`); or a tree of the whole model."""

ByPattern = Callable[[str, nn.Parameter], bool] | tuple[str, ...]
"""A mask of the two kinds that need no names: ``mask(name, param)``, or patterns."""

KINDS = "a function of (name, parameter) or of all parameters, patterns of names, or a tree of True and False by name"


def without_trees(
    mask: Mask, params: Mapping[str, nn.Parameter], frozen: Iterable[str], groups: ProcessGroupCollection
) -> ByPattern:
    """``mask`` as a function of (name, parameter) or as patterns. All pipeline stages call this together.

    Args:
        mask: The mask.
        params: Trainable parameters of this rank, by name; a tree must have an entry for each of them.
        frozen: Names of the other parameters of this rank; a tree may have entries for them.
        groups: Process groups of the model.

    Raises:
        TypeError: for a mask, or an entry of a tree, of another kind.
        ValueError: on all stages, for a tree that has no entry for a parameter, or an entry without a parameter.
    """
    if isinstance(mask, str):
        return (mask,)
    if isinstance(mask, Mapping):
        chosen = _flat(mask)
    elif callable(mask):
        by_count = [_takes(mask, count) for count in range(3)]
        if by_count[:2] != [False, True] and by_count[2]:
            return mask  # type: ignore[return-value]
        if not by_count[1]:
            raise TypeError(f"weight_decay_mask is {mask!r}, which takes other arguments; give {KINDS}.")
        returned: Any = mask(dict(params))  # type: ignore[call-arg, arg-type]
        if not isinstance(returned, Mapping):
            raise TypeError(
                f"weight_decay_mask returned a {type(returned).__name__} for all parameters; return a mapping from each name to "
                f"True or False, or let the function take (name, parameter)."
            )
        chosen = _flat(returned)
    elif isinstance(mask, Collection) and all(isinstance(pattern, str) for pattern in mask):
        return tuple(mask)
    else:
        raise TypeError(f"weight_decay_mask is {mask!r}, a {type(mask).__name__}; give {KINDS}.")
    _check_names(chosen, list(params), list(frozen), groups)
    return lambda name, param: chosen[name]


def _takes(function: Callable[..., Any], count: int) -> bool:
    """Whether ``function`` can be called with ``count`` arguments by position."""
    try:
        inspect.signature(function).bind(*[None] * count)
    except TypeError:
        return False
    except ValueError:  # a function in C whose signature nobody knows
        return count == 2
    return True


def _flat(tree: Tree) -> dict[str, bool]:
    chosen: dict[str, bool] = {}
    for name, value in _leaves(tree, ""):
        if not isinstance(value, bool):
            raise TypeError(
                f"weight_decay_mask has {value!r}, a {type(value).__name__}, for {name!r}; give True or False for each."
            )
        if name in chosen:
            raise ValueError(f"weight_decay_mask names {name!r} twice, nested and flat; name it once.")
        chosen[name] = value
    return chosen


def _leaves(tree: Any, name: str) -> Iterator[tuple[str, Any]]:
    if isinstance(tree, Mapping | list | tuple):
        for key, value in tree.items() if isinstance(tree, Mapping) else enumerate(tree):
            yield from _leaves(value, f"{name}.{key}" if name else str(key))
    else:
        yield name, tree


def _check_names(
    chosen: Mapping[str, bool], trainable: list[str], frozen: list[str], groups: ProcessGroupCollection
) -> None:
    stages = groups.domain((groups.axis("pp"),)).gather((trainable, frozen, list(chosen)))
    known = {name for trainable_here, frozen_here, _ in stages for name in (*trainable_here, *frozen_here)}
    for trainable_here, _, entries in stages:
        if strange := [name for name in entries if name not in known]:
            raise ValueError(f"weight_decay_mask: {unknown('parameter', strange[0], sorted(known))}")
        if missing := [name for name in trainable_here if name not in set(entries)]:
            raise ValueError(
                f"weight_decay_mask has no entry for {missing}; give True or False for every parameter that is trained, or use "
                f"patterns of names, such as '!*.bias'."
            )
