"""The cost model against arithmetic by hand, against what a step executes, and against common sense."""

from dataclasses import replace
from math import inf

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from core import engine
from core.cost.cheapest import choose
from core.cost.dealing import deal, waves_of
from core.cost.measure import measure
from core.cost.model import COSTS, Link, Machine, Matrices, exact_costs, predict, team_size
from core.linalg.coefficients import coefficients
from core.linalg.matmul_precision import matmul_precision
from core.linalg.newton_schulz import newton_schulz
from core.linalg.newton_schulz_cost import total_flops
from core.process_groups_config import ProcessGroupCollection
from core.sharding.dealing import deal_to_least
from core.sharding.layout import Layout
from tools.bench import cases
from tools.bench.measure import count_collectives
from tools.plan.validate import cuts_short

# One operation and one byte of the link a second; memory takes no time, and a collective no more than its bytes.
UNIT = Machine(1.0, inf, Link(0.0, 1.0), device="cpu")
H200 = Machine(7.9e14, 4.3e12, Link(1e-5, 4.5e11))

matrices = st.builds(
    Matrices,
    count=st.integers(1, 40),
    rows=st.sampled_from([64, 256, 1024, 4096]),
    cols=st.sampled_from([64, 256, 1024, 4096]),
    tp=st.sampled_from([2, 4, 8]),
    copies=st.sampled_from([1, 2, 16]),
    splits_short=st.booleans(),
    itemsize=st.sampled_from([2, 4]),
)


def test_four_matrices_on_four_ranks_by_hand():
    """8 x 16 in float32 is 512 bytes. An iteration takes 2*8*8*16 + 2*8*8*8 + 2*8*8*16 = 5120 operations, five take 25600."""
    four = [Matrices(4, 8, 16, tp=4)]
    owner, team, distributed, duplicated, blockwise = (predict(mode, four, UNIT) for mode in COSTS)
    # Each rank owns one, takes in the three quarters of it that it lacks, and its quarters of the other three's results.
    assert (owner.compute, owner.bytes, owner.collectives) == (25600, 3 * 128 + 3 * 128, 2)
    # All in one wave: nothing is hidden.
    assert owner.seconds == 25600 + 768
    # Everybody does all four, and takes in three quarters of them.
    assert (duplicated.compute, duplicated.bytes, duplicated.collectives) == (4 * 25600, 4 * 384, 1)
    # Five iterations restart twice: three Gram matrices of 2*8*8*4 operations, 1 + 5 + 5 products of 8 x 8, three by X.
    assert distributed.compute == 4 * (3 * 512 + 11 * 1024 + 3 * 512)
    # Each Gram matrix is 256 bytes; all-reduced, three quarters of it come in twice.
    assert (distributed.bytes, distributed.collectives) == (4 * 3 * 2 * 192, 3)
    # Blocks of 8 x 4: 2*4*4*8 + 2*4*4*4 + 2*4*4*8 = 640 operations.
    assert (blockwise.compute, blockwise.bytes, blockwise.collectives) == (4 * 5 * 640, 0, 0)
    # Two teams of two, two matrices each: halves of 8 columns make Gram matrices of 2*8*8*8 operations.
    assert team_size(four, UNIT) == 2
    assert team.compute == 2 * (3 * 1024 + 11 * 1024 + 3 * 1024)


def test_two_matrices_on_two_by_two_ranks_by_hand():
    """4 x 4 in float32 is 64 bytes, five iterations take 5 * 3 * 2*4*4*4 = 1920 operations."""
    two = [Matrices(2, 4, 4, tp=2, copies=2)]
    owner = predict("owner", two, UNIT)
    # A rank that owns none of them takes in half of both; one that owns one, half of it and half of the other.
    assert (owner.compute, owner.bytes) == (1920, 64)
    # The owner takes in 32 bytes, and sends 32 to each of the three others.
    assert owner.communication == 32 + 96
    # Copies work alike.
    assert predict("duplicated", two, UNIT).compute == 2 * 1920
    # Cut along the shorter side it is cut anew first: half of the 32 bytes comes from the other rank, and goes back.
    short = [Matrices(1, 4, 4, tp=2, splits_short=True)]
    long = [replace(short[0], splits_short=False)]
    before, after = (predict("distributed", some, UNIT) for some in (long, short))
    assert (after.bytes - before.bytes, after.collectives - before.collectives) == (2 * 16, 2)


