"""What is chosen by prediction or measurement: the step stays that of the whole matrix, on all ranks alike."""

from dataclasses import replace

import pytest
import torch

from core.linalg import autotune
from core.linalg.autotune import cache_file
from core.optimizer.rules.tensor_parallel_muon import TensorParallelMuon
from core.process_groups_config import ProcessGroupCollection
from tests.support.sharding import CUTS, sharded, sharded_optimizer, unsharded

# FLOP/s, memory B/s, link latency s, link B/s.
SLOW_LINK = (1e12, 1e12, 1.0, 1e15)
FAST_LINK = (1e6, 1e12, 1e-9, 1e15)
RATES = {"slow link": SLOW_LINK, "fast link": FAST_LINK, "measured": None}


def modes(optimizer) -> list[str]:
    return [optimizer.mode_of(p) for group in optimizer.param_groups for p in group["params"]]


@pytest.mark.mpi(min_size=4)
@pytest.mark.parametrize("rates", ["slow link", "fast link", pytest.param("measured", marks=pytest.mark.soak)])
@pytest.mark.parametrize("name", ["muon", "adaptive_muon"])
@pytest.mark.parametrize("cut", ["uneven columns", "tp rows, dp copies", "qkv tp, dp copies"])
def test_the_step_is_that_of_the_whole_matrix(world, cut, name, rates):
    whole = CUTS[world.size][cut]
    got, shard = sharded(name, whole, 5, world, tp_mode="auto", auto_rates=RATES[rates])
    for a, b in zip(got, unsharded(name, whole, 5), strict=True):
        torch.testing.assert_close(a, shard(b), rtol=1e-9, atol=1e-9)


@pytest.mark.mpi(min_size=4)
def test_the_choice_follows_the_rates_and_is_said(world):
    cut = CUTS[4]["rows"]

    def said_with(rates):
        return modes(sharded_optimizer("muon", cut, world, tp_mode="auto", auto_rates=rates))

    # Where a collective takes a second, everybody computes what one gather brings.
    assert all(said.startswith("auto: duplicated, ") for said in said_with(SLOW_LINK))
    # Where it takes none, the work is shared.
    assert all(
        said.startswith(("auto: owner, ", "auto: team ", "auto: distributed, ")) for said in said_with(FAST_LINK)
    )
    for said in said_with(None):
        assert said.startswith("auto: ") and said.endswith(" ms") and "blockwise" not in said


@pytest.mark.mpi(min_size=4)
def test_one_wide_matrix_goes_to_a_team(world):
    groups = ProcessGroupCollection.from_mesh(world.mesh((4,), ("tp",)))
    p = torch.nn.Parameter(torch.ones(16, 1024))
    p.tensor_model_parallel, p.partition_dim = True, 1
    optimizer = TensorParallelMuon(
        [p], pg_collection=groups, tp_mode="auto", auto_rates=FAST_LINK, fp32_matmul_prec="highest"
    )
    (said,) = modes(optimizer)
    assert said.startswith(("auto: team", "auto: distributed"))


def test_one_process_needs_no_choice():
    p = torch.nn.Parameter(torch.ones(8, 16))
    assert modes(TensorParallelMuon([p], tp_mode="auto")) == ["one rank"]


@pytest.mark.parametrize("rates", [(1.0, 1.0, 1.0), (1.0, 1.0, 0.0, 1.0), (-1.0, 1.0, 1.0, 1.0)])
def test_rates_that_are_none_are_refused(rates):
    with pytest.raises(ValueError, match=r"auto_rates=.*four positive numbers"):
        TensorParallelMuon([torch.nn.Parameter(torch.ones(2, 2))], auto_rates=rates)


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("mode", ["owner", "duplicated"])
def test_all_ranks_take_the_variants_that_one_has_measured(world, monkeypatch, tmp_path, mode):
    """And a later run takes them out of the file: bit for bit the same."""
    whole = replace(CUTS[world.size]["rows"], dtype=torch.float32)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / str(world.rank)))
    tuned, _ = sharded("muon", whole, 3, world, tp_mode=mode, ns_plan="tune")
    assert cache_file().exists() == (world.rank == 0)
    monkeypatch.setattr(autotune, "_seconds", lambda *_: pytest.fail("measured again"))
    pinned, _ = sharded("muon", whole, 3, world, tp_mode=mode, ns_plan=str(cache_file()))
    for a, b in zip(tuned, pinned, strict=True):
        assert torch.equal(a, b)


@pytest.mark.mpi(min_size=2)
def test_a_plan_that_cannot_be_read_is_refused_on_all_ranks(world, tmp_path):
    with pytest.raises(ValueError, match=r"cannot be read as a plan.*'static', 'tune'"):
        sharded("muon", CUTS[2]["rows"], 1, world, ns_plan=str(tmp_path / "none.json"))
