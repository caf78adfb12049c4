"""Differences between a checkpoint and a run, found before anything is changed."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import Tensor
from torch.distributed.checkpoint.metadata import STORAGE_TYPES, TensorStorageMetadata

from .contents import MODEL, STATE, Group, base_of, parameter_of

MAX_ROWS = 20
"""Rows that the table of an error shows; the others are counted."""

_HINTS = {
    "model": "Build the model that was saved: layers, sizes, vocabulary, dtype, tied or untied embeddings.",
    "optimizer": "Resume with the optimizer that was saved, or load without its state (load_optimizer=False).",
    "extra": "Extra states that differ between ranks fit the layout that saved them; resume on it, or say what to load (only).",
    "block": "State of blockwise mode loads at the tensor-parallel size that saved it; resume with that size, cut and mode.",
}


@dataclass(frozen=True, order=True)
class Mismatch:
    """One difference between a checkpoint and this run.

    Attributes:
        what: Key of a tensor, or the optimizer of named parameters.
        saved: Description of it in the checkpoint.
        current: Description of it in this run.
        kind: Kind of difference, which chooses the advice: ``model``, ``optimizer``, ``extra`` or ``block``.
    """

    what: str
    saved: str
    current: str
    kind: str


def selection[T](by_key: Mapping[str, T], patterns: Iterable[str]) -> dict[str, T]:
    """The entries whose key, without the number of a block, matches any of ``patterns``."""
    patterns = list(patterns)
    return {key: x for key, x in by_key.items() if any(fnmatchcase(base_of(key)[0], pattern) for pattern in patterns)}


def compare_tensors(
    tensors: Mapping[str, Tensor], saved: Mapping[str, STORAGE_TYPES], skip: set[str]
) -> list[Mismatch]:
    """Tensors of this rank that the checkpoint lacks, or has with another dtype or shape or cut into other blocks.

    Args:
        tensors: Key → tensor to load into.
        saved: Key → metadata of the saved value.
        skip: Names of parameters whose optimizer state is not compared.
    """
    blocks = {base: count for base, count in map(base_of, saved)}
    rows = []
    for key, x in tensors.items():
        if key.startswith(STATE) and parameter_of(key) in skip:
            continue
        base, count = base_of(key)
        current = f"{_dtype(x)} {tuple(x.shape)}"
        if key in saved:
            stored = _describe(saved[key])
            if stored != current:
                rows.append(Mismatch(key, stored, current, _kind(key)))
        elif base in blocks:
            other = ", cut otherwise" if count == blocks[base] else ""
            rows.append(Mismatch(base, _blocks(blocks[base]), _blocks(count) + other, "block"))
        else:
            rows.append(Mismatch(base, "missing", current, _kind(key)))
    return rows


def compare_keys(
    keys: Iterable[str], saved: Mapping[str, STORAGE_TYPES], skip: set[str], prefixes: Sequence[str]
) -> list[Mismatch]:
    """Saved tensors under ``prefixes`` that are not among ``keys``, the keys of all ranks."""
    wanted = {base_of(key)[0] for key in keys}
    left = {base_of(key)[0]: _describe(x) for key, x in saved.items() if key.startswith(tuple(prefixes))}
    return [
        Mismatch(base, x, "missing", _kind(base))
        for base, x in left.items()
        if base not in wanted and not (base.startswith(STATE) and parameter_of(base) in skip)
    ]


def compare_optimizers(current: Iterable[Group], saved: Iterable[Group]) -> dict[str, tuple[str, str]]:
    """Name of a parameter → saved and current optimizer, where they are not the same."""
    before = {name: group.optimizer for group in saved for name in group.parameters}
    now = {name: group.optimizer for group in current for name in group.parameters}
    pairs = {name: (before.get(name, "none"), optimizer) for name, optimizer in now.items()}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def optimizer_rows(changed: Mapping[str, tuple[str, str]]) -> list[Mismatch]:
    """One row for each pair of saved and current optimizers."""
    pairs: dict[tuple[str, str], list[str]] = {}
    for name, pair in changed.items():
        pairs.setdefault(pair, []).append(name)
    rows = []
    for (before, now), names in pairs.items():
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        rows.append(Mismatch(f"optimizer of {names[0]}{more}", before, now, "optimizer"))
    return rows


def table(where: str, rows: Iterable[Mismatch]) -> str:
    """Text of the error: a table of the differences of the checkpoint at ``where``, and advice."""
    rows = sorted(set(rows))
    shown = [("", "in the checkpoint", "here"), *((row.what, row.saved, row.current) for row in rows[:MAX_ROWS])]
    widths = [max(map(len, column)) for column in zip(*shown, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in shown]
    if len(rows) > MAX_ROWS:
        lines.append(f"… and {len(rows) - MAX_ROWS} more")
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
