"""The global gradient norm, and steps of chained optimizers over pipeline stages."""

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, Shard

from core.optimizer.clip import NonFiniteGradientError, clip_grad_norm_
from core.optimizer.emerging_optimizers import get_optimizer
from core.optimizer.optimizer_config import OptimizerConfig
from core.process_groups_config import ProcessGroupCollection
from core.sharding.parameter_layout import layout_of
from tests.support.sharding import Weights, whole_gradient
from tests.support.whole_and_part import LAYOUTS, SHAPES, gradients, part


def chain(params, groups, name="muon"):
    return get_optimizer(OptimizerConfig(optimizer=name, lr=0.1, muon_split_qkv=False), [Weights(params)], groups)


def check_norm(world, axes, dtensor):
    whole = gradients()
    params, groups, cut = part(world, axes, dtensor, whole)
    optimizer = chain(params, groups)
    norm = torch.stack([g.square().sum() for g in whole.values()]).sum().sqrt()
    for limit in (0.0, 1e9, 0.5):
        assert optimizer.clip_grad_norm_(limit) == pytest.approx(float(norm), rel=1e-12)
    factor = 0.5 / (norm + 1e-6)
    for name, p in params.items():
        torch.testing.assert_close(p.grad, cut(whole[name] * factor), rtol=1e-12, atol=0)


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("dtensor", [False, True])
@pytest.mark.parametrize("axes", [a for a in LAYOUTS if len(a) == 1 and 4 not in a.values()], ids=str)
def test_norm_equals_the_unsharded_one_on_2_ranks(world, axes, dtensor):
    check_norm(world, axes, dtensor)


@pytest.mark.mpi(min_size=4)
@pytest.mark.parametrize("dtensor", [False, True])
@pytest.mark.parametrize("axes", [a for a in LAYOUTS if len(a) == 2 or 4 in a.values()], ids=str)
def test_norm_equals_the_unsharded_one_on_4_ranks(world, axes, dtensor):
    check_norm(world, axes, dtensor)


@pytest.mark.mpi(min_size=4)
@pytest.mark.parametrize("name", ["muon", "adaptive_muon", "adamw", "sgd"])
@pytest.mark.parametrize("axes", [a for a in LAYOUTS if len(a) == 2 or 4 in a.values()], ids=str)
def test_clipped_steps_of_a_chain_equal_the_unsharded_ones(world, axes, name):
    trained = []
    for layout in ({}, axes):
        params, groups, cut = part(world, layout, False, gradients(0))
        optimizer = chain(params, groups, name)
        for step in range(10):
            whole = gradients(step + 3)
            for parameter, p in params.items():
                p.grad = cut(whole[parameter])
            optimizer.clip_grad_norm_(1.0)
            optimizer.step()
        trained.append((params, cut))
    (whole, _), (mine, cut) = trained
    for parameter, p in mine.items():
        torch.testing.assert_close(p.detach(), cut(whole[parameter].detach()), rtol=1e-9, atol=1e-11)


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("axes", [{"tp": 2}, {"pp": 2}], ids=str)
def test_a_gradient_that_is_not_finite_stops_all_ranks_before_anything_changes(world, axes, bad):
    whole = gradients()
    whole["1.weight"][-1, 3] = bad
    params, groups, _ = part(world, axes, False, whole)
    optimizer = chain(params, groups)
    before = [p.grad.clone() for p in params.values()]
    with pytest.raises(NonFiniteGradientError, match=r"1\.weight on model-parallel rank 1 is not finite"):
        optimizer.clip_grad_norm_(1.0)
    for p, g in zip(params.values(), before, strict=True):
        torch.testing.assert_close(p.grad, g, rtol=0, atol=0, equal_nan=True)


@pytest.mark.mpi(min_size=2)
def test_a_tied_copy_counts_once(world):
    groups = ProcessGroupCollection.from_mesh(world.mesh((2,), ("pp",)))
    p = nn.Parameter(torch.ones(4, 4))
    p.grad = torch.full((4, 4), 3.0)
    p.shared = world.rank == 1
    assert chain({"0.weight": p}, groups).clip_grad_norm_(0.0) == 12.0


