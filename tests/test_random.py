"""Counter-based randomness: the published known answers, and shards that draw their part of the whole."""

import hashlib
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from core.philox import Key, bits, normal, philox, rademacher, uniform
from core.process_groups_config import Axis
from core.sharding.layout import Layout, Split

KEY = Key(5489, "decoder.layers.0.mlp.weight", 7, "noise")
DRAWS: dict[str, Callable[..., Tensor]] = {
    "bits": lambda *a: torch.stack(bits(*a, words=4), -1),
    "uniform": uniform,
    "normal": normal,
    "rademacher": rademacher,
}
SHAPES = {1: (1001,), 2: (30, 9), 3: (5, 7, 12)}
# More than one block of entries, so that block borders are crossed.
LARGE = (301, 409)


def axis(size: int, index: int) -> Axis:
    return Axis(f"a{size}", tuple(range(size)), index)


@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [
        (
            "00000000 00000000 00000000 00000000",
            "00000000 00000000",
            "6627e8d5 e169c58d bc57ac4c 9b00dbd8",
        ),
        (
            "ffffffff ffffffff ffffffff ffffffff",
            "ffffffff ffffffff",
            "408f276d 41c83b0e a20bc7c6 6d5451fd",
        ),
        (
            "243f6a88 85a308d3 13198a2e 03707344",
            "a4093822 299f31d0",
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_gives_the_published_known_answers(counter: str, key: str, answer: str) -> None:
    words = [torch.tensor([int(word, 16)]) for word in counter.split()]
    k0, k1 = (int(word, 16) for word in key.split())
    got = philox((words[0], words[1], words[2], words[3]), (k0, k1))
    assert " ".join(f"{int(word):08x}" for word in got) == answer


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize(
    ("shape", "dim"), [(SHAPES[1], 0), (SHAPES[2], 0), (SHAPES[2], 1), (SHAPES[3], 1), (SHAPES[3], 2), (LARGE, 1)]
)
def test_a_shard_draws_its_part_of_the_whole(draw, shape, dim, size, stride) -> None:
    sizes = list(shape)
    sizes[dim] -= sizes[dim] % stride
    whole = draw(KEY, sizes)
    for index in range(size):
        split = Split.even(axis(size, index), sizes[dim], stride=stride)
        lay = Layout(tuple(sizes), tuple(split if d == dim else None for d in range(len(sizes))))
        held = [i for lo, hi in split.held[index] for i in range(lo, hi)]
        assert torch.equal(draw(KEY, lay), whole.index_select(dim, torch.tensor(held, dtype=torch.int64)))


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
def test_a_tensor_cut_in_both_dims_draws_its_part(draw) -> None:
    whole = draw(KEY, SHAPES[2])
    for i, rows in enumerate(whole.chunk(2, 0)):
        for j, block in enumerate(rows.chunk(4, 1)):
            splits = Split.even(axis(2, i), SHAPES[2][0]), Split.even(axis(4, j), SHAPES[2][1])
            assert torch.equal(draw(KEY, Layout(SHAPES[2], splits)), block)


@pytest.mark.parametrize(
    "other",
    [Key(1, KEY.name, 7, "noise"), Key(5489, "b", 7, "noise"), Key(5489, KEY.name, 8, "noise"), Key(5489, KEY.name, 7)],
)
def test_every_part_of_the_key_counts(other: Key) -> None:
    a, b = normal(KEY, (10000,)), normal(other, (10000,))
    assert abs(torch.corrcoef(torch.stack([a, b]))[0, 1]) < 0.05


def test_a_key_means_the_same_in_every_process() -> None:
    """Against blake2b of the spelled-out key, taken with b2sum's definition of a 16-byte digest."""
    digest = hashlib.blake2b(b"1\0w\x002\0p", digest_size=16).hexdigest()
    assert "".join(word.to_bytes(4, "little").hex() for word in Key(1, "w", 2, "p").words) == digest


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_draws_are_distributed_as_they_say(dtype: torch.dtype) -> None:
    n = 200_000
    u = uniform(KEY, (n,), dtype=dtype)
    assert u.dtype == dtype and u.min() >= 0 and u.max() < 1
    assert abs(u.double().mean() - (0.5 - torch.finfo(dtype).eps / 4)) < 5 * (1 / 12 / n) ** 0.5
    z = normal(KEY, (n,), dtype=dtype)
    assert z.dtype == dtype
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        tolerance = 5 * (variance / n) ** 0.5 + 0.01 * (torch.finfo(dtype).bits == 16)
        assert abs((z.double() ** power).mean() - moment) < tolerance
    r = rademacher(KEY, (n,), dtype=dtype).double()
    assert r.abs().eq(1).all() and abs(r.mean()) < 5 / n**0.5
    words = bits(KEY, (n,), words=4)
    for i, word in enumerate(words):
        assert word.min() >= 0 and word.max() < 2**32
        assert all(abs(((word >> b) & 1).double().mean() - 0.5) < 5 * 0.5 / n**0.5 for b in range(32))
        assert all(not torch.equal(word, other) for other in words[:i])


def test_one_number_and_none() -> None:
    assert normal(KEY, ()).shape == ()
    assert uniform(KEY, (0, 4)).shape == (0, 4)
    with pytest.raises(ValueError, match="words=5 must be 1 to 4"):
        bits(KEY, (3,), words=5)
