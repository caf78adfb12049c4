"""Stages that step in the pipeline's bubble train as those that wait for each other, bit for bit."""

import math

import pytest
import torch

from core.faults import FaultError, Guard
from core.optimizer.emerging_optimizers import get_optimizer
from core.optimizer.optimizer_config import OptimizerConfig
from core.optimizer.speculative_step import SpeculativeStep
from core.process_groups_config import ProcessGroupCollection
from core.sharding.parameter_layout import local
from tests.support.small_gpt import TIED, UNTIED, batch, build, parameters
from tools.plot.timeline import CHUNKS, Span, shares
from tools.pretrain.bubble_step import BubbleStep
from tools.pretrain.parallel import AXES

CLIPS = {"off": 0.0, "never bites": 100.0, "always bites": 0.1, "bites now and then": 1.2}


class Pipeline:
    """One stage of a training run."""

    def __init__(self, world, layout, config, *, inside, optimizer="muon", on_non_finite="skip", **settings):
        self.engine = build(world, config, layout)
        pp, tp = layout.get("pp", 1), layout.get("tp", 1)
        mesh = world.mesh((pp, world.size // (pp * tp), tp), AXES)
        groups = ProcessGroupCollection.from_mesh(mesh)
        given = OptimizerConfig.from_dict({"optimizer": optimizer, "lr": 0.02, **settings})
        self.optimizer = get_optimizer(given, self.engine.model_chunks, groups)
        self.guard = Guard(self.optimizer, on_non_finite=on_non_finite)
        stage = mesh["pp"].get_local_rank()
        self.bubble = BubbleStep(self.optimizer, self.guard, has_bubble=stage > 0) if inside else None
        self.is_first = stage == 0

    def step(self, step: int, max_norm: float, spoil: bool = False) -> tuple[float, float]:
        def then() -> None:
            if spoil:
                next(iter(parameters(self.engine).values())).grad.fill_(math.nan)
            if self.bubble:
                self.bubble.begin()

        loss = self.engine.train_step(batch(step), then=then)
        if self.bubble:
            verdict = self.bubble.settle(step, loss, max_norm)
        else:
            verdict = self.guard.judge(step, loss, max_norm=max_norm)
            if verdict.take:
                self.optimizer.step()
        return loss, verdict.norm

    def weights(self):
        return {name: local(p.detach()).clone() for name, p in parameters(self.engine).items()}


def check_both_orders(world, layout, config, max_norm, steps=5, **settings):
    plain, inside = (Pipeline(world, layout, config, inside=inside, **settings) for inside in (False, True))
    for step in range(steps):
        assert inside.step(step, max_norm) == plain.step(step, max_norm)
        after = plain.weights()
        assert all(torch.equal(after[name], w) for name, w in inside.weights().items())
    return inside


@pytest.mark.mpi(min_size=4)
@pytest.mark.parametrize("clip", CLIPS)
def test_both_orders_train_alike(world, clip):
    bubble = check_both_orders(world, {"pp": 4}, UNTIED, CLIPS[clip]).bubble
    ahead, undone = {"off": (5, 0), "never bites": (5, 0), "always bites": (0, 1)}.get(clip, (None, None))
    if bubble._has_bubble and ahead is not None:
        assert (bubble.ahead, bubble.undone) == (ahead, undone)
    elif not bubble._has_bubble:
        assert bubble.ahead == bubble.undone == 0


@pytest.mark.mpi(min_size=4)
@pytest.mark.parametrize("optimizer", ["muon", "soap", "adafactor"])
@pytest.mark.parametrize("layout", [{"pp": 2, "tp": 2}, {"pp": 2}], ids=str)
def test_any_optimizer_on_any_layout_may(world, layout, optimizer):
    check_both_orders(world, layout, TIED, 1.2, steps=3, optimizer=optimizer)


@pytest.mark.mpi(min_size=4)
@pytest.mark.parametrize("where", [0, 3])
def test_a_gradient_that_is_not_finite_on_one_stage_moves_none(world, where):
    job = Pipeline(world, {"pp": 4}, UNTIED, inside=True)
    job.step(0, 1.0)
    before = job.weights()
    job.step(1, 0.0, spoil=world.rank == where)
    assert job.guard.skipped == 1
    assert all(torch.equal(before[name], w) for name, w in job.weights().items())
    job.step(2, 0.0)
    assert any(not torch.equal(before[name], w) for name, w in job.weights().items())


@pytest.mark.mpi(min_size=2)
def test_an_error_leaves_nothing_changed(world):
    job = Pipeline(world, {"pp": 2}, UNTIED, inside=True, on_non_finite="error")
    before = job.weights()
    with pytest.raises(FaultError, match="nothing was changed"):
        job.step(0, 0.0, spoil=job.is_first)
    assert all(torch.equal(before[name], w) for name, w in job.weights().items())


@pytest.mark.mpi(min_size=2)
def test_an_optimizer_that_looks_at_all_stages_is_refused(world):
    with pytest.raises(ValueError, match="mars itself scales by a norm over all pipeline stages"):
        Pipeline(world, {"pp": 2}, UNTIED, inside=True, optimizer="mars")
    alone = get_optimizer(OptimizerConfig(optimizer="mars", lr=0.1), [torch.nn.Linear(4, 4)])
    SpeculativeStep(alone)


def test_shares_count_what_lies_in_the_bubble():
    spans = [
        Span("backward", 0, 0, CHUNKS, 5.0, 10.0),
        Span("optimizer", 0, 0, 0, 11.0, 14.0),
        Span("backward", 1, 1, CHUNKS, 3.0, 6.0),
        Span("optimizer", 1, 1, 0, 7.0, 12.0),
    ]
    first, second = shares(spans).values()
    assert (first.bubble, first.optimizer, first.inside) == (0.0, 3.0, 0.0)
    assert (second.bubble, second.optimizer, second.inside) == (4.0, 5.0, 3.0)