def test_memory_traffic_by_hand():
    """Gradient and momentum in, momentum and direction out, parameter and update in, parameter out: 28 bytes in float32."""
    slow = replace(UNIT, memory=1.0, cached=inf, turned=inf)
    some = [Matrices(3, 8, 16, tp=4)]
    assert predict("blockwise", some, slow).compute - predict("blockwise", some, UNIT).compute == 3 * 32 * 28
    halved = [replace(some[0], itemsize=2)]
    assert predict("blockwise", halved, slow).compute - predict("blockwise", halved, UNIT).compute == 3 * 32 * 24


def test_waves_are_hidden_but_for_the_first_and_the_last():
    # 64 matrices of 128 entries on four ranks, one a wave: 16 waves in and 16 out, of 384 bytes each way.
    some = [Matrices(64, 8, 16, tp=4)]
    cost = predict("owner", some, UNIT, wave=1)
    assert (cost.collectives, cost.communication) == (32, 16 * 768)
    assert cost.seconds == 16 * 25600 + 768
    slow_link = replace(UNIT, link=Link(0.0, 1e-3))
    assert predict("owner", some, slow_link, wave=1).seconds == pytest.approx(16 * 768e3)


def test_dealing_and_filling_by_hand():
    # The dearest first: 5 | 4, then both 3s to the second and the first, then 1.
    assert sorted(deal([(1, 5.0, 0.0), (1, 4.0, 0.0), (2, 3.0, 0.0), (1, 1.0, 0.0)], 2)) == [
        (8.0, 0.0, 1),
        (8.0, 0.0, 1),
    ]
    assert deal([(1001, 2.0, 7.0)], 1000) and max(load.seconds for load in deal([(1001, 2.0, 7.0)], 1000)) == 4.0
    # 4 4 | 4 2 2 | 2.
    assert waves_of([(3, 4.0), (3, 2.0)], 8.0, 1) == 3
    # Two workers: rounds (4 4) (4 2) (2 2) bring each rank 4 4 | 2, for the second round is one of a 4.
    assert waves_of([(3, 4.0), (3, 2.0)], 8.0, 2) == 2


# An iteration more of a large bfloat16 matrix is the same again, and takes seconds where bfloat16 is slow.
@pytest.mark.parametrize(
    ("shape", "dtype", "iterations"),
    [
        (shape, dtype, iterations)
        for shape in ((64, 64), (48, 192), (192, 48), (512, 2048), (2048, 512), (520, 520), (513, 600))
        for dtype in (torch.bfloat16, torch.float32, torch.float64)
        for iterations in ((1, 3) if dtype == torch.bfloat16 and max(shape) > 500 else (1, 5, 8))
    ],
)
def test_operations_are_those_that_are_executed(shape, dtype, iterations):
    x = torch.ones(1, *shape, dtype=dtype)
    with matmul_precision("highest", x.device):
        pass  # The first scope of a process probes the processor, with products of its own.
    steps = newton_schulz(x, Layout.whole(shape), coefs=coefficients("quintic", iterations), precision="highest")
    with FlopCounterMode(display=False) as counted:
        engine.run([("x", steps)])
    assert total_flops(*shape, dtype.itemsize, iterations=iterations, device="cpu") == counted.get_total_flops()


