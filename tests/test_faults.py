"""Steps that must not be taken are taken by no rank, or end the run on all of them; nothing has changed then."""

import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from core.faults import FaultError, Guard, check_state
from core.optimizer.chained import ChainedOptimizer
from core.optimizer.emerging_optimizers import get_optimizer
from core.optimizer.optimizer_config import OptimizerConfig
from core.process_groups_config import ProcessGroupCollection
from tests.support.sharding import Weights

SHAPES = {"0.weight": (16, 8), "1.weight": (8, 16), "2.weight": (16, 16), "3.bias": (16,)}
STAGES = ({"0.weight", "2.weight"}, {"1.weight", "3.bias"})
VALUES = {"nan": math.nan, "+inf": math.inf, "-inf": -math.inf, "3e38": 3e38, "denormal": 1e-40, "zero": 0.0}
SITES = ("element", "tensor", "stage", "state")
GRID = {"pp": 2, "tp": 2}


def build(world: Any = None, axes: dict[str, int] | None = None) -> tuple[dict[str, nn.Parameter], ChainedOptimizer]:
    """Float32 parameters, rows over tp, two stages; muon for matrices and adamw for the bias, which tp ranks copy."""
    axes = axes or {}
    mesh = world.mesh(tuple(axes.values()), tuple(axes)) if axes else None
    at = {axis: mesh.get_local_rank(axis) for axis in axes}
    params = {}
    for i, (name, shape) in enumerate(SHAPES.items()):
        if "pp" in axes and name not in STAGES[at["pp"]]:
            continue
        whole = torch.randn(shape, generator=torch.Generator().manual_seed(i))
        cut = "tp" in axes and len(shape) == 2
        params[name] = nn.Parameter(whole.chunk(2)[at["tp"]].clone() if cut else whole)
        if cut:
            params[name].tensor_model_parallel, params[name].partition_dim = True, 0
    groups = ProcessGroupCollection.from_mesh(mesh) if mesh else ProcessGroupCollection()
    config = OptimizerConfig(optimizer="muon", lr=0.01, muon_split_qkv=False)
    return params, get_optimizer(config, [Weights(params)], groups)


def set_gradients(params: dict[str, nn.Parameter], seed: int, scale: float = 1.0) -> None:
    """Equal ones on tp ranks for what they copy."""
    for name, p in params.items():
        draw = torch.Generator().manual_seed(100 * seed + [*SHAPES].index(name))
        p.grad = scale * torch.randn(p.shape, generator=draw)


def everything(params: dict[str, nn.Parameter], optimizer: ChainedOptimizer) -> dict[str, Tensor]:
    """Copies of weights and state."""
    kept = {name: p.detach().clone() for name, p in params.items()}
    for name, p in params.items():
        kept |= {f"{slot} of {name}": torch.as_tensor(x).clone() for slot, x in optimizer.state[p].items()}
    return kept


def is_same(before: dict[str, Tensor], after: dict[str, Tensor]) -> bool:
    """Bitwise, NaN included."""
    return before.keys() == after.keys() and all(
        torch.equal(x.view(torch.uint8), after[k].view(torch.uint8)) if x.ndim else torch.equal(x, after[k])
        for k, x in before.items()
    )


def poison(site: str, value: float, world: Any, params: dict[str, nn.Parameter], optimizer: ChainedOptimizer) -> None:
    """The last rank holds the fault; with a whole stage, each of its ranks."""
    gradients = [p.grad for p in params.values()]
    if site == "stage" and "1.weight" in params:
        for g in gradients:
            g.fill_(value)
    elif site == "element" and world.rank == world.size - 1:
        params["1.weight"].grad[-1, 3] = value
    elif site == "tensor" and world.rank == world.size - 1:
        params["1.weight"].grad.fill_(value)
    elif site == "state" and world.rank == world.size - 1:
        slots = optimizer.state[params["1.weight"]]
        next(x for x in slots.values() if x.ndim == 2).view(-1)[5] = value


def together(world: Any, mine: Any) -> list[Any]:
    told: list[Any] = [None] * world.size
    torch.distributed.all_gather_object(told, mine)
    return told


