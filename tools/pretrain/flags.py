"""What a flag may hold, and how a word of the command line or a value of a YAML file becomes that."""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from core.optimizer.steps.constructor_settings import NOUNS, Setting

from ..usage import UsageError, nearest


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


@dataclass(frozen=True)
class Flag:
    """One flag: the setting that its value is, bounds of a number, and a word for ``--help``.

    Attributes:
        help: Text for ``--help``.
        setting: Kind of the value, whether there are several, whether it may be None, and the texts that are possible.
        range: Bounds of a number.
        choices: Function that lists the texts that are possible, where they are not known beforehand; None: the setting's.
        hint: What to do, said when a value is refused.
        also_count: Whether a text may also be a whole number, which a YAML file does not hold as a text.
    """

    help: str
    setting: Setting
    range: Range = Range()
    choices: Callable[[], Sequence[str]] | None = None
    hint: str = "see --help"
    also_count: bool = False

    @property
    def texts(self) -> Sequence[str]:
        """The only texts possible; empty: any."""
        return self.choices() if self.choices else self.setting.choices

    @property
    def noun(self) -> str:
        """What a value is called."""
        return NOUNS[self.setting.kind].lower()

    @property
    def possible(self) -> str:
        """What the flag may be, in words."""
        return ", ".join(self.texts) or f"{self.noun} {self.range}".strip()

    def convert(self, raw: Any, source: str) -> Any:
        """The checked value of ``raw``: a list of words from the command line, or whatever the YAML file holds.

        Raises:
            UsageError: for a value that the flag cannot have; names ``source``.
        """
        if raw is None and self.setting.optional:
            return None
        values = raw if isinstance(raw, list) else [raw]
        length = self.setting.length if self.setting.many else 1
        if length not in (None, len(values)):
            shown = "[" + ", ".join(map(str, values)) + "]"
            count = "one value" if length == 1 else f"{length} values"
            raise UsageError(source, shown, f"takes {count}, not {len(values)}", possible=self.possible, hint=self.hint)
        if self.setting.many:
            return tuple(self._one(value, source) for value in values)
        return self._one(values[0], source)

    def _one(self, raw: Any, source: str) -> Any:
        kind = self.setting.kind
        if self.also_count and isinstance(raw, int) and not isinstance(raw, bool):
            raw = str(raw)
        if texts := self.texts:
            if raw not in texts:
                hint = nearest(str(raw), texts) or self.hint
                raise UsageError(source, repr(raw), "unknown", possible=self.possible, hint=hint)
            return raw
        if kind is bool and not isinstance(raw, bool):
            raise UsageError(source, repr(raw), "is not a switch", possible=self.possible, hint=self.hint)
        if kind is str and not (isinstance(raw, str) and raw):
            raise UsageError(source, repr(raw), "is not a text", possible=self.possible, hint=self.hint)
        return self._number(raw, source) if kind in (int, float) else raw

    def _number(self, raw: Any, source: str) -> Any:
        # PyYAML reads 1e-3 as a text, and True is an int in Python.
        kind, possible = self.setting.kind, self.possible
        value = None
        if isinstance(raw, str | int | float) and not isinstance(raw, bool):
            with contextlib.suppress(ValueError, OverflowError):
                value = kind(raw)
        if value is None or (kind is int and isinstance(raw, float) and value != raw):
            raise UsageError(source, repr(raw), f"is not {self.noun}", possible=possible, hint=self.hint)
        if value not in self.range:
            raise UsageError(source, raw, "is out of range", possible=possible, hint=self.hint)
        return value


def text(default: str | None, help: str, choices: Sequence[str] | Callable[[], Sequence[str]] = ()) -> Any:
    """A field of any text, or of one of ``choices``, which may be a function that lists them."""
    listed = () if callable(choices) else tuple(choices)
    setting = Setting("", str, choices=listed, optional=default is None)
    return _field(default, Flag(help, setting, choices=choices if callable(choices) else None))


def count_or_text(help: str) -> Any:
    """A field of a whole number or any text, both as text; None by default."""
    return _field(None, Flag(help, Setting("", str, optional=True), also_count=True))


def number(default: float | None, help: str, range: Range, hint: str) -> Any:
    """A field of a real number."""
    return _field(default, Flag(help, Setting("", float, optional=default is None), range, hint=hint))


def count(default: int | None, help: str, at_least: int = 1, at_most: int = 2**31 - 1) -> Any:
    """A field of a whole number."""
    hint = "leave it out" if default is None else f"leave it out for {default}"
    setting = Setting("", int, optional=default is None)
    return _field(default, Flag(help, setting, Range(at_least=at_least, at_most=at_most), hint=hint))


def switch(default: bool, help: str) -> Any:
    """A field that is on or off: ``--name``, ``--no-name``."""
    return _field(default, Flag(help, Setting("", bool)))


def words(help: str) -> Any:
    """A field of any number of texts, none by default."""
    return _field((), Flag(help, Setting("", str, many=True)))


def _field(default: Any, flag: Flag) -> Any:
    return dataclasses.field(default=default, metadata={"flag": flag})
