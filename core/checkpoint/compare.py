"""How a checkpoint and a run differ, found out before anything is touched."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import Tensor
from torch.distributed.checkpoint.metadata import STORAGE_TYPES, TensorStorageMetadata

from .contents import MODEL, STATE, Group, base_of, parameter_of

LIMIT = 20
"""Rows that a table shows."""

_HINTS = {
    "model": "Build the model that was saved: layers, sizes, vocabulary, dtype, tied or untied embeddings.",
    "optimizer": "Resume with the optimizer that was saved, or load without its state (load_optimizer=False).",
    "block": "State of blockwise mode loads at the tensor-parallel size that saved it; resume with that size, cut and mode.",
}


@dataclass(frozen=True, order=True)
class Mismatch:
    """One thing that is not what it was.

    Attributes:
        what: Key, or name of a parameter.
        saved: What the checkpoint has.
        here: What this run has.
        kind: ``model``, ``optimizer`` or ``block``.
    """

    what: str
    saved: str
    here: str
    kind: str


def selection[T](by_key: Mapping[str, T], patterns: Iterable[str]) -> dict[str, T]:
    """What is under a key, or all blocks of one, that a pattern matches."""
    patterns = list(patterns)
    return {key: x for key, x in by_key.items() if any(fnmatchcase(base_of(key)[0], pattern) for pattern in patterns)}


def compare_tensors(here: Mapping[str, Tensor], saved: Mapping[str, STORAGE_TYPES], skip: set[str]) -> list[Mismatch]:
    """What this rank wants and the checkpoint does not have: keys, kinds, dtypes, shapes.

    Args:
        here: Key → tensor to load into.
        saved: Key → what the checkpoint says of it.
        skip: Parameters whose optimizer state is not compared.
    """
    blocks = {base: count for base, count in map(base_of, saved)}
    rows = []
    for key, x in here.items():
        if key.startswith(STATE) and parameter_of(key) in skip:
            continue
        base, count = base_of(key)
        mine = f"{_dtype(x)} {tuple(x.shape)}"
        if key in saved:
            theirs = _describe(saved[key])
            if theirs != mine:
                rows.append(Mismatch(key, theirs, mine, _kind(key)))
        elif base in blocks:
            other = ", cut otherwise" if count == blocks[base] else ""
            rows.append(Mismatch(base, _blocks(blocks[base]), _blocks(count) + other, "block"))
        else:
            rows.append(Mismatch(base, "missing", mine, _kind(key)))
    return rows


def compare_keys(
    here: Iterable[str], saved: Mapping[str, STORAGE_TYPES], skip: set[str], prefixes: Sequence[str]
) -> list[Mismatch]:
    """What the checkpoint has under ``prefixes`` and no rank wants; ``here`` are the keys of all ranks."""
    wanted = {base_of(key)[0] for key in here}
    left = {base_of(key)[0]: _describe(x) for key, x in saved.items() if key.startswith(tuple(prefixes))}
    return [
        Mismatch(base, x, "missing", _kind(base))
        for base, x in left.items()
        if base not in wanted and not (base.startswith(STATE) and parameter_of(base) in skip)
    ]


def compare_optimizers(here: Iterable[Group], saved: Iterable[Group]) -> dict[str, tuple[str, str]]:
    """Parameter → the optimizer that it had and the one it has, where they are not the same."""
    had = {name: group.optimizer for group in saved for name in group.parameters}
    have = {name: group.optimizer for group in here for name in group.parameters}
    return {name: (had.get(name, "none"), now) for name, now in have.items() if had.get(name, "none") != now}


def optimizer_rows(changed: Mapping[str, tuple[str, str]]) -> list[Mismatch]:
    """One row for each pair of optimizers."""
    pairs: dict[tuple[str, str], list[str]] = {}
    for name, pair in changed.items():
        pairs.setdefault(pair, []).append(name)
    rows = []
    for (had, has), names in pairs.items():
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        rows.append(Mismatch(f"optimizer of {names[0]}{more}", had, has, "optimizer"))
    return rows


def table(where: str, rows: Iterable[Mismatch]) -> str:
    """The error text."""
    rows = sorted(set(rows))
    shown = [("", "in the checkpoint", "here"), *((row.what, row.saved, row.here) for row in rows[:LIMIT])]
    widths = [max(map(len, column)) for column in zip(*shown, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in shown]
    if len(rows) > LIMIT:
        lines.append(f"… and {len(rows) - LIMIT} more")
    hints = [hint for kind, hint in _HINTS.items() if any(row.kind == kind for row in rows)]
    return "\n  ".join([f"{where} does not fit this run; nothing was loaded:", *lines, *hints])


def _kind(key: str) -> str:
    return "model" if key.startswith(MODEL) else "optimizer"


def _blocks(count: int) -> str:
    return f"{count} blocks, one a rank" if count else "whole"


def _describe(x: STORAGE_TYPES) -> str:
    if not isinstance(x, TensorStorageMetadata):
        return "a Python object"
    return f"{str(x.properties.dtype).removeprefix('torch.')} {tuple(x.size)}"


def _dtype(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")
