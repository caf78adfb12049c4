"""Schedules by name, and the check that settings fit a schedule and each other."""

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, Literal, get_args, get_origin

Schedule = Callable[[int], float]
"""Function from the number of finished steps to a factor of the peak learning rate."""

Check = Callable[[Mapping[str, Any]], None]
"""Function of all settings of a schedule that raises ValueError when they do not fit each other."""

_SCHEDULERS: dict[str, Callable[..., Any]] = {}
_CHECKS: dict[str, Check] = {}


def register_scheduler[F: Callable[..., Any]](name: str, check: Check | None = None) -> Callable[[F], F]:
    """Decorator that registers a schedule as ``name``, whatever its case.

    It takes a function ``(step, *, settings...) -> factor``, or a class whose constructor takes the settings and whose instances
    are functions ``step -> factor``. It returns its argument.

    Args:
        check: Function that is called with all settings, defaults included, before a schedule is made.

    Raises:
        ValueError: when the name is taken, or empty.
    """
    if not name.strip():
        raise ValueError(f"a scheduler's name is {name!r}; give it one that is not empty.")
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
    """The function or class that was registered as ``name``.

    Raises:
        ValueError: when no schedule has this name.
    """
    return _SCHEDULERS[_registered(name)]


def _registered(name: str) -> str:
    for known in _SCHEDULERS:
        if known.lower() == name.lower():
            return known
    raise ValueError(f"unknown decay style {name!r}; possible: {', '.join(_SCHEDULERS)}.{_nearest(name, _SCHEDULERS)}")


def schedule_parameters(name: str) -> dict[str, inspect.Parameter]:
    """Name → parameter, for each setting that the schedule ``name`` takes."""
    schedule = get_scheduler(name)
    parameters = [*inspect.signature(schedule).parameters.values()]
    settings = parameters if isinstance(schedule, type) else parameters[1:]
    return {p.name: p for p in settings}


def make_schedule(name: str, **settings: Any) -> Schedule:
    """The schedule registered as ``name``, with ``settings``, as a function of the step.

    Raises:
        ValueError: for an unknown schedule or setting, a missing setting, or values that are out of range or do not fit each
            other.
    """
    name = _registered(name)
    known = schedule_parameters(name)
    open_ended = any(p.kind is p.VAR_KEYWORD for p in known.values())
    for setting in settings:
        if setting not in known and not open_ended:
            near = _nearest(setting, known)
            raise ValueError(f"{name} has no setting {setting!r}; possible: {', '.join(known)}.{near}")
    for setting, p in known.items():
        if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL) and setting not in settings:
            raise ValueError(f"{name} needs {setting}; give it as {setting}=...")
    defaults = {setting: p.default for setting, p in known.items() if p.default is not p.empty}
    _check(name, defaults | settings)
    schedule = get_scheduler(name)
    return schedule(**settings) if isinstance(schedule, type) else partial(schedule, **settings)


def _check(name: str, settings: Mapping[str, Any]) -> None:
    for setting, p in schedule_parameters(name).items():
        possible = get_args(p.annotation)
        if get_origin(p.annotation) is Literal and settings[setting] not in possible:
            near = _nearest(str(settings[setting]), possible)
            raise ValueError(f"unknown {name} {setting} {settings[setting]!r}; possible: {', '.join(possible)}.{near}")
    if name in _CHECKS:
        _CHECKS[name](settings)


def _nearest(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, [*known], n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else ""
