"""The differences between two checkpoints: in their manifests, their keys, and the values of their tensors."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from core.checkpoint.manifest import Manifest

from .source import Source

WIDTH = 60
"""Number of characters of a value that a table shows."""
_PIECE = 1 << 20  # entries that are compared at once, in float64


@dataclass(frozen=True)
class Distance:
    """Distance between two tensors of one shape.

    Attributes:
        key: Key of both tensors.
        equal: Whether the tensors are equal bit for bit.
        largest: Largest absolute difference; nan if an entry is nan in only one of them.
        relative: ``largest`` over the largest absolute value of the first tensor.
    """

    key: str
    equal: bool
    largest: float
    relative: float


def manifest_rows(a: Manifest, b: Manifest) -> Iterator[tuple[str, str, str]]:
    """Rows ``(name, in a, in b)`` for all entries of the two manifests that differ."""
    for name in ("step", "consumed_samples", "layout", "optimizers", "config"):
        yield from _differing(name, getattr(a, name), getattr(b, name))
    for name in ("schedule", "extra"):
        yield from _entries(name, getattr(a, name) or {}, getattr(b, name) or {})
    yield from _settings(a, b)


def keys(a: Source, b: Source) -> Iterator[tuple[str, str, str]]:
    """Rows ``(key, in a, in b)`` for all keys that only one has, or whose dtype or shape differs."""
    in_a, in_b = _describe(a), _describe(b)
    for key in sorted({*in_a, *in_b}):
        yield from _differing(key, in_a.get(key, "missing"), in_b.get(key, "missing"))


def values(a: Source, b: Source) -> list[Distance]:
    """Distance of each pair of tensors of one shape, the largest first; two tensors are in memory at a time."""
    in_a, in_b = a.reader.tensors(), b.reader.tensors()
    both = [key for key, x in in_a.items() if key in in_b and in_b[key].size == x.size]
    distances = [distance(key, a.reader.whole(key), b.reader.whole(key)) for key in both]
    return sorted(distances, key=lambda d: (d.equal, -_rank(d.relative), -_rank(d.largest), d.key))


def objects(a: Source, b: Source) -> list[str]:
    """Keys of objects that both have and whose stored bytes differ."""
    both = set(a.reader.objects()) & set(b.reader.objects())
    return sorted(key for key in both if a.reader.raw(key) != b.reader.raw(key))


def distance(key: str, x: Tensor, y: Tensor) -> Distance:
    """The distance between two tensors of one shape, which may have different dtypes."""
    same_bits = x.dtype == y.dtype and torch.equal(_bytes(x), _bytes(y))
    if same_bits or not x.numel():
        return Distance(key, same_bits, 0.0, 0.0)
    largest = scale = torch.zeros((), dtype=torch.float64)
    for one, other in zip(x.reshape(-1).split(_PIECE), y.reshape(-1).split(_PIECE), strict=True):
        left, right = _real(one), _real(other)
        difference = torch.where((left == right) | (left.isnan() & right.isnan()), 0.0, (left - right).abs())
        largest, scale = torch.maximum(largest, difference.max()), torch.maximum(scale, left.abs().max())
    relative = largest / scale if scale else largest
    return Distance(key, False, float(largest), float(relative))


def _bytes(x: Tensor) -> Tensor:
    return x.contiguous().reshape(-1).view(torch.uint8)


def _real(x: Tensor) -> Tensor:
    return torch.view_as_real(x).reshape(-1).double() if x.is_complex() else x.double()


def _rank(value: float) -> float:
    return float("inf") if value != value else value


def _describe(source: Source) -> dict[str, str]:
    tensors = {key: f"{str(x.properties.dtype)[6:]} {tuple(x.size)}" for key, x in source.reader.tensors().items()}
    return tensors | dict.fromkeys(source.reader.objects(), "an object")


def _differing(name: str, a: Any, b: Any) -> Iterator[tuple[str, str, str]]:
    if a != b:
        yield name, _short(a), _short(b)


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= WIDTH else f"{text[:WIDTH]}…"


def _entries(name: str, a: Mapping[str, Any], b: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    for key in sorted({*a, *b}):
        x, y = a.get(key, "left out"), b.get(key, "left out")
        if isinstance(x, dict) or isinstance(y, dict):
            yield from _entries(f"{name}.{key}", *(side if isinstance(side, dict) else {} for side in (x, y)))
        else:
            yield from _differing(f"{name}.{key}", x, y)


def _settings(a: Manifest, b: Manifest) -> Iterator[tuple[str, str, str]]:
    """One row for each setting that differs, with the number of parameters that have it."""
    in_a, in_b = _by_parameter(a), _by_parameter(b)
    counts: dict[tuple[str, str, str], int] = {}
    for name in sorted(in_a.keys() & in_b.keys()):
        for row in _entries("", in_a[name], in_b[name]):
            counts[row] = counts.get(row, 0) + 1
    for (setting, x, y), count in counts.items():
        yield f"{setting.lstrip('.')} of {count} parameters", x, y
    for name in sorted(in_a.keys() ^ in_b.keys()):
        x, y = (by_name.get(name, {}).get("optimizer", "none") for by_name in (in_a, in_b))
        yield f"optimizer of {name}", x, y


def _by_parameter(manifest: Manifest) -> dict[str, dict[str, Any]]:
    return {
        name: {"optimizer": group.optimizer, **group.settings} for group in manifest.groups for name in group.parameters
    }