def check_collectives(ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Large shapes fill several waves, those of 64 all fit one. Products at ``medium`` are slow on many processors: a quarter."""
    sizes = [("medium", 2, 256, 1, 2**18), ("highest", 4, 512, 2, 2**20)]
    for precision, itemsize, large, layers, wave in sizes:
        monkeypatch.setenv(engine.WAVE, str(wave))
        for benchmark in (cases.gpt_matrices(large, layers), cases.gpt_matrices(64, 3)):
            matrices = [Matrices(1, m.rows, m.cols, ranks, 1, cuts_short(m), itemsize) for m in benchmark]
            makers = cases.tensor_parallel(precision, dist.group.WORLD)
            for candidate in cases.candidates(makers, benchmark, dist.group.WORLD, [cases.OURS]):
                mode = candidate.name.split()[-1]
                predicted = predict(mode, matrices, UNIT, wave=wave).collectives
                assert predicted == count_collectives(candidate.optimizer), (precision, benchmark[0], mode)


@pytest.mark.mpi(min_size=2)
def test_collectives_are_those_of_a_step_on_2_ranks(world, monkeypatch):
    check_collectives(2, monkeypatch)


@pytest.mark.soak
@pytest.mark.mpi(min_size=4)
def test_collectives_are_those_of_a_step_on_4_ranks(world, monkeypatch):
    check_collectives(4, monkeypatch)


@pytest.mark.mpi(min_size=2)
def test_all_ranks_measure_the_same(world):
    groups = ProcessGroupCollection(tp=dist.group.WORLD)
    domain = groups.domain((groups.axis("tp"),))
    mine = measure(domain, torch.device("cpu"), torch.float32, precision="highest")
    assert domain.gather(mine) == [mine] * world.size
    rates = (mine.flops, mine.memory, mine.gram_flops, mine.turned, mine.cached, mine.link.latency, mine.link.bandwidth)
    assert all(rate > 0 for rate in rates)


@given(some=matrices)
def test_more_ranks_never_give_an_owner_more_to_compute(some):
    no_traffic = replace(H200, memory=inf, cached=H200.memory)
    more = replace(some, copies=2 * some.copies)
    assert predict("owner", [more], no_traffic).compute <= predict("owner", [some], no_traffic).compute


@given(some=matrices)
def test_an_owner_takes_in_each_shard_it_lacks_twice(some):
    """What a rank lacks of its share of all matrices comes in, and goes back: 2 (t - 1)/t mn/t bytes a matrix."""
    full = replace(some, count=some.count * some.tp, copies=1)
    expected = 2 * (full.tp - 1) / full.tp * full.count * full.payload / full.tp
    assert predict("owner", [full], H200).bytes == pytest.approx(expected)


@given(some=matrices, mode=st.sampled_from(tuple(COSTS)))
def test_latency_counts_once_a_collective(some, mode):
    # Teams of another size may be better where a collective is dear.
    some = replace(some, tp=2, copies=1)
    slow = replace(UNIT, link=Link(100.0, 1.0))
    cost = predict(mode, [some], slow)
    assert cost.communication == pytest.approx(predict(mode, [some], UNIT).communication + 100 * cost.collectives)


@given(some=st.lists(matrices, max_size=5))
def test_a_choice_is_exact_and_no_worse_than_any_one_mode(some):
    some = [replace(one, tp=4, copies=2) for one in some]
    chosen = choose(some, H200)
    assert len(chosen) == len(some) and all(mode in exact_costs() for mode, _ in chosen)
    assert choose(some, H200) == chosen
    total = sum(cost.seconds for _, cost in chosen)
    assert total <= 1.000001 * min(predict(mode, some, H200).seconds for mode in exact_costs())


def test_nothing_to_choose_from():
    assert choose([], H200) == []
    # One rank does everything alone in every mode; of equals the first is taken.
    assert [mode for mode, _ in choose([Matrices(2, 8, 8)], H200)] == ["owner"]


def test_a_matrix_for_many_ranks_is_not_left_to_one():
    (chosen,) = choose([Matrices(1, 8192, 32768, tp=8, itemsize=2)], H200)
    assert chosen[0] in ("team", "distributed")


@given(costs=st.lists(st.integers(1, 9), min_size=1, max_size=30), ranks=st.integers(1, 6))
def test_dealing_on_paper_is_the_engines(costs, ranks):
    loads = [0.0] * ranks
    for cost in sorted(costs, reverse=True):
        deal_to_least(loads, cost)
    paper = deal([(costs.count(cost), float(cost), 0.0) for cost in set(costs)], ranks)
    assert sorted(loads) == sorted(load.seconds for load in paper for _ in range(load.ranks))
