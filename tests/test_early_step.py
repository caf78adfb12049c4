"""Steps that begin during backward are the steps that would follow it."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from core import engine
from core.optimizer.chained import ChainedOptimizer
from core.optimizer.early_step import EarlyStep
from core.optimizer.rules.adam import AdamW
from core.optimizer.rules.lion import Lion
from core.optimizer.rules.tensor_parallel_muon import TensorParallelMuon
from core.optimizer.steps import stacked
from core.process_groups_config import ProcessGroupCollection


class Sharded(torch.autograd.Function):
    """x W^T for rows of W that are cut over a group; every rank sees all outputs."""

    @staticmethod
    def forward(ctx, x, w, group):
        ctx.save_for_backward(x, w)
        ctx.group = group
        ranks = dist.get_world_size(group)
        pieces = [torch.empty(len(x), len(w), dtype=x.dtype) for _ in range(ranks)]
        dist.all_gather(pieces, (x @ w.mT).contiguous(), group=group)
        return torch.cat(pieces, -1)

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        mine = g.chunk(dist.get_world_size(ctx.group), -1)[dist.get_rank(ctx.group)]
        back = (mine @ w).contiguous()
        dist.all_reduce(back, group=ctx.group)
        return back, mine.mT @ x, None


class Stack(nn.Module):
    def __init__(self, group, layers=6, width=16):
        super().__init__()
        draw = torch.Generator().manual_seed(1)
        self.group = group
        self.weights = nn.ParameterList()
        self.gains = nn.ParameterList(nn.Parameter(torch.ones(width, dtype=torch.float64)) for _ in range(layers))
        for _ in range(layers):
            whole = torch.randn(width, width, generator=draw, dtype=torch.float64)
            w = nn.Parameter(whole.chunk(dist.get_world_size(group))[dist.get_rank(group)].clone())
            w.tensor_model_parallel, w.partition_dim = True, 0
            self.weights.append(w)

    def forward(self, x: Tensor) -> Tensor:
        for w, gain in zip(self.weights, self.gains, strict=True):
            x = x + torch.tanh(Sharded.apply(x * gain, w, self.group))
        return x.square().mean()


def chain(model, groups, mode="owner"):
    return ChainedOptimizer(
        {
            "muon": TensorParallelMuon(list(model.weights), lr=0.1, pg_collection=groups, tp_mode=mode),
            "adamw": AdamW(list(model.gains), lr=0.1, pg_collection=groups),
        },
        groups,
    )


def batches(rank=0):
    return [
        torch.randn(8, 16, generator=torch.Generator().manual_seed(100 * rank + s), dtype=torch.float64)
        for s in range(4)
    ]


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("wave", [1, 200, 10**6])
@pytest.mark.parametrize("mode", ["owner", "duplicated"])
def test_it_is_the_step_that_follows_backward(world, monkeypatch, wave, mode):
    monkeypatch.setenv(engine.WAVE, str(wave))
    groups = ProcessGroupCollection.from_mesh(world.mesh((world.size,), ("tp",)))
    early, late = (Stack(groups.tp) for _ in range(2))
    first, second = chain(early, groups, mode), chain(late, groups, mode)
    for x in batches():
        for model in (early, late):
            model.zero_grad()
            model(x).backward()  # an earlier micro-batch
        with EarlyStep(first):
            early(x + 1).backward()
        late(x + 1).backward()
        second.step()
        for a, b in zip(early.parameters(), late.parameters(), strict=True):
            assert torch.equal(a, b)


@pytest.mark.mpi(min_size=2)
def test_matrices_leave_while_backward_runs(world, monkeypatch):
    monkeypatch.setenv(engine.WAVE, "1")
    # A bucket is ready when all its matrices are.
    monkeypatch.setitem(stacked.STACK_BYTES, "cpu", 1)
    groups = ProcessGroupCollection.from_mesh(world.mesh((world.size,), ("tp",)))
    model = Stack(groups.tp)
    optimizer = chain(model, groups)
    order = []
    original = dist.all_to_all_single
    monkeypatch.setattr(dist, "all_to_all_single", lambda *a, **k: (order.append("wave"), original(*a, **k))[1])
    model.weights[0].register_post_accumulate_grad_hook(lambda p: order.append("end of backward"))
    with EarlyStep(optimizer):
        model(batches()[0]).backward()
    # Six matrices, a wave each: five of them have left before the first layer's gradient is there.
    assert order.index("end of backward") >= 5
    assert order.count("wave") == 12


@pytest.mark.mpi(min_size=4)
def test_gradients_are_reduced_over_data_parallel_ranks_as_they_come(world):
    groups = ProcessGroupCollection.from_mesh(world.mesh((2, 2), ("dp", "tp")))
    early, late = (Stack(groups.tp) for _ in range(2))
    first, second = chain(early, groups), chain(late, groups)

    def reduce(p):
        dist.all_reduce(p.grad, group=groups.dp)

    for x in batches(rank=groups.axis("dp").index):
        early.zero_grad()
        late.zero_grad()
        with EarlyStep(first, reduce=reduce):
            early(x).backward()
        late(x).backward()
        for p in late.parameters():
            reduce(p)
        second.step()
    for a, b in zip(early.parameters(), late.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.mpi(min_size=2)
def test_a_known_norm_scales_the_gradients(world):
    groups = ProcessGroupCollection.from_mesh(world.mesh((world.size,), ("tp",)))
    early, late = (Stack(groups.tp) for _ in range(2))
    first, second = chain(early, groups), chain(late, groups)
    x = batches()[0]
    late(x).backward()
    norm = second.clip_grad_norm_(0.01)
    assert norm > 0.01
    second.step()
    with EarlyStep(first, clip_grad=0.01, norm=norm):
        early(x).backward()
    for a, b in zip(early.parameters(), late.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_one_process_and_a_parameter_without_a_gradient():
    params = [nn.Parameter(torch.full((4, 4), 2.0)) for _ in range(3)]
    kept = params[2].detach().clone()
    for optimizer in (TensorParallelMuon(params, lr=0.1), Lion(params, lr=0.1)):
        before = [p.detach().clone() for p in params]
        with EarlyStep(optimizer):
            (params[0] @ params[1]).sum().backward()
        assert all(not torch.equal(p, b) for p, b in zip(params[:2], before, strict=False))
    assert torch.equal(params[2], kept)


def test_clipping_by_a_norm_that_is_not_known_is_refused():
    optimizer = TensorParallelMuon([nn.Parameter(torch.ones(4, 4))])
    with pytest.raises(ValueError, match=r"clip_grad=1.0 needs the norm of all gradients.*clip_grad=0"):
        EarlyStep(optimizer, clip_grad=1.0)


def test_a_backward_that_fails_leaves_no_hooks():
    p = nn.Parameter(torch.ones(4, 4))
    optimizer = TensorParallelMuon([p])
    with pytest.raises(RuntimeError, match="stop"), EarlyStep(optimizer):
        raise RuntimeError("stop")
    p.sum().backward()
    assert torch.equal(p, torch.ones(4, 4))