@pytest.mark.mpi(min_size=4)
@pytest.mark.parametrize("policy", ["error", "skip"])
@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("name", VALUES)
def test_all_ranks_decide_alike_and_nothing_changes_without_a_step(world, name, site, policy):
    params, optimizer = build(world, GRID)
    guard = Guard(optimizer, on_non_finite=policy)
    set_gradients(params, 1)
    optimizer.step()
    set_gradients(params, 2)
    poison(site, VALUES[name], world, params, optimizer)
    before = everything(params, optimizer)
    said = ""
    try:
        check_state(optimizer, 1)
        verdict = guard.judge(2, 3.0, max_norm=1.0)
        decided = "take" if verdict.take else "leave out"
        said = verdict.reason
        if verdict.take:
            optimizer.step()
    except FaultError as error:
        decided, said = "error", str(error)
    finite = math.isfinite(VALUES[name])
    assert decided == ("take" if finite else "error" if site == "state" else {"skip": "leave out"}.get(policy, "error"))
    assert len(set(together(world, (decided, said)))) == 1
    assert is_same(before, everything(params, optimizer)) == (decided != "take")
    copies = together(world, params["3.bias"].tolist() if "3.bias" in params else None)
    assert copies[2] == copies[3]
    if not finite:
        first = min(rank for rank in range(4) if rank >= (2 if site == "stage" else 3))
        what = {"state": r"after step 1: momentum\w* of 1\.weight"}.get(site, r"step 2: gradient of 1\.weight")
        assert guard.skipped == (decided == "leave out")
        assert re.match(rf"{what} on rank {first}\b.* not finite", said), said


@pytest.mark.mpi(min_size=4)
@pytest.mark.parametrize("policy", ["error", "skip"])
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_what_only_one_replica_has_is_a_fault_of_all(world, what, policy):
    """Data-parallel ranks hold equal gradients, unless memory is bad; nothing else would tell the others."""
    params, optimizer = build(world, {"dp": 2, "tp": 2})
    guard = Guard(optimizer, on_non_finite=policy)
    set_gradients(params, 1)
    mine = world.rank == 3
    if mine and what == "gradient":
        params["2.weight"].grad[0, 0] = math.nan
    before = everything(params, optimizer)
    try:
        said = guard.judge(1, math.nan if mine and what == "loss" else 3.0, max_norm=1.0).reason
    except FaultError as error:
        said = str(error)
    assert said.startswith(
        "step 1: loss on rank 3 is" if what == "loss" else "step 1: gradient of 2.weight on rank 3 is"
    )
    assert len(set(together(world, (said, guard.skipped)))) == 1
    assert guard.skipped == (policy == "skip")
    assert is_same(before, everything(params, optimizer))


@pytest.mark.mpi(min_size=2)
def test_one_rank_with_a_poisoned_weight_stops_all(world):
    params, optimizer = build(world, {"tp": 2})
    check_state(optimizer, 7)
    if world.rank == 1:
        params["0.weight"].data[0, 0] = math.nan
    with pytest.raises(FaultError, match=r"after step 7: weight of 0\.weight on rank 1 is not finite"):
        check_state(optimizer, 7)


def judge(guard: Guard, params: dict[str, nn.Parameter], step: int, loss: float, norm: float) -> bool:
    set_gradients(params, step)
    length = math.sqrt(sum(float(p.grad.double().square().sum()) for p in params.values()))
    for p in params.values():
        p.grad *= norm / length
    return guard.judge(step, loss).take


def test_skips_in_a_row_stop_the_run_and_a_step_between_them_does_not():
    params, optimizer = build()
    guard = Guard(optimizer, on_non_finite="skip", max_skipped=3)
    bad = [True, True, False, True, True]
    for step, is_bad in enumerate(bad, 1):
        assert judge(guard, params, step, math.nan if is_bad else 1.0, 1.0) != is_bad
    assert (guard.skipped, guard.in_a_row) == (4, 2)
    resumed = Guard(optimizer, on_non_finite="skip", max_skipped=3)
    resumed.load_state_dict(guard.state_dict())
    with pytest.raises(FaultError, match=r"3 steps in a row were left out.*step 6: loss on rank 0 is not finite"):
        judge(resumed, params, 6, math.nan, 1.0)


