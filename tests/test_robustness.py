"""What users do that examples do not: uneven shards, strange strides, loads that fit badly, steps that must not half happen."""

import gc
import weakref

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor, Shard

from core.optimizer.emerging_optimizers import TensorParallelMuon, get_optimizer, register_optimizer
from core.optimizer.optimizer_config import OptimizerConfig, ParamKey
from core.optimizer.rules.adam import AdamW
from core.optimizer.rules.sgd import SGD
from core.process_groups_config import ProcessGroupCollection
from tests.support.sharding import Cut, sharded, unsharded, whole_gradient


def weight(shape=(8, 4), i=0, dtype=torch.float32) -> nn.Parameter:
    return nn.Parameter(whole_gradient(i, 9, shape).to(dtype))


def step(optimizer, times=1):
    for k in range(times):
        for group in optimizer.param_groups:
            for i, p in enumerate(group["params"]):
                p.grad = whole_gradient(i, 10 + k, tuple(p.shape)).to(p.dtype)
        optimizer.step()


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("mode", ["owner", "distributed", "duplicated"])
@pytest.mark.parametrize("method", ["normuon", "namo"])
def test_uneven_shards_share_buckets_alike_on_all_ranks(world, method, mode):
    """Two rows on one rank and one on the other, small enough to be stacked, on the edge of what a bucket holds."""
    cut = Cut({"tp": 2}, {"tp": 0}, dtensor=True, shapes=((3, 6000),) * 4)
    kwargs = {"moment2_method": method}
    got, shard = sharded("adaptive_muon", cut, 4, world, tp_mode=mode, **kwargs)
    for mine, whole in zip(got, unsharded("adaptive_muon", cut, 4, **kwargs), strict=True):
        torch.testing.assert_close(mine, shard(whole), rtol=1e-8, atol=1e-8)


@pytest.mark.mpi(min_size=2)
def test_experts_are_not_copies_of_each_other(world):
    groups = ProcessGroupCollection.from_mesh(world.mesh((2,), ("dp",)))
    results = []
    for collection in (groups, None):
        p = weight(i=world.rank)
        p.allreduce = False
        optimizer = TensorParallelMuon([p], lr=0.1, pg_collection=collection, tp_mode="owner")
        p.grad = whole_gradient(world.rank, 11, (8, 4)).float()
        optimizer.step()
        results.append(p.detach())
    assert torch.equal(*results)


@pytest.mark.mpi(min_size=2)
def test_pieces_that_no_stride_gives_are_refused(world):
    p = weight((3, 4))
    p.tensor_model_parallel, p.partition_dim, p.partition_stride = True, 0, 2
    with pytest.raises(ValueError, match="partition_stride"):
        TensorParallelMuon([p], pg_collection=ProcessGroupCollection.from_mesh(world.mesh((2,), ("tp",))))


@pytest.mark.parametrize("cls", [AdamW, SGD, TensorParallelMuon])
def test_strides_do_not_matter(cls):
    plain, transposed = weight((8, 4)), nn.Parameter(weight((8, 4)).detach().t().contiguous().t())
    table = weight((8, 6)).detach().clone()
    before = table.clone()
    sliced = nn.Parameter(table[:, :4])
    sliced.data.copy_(plain.data)
    for p in (plain, transposed, sliced):
        step(cls([p], lr=0.1), 2)
    assert torch.equal(plain, transposed)
    assert torch.equal(plain, sliced)
    assert torch.equal(table[:, 4:], before[:, 4:])


@pytest.mark.parametrize("cls", [AdamW, SGD, TensorParallelMuon])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loaded_state_keeps_its_bits_and_is_nobody_elses(cls, dtype):
    kwargs = {"momentum": 0.9} if cls is SGD else {}
    p, q = weight(dtype=dtype), weight(dtype=dtype)
    first, second = cls([p], lr=0.1, **kwargs), cls([q], lr=0.1, **kwargs)
    step(first, 3)
    saved = {name: value.clone() for name, value in first.state[p].items()}
    second.load_state_dict(first.state_dict())
    step(first)
    for name, value in saved.items():
        assert second.state[q][name].dtype == torch.float32
        assert torch.equal(second.state[q][name], value)
    step(second)


@pytest.mark.parametrize("cls", [AdamW, TensorParallelMuon])
def test_a_load_that_does_not_fit_changes_nothing(cls):
    small, big = cls([weight((4, 8))], lr=0.1), cls([weight((8, 4))], lr=0.2)
    step(small, 2)
    with pytest.raises(ValueError, match=r"\(4, 8\).*\(8, 4\)"):
        big.load_state_dict(small.state_dict())
    assert big.param_groups[0]["lr"] == 0.2
    step(big)


def test_a_bad_gradient_or_group_changes_nothing():
    p, q = weight(), weight(i=1)
    optimizer = TensorParallelMuon([p, q], lr=0.1)
    before = p.detach().clone()
    p.grad, q.grad = torch.ones_like(p), torch.ones_like(q).to_sparse()
    with pytest.raises(ValueError, match="sparse; nothing was changed"):
        optimizer.step()
    assert torch.equal(p, before)
    q.grad = None
    with pytest.raises(ValueError, match="works on matrices"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3))]})
    optimizer.step()
    assert not torch.equal(p, before)


