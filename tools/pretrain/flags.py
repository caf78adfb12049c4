"""What a flag may hold, and how a word of the command line or a value of a YAML file becomes that."""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..usage import UsageError, nearest

Choices = Sequence[str] | Callable[[], Sequence[str]]


@dataclass(frozen=True)
class Range:
    """Bounds of a number. Infinities and NaN are in no range."""

    above: float = -math.inf
    at_least: float = -math.inf
    below: float = math.inf
    at_most: float = math.inf

    def __contains__(self, value: float) -> bool:
        return self.above < value < self.below and self.at_least <= value <= self.at_most

    def __str__(self) -> str:
        bounds = ((">", self.above), (">=", self.at_least), ("<", self.below), ("<=", self.at_most))
        return " and ".join(f"{sign} {bound}" for sign, bound in bounds if math.isfinite(bound))


POSITIVE = Range(above=0)
NOT_NEGATIVE = Range(at_least=0)
SHARE = Range(at_least=0, below=1)


_NOUNS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}


@dataclass(frozen=True)
class Flag:
    """One flag: the type of its value, what it may be, and a word for `--help`.

    Args:
        kind: int, float, str or bool.
        choices: the only texts possible, or a function that lists them; empty: any.
        many: takes any number of values.
        length: how many; None for any number.
        optional: may be left at None.
        hint: said when a value is refused.
    """

    help: str
    kind: type = str
    range: Range = Range()
    choices: Choices = ()
    many: bool = False
    length: int | None = None
    optional: bool = False
    hint: str = "see --help"

    @property
    def possible(self) -> str:
        """What it may be, in words."""
        choices = self.choices() if callable(self.choices) else self.choices
        return ", ".join(choices) or f"{_NOUNS[self.kind]} {self.range}".strip()

    def convert(self, raw: Any, source: str) -> Any:
        """The checked value of `raw`: a list of words from the command line, or whatever the YAML file holds.

        Raises:
            UsageError: naming `source`.
        """
        if raw is None and self.optional:
            return None
        given = raw if isinstance(raw, list) else [raw]
        length = self.length if self.many else 1
        if length not in (None, len(given)):
            shown = "[" + ", ".join(map(str, given)) + "]"
            count = "one value" if length == 1 else f"{length} values"
            raise UsageError(source, shown, f"takes {count}, not {len(given)}", possible=self.possible, hint=self.hint)
        if self.many:
            return tuple(self._one(item, source) for item in given)
        return self._one(given[0], source)

    def _one(self, raw: Any, source: str) -> Any:
        choices = self.choices() if callable(self.choices) else self.choices
        if choices:
            if raw not in choices:
                hint = nearest(str(raw), choices) or self.hint
                raise UsageError(source, repr(raw), "unknown", possible=self.possible, hint=hint)
            return raw
        if self.kind is bool and not isinstance(raw, bool):
            raise UsageError(source, repr(raw), "is not a switch", possible=self.possible, hint=self.hint)
        if self.kind is str and not (isinstance(raw, str) and raw):
            raise UsageError(source, repr(raw), "is not a text", possible=self.possible, hint=self.hint)
        return self._number(raw, source) if self.kind in (int, float) else raw

    def _number(self, raw: Any, source: str) -> Any:
        # PyYAML reads 1e-3 as a text, and True is an int in Python.
        noun, possible = _NOUNS[self.kind], self.possible
        value = None
        if isinstance(raw, str | int | float) and not isinstance(raw, bool):
            with contextlib.suppress(ValueError, OverflowError):
                value = self.kind(raw)
        if value is None or (self.kind is int and isinstance(raw, float) and value != raw):
            raise UsageError(source, repr(raw), f"is not {noun}", possible=possible, hint=self.hint)
        if value not in self.range:
            raise UsageError(source, raw, "is out of range", possible=possible, hint=self.hint)
        return value


def text(default: str | None, help: str, choices: Choices = ()) -> Any:
    """A field of any text, or of one of `choices`."""
    return _field(default, Flag(help, choices=choices, optional=default is None))


def number(default: float | None, help: str, range: Range, hint: str) -> Any:
    """A field of a real number."""
    return _field(default, Flag(help, float, range, optional=default is None, hint=hint))


def count(default: int | None, help: str, at_least: int = 1, at_most: int = 2**31 - 1) -> Any:
    """A field of a whole number."""
    hint = "leave it out" if default is None else f"leave it out for {default}"
    return _field(
        default, Flag(help, int, Range(at_least=at_least, at_most=at_most), optional=default is None, hint=hint)
    )


def switch(default: bool, help: str) -> Any:
    """A field that is on or off: ``--name``, ``--no-name``."""
    return _field(default, Flag(help, bool))


def words(help: str) -> Any:
    """A field of any number of texts, none by default."""
    return _field((), Flag(help, many=True))


def _field(default: Any, flag: Flag) -> Any:
    return dataclasses.field(default=default, metadata={"flag": flag})
