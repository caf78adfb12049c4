"""Keys that select parameters: by name, attribute or test. Names are Megatron-Core's."""

from collections.abc import Callable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch


@dataclass(frozen=True)
class ParamPredicate:
    """A test of a parameter; two tests of one name are equal."""

    name: str
    fn: Callable[[torch.nn.Parameter], bool] = field(compare=False)

    def __call__(self, param: torch.nn.Parameter) -> bool:
        """Whether ``param`` passes."""
        return self.fn(param)


@dataclass(frozen=True)
class ParamWithNamePredicate:
    """A test of a parameter and its name; two tests of one name are equal."""

    name: str
    fn: Callable[[torch.nn.Parameter, str], bool] = field(compare=False)

    def __call__(self, param: torch.nn.Parameter, name: str) -> bool:
        """Whether ``param`` called ``name`` passes."""
        return self.fn(param, name)


@dataclass(frozen=True, slots=True)
class ParamKey:
    """Selects the parameters for which any pattern, attribute or predicate holds.

    Attributes:
        name: Glob pattern for the parameter's name, or several.
        attr: Name of an attribute that is true on the parameter, or several names.
        predicate: Test of the parameter, or several tests.
        with_name_predicate: Test of the parameter and its name, or several tests.
    """

    name: str | tuple[str, ...] = ()
    attr: str | tuple[str, ...] = ()
    predicate: ParamPredicate | tuple[ParamPredicate, ...] = ()
    with_name_predicate: ParamWithNamePredicate | tuple[ParamWithNamePredicate, ...] = ()

    def matches(self, param: torch.nn.Parameter, param_name: str) -> bool:
        """Whether the parameter is selected."""
        return self.why(param, param_name) is not None

    def why(self, param: torch.nn.Parameter, param_name: str) -> str | None:
        """The first pattern, attribute or test that selects the parameter, in words; None when the parameter is not selected."""
        reasons = (
            *(pattern for pattern in _several(self.name) if fnmatchcase(param_name, pattern)),
            *(f".{attr}" for attr in _several(self.attr) if getattr(param, attr, False)),
            *(test.name for test in _several(self.predicate) if test(param)),
            *(test.name for test in _several(self.with_name_predicate) if test(param, param_name)),
        )
        return next(iter(reasons), None)

    def __str__(self) -> str:
        """The selection in words, for errors."""
        tests = [*_several(self.predicate), *_several(self.with_name_predicate)]
        return " or ".join([*_several(self.name), *(f".{a}" for a in _several(self.attr)), *(t.name for t in tests)])


def _several(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)
