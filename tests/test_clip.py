"""The global gradient norm, and steps of chained optimizers over pipeline stages."""

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, Shard

from core.optimizer.clip import NonFiniteGradientError
from core.optimizer.emerging_optimizers import get_optimizer
from core.optimizer.optimizer_config import OptimizerConfig
from core.process_groups_config import ProcessGroupCollection
from tests.sharding import whole_gradient

SHAPES = {"0.weight": (16, 8), "1.weight": (8, 16), "2.weight": (16, 16), "3.bias": (16,)}
LAYOUTS = [{"tp": 2}, {"pp": 2}, {"dp": 2}, {"pp": 2, "tp": 2}, {"dp": 2, "tp": 2}, {"tp": 4}, {"pp": 2, "dp": 2}]


class Weights(nn.Module):
    """Parameters called as in SHAPES, without a forward."""

    def __init__(self, params: dict[str, nn.Parameter]) -> None:
        super().__init__()
        for name, param in params.items():
            module, attribute = name.split(".")
            self.add_module(module, nn.Module()) if module not in self._modules else None
            getattr(self, module).register_parameter(attribute, param)


def part(world, axes, dtensor, gradients):
    """This rank's module, groups, and what cuts a whole tensor: rows over tp, parameters alternately over pp; 1-D is copied."""
    mesh = world.mesh(tuple(axes.values()), tuple(axes)) if axes else None
    at = {axis: mesh.get_local_rank(axis) for axis in axes}
    groups = ProcessGroupCollection.from_mesh(mesh) if mesh else ProcessGroupCollection()

    def cut(whole):
        if "tp" not in axes or whole.ndim < 2:
            return whole.clone()
        piece = whole.chunk(axes["tp"], 0)[at["tp"]].clone()
        if dtensor:
            return DTensor.from_local(piece, mesh["tp"], [Shard(0)], shape=whole.shape, stride=whole.stride())
        return piece

    params = {}
    for i, (name, shape) in enumerate(SHAPES.items()):
        if "pp" in axes and i % 2 != at["pp"]:
            continue
        weight = torch.linspace(-1, 1, torch.Size(shape).numel(), dtype=torch.float64).reshape(shape)
        params[name] = nn.Parameter(cut(weight))
        if len(shape) == 2 and "tp" in axes and not dtensor:
            params[name].tensor_model_parallel, params[name].partition_dim = True, 0
        params[name].grad = cut(gradients[name])
    return params, groups, cut


def gradients(step=5):
    return {name: whole_gradient(i, step, shape) for i, (name, shape) in enumerate(SHAPES.items())}


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