def noise(steps: int, seed: int) -> list[tuple[float, float]]:
    """Loss and gradient norm of a run as they are: a falling curve, and noise of several kinds."""
    draw = torch.Generator().manual_seed(seed)
    z = torch.randn(steps, 2, generator=draw)
    return [
        (2 + 4 * math.exp(-t / 100) + 0.1 * float(z[t, 0]), (1 + math.exp(-t / 50)) * math.exp(0.25 * float(z[t, 1])))
        for t in range(steps)
    ]


@pytest.mark.parametrize("seed", range(4))
def test_normal_noise_is_no_spike(seed):
    params, optimizer = build()
    guard = Guard(optimizer, loss_spike=1.5, norm_spike=4)
    taken = [judge(guard, params, step, *values) for step, values in enumerate(noise(500, seed), 1)]
    assert (all(taken), guard.skipped) == (True, 0)


@pytest.mark.parametrize("factor", [10.0, 100.0])
@pytest.mark.parametrize("at", [65, 200])
def test_a_norm_of_many_times_the_usual_is_left_out(factor, at):
    params, optimizer = build()
    guard = Guard(optimizer, norm_spike=4)
    left_out = []
    for step, (loss, norm) in enumerate(noise(260, 0), 1):
        taken = judge(guard, params, step, loss, norm * (factor if step in (at, at + 1) else 1))
        left_out += [] if taken else [step]
    assert left_out == [at, at + 1]
    assert guard.skipped == 2


def test_nothing_is_a_spike_before_the_window_is_full():
    params, optimizer = build()
    guard = Guard(optimizer, norm_spike=2, loss_spike=2, window=5)
    values = [1, 100, 1, 100, 1, 100]
    assert [judge(guard, params, step, 1.0, norm) for step, norm in enumerate(values, 1)] == [True] * 5 + [False]


def test_a_learning_rate_spike_is_left_out():
    """Least squares by gradient descent: one step too long, and the loss of the next ones is a multiple."""
    model = nn.Linear(8, 1)
    optimizer = get_optimizer(OptimizerConfig(optimizer="sgd", lr=0.05, weight_decay=0.0), [model])
    guard = Guard(optimizer, loss_spike=3, window=20)
    taken = []
    for step in range(1, 61):
        x = torch.randn(64, 8, generator=torch.Generator().manual_seed(step))
        loss = (model(x) - x.sum(1, keepdim=True)).square().mean() + 1
        optimizer.zero_grad()
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = 5.0 if step == 50 else 0.05
        taken.append(guard.judge(step, loss.item()).take)
        if taken[-1]:
            optimizer.step()
        if step == 55:
            with pytest.raises(FaultError, match="2 steps in a row"):
                Guard.judge(replaced(guard, 2), step, loss.item())
            break
    assert taken == [True] * 50 + [False] * 5


def replaced(guard: Guard, limit: int) -> Guard:
    strict = Guard(guard._optimizer, loss_spike=3, window=20, max_skipped=limit)
    strict.load_state_dict({**guard.state_dict(), "in_a_row": limit - 1})
    return strict


def test_the_window_is_kept():
    params, optimizer = build()
    guard, resumed = (Guard(optimizer, norm_spike=4, window=8) for _ in range(2))
    for step in range(1, 9):
        judge(guard, params, step, 1.0, 1.0)
    resumed.load_state_dict(guard.state_dict())
    assert not judge(resumed, params, 9, 1.0, 5.0)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"on_non_finite": "ignore"}, "on_non_finite is 'ignore'; possible: 'error', 'skip'"),
        ({"max_skipped": 0}, "max_skipped is 0"),
        ({"loss_spike": 1.0}, "loss_spike is 1.0; give a factor above 1"),
        ({"norm_spike": math.nan}, "norm_spike is nan"),
        ({"window": 0}, "window is 0"),
    ],
)
def test_arguments_that_make_no_sense(given, said):
    with pytest.raises(ValueError, match=said):
        Guard(build()[1], **given)
