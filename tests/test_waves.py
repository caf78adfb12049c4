"""Owner mode in waves: the same bits for any wave size and layout, few tensors in memory, and work that fills the waits."""

import hashlib
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor.debug import CommDebugMode

from core import engine
from core.engine.waves import Wave
from core.optimizer.chained import ChainedOptimizer
from core.optimizer.rules.adam import AdamW
from core.optimizer.rules.tensor_parallel_muon import TensorParallelMuon
from core.process_groups_config import ProcessGroupCollection
from tests.support.sharding import CUTS, sharded, sharded_optimizer, unsharded, whole_gradient

LARGE = ((512, 640), (640, 512), (512, 512))
"""Rows from which a matrix on CPU goes through kernels of its own."""


def digest(weights: list[Tensor]) -> str:
    return hashlib.sha256(b"".join(w.contiguous().numpy().tobytes() for w in weights)).hexdigest()


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("precision", ["highest", "medium"])
@pytest.mark.parametrize("cut", ["rows", "columns", "copies", "qkv"])
def test_weights_have_one_hash_on_two_ranks_for_every_wave_size(world, monkeypatch, cut, precision):
    compare_hashes(world, monkeypatch, cut, precision)


@pytest.mark.mpi(min_size=4)
@pytest.mark.parametrize("precision", ["highest", "medium"])
@pytest.mark.parametrize("cut", ["rows", "columns", "tp rows, dp copies", "tp columns, dp copies", "qkv tp, dp copies"])
def test_weights_have_one_hash_on_four_ranks_for_every_wave_size(world, monkeypatch, cut, precision):
    compare_hashes(world, monkeypatch, cut, precision)


def compare_hashes(world, monkeypatch, cut, precision):
    whole = replace(CUTS[world.size][cut], dtype=torch.float32)
    wanted = unsharded("muon", whole, 20, fp32_matmul_prec=precision)
    for wave in (1, 4000, None):
        if wave:
            monkeypatch.setenv(engine.WAVE, str(wave))
        else:
            monkeypatch.delenv(engine.WAVE)
        got, shard = sharded("muon", whole, 20, world, tp_mode="owner", fp32_matmul_prec=precision)
        assert digest(got) == digest([shard(w) for w in wanted]), wave


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("precision", ["highest", "medium"])
def test_large_matrices_have_the_same_hash_too(world, monkeypatch, precision):
    whole = replace(CUTS[world.size]["rows"], dtype=torch.float32, shapes=LARGE)
    wanted = unsharded("muon", whole, 2, fp32_matmul_prec=precision)
    for wave in (1, 10**9):
        monkeypatch.setenv(engine.WAVE, str(wave))
        got, shard = sharded("muon", whole, 2, world, tp_mode="owner", fp32_matmul_prec=precision)
        assert digest(got) == digest([shard(w) for w in wanted]), wave


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("name", ["muon", "soap", "shampoo"])
def test_a_wave_costs_two_collectives_and_brings_no_rank_more_than_its_limit(world, monkeypatch, name):
    cut = replace(CUTS[world.size]["rows"], shapes=((24, 64), (64, 24), (32, 32), (16, 8), (40, 16)))
    optimizer = sharded_optimizer(name, cut, world, tp_mode="owner")
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for p in params:
        p.grad = torch.ones_like(p)
    brought = []
    original = dist.all_to_all_single

    def spy(recv, *args, **kw):
        brought.append(recv.numel())
        return original(recv, *args, **kw)

    monkeypatch.setattr(dist, "all_to_all_single", spy)
    counts = {}
    middle = 1600 * (1 if name == "muon" else 2)
    for wave in (1, middle, 10**9):
        monkeypatch.setenv(engine.WAVE, str(wave))
        brought.clear()
        with CommDebugMode() as calls:
            optimizer.step()
        counts[wave] = calls.get_total_counts()
        # In a wave of several tensors each rank takes in what the limit says; one tensor alone may be larger.
        tensors = 1 if name == "muon" else 2
        largest = tensors * max(p.numel() * world.size for p in params)
        assert max(brought) <= max(wave, largest)
    assert counts[10**9] == 2 < counts[middle] < counts[1] <= 2 * len(params)


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize(("precision", "waves"), [("medium", engine.DEPTH), ("highest", engine.DEPTH - 1)])
def test_no_more_than_three_waves_are_under_way_and_two_of_wide_entries(world, monkeypatch, precision, waves):
    monkeypatch.setenv(engine.WAVE, "1")
    cut = replace(CUTS[world.size]["rows"], dtype=torch.float32)
    kwargs = {"tp_mode": "owner", "moment2_method": "normuon", "fp32_matmul_prec": precision}
    optimizer = sharded_optimizer("adaptive_muon", cut, world, **kwargs)
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.ones_like(p)
    alive, most = [0], [0]
    post = Wave._post

    def counting(batch, start):
        finish = post(batch, start)
        alive[0] += 1
        most[0] = max(most[0], alive[0])

        def finished():
            alive[0] -= 1
            finish()

        return finished

    monkeypatch.setattr(Wave, "_post", staticmethod(counting))
    optimizer.step()
    assert most[0] == waves and not alive[0]


