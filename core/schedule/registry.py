"""Schedules by name, and the check that the settings given to one fit it and each other."""

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, Literal, get_args, get_origin

Schedule = Callable[[int], float]
"""From the number of finished steps to a factor of the peak learning rate."""

Check = Callable[[Mapping[str, Any]], None]
"""Raises ValueError for settings that do not fit each other."""

_SCHEDULERS: dict[str, Callable[..., Any]] = {}
_CHECKS: dict[str, Check] = {}


def register_scheduler[F: Callable[..., Any]](name: str, check: Check | None = None) -> Callable[[F], F]:
    """A decorator that makes a schedule known by ``name``; upper and lower case are one.

    It takes a function ``(step, *, settings...) -> factor``, or a class whose instances, made of the settings, are functions
    ``step -> factor``. It returns what it was given.

    Args:
        check: Called with all settings, those left out too, before a schedule is made of them.

    Raises:
        ValueError: the name is taken, or empty.
    """
    if not name.strip():
        raise ValueError(f"a scheduler's name is {name!r}; give it a name to be found by.")
    if name.lower() in map(str.lower, _SCHEDULERS):
        raise ValueError(f"scheduler {name!r} is already registered; take another name.")

    def register(schedule: F) -> F:
        _SCHEDULERS[name] = schedule
        if check:
            _CHECKS[name] = check
        return schedule

    return register


def list_schedulers() -> tuple[str, ...]:
    """All registered names, in the order of registration."""
    return tuple(_SCHEDULERS)


def get_scheduler(name: str) -> Callable[..., Any]:
    """What was registered as ``name``.

    Raises:
        ValueError: nothing was.
    """
    return _SCHEDULERS[_registered(name)]


def _registered(name: str) -> str:
    for known in _SCHEDULERS:
        if known.lower() == name.lower():
            return known
    raise ValueError(f"unknown decay style {name!r}; possible: {', '.join(_SCHEDULERS)}.{_nearest(name, _SCHEDULERS)}")


def settings_of(name: str) -> dict[str, inspect.Parameter]:
    """The settings that the schedule ``name`` takes."""
    schedule = get_scheduler(name)
    parameters = [*inspect.signature(schedule).parameters.values()]
    taken = parameters if isinstance(schedule, type) else parameters[1:]
    return {p.name: p for p in taken}


def make_schedule(name: str, **settings: Any) -> Schedule:
    """The schedule registered as ``name`` with its settings filled in.

    Raises:
        ValueError: an unknown schedule or setting, one that is missing, or values that are out of range or do not fit each
            other.
    """
    name = _registered(name)
    known = settings_of(name)
    open_ended = any(p.kind is p.VAR_KEYWORD for p in known.values())
    for given in settings:
        if given not in known and not open_ended:
            raise ValueError(f"{name} has no setting {given!r}; possible: {', '.join(known)}.{_nearest(given, known)}")
    for setting, p in known.items():
        if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL) and setting not in settings:
            raise ValueError(f"{name} needs {setting}; give it as {setting}=...")
    defaults = {setting: p.default for setting, p in known.items() if p.default is not p.empty}
    _check(name, defaults | settings)
    schedule = get_scheduler(name)
    return schedule(**settings) if isinstance(schedule, type) else partial(schedule, **settings)


def _check(name: str, settings: Mapping[str, Any]) -> None:
    for setting, p in settings_of(name).items():
        possible = get_args(p.annotation)
        if get_origin(p.annotation) is Literal and settings[setting] not in possible:
            near = _nearest(str(settings[setting]), possible)
            raise ValueError(f"unknown {name} {setting} {settings[setting]!r}; possible: {', '.join(possible)}.{near}")
    if name in _CHECKS:
        _CHECKS[name](settings)


def _nearest(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, [*known], n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else ""
