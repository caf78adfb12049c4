"""Schedule-free optimizers: what the parameters hold, and checkpoints in either mode."""

import pytest
import schedulefree
import torch
from torch import nn
from torch.distributed.tensor import DTensor, Shard

from core.checkpoint import load, save
from core.optimizer.rules.schedule_free import ScheduleFreeAdamW, ScheduleFreeSGD
from core.process_groups_config import ProcessGroupCollection

SETTINGS = {"lr": 0.05, "weight_decay": 0.1, "warmup_steps": 6, "r": 0.5}
both = pytest.mark.parametrize(
    ("cls", "peer"),
    [
        (ScheduleFreeAdamW, schedulefree.AdamWScheduleFree),
        (ScheduleFreeSGD, schedulefree.SGDScheduleFree),
    ],
)


def model() -> nn.Linear:
    torch.manual_seed(3)
    return nn.Linear(5, 4, dtype=torch.float64)


def step(module: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for k in steps:
        for i, p in enumerate(module.parameters()):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(10 * k + i), dtype=p.dtype)
        optimizer.step()


def assert_equal(module: nn.Module, other: nn.Module, tolerance: float = 1e-12) -> None:
    for p, q in zip(module.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=tolerance, atol=tolerance)


@both
def test_evaluation_in_between_is_the_peers(cls, peer):
    mine, other = model(), model()
    ours, theirs = cls(mine.parameters(), **SETTINGS), peer(other.parameters(), **SETTINGS)
    theirs.train()
    for start in (0, 4, 8):
        step(mine, ours, range(start, start + 4))
        step(other, theirs, range(start, start + 4))
        assert_equal(mine, other)
        for optimizer in (ours, theirs):
            optimizer.eval()
            optimizer.eval()
        assert_equal(mine, other)
        for optimizer in (ours, theirs):
            optimizer.train()
    assert_equal(mine, other)


def test_evaluation_holds_the_weighted_average_of_the_iterates():
    """x by its definition, a mean of z with weights t^r·(largest rate)², on gradients that do not depend on y."""
    module = model()
    optimizer = ScheduleFreeSGD(module.parameters(), **{**SETTINGS, "weight_decay": 0.0})
    z = module.weight.detach().clone()
    mean, total = torch.zeros_like(z), 0.0
    for k in range(9):
        rate = 0.05 * min((k + 1) / 6, 1)
        z -= rate * torch.randn(z.shape, generator=torch.Generator().manual_seed(10 * k), dtype=z.dtype)
        weight = (k + 1) ** 0.5 * rate**2
        mean, total = mean + weight * z, total + weight
    step(module, optimizer, range(9))
    optimizer.eval()
    torch.testing.assert_close(module.weight.detach(), mean / total, rtol=1e-12, atol=1e-12)


@both
def test_a_step_in_evaluation_mode_is_refused_and_changes_nothing(cls, peer):
    module = model()
    optimizer = cls(module.parameters(), **SETTINGS)
    step(module, optimizer, range(2))
    optimizer.eval()
    before = module.weight.detach().clone()
    with pytest.raises(RuntimeError, match=r"evaluation mode.*train\(\)"):
        step(module, optimizer, range(2, 3))
    assert torch.equal(module.weight, before)
    optimizer.train()
    step(module, optimizer, range(2, 3))


@both
def test_modes_before_the_first_step_change_nothing(cls, peer):
    module = model()
    optimizer = cls(module.parameters(), **SETTINGS)
    optimizer.eval()
    optimizer.train()
    assert_equal(module, model(), 0.0)
    with torch.no_grad():
        module.weight.fill_(2.0)  # as when weights are loaded after the optimizer was made
    optimizer.eval()
    assert torch.equal(module.weight, torch.full_like(module.weight, 2.0))


@both
@pytest.mark.parametrize("evaluating", [False, True])
@pytest.mark.parametrize("how", ["state_dict", "checkpoint"])
def test_a_run_goes_on_from_either_mode(cls, peer, evaluating, how, tmp_path):
    straight, saved, loaded = model(), model(), nn.Linear(5, 4, dtype=torch.float64)
    reference, first, second = (cls(m.named_parameters(), **SETTINGS) for m in (straight, saved, loaded))
    step(straight, reference, range(10))
    step(saved, first, range(4))
    if evaluating:
        first.eval()
    if how == "checkpoint":
        save(tmp_path, step=4, model_chunks=[saved], optimizer=first)
        load(tmp_path, model_chunks=[loaded], optimizer=second)
    else:
        loaded.load_state_dict(saved.state_dict())
        second.load_state_dict(first.state_dict())
    assert second.state[loaded.weight]["weight_sum"].dtype == torch.float64
    assert_equal(loaded, saved, 0.0)
    if evaluating:
        with pytest.raises(RuntimeError, match=r"train\(\)"):
            step(loaded, second, range(4, 5))
    second.train()
    step(loaded, second, range(4, 10))
    assert_equal(loaded, straight)
    second.eval()
    reference.eval()
    assert_equal(loaded, straight)


def test_16_bit_parameters_come_back_from_evaluation_to_a_unit_in_the_last_place():
    module = model().to(torch.bfloat16)
    optimizer = ScheduleFreeAdamW(module.parameters(), lr=0.05)
    step(module, optimizer, range(3))
    before = module.weight.detach().clone()
    optimizer.eval()
    optimizer.train()
    torch.testing.assert_close(module.weight.detach(), before, rtol=2**-7, atol=2**-9)


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("cls", [ScheduleFreeAdamW, ScheduleFreeSGD])
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("dtensor", [False, True])
def test_both_modes_are_the_same_on_shards(world, cls, dim, dtensor):
    """Steps, evaluation and steps again; one parameter has no gradient at first, so that its count differs."""
    mesh = world.mesh((2,), ("tp",))
    wholes = [torch.randn(6, 8, generator=torch.Generator().manual_seed(i), dtype=torch.float64) for i in range(2)]

    def shard(whole):
        piece = whole.chunk(2, dim)[world.rank].contiguous()
        return DTensor.from_local(piece, mesh, [Shard(dim)]) if dtensor else piece

    def run(parameter, **kwargs):
        params = [nn.Parameter(parameter(whole.clone())) for whole in wholes]
        for p in params:
            if kwargs and not dtensor:
                p.tensor_model_parallel, p.partition_dim = True, dim
        optimizer = cls(params, **SETTINGS, **kwargs)
        seen = []
        for k in range(6):
            for i, p in enumerate(params):
                g = torch.randn(6, 8, generator=torch.Generator().manual_seed(10 * k + i), dtype=torch.float64)
                p.grad = None if (i, k) == (1, 0) else parameter(g)
            optimizer.step()
            if k in (2, 5):
                optimizer.eval()
                seen += [p.detach().clone() for p in params]
                optimizer.train()
        scalars = [float(optimizer.state[p][name]) for p in params for name in ("k", "weight_sum", "lr_max")]
        return [x.to_local() if isinstance(x, DTensor) else x for x in seen], scalars

    got, scalars = run(shard, pg_collection=ProcessGroupCollection.from_mesh(mesh))
    wanted, same = run(lambda x: x)
    assert scalars == same
    for mine, whole in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine, whole.chunk(2, dim)[world.rank], rtol=1e-12, atol=1e-12)