@pytest.mark.mpi(min_size=4)
@pytest.mark.parametrize("attribute", ["shared", "shared_embedding"])
def test_an_embedding_tied_across_first_and_last_stage_counts_once(world, attribute):
    mesh = world.mesh((2, 2), ("pp", "tp"))
    first, tp = mesh.get_local_rank("pp") == 0, mesh.get_local_rank("tp")
    table, own = whole_gradient(0, 5, (8, 4)), whole_gradient(1 + (not first), 5, (4, 4))
    tied, other = nn.Parameter(torch.zeros(4, 4)), nn.Parameter(torch.zeros(4, 4))
    tied.grad, other.grad = table.chunk(2)[tp].float(), own.float()
    tied.tensor_model_parallel, tied.partition_dim = True, 0
    # As Megatron-Core marks them: shared is the copy alone, shared_embedding are both.
    setattr(tied, attribute, attribute == "shared_embedding" or not first)
    optimizer = chain({"0.weight": tied, "1.weight": other}, ProcessGroupCollection.from_mesh(mesh), "sgd")
    wholes = [whole_gradient(0, 5, (8, 4)), whole_gradient(1, 5, (4, 4)), whole_gradient(2, 5, (4, 4))]
    norm = torch.stack([g.square().sum() for g in wholes]).sum().sqrt()
    assert optimizer.clip_grad_norm_(0.0) == pytest.approx(float(norm), rel=1e-6)


EXPERTS = {
    "over dp": ({"dp": 2, "expt_dp": 1}, "dp", None),
    "over tp": ({"tp": 2, "expt_tp": 1}, "tp", None),
    "with one copy each": ({"dp": 2, "tp": 2, "expt_tp": 1}, "tp", "dp"),
    "cut over tp": ({"dp": 2, "tp": 2, "expt_dp": 1}, "dp", None),
    "on the last stage": ({"pp": 2, "dp": 2, "expt_dp": 1}, "dp", None),
}
"""Mesh; the axis whose ranks hold different experts; the one whose ranks hold copies."""


def check_experts(world, axes, apart, copies):
    """A dense weight, cut over tp, and an expert for each rank along ``apart``, cut over expt_tp where it has several ranks."""
    mesh = world.mesh(tuple(axes.values()), tuple(axes))
    groups = ProcessGroupCollection.from_mesh(mesh)
    if copies is not None:
        groups.expt_dp = mesh.get_group(copies)
    cuts_experts = "tp" in axes and "expt_tp" not in axes
    if cuts_experts:
        groups.expt_tp = mesh.get_group("tp")
    at = {axis: mesh.get_local_rank(axis) for axis in axes}
    stages, stage = axes.get("pp", 1), at.get("pp", 0)

    def parameter(whole, cut):
        p = nn.Parameter(torch.zeros_like(whole.chunk(2)[0] if cut else whole))
        p.grad = whole.chunk(2)[at["tp"]].clone() if cut else whole.clone()
        p.tensor_model_parallel, p.partition_dim = cut, 0 if cut else -1
        return p

    dense = [whole_gradient(i, 5, (8, 4)) for i in range(stages)]
    experts = [whole_gradient(10 + i, 5, (8, 4)) for i in range(2)]
    params = {"0.weight": parameter(dense[stage], "tp" in axes)}
    if stage == stages - 1:
        params["1.weight"] = parameter(experts[at[apart]], cuts_experts)
        params["1.weight"].allreduce = False
    norm = torch.stack([g.square().sum() for g in (*dense, *experts)]).sum().sqrt()
    assert chain(params, groups, "sgd").clip_grad_norm_(0.5) == pytest.approx(float(norm), rel=1e-12)
    for p, whole in zip(params.values(), (dense[stage], experts[at[apart]]), strict=False):
        cut = p.tensor_model_parallel
        wanted = (whole.chunk(2)[at["tp"]] if cut else whole) * (0.5 / (norm + 1e-6))
        torch.testing.assert_close(p.grad, wanted, rtol=1e-12, atol=0)


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("name", ["over dp", "over tp"])
def test_the_norm_covers_all_experts_on_2_ranks(world, name):
    check_experts(world, *EXPERTS[name])


