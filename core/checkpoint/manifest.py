"""The manifest of a checkpoint: ``shardstep.json`` beside the tensors."""

import hashlib
import json
import platform
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import PackageNotFoundError, version
from typing import Any, get_args, get_origin

import torch

from . import plain
from .contents import Group
from .together import CheckpointError, NewerFormatError

NAME = "shardstep.json"
FORMAT = 3
"""Version of the format; it goes up when readers of the last one cannot read the new one.

Format 3 has values of :mod:`.plain` in ``schedule`` and ``extra``, which format 2 kept as JSON made of them.
"""
OLDEST = 2
"""Oldest format that can be read."""

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
_VALUES = ("schedule", "extra")
"""Fields whose values are the user's."""
_KINDS_OF_GROUP: dict[str, Any] = {"optimizer": str, "settings": dict, "parameters": list[str]}


@dataclass(frozen=True)
class Manifest:
    """Contents of a checkpoint besides its tensors.

    Attributes:
        step: Number of finished steps.
        consumed_samples: Position in the data, in samples.
        layout: Name of each mesh axis → its size.
        ranks: Index on each axis of ``layout``, for each rank.
        optimizers: Names of the optimizers' classes.
        groups: Parameter groups of all pipeline stages; groups with equal settings are one.
        schedule: State of the learning-rate schedule that was passed to ``save``.
        extra: Additional values that were passed to ``save``.
        files: Name → size in bytes of every file but the manifest and the digests.
        config: Digest of optimizers, groups and their settings; equal in runs that are set up alike, on any layout.
        versions: Versions of Python and the packages that wrote the checkpoint.
        format: Version of the format, :data:`FORMAT`.
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
        """The manifest as JSON."""
        values = {name: plain.form(name, getattr(self, name)) for name in _VALUES}
        groups = [asdict(group) for group in self.groups]
        return json.dumps({**vars(self), **values, "groups": groups, "format": FORMAT}, indent=1)

    @classmethod
    def parse(cls, text: str, where: str) -> "Manifest":
        """Inverse of :meth:`text`.

        Raises:
            NewerFormatError: when ``text`` has a newer format; the message names ``where``.
            CheckpointError: when ``text`` has an older format, or is no manifest.
        """
        try:
            content = json.loads(text)
            written = int(content["format"])
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            raise CheckpointError(f"{where} is damaged: it is not the JSON that a save writes.") from None
        if written > FORMAT:
            raise NewerFormatError(
                f"{where} has format {written}, but this version of shardstep reads formats up to {FORMAT}; it was written by "
                f"{content.get('versions', 'a newer one')}. Update shardstep."
            )
        if written < OLDEST:
            raise CheckpointError(
                f"{where} has format {written}, which had no digests and can no longer be read; save again."
            )
        try:
            known = {f.name: content[f.name] for f in fields(cls)}
            known["groups"] = [Group(**group) for group in known["groups"]]
            if odd := [name for name, kind in _KINDS.items() if not _is(known[name], kind)]:
                raise TypeError(", ".join(odd))
            if written == FORMAT:
                known |= {name: plain.restored(known[name]) for name in _VALUES}
            return cls(**known)
        except (KeyError, TypeError, ValueError) as wrong:
            raise CheckpointError(f"{where} is damaged: {wrong} is missing or wrong.") from None


def merge_groups(groups: Iterable[Group]) -> list[Group]:
    """The groups of all ranks, with those of equal settings merged into one that names each parameter once."""
    merged: dict[str, Group] = {}
    for group in groups:
        same = merged.setdefault(
            json.dumps([group.optimizer, group.settings], sort_keys=True), Group(group.optimizer, group.settings, [])
        )
        same.parameters.extend(group.parameters)
    return [Group(g.optimizer, g.settings, list(dict.fromkeys(g.parameters))) for g in merged.values()]


def config_digest(groups: Iterable[Group]) -> str:
    """SHA-256 of optimizers, settings and names of parameters; does not depend on their order."""
    rows = sorted((g.optimizer, json.dumps(g.settings, sort_keys=True), sorted(g.parameters)) for g in groups)
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def _is(value: Any, kind: Any) -> bool:
    """Whether a value from JSON is of ``kind``; all numbers are counts, so they must not be negative."""
    arguments = get_args(kind)
    if get_origin(kind) is list:
        return isinstance(value, list) and all(_is(x, arguments[0]) for x in value)
    if get_origin(kind) is dict:
        return isinstance(value, dict) and all(_is(x, arguments[1]) for x in value.values())
    if kind is int:
        return type(value) is int and value >= 0
    if kind is Group:
        return all(_is(getattr(value, name), field_kind) for name, field_kind in _KINDS_OF_GROUP.items())
    return isinstance(value, kind)


def _packages() -> dict[str, str]:
    try:
        own = version("shardstep")
    except PackageNotFoundError:
        own = "from source"
    return {"torch": torch.__version__, "shardstep": own}
