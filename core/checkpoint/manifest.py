"""What a checkpoint says of itself: ``shardstep.json`` beside the tensors."""

import hashlib
import json
import platform
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import PackageNotFoundError, version
from typing import Any, get_args, get_origin

import torch

from .contents import Group
from .together import CheckpointError, NewerFormatError

NAME = "shardstep.json"
FORMAT = 2
"""Raised when a reader of the number before could not read what is written."""

_KINDS: dict[str, Any] = {
    **dict.fromkeys(("step", "consumed_samples", "format"), int),
    **dict.fromkeys(("layout", "files"), dict[str, int]),
    "versions": dict[str, str],
    "ranks": list[list[int]],
    "optimizers": list[str],
    "groups": list[Group],
    "extra": dict,
    "schedule": dict | None,
    "config": str,
}
_KINDS_OF_GROUP: dict[str, Any] = {"optimizer": str, "settings": dict, "parameters": list[str]}


@dataclass(frozen=True)
class Manifest:
    """All of a checkpoint that is not a tensor.

    Attributes:
        step: Finished steps.
        consumed_samples: Position in the data.
        layout: Name of a mesh axis → its size.
        ranks: For each rank, its index on each axis of ``layout``.
        optimizers: Names of the optimizers' classes.
        groups: Their settings and parameters, those of all pipeline stages together.
        schedule: State of the learning-rate schedule, as given.
        extra: Whatever else was given.
        files: Name → bytes of every file but this one and the digests.
        config: Digest of optimizers, groups and their settings: equal in runs that are set up alike, on any layout.
        versions: Of the packages that wrote it.
        format: See ``FORMAT``.
    """

    step: int
    consumed_samples: int
    layout: dict[str, int]
    ranks: list[list[int]]
    optimizers: list[str]
    groups: list[Group]
    schedule: dict[str, Any] | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    files: dict[str, int] = field(default_factory=dict)
    config: str = ""
    versions: dict[str, str] = field(default_factory=lambda: {"python": platform.python_version(), **_packages()})
    format: int = FORMAT

    def text(self) -> str:
        """JSON."""
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def parse(cls, text: str, where: str) -> "Manifest":
        """Inverse of :meth:`text`.

        Raises:
            NewerFormatError: when ``text`` is of a newer format; names ``where``.
            CheckpointError: when it is of an older one, or is no manifest.
        """
        try:
            given = json.loads(text)
            written = int(given["format"])
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            raise CheckpointError(f"{where} is damaged: it is not the JSON that a save writes.") from None
        if written > FORMAT:
            raise NewerFormatError(
                f"{where} has format {written}, but this version of shardstep reads formats up to {FORMAT}; it was written by "
                f"{given.get('versions', 'a newer one')}. Update shardstep."
            )
        if written < FORMAT:
            raise CheckpointError(
                f"{where} has format {written}, which had no digests and is read no more; save again."
            )
        try:
            known = {f.name: given[f.name] for f in fields(cls)}
            known["groups"] = [Group(**group) for group in known["groups"]]
            if odd := [name for name, kind in _KINDS.items() if not _is(known[name], kind)]:
                raise TypeError(", ".join(odd))
            return cls(**known)
        except (KeyError, TypeError) as wrong:
            raise CheckpointError(f"{where} is damaged: {wrong} is missing or wrong.") from None


def merge_groups(groups: Iterable[Group]) -> list[Group]:
    """The groups of all ranks: those of equal settings as one, with each parameter once."""
    merged: dict[str, Group] = {}
    for group in groups:
        same = merged.setdefault(
            json.dumps([group.optimizer, group.settings], sort_keys=True), Group(group.optimizer, group.settings, [])
        )
        same.parameters.extend(group.parameters)
    return [Group(g.optimizer, g.settings, list(dict.fromkeys(g.parameters))) for g in merged.values()]


def config_digest(groups: Iterable[Group]) -> str:
    """SHA-256 of optimizers, settings and names of parameters, whatever their order."""
    rows = sorted((g.optimizer, json.dumps(g.settings, sort_keys=True), sorted(g.parameters)) for g in groups)
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def json_copy(name: str, value: Any) -> Any:
    """What a manifest gives back for ``value``.

    Raises:
        ValueError: when JSON cannot hold it.
    """
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{name} cannot be saved: {error}. A checkpoint holds no Python objects; give numbers, text, lists and dicts."
        ) from None


def _is(value: Any, kind: Any) -> bool:
    """Whether what JSON gave is of ``kind``; numbers count something."""
    of = get_args(kind)
    if get_origin(kind) is list:
        return isinstance(value, list) and all(_is(x, of[0]) for x in value)
    if get_origin(kind) is dict:
        return isinstance(value, dict) and all(_is(x, of[1]) for x in value.values())
    if kind is int:
        return type(value) is int and value >= 0
    if kind is Group:
        return all(_is(getattr(value, name), of_group) for name, of_group in _KINDS_OF_GROUP.items())
    return isinstance(value, kind)


def _packages() -> dict[str, str]:
    try:
        own = version("shardstep")
    except PackageNotFoundError:
        own = "from source"
    return {"torch": torch.__version__, "shardstep": own}