@pytest.mark.mpi(min_size=4)
@pytest.mark.parametrize("name", ["with one copy each", "cut over tp", "on the last stage"])
def test_the_norm_covers_all_experts_on_4_ranks(world, name):
    check_experts(world, *EXPERTS[name])


@pytest.mark.mpi(min_size=2)
def test_experts_whose_ranks_nobody_told_of_have_no_norm(world):
    p = nn.Parameter(torch.ones(4, 4))
    p.grad, p.allreduce = torch.ones(4, 4), False
    optimizer = chain({"1.weight": p}, ProcessGroupCollection.from_mesh(world.mesh((2,), ("dp",))), "sgd")
    with pytest.raises(ValueError, match=r"1\.weight is an expert's, but .* pass pg_collection"):
        optimizer.clip_grad_norm_(1.0)


def test_a_parameter_that_comes_twice_counts_and_is_scaled_once():
    p = nn.Parameter(torch.ones(4))
    p.grad = torch.full((4,), 3.0)
    entry = ("0.weight", p, layout_of(p, ProcessGroupCollection()))
    assert clip_grad_norm_([entry, entry], 3.0, ProcessGroupCollection()) == 6.0
    assert float(p.grad.norm()) == pytest.approx(3.0)


def test_clipping_by_value_is_torchs():
    params = {name: nn.Parameter(torch.zeros(shape)) for name, shape in SHAPES.items()}
    for (name, p), g in zip(params.items(), gradients().values(), strict=True):
        p.grad = None if name == "1.weight" else g.float()
    wanted = [nn.Parameter(torch.zeros_like(p)) for p in params.values()]
    for p, q in zip(params.values(), wanted, strict=True):
        q.grad = None if p.grad is None else p.grad.clone()
    torch.nn.utils.clip_grad_value_(wanted, 0.5)
    optimizer = chain(params, ProcessGroupCollection())
    optimizer.clip_grad_value_(0.5)
    for p, q in zip(params.values(), wanted, strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=0, atol=0) if p.grad is not None else None
    assert params["1.weight"].grad is None
    with pytest.raises(ValueError, match="max_value=-1 must be"):
        optimizer.clip_grad_value_(-1)


def test_large_float32_gradients_do_not_overflow():
    p = nn.Parameter(torch.ones(4))
    p.grad = torch.full((4,), 3e38)
    optimizer = chain({"0.weight": p}, ProcessGroupCollection(), "adamw")
    assert optimizer.clip_grad_norm_(1.0) == pytest.approx(6e38, rel=1e-6)
    assert float(p.grad.norm()) == pytest.approx(1.0)


@pytest.mark.mpi(min_size=2)
def test_a_pattern_that_matches_on_another_stage_is_no_error(world):
    from core.optimizer.optimizer_config import ParamKey

    params, groups, _ = part(world, {"pp": 2}, False, gradients())
    config = OptimizerConfig(optimizer="adamw", lr=0.1)
    get_optimizer(config, [Weights(params)], groups, {ParamKey(name="0.weight"): {"lr": 0.5}})
    with pytest.raises(ValueError, match=r"'nothing\.\*' matches no parameter"):
        get_optimizer(config, [Weights(params)], groups, {ParamKey(name="nothing.*"): {"lr": 0.5}})


@pytest.mark.mpi(min_size=2)
def test_gradients_placed_otherwise_are_redistributed(world):
    mesh = world.mesh((2,), ("tp",))
    whole = whole_gradient(0, 5, (8, 8))
    p = nn.Parameter(DTensor.from_local(torch.zeros(4, 8, dtype=torch.float64), mesh, [Shard(0)]))
    p.grad = DTensor.from_local(whole.clone(), mesh, [Replicate()])
    optimizer = chain({"0.weight": p}, ProcessGroupCollection.from_mesh(mesh), "sgd")
    optimizer.step()
    torch.testing.assert_close(p.to_local().detach(), -0.1 * whole.chunk(2)[world.rank])
