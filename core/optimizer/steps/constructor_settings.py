"""The settings of an optimizer, read from the signature of its constructor: values that a config, flag or file can hold."""

import inspect
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from numbers import Integral, Real
from types import NoneType, SimpleNamespace, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from .argument_checks import choice

ELSEWHERE = ("self", "params", "lr", "weight_decay", "pg_collection")
"""Arguments that are not settings: every optimizer receives them in the same way."""

DTYPES = {name: getattr(torch, name) for name in ("float16", "bfloat16", "float32", "float64")}
"""Dtypes by the names that settings use."""

NOUNS = {int: "a whole number", float: "a number", bool: "True or False", str: "a text"}
"""What a value of each kind is called."""


@dataclass(frozen=True)
class Setting:
    """One argument of a constructor that is a plain value.

    Attributes:
        argument: Name of the argument.
        kind: Type of the value, or of each number of a tuple: float, int, bool or str.
        default: Default value; ``inspect.Parameter.empty`` where there is none.
        choices: Possible texts; empty if every text is possible.
        many: Whether the value is a tuple.
        length: Length of the tuple; None for any length.
        optional: Whether the value may be None.
        is_dtype: Whether the value is the name of a ``torch.dtype``.
    """

    argument: str
    kind: type
    default: Any = inspect.Parameter.empty
    choices: tuple[str, ...] = ()
    many: bool = False
    length: int | None = None
    optional: bool = False
    is_dtype: bool = False

    def value(self, raw: Any) -> Any:
        """The constructor's argument for the value ``raw`` of JSON or YAML: lists become tuples, names of dtypes dtypes.

        Raises:
            ValueError: for an unknown dtype, or a value of another kind.
        """
        if self.is_dtype:
            if isinstance(raw, str):
                choice(self.argument, raw, self.choices)
            return DTYPES.get(raw, raw) if isinstance(raw, str) else raw
        if raw is None and self.optional:
            return None
        if not self.many:
            return check_kind(self.argument, raw, self.kind)
        if not isinstance(raw, list | tuple) or self.length not in (None, len(raw)):
            count = "several values" if self.length is None else f"{self.length} values"
            raise ValueError(f"{self.argument} is {raw!r}; give {count} in a list.")
        return tuple(check_kind(self.argument, x, self.kind) for x in raw)


def check_kind(name: str, value: Any, kind: type) -> Any:
    """Return ``value`` if it is of ``kind``; as a float counts every real number that fits one, and a tensor.

    Raises:
        ValueError: otherwise; names the value and the kind.
    """
    if isinstance(value, bool) or kind is bool:
        fits = isinstance(value, bool) and kind is bool
    elif kind is float:
        fits = isinstance(value, Tensor | Real) and (not isinstance(value, int) or abs(value) <= sys.float_info.max)
    else:
        fits = isinstance(value, Integral if kind is int else kind)
    if not fits:
        raise ValueError(f"{name} is {value!r}; give {NOUNS.get(kind, f'a {kind.__name__}')}.")
    return value


def constructor_arguments(cls: type) -> dict[str, inspect.Parameter]:
    """Name → parameter of the constructor; for one with ``**kwargs``, also the parameters of its base classes."""
    if "__signature__" in vars(cls):
        return dict(inspect.signature(cls).parameters)
    arguments: dict[str, inspect.Parameter] = {}
    for base in cls.__mro__:
        if "__init__" not in vars(base):
            continue
        init = vars(base)["__init__"]
        parameters = inspect.signature(init).parameters
        names = getattr(inspect.unwrap(init), "__globals__", {})
        for name, parameter in parameters.items():
            if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                arguments.setdefault(name, parameter.replace(annotation=_read(parameter.annotation, names)))
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
            break
    return arguments


@cache
def settings(cls: type) -> tuple[Setting, ...]:
    """The constructor's arguments that are numbers, switches, texts, dtypes or tuples of numbers, in its order."""
    return tuple(
        replace(setting, argument=name, default=parameter.default)
        for name, parameter in constructor_arguments(cls).items()
        if name not in ELSEWHERE
        for setting in _of(parameter)
    )


def _of(parameter: inspect.Parameter) -> Iterator[Setting]:
    # An annotation that could not be read stays a text.
    unknown_type = parameter.annotation is parameter.empty or isinstance(parameter.annotation, str)
    setting = _of_value(parameter.default) if unknown_type else _of_type(parameter.annotation)
    if setting is not None:
        yield setting


def _of_type(hint: Any) -> Setting | None:
    origin, inner = get_origin(hint), get_args(hint)
    if hint in (float, int, bool, str):
        return Setting("", hint)
    if hint is torch.dtype:
        return Setting("", str, choices=tuple(DTYPES), is_dtype=True)
    if origin is Literal and all(isinstance(choice, str) for choice in inner):
        return Setting("", str, choices=inner)
    if origin is tuple and (numbers := {kind for kind in inner if kind is not ...}) <= {int, float}:
        return Setting("", _number(numbers), many=True, length=None if ... in inner else len(inner))
    if origin in (Union, UnionType):
        return _of_union([_of_type(one) for one in inner if one is not NoneType], optional=NoneType in inner)
    return None


def _of_union(members: list[Setting | None], *, optional: bool) -> Setting | None:
    first, *others = members
    if first is None or None in others:
        return None
    kinds = {member.kind for member in members if member is not None}
    choices = [member.choices for member in members if member is not None]
    if others and (any(member.many for member in members if member) or not (len(kinds) == 1 or kinds == {int, float})):
        return None
    one_of = tuple(dict.fromkeys(c for texts in choices for c in texts)) if all(choices) else ()
    return replace(first, kind=_number(kinds) if others else first.kind, choices=one_of, optional=optional)


def _of_value(default: Any) -> Setting | None:
    if isinstance(default, bool | int | float | str):
        return Setting("", type(default))
    if isinstance(default, tuple) and (kinds := {type(x) for x in default}) and kinds <= {int, float}:
        return Setting("", _number(kinds), many=True, length=len(default))
    return None


def _number(kinds: set[type]) -> type:
    """The only member of ``kinds``, or float if there are several."""
    return next(iter(kinds)) if len(kinds) == 1 else float


def _read(annotation: Any, namespace: dict[str, Any]) -> Any:
    """The type that a quoted annotation names; the text itself where it cannot be resolved."""
    try:
        return get_type_hints(SimpleNamespace(__annotations__={"it": annotation}), namespace)["it"]
    except (NameError, AttributeError, TypeError, SyntaxError):
        return annotation