@pytest.mark.mpi(min_size=2)
def test_other_parameters_are_updated_while_the_first_wave_travels(world, monkeypatch):
    groups = ProcessGroupCollection.from_mesh(world.mesh((world.size,), ("tp",)))
    matrix = torch.nn.Parameter(torch.ones(8, 16))
    matrix.tensor_model_parallel, matrix.partition_dim = True, 0
    vector = torch.nn.Parameter(torch.ones(8))
    order = []

    class Watched(AdamW):
        def update_(self, *args):
            order.append("adamw")
            super().update_(*args)

    original = dist.all_to_all_single

    def watched(*args, **kwargs):
        order.append("sent")
        return original(*args, **kwargs)

    monkeypatch.setattr(dist, "all_to_all_single", watched)
    chain = ChainedOptimizer(
        {
            "muon": TensorParallelMuon([matrix], pg_collection=groups, tp_mode="owner"),
            "adamw": Watched([vector], pg_collection=groups),
        },
        groups,
    )
    matrix.grad, vector.grad = torch.ones_like(matrix), torch.ones_like(vector)
    chain.step()
    assert order == ["sent", "adamw", "sent"]


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("given", ["0", "-3", "many", "1.5"])
def test_a_wave_size_that_is_none_is_refused_before_anything_is_changed(world, monkeypatch, given):
    monkeypatch.setenv(engine.WAVE, given)
    optimizer = sharded_optimizer("muon", CUTS[world.size]["rows"], world, tp_mode="owner")
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for i, p in enumerate(params):
        p.grad = whole_gradient(i, 0, tuple(p.shape))
    before = [p.detach().clone() for p in params]
    with pytest.raises(ValueError, match=f"SHARDSTEP_WAVE is '{given}'"):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, params, strict=True))
    assert not any(s.any() for p in params for s in optimizer.state[p].values())


@pytest.mark.mpi(min_size=4)
@pytest.mark.parametrize("team", [2, 4])
@pytest.mark.parametrize("name", ["muon", pytest.param("adaptive_muon", marks=pytest.mark.soak)])
@pytest.mark.parametrize("cut", ["dtensor columns", "tp rows, dp copies", "qkv one group"])
def test_a_team_takes_the_step_of_the_whole_matrix(world, monkeypatch, cut, name, team):
    """The largest matrices are worked on by several ranks together, the others by one each, in one step."""
    original = TensorParallelMuon.layout

    def layout(self, p):
        lay = original(self, p)
        large = lay.domain.size > 1 and max(lay.shape) > 30
        return replace(lay, domain=self._groups.teamed(lay.domain, team)) if large else lay

    whole = CUTS[world.size][cut]
    kwargs = {"moment2_method": "normuon"} if name == "adaptive_muon" else {}
    wanted = unsharded(name, whole, 6, **kwargs)
    monkeypatch.setattr(TensorParallelMuon, "layout", layout)
    for wave in ("1", "4000"):
        monkeypatch.setenv(engine.WAVE, wave)
        monkeypatch.setenv("SHARDSTEP_CHECK", "1")
        got, shard = sharded(name, whole, 6, world, tp_mode="owner", **kwargs)
        for a, b in zip(got, wanted, strict=True):
            torch.testing.assert_close(a, shard(b), rtol=1e-9, atol=1e-9)