def test_nothing_outlives_replaced_parameters_or_the_optimizer():
    p = weight()
    optimizer = TensorParallelMuon([p], lr=0.1)
    main = nn.Parameter(p.detach().clone())
    optimizer.param_groups[0]["params"] = [main]
    optimizer.state[main] = optimizer.state.pop(p)
    step(optimizer)
    gone = weakref.ref(p)
    del p
    gc.collect()
    assert gone() is None
    gone = weakref.ref(optimizer)
    gc.disable()
    try:
        del optimizer
        assert gone() is None
    finally:
        gc.enable()


def test_autocast_does_not_round_a_step():
    plain, cast = weight(), weight()
    step(TensorParallelMuon([plain], lr=0.1, fp32_matmul_prec="highest"))
    optimizer = TensorParallelMuon([cast], lr=0.1, fp32_matmul_prec="highest")
    with torch.autocast("cpu", torch.bfloat16):
        step(optimizer)
    assert torch.equal(plain, cast)


def test_a_weight_that_two_chunks_share_is_stepped_once():
    class Chunk(nn.Module):
        def __init__(self, name, shared):
            super().__init__()
            self.register_parameter(name, shared)

    shared = weight()
    chain = get_optimizer(OptimizerConfig(optimizer="adamw", lr=0.1), [Chunk("word", shared), Chunk("output", shared)])
    assert [a.name for a in chain.assignments()] == ["word"]


def test_lists_are_settings_too():
    model = nn.Sequential(nn.Linear(4, 4))
    overrides = {ParamKey(name="0.bias"): {"betas": [0.5, 0.6]}}
    chain = get_optimizer(OptimizerConfig(optimizer="adamw", lr=0.1), [model], param_overrides=overrides)
    assert (0.5, 0.6) in [group["betas"] for group in chain.param_groups]


def test_embedding_modules_are_no_matrices_whatever_they_are_called():
    model = nn.ModuleDict({"wte": nn.Embedding(8, 4), "fc": nn.Linear(4, 4, bias=False)})
    chain = get_optimizer(OptimizerConfig(optimizer="muon", lr=0.1), [model])
    assert {a.name: a.optimizer for a in chain.assignments()} == {"wte.weight": "adamw", "fc.weight": "muon"}


def test_an_instance_is_no_entry():
    with pytest.raises(TypeError, match="is no optimizer class and no EmergingOptimizerEntry"):
        register_optimizer("foo", torch.optim.SGD([torch.ones(1)]))


@pytest.mark.mpi(min_size=2)
def test_clipping_a_stage_without_gradients(world):
    groups = ProcessGroupCollection.from_mesh(world.mesh((2,), ("pp",)))
    model = nn.Linear(4, 4, bias=False)
    chain = get_optimizer(OptimizerConfig(optimizer="adamw", lr=0.1), [model], groups)
    if world.rank == 0:
        model.weight.grad = torch.full((4, 4), 3.0)
    assert chain.clip_grad_norm_(1.0) == pytest.approx(12.0)


@pytest.mark.mpi(min_size=2)
def test_an_axis_may_go_by_two_names(world):
    mesh = world.mesh((2,), ("shards",))
    groups = ProcessGroupCollection(tp=mesh.get_group("shards"))
    whole = whole_gradient(0, 3, (8, 4))
    p = nn.Parameter(DTensor.from_local(torch.zeros(4, 4, dtype=torch.float64), mesh, [Shard(0)]))
    p.grad = DTensor.from_local(whole.chunk(2)[world.rank].clone(), mesh, [Shard(0)])
    module = nn.Module()
    module.register_parameter("weight", p)
    chain = get_optimizer(OptimizerConfig(optimizer="muon", lr=0.1), [module], groups)
    assert chain.clip_grad_norm_(0.0) == pytest.approx(float(whole.norm()))
    chain.step()


@pytest.mark.mpi(min_size=4)
def test_equal_names_on_different_ranks_are_different_domains(world):
    """Two meshes that both call an axis tp: over neighbours, and over ranks two apart."""
    near, far = (world.mesh((2, 2), names) for names in (("dp", "tp"), ("tp", "dp")))
    params = []
    for i, mesh in enumerate((near, far)):
        local = whole_gradient(i, 3, (8, 4)).chunk(2)[mesh.get_local_rank("tp")].clone()
        p = nn.Parameter(DTensor.from_local(local, mesh["tp"], [Shard(0)]))
        p.grad = DTensor.from_local(local.clone(), mesh["tp"], [Shard(0)])
        params.append(p)
    optimizer = TensorParallelMuon(params, lr=0.1, tp_mode="owner", fp32_matmul_prec="highest")
    optimizer.step()
    for i, (p, mesh) in enumerate(zip(params, (near, far), strict=True)):
        whole = nn.Parameter(whole_gradient(i, 3, (8, 4)))
        whole.grad = whole.detach().clone()
        TensorParallelMuon([whole], lr=0.1, fp32_matmul_prec="highest").step()
        torch.testing.assert_close(p.to_local().detach(), whole.detach().chunk(2)[mesh.get_local_rank("tp")])
