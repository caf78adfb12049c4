"""Rounds, coalescing, dealing, and the check that ranks agree."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from core import engine
from core.process_groups_config import Domain, ProcessGroupCollection
from core.sharding.layout import Layout, Split
from core.sharding.requests import Deal


def rows(world, whole: Tensor) -> tuple[Tensor, Layout]:
    axis = ProcessGroupCollection.from_mesh(world.mesh((world.size,), ("tp",))).axis("tp")
    lay = Layout(tuple(whole.shape), (Split.even(axis, whole.shape[0]), None))
    return whole.chunk(world.size)[world.rank][None], lay


@pytest.fixture
def calls(monkeypatch):
    made = []
    all_gather = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
    for name in ("all_reduce", "all_to_all_single", all_gather):
        original = getattr(dist, name)
        monkeypatch.setattr(dist, name, lambda *a, _f=original, _n=name, **k: (made.append(_n), _f(*a, **k))[1])
    return made


def test_results_come_back_in_order_without_a_process_group():
    def rule(x):
        lay = Layout.whole(x.shape)
        mean, norm = yield lay.mean(x[None]), lay.norm(x[None])
        top = yield lay.amax(x[None], -1)
        return float(mean + norm), top

    xs = [torch.arange(6.0).reshape(2, 3) + i for i in range(3)]
    results = engine.run([(str(i), rule(x)) for i, x in enumerate(xs)])
    for x, (scalar, top) in zip(xs, results, strict=True):
        assert scalar == pytest.approx(float(x.mean() + x.norm()))
        assert torch.equal(top[0], x.amax(-1, keepdim=True))


def test_rules_may_yield_rules_and_nothing():
    def child(k):
        if k:
            got = yield [child(k - 1), child(k - 1)]
            return sum(got)
        yield ()
        return 1

    assert engine.run([("tree", child(4))]) == [16]


@pytest.mark.mpi(min_size=2)
def test_requests_of_a_round_share_one_collective(world, calls):
    def rule(x, lay):
        mean, rms = yield lay.mean(x, -2), lay.rms(x)
        total = yield lay.sum(x * mean)
        return mean, rms, total

    wholes = [torch.randn(8, n, generator=torch.Generator().manual_seed(n), dtype=torch.float64) for n in (3, 4, 5)]
    results = engine.run([("x", rule(*rows(world, whole))) for whole in wholes])
    assert calls == ["all_reduce", "all_reduce"]
    for whole, (mean, rms, total) in zip(wholes, results, strict=True):
        torch.testing.assert_close(mean[0], whole.mean(0, keepdim=True))
        torch.testing.assert_close(rms.reshape(()), whole.square().mean().sqrt())
        torch.testing.assert_close(total.reshape(()), (whole * whole.mean(0)).sum())


@pytest.mark.mpi(min_size=2)
def test_a_reduction_of_two_kinds_and_dtypes(world, calls):
    def rule(x, lay):
        return (yield lay.sum(x), lay.amax(x), lay.sum(x.float()))

    x = torch.arange(8.0, dtype=torch.float64).reshape(4, 2)
    ((total, top, single),) = engine.run([("x", rule(*rows(world, x)))])
    assert (float(total), float(top), float(single)) == (28.0, 7.0, 28.0)
    assert len(calls) == 3


@pytest.mark.mpi(min_size=2)
def test_ranks_that_differ_are_named(world, monkeypatch):
    monkeypatch.setenv(engine.CHECK, "1")

    def rule(x, lay, more):
        yield lay.sum(x)
        if more:
            yield lay.sum(x)

    x, lay = rows(world, torch.ones(4, 2))
    with pytest.raises(RuntimeError, match=r"the ranks of a group ask for different things.*decoder\.(weight|bias)"):
        engine.run([(f"decoder.{'weight' if world.rank else 'bias'}", rule(x, lay, False))])
    assert engine.run([("decoder.weight", rule(x, lay, True))]) == [None]


def test_the_dearest_matrices_are_dealt_first():
    domain = Domain(("tp",), (0, 1), ((0,), (1,)), 0, group="not used")  # type: ignore[arg-type]

    def rule(count, cost):
        return (yield Deal(domain, count, cost))

    works = [engine.Work("small", rule(3, 1.0), 1.0, 1), engine.Work("large", rule(1, 3.0), 3.0, 1)]
    assert engine.run(works) == [[1, 1, 1], [0]]


@pytest.mark.mpi(min_size=2)
def test_every_way_into_the_engine_checks_when_asked(world, monkeypatch):
    def rule(x, lay):
        yield lay.sum(x)

    monkeypatch.setenv(engine.CHECK, "1")
    group, label = dist.group.WORLD, f"rank {world.rank}"
    x, lay = rows(world, torch.ones(4, 2))
    for ask in (
        lambda: engine.run([(label, rule(x, lay))]),
        lambda: engine.Run().finish([(label, rule(x, lay))]),
        lambda: engine.reduced(label, torch.ones(()), "sum", group),
    ):
        with pytest.raises(RuntimeError, match="the ranks of a group ask for different things"):
            ask()
    assert float(engine.reduced("x", torch.ones(()), "sum", group)()) == world.size


def test_a_switch_that_says_neither_is_refused(monkeypatch):
    monkeypatch.setenv(engine.CHECK, "true")
    with pytest.raises(ValueError, match="SHARDSTEP_CHECK is 'true', but must be 1"):
        engine.run([])


@pytest.mark.mpi(min_size=2)
def test_collectives_are_told_to_a_listener(world):
    told = []
    engine.on_collective(told.append)
    try:
        engine.reduced("norm", torch.ones(()), "sum", dist.group.WORLD)()
    finally:
        engine.on_collective(None)
    engine.reduced("other", torch.ones(()), "sum", dist.group.WORLD)()
    assert told == ["norm"]
