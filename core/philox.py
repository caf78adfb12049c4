"""Random numbers that depend on (seed, name, step, purpose) and the index in the whole tensor, and on nothing else.

There is no generator to keep, save or advance: any rank draws exactly its shard of what one process would draw, copies draw
the same, and a resumed run goes on with the same numbers.

Source: Salmon, Moraes, Dror & Shaw 2011, "Parallel random numbers: as easy as 1, 2, 3" (Philox4x32-10),
https://doi.org/10.1145/2063384.2063405
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import accumulate

import torch
from torch import Tensor

from .cache_blocks import BLOCK_BYTES
from .sharding.layout import Layout

Words = tuple[Tensor, Tensor, Tensor, Tensor]

_WORD = 0xFFFFFFFF
_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_WEYL = 0x9E3779B9, 0xBB67AE85
_ROUNDS = 10

# Entries drawn at a time, by type of device: about a dozen int64 tensors of this size exist at once.
_BLOCK_ENTRIES = {device: size // 16 for device, size in BLOCK_BYTES.items()}
_DEFAULT_BLOCK_ENTRIES = 2**24


@dataclass(frozen=True)
class Key:
    """Identifies a draw. Two keys that differ in any attribute give independent numbers.

    Attributes:
        seed: Seed that the user chose.
        name: Name of the parameter in the whole model.
        step: Number of the optimizer step, or of the draw.
        purpose: Text that tells the draws of one step apart.
    """

    seed: int
    name: str
    step: int = 0
    purpose: str = ""

    @property
    def words(self) -> tuple[int, int, int, int]:
        """128 bits: Philox's two key words, then the upper two words of the counter. Equal on every machine."""
        text = "\0".join((str(self.seed), self.name, str(self.step), self.purpose))
        digest = blake2b(text.encode(), digest_size=16).digest()
        k0, k1, c2, c3 = (int.from_bytes(digest[i : i + 4], "little") for i in range(0, 16, 4))
        return k0, k1, c2, c3


def philox(counter: Words, key: tuple[int, int]) -> Words:
    """Philox4x32-10 of four int64 tensors that hold 32-bit words; returns four of them. Salmon et al. 2011, section 3.3."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        # 64-bit products wrap around into the sign, which the mask removes.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0 = (p1 >> 32).bitwise_and_(_WORD).bitwise_xor_(c1).bitwise_xor_(k0)
        c2 = (p0 >> 32).bitwise_and_(_WORD).bitwise_xor_(c3).bitwise_xor_(k1)
        c1, c3 = p1.bitwise_and_(_WORD), p0.bitwise_and_(_WORD)
        k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
    return c0, c1, c2, c3


def bits(key: Key, lay: Layout | Sequence[int], *, words: int = 1, device: torch.device | str = "cpu") -> list[Tensor]:
    """``words`` ≤ 4 independent tensors of 32 random bits, int64 in [0, 2³²), each this rank's shard of ``lay``.

    Args:
        key: Identifies the draw.
        lay: Layout of the whole tensor, or the shape of a tensor that this rank has whole; () for a single number.
        words: Number of tensors; four cost hardly more than one.
        device: Device to draw on.

    Raises:
        ValueError: when ``words`` is not 1 to 4.
    """
    if not 1 <= words <= 4:
        raise ValueError(f"words={words} must be 1 to 4: one Philox block an entry; use another purpose for more.")
    return _draw(key, lay, device, torch.int64, lambda block: block[:words], words)


def uniform(
    key: Key,
    lay: Layout | Sequence[int],
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Uniform in [0, 1), this rank's shard; every multiple of half the dtype's epsilon is equally likely."""
    grain = torch.finfo(dtype).eps / 2

    def of(block: Words) -> tuple[Tensor]:
        return (_unit(block[0], block[1]).div_(grain).floor_().mul_(grain),)

    return _draw(key, lay, device, dtype, of)[0]


def normal(
    key: Key,
    lay: Layout | Sequence[int],
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Standard normal, this rank's shard: Box & Muller's transform in float64, rounded to ``dtype`` once."""

    def of(block: Words) -> tuple[Tensor]:
        # 1 - u is in (0, 1]: its logarithm is finite.
        radius = _unit(block[0], block[1]).neg_().add_(1).log_().mul_(-2).sqrt_()
        return (radius.mul_(_unit(block[2], block[3]).mul_(2 * math.pi).cos_()),)

    return _draw(key, lay, device, dtype, of)[0]


def rademacher(
    key: Key,
    lay: Layout | Sequence[int],
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """-1 or 1, equally likely, this rank's shard."""
    return _draw(key, lay, device, dtype, lambda block: ((block[0] & 1).mul_(2).sub_(1),))[0]


def _unit(high: Tensor, low: Tensor) -> Tensor:
    """The upper 27 and 26 bits of two words, as a float64 in [0, 1)."""
    return ((high >> 5 << 26) + (low >> 6)).double().mul_(2.0**-53)


def _draw(
    key: Key,
    lay: Layout | Sequence[int],
    device: torch.device | str,
    dtype: torch.dtype,
    of: Callable[[Words], Sequence[Tensor]],
    count: int = 1,
) -> list[Tensor]:
    """``count`` tensors of the shape of this rank's shard, which ``of`` computes from the Philox words of each entry."""
    lay = lay if isinstance(lay, Layout) else Layout.whole(lay)
    device = torch.device(device)
    k0, k1, *upper = key.words
    out = [torch.empty(lay.local_shape, dtype=dtype, device=device) for _ in range(count)]
    flat = [x.view(-1) for x in out]
    held = [_indices(lay, dim, device) for dim in range(-lay.ndim, 0)]
    size, step = out[0].numel(), _BLOCK_ENTRIES.get(device.type, _DEFAULT_BLOCK_ENTRIES)
    for lo in range(0, size, step):
        index = _whole_index(torch.arange(lo, min(lo + step, size), dtype=torch.int64, device=device), lay, held)
        c2, c3 = (torch.full_like(index, word) for word in upper)
        block = philox((index & _WORD, index >> 32, c2, c3), (k0, k1))
        for target, values in zip(flat, of(block), strict=True):
            target[lo : lo + step] = values
    return out


def _indices(lay: Layout, dim: int, device: torch.device) -> Tensor:
    """The indices of ``dim`` of the whole tensor that this rank holds, in its order."""
    split = lay.splits[dim]
    ranges = ((0, lay.shape[dim]),) if split is None else split.held[split.axis.index]
    indices = [torch.arange(lo, hi, dtype=torch.int64, device=device) for lo, hi in ((0, 0), *ranges)]
    return torch.cat(indices)


def _whole_index(index: Tensor, lay: Layout, held: Sequence[Tensor]) -> Tensor:
    """Flat indices into the shard → flat indices into the whole tensor."""
    if lay.is_whole:
        return index
    strides = list(accumulate(reversed(lay.shape[1:]), int.__mul__, initial=1))  # last dim first
    whole = torch.zeros_like(index)
    for size, stride, indices in zip(reversed(lay.local_shape), strides, reversed(held), strict=True):
        whole += indices[index % size] * stride
        index = index // size
    return whole
