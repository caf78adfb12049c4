"""Ranges, layouts out of parameters, and moves between arbitrary placements."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.distributed.tensor import DTensor, Shard

from core.engine.exchange import exchange
from core.process_groups_config import Axis, ProcessGroupCollection
from core.sharding.layout import Layout, Split
from core.sharding.parameter_layout import layout_of
from core.sharding.ranges import chunk, merge, overlap, repeat, total
from core.sharding.requests import Move

cuts = st.lists(st.integers(0, 30), min_size=2, max_size=8).map(sorted)
ranges = cuts.map(lambda c: merge(zip(c[::2], c[1::2], strict=False)))


def indices(r):
    return [i for lo, hi in r for i in range(lo, hi)]


@given(ranges, ranges)
def test_overlap_finds_what_both_have(left, right):
    found = [(o.left + k, o.right + k) for o in overlap(left, right) for k in range(o.length)]
    a, b = indices(left), indices(right)
    assert [a[i] for i, _ in found] == [b[j] for _, j in found]
    assert {a[i] for i, _ in found} == set(a) & set(b)


@given(st.integers(1, 40), st.integers(1, 8))
def test_chunk_cuts_as_torch_does(size, parts):
    wanted = [c.tolist() for c in torch.arange(size).chunk(parts)]
    wanted += [[]] * (parts - len(wanted))
    assert [indices(chunk(size, parts, i)) for i in range(parts)] == wanted


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.integers(1, 5))
def test_repeat_covers_everything_once(sizes, times):
    size = sum(sizes) * times
    parts = repeat(tuple(sizes), size)
    assert sorted(i for part in parts for i in indices(part)) == list(range(size))
    assert [total(part) for part in parts] == [s * times for s in sizes]


def axis(size: int, index: int = 0) -> Axis:
    return Axis("tp", tuple(range(size)), index)


@pytest.mark.parametrize("index", [0, 1, 2, 3])
def test_parts_are_split_and_joined(index):
    whole = torch.arange(48.0).reshape(24, 2)
    lay = Layout((24, 2), (Split.even(axis(4, index), 24), None), parts=repeat((8, 2, 2), 24))
    mine = whole.chunk(4)[index][None]
    pieces = lay.split_parts(mine)
    assert [p.shape[-2] for p, _ in pieces] == [part.local_shape[0] for _, part in pieces]
    assert torch.equal(lay.join_parts([p for p, _ in pieces]), mine)
    assert sum(p.shape[-2] for p, _ in pieces) == 6


def test_factor_per_part_follows_the_rows():
    lay = Layout((24, 2), (Split.even(axis(4, 1), 24), None), parts=repeat((8, 2, 2), 24))
    column = lay.per_part(lambda rows, cols: float(rows), torch.empty(0))
    assert column.flatten().tolist() == [16.0, 16.0, 4.0, 4.0, 4.0, 4.0]
    assert Layout.whole((3, 4)).per_part(lambda rows, cols: rows / cols, torch.empty(0)) == 0.75


def test_attributes_without_a_group_are_whole():
    p = nn.Parameter(torch.ones(4, 4))
    p.partition_dim, p.tensor_model_parallel = 0, True
    assert layout_of(p, ProcessGroupCollection()).is_whole


def test_parts_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"fc1: row blocks \(3, 2\) sum to 5.*12 rows"):
        layout_of(torch.ones(12, 4), ProcessGroupCollection(), part_sizes=(3, 2), name="fc1")


@pytest.mark.mpi(min_size=2)
def test_layouts_that_cannot_be_described_are_refused(world):
    mesh = world.mesh((2,), ("tp",))
    groups = ProcessGroupCollection.from_mesh(mesh)
    p = torch.ones(4, 4)
    p.partition_dim = 2
    with pytest.raises(ValueError, match=r"fc1: partition_dim 2 is not a dim"):
        layout_of(p, groups, name="fc1")
    p.partition_dim, p.tensor_model_parallel = 0, True
    with pytest.raises(ValueError, match=r"fc1.*no tensor-parallel group"):
        layout_of(p, ProcessGroupCollection(), name="fc1")
    mesh = world.mesh((2,), ("batch",))
    with pytest.raises(ValueError, match=r"batch.*name the axes among"):
        ProcessGroupCollection.from_mesh(mesh)
    assert layout_of(DTensor.from_local(p, mesh, [Shard(0)]), groups).shape == (8, 4)


@st.composite
def placements(draw, size: int):
    """A layout of a 6 × 5 tensor over ``size`` ranks: uneven cuts, some of them empty."""
    dim = draw(st.sampled_from([-2, -1]))
    length = (6, 5)[dim]
    marks = [0, *sorted(draw(st.lists(st.integers(0, length), min_size=size - 1, max_size=size - 1))), length]
    return dim, tuple(merge([(lo, hi)]) for lo, hi in pairwise(marks))


@pytest.mark.mpi(min_size=4)
@given(data=st.data())
def test_any_placement_moves_to_any_other(world, data):
    groups = ProcessGroupCollection.from_mesh(world.mesh((4,), ("tp",)))
    tp = groups.axis("tp")
    domain = groups.domain((tp,))
    whole = torch.arange(60.0).reshape(2, 6, 5)

    def layout(drawn):
        dim, held = drawn
        split = Split(tp, held)
        return Layout((6, 5), (split, None) if dim == -2 else (None, split), domain=domain)

    def piece(lay):
        box = lay.placement.boxes[domain.index]
        return whole[:, indices(box[0])][:, :, indices(box[1])]

    moves, wanted = [], []
    for _ in range(data.draw(st.integers(1, 3))):
        src, dst = layout(data.draw(placements(4))), layout(data.draw(placements(4)))
        owner = data.draw(st.integers(0, 3))
        for target, want in (
            (dst.placement, piece(dst)),
            (src.owners[owner], whole if owner == domain.index else None),
            (src.everywhere, whole),
        ):
            moves.append(Move(piece(src), 2, src.placement, target, whole.dtype, whole.device))
            wanted.append(want)
    for some in (slice(None), slice(2, None, 3)):
        for got, want in zip(exchange([replace(move) for move in moves[some]])(), wanted[some], strict=True):
            assert (got is None) == (want is None)
            assert want is None or torch.equal(got, want)


@pytest.mark.mpi(min_size=2)
def test_ranks_in_different_numbers_of_groups_can_be_joined(world, monkeypatch):
    from core import process_groups_config

    monkeypatch.setattr(process_groups_config, "_GROUPS", {})
    for _ in range(2 * world.rank):
        dist.new_group([world.rank], use_local_synchronization=True)
    groups = ProcessGroupCollection.from_mesh(world.mesh((2,), ("tp",)))
    team = groups.teamed(groups.domain((groups.axis("tp"),)), 2).team
    ones = torch.ones(1)
    dist.all_reduce(ones, group=team.group)
    assert ones == 2
