"""The benchmark runs, and a step's collectives are few however many matrices there are. Nothing here is timed."""

import json

import pytest
import torch
import torch.distributed as dist

from core.optimizer.rules.tensor_parallel_muon import TensorParallelMuon
from core.process_groups_config import ProcessGroupCollection
from tools.bench import cases
from tools.bench import command as bench
from tools.bench.measure import count_collectives

MODES = {"duplicated": 1, "distributed": 4, "owner": 4, "blockwise": 0}
"""The most collectives that a step may take."""


def collectives(layers: int, mode: str, hidden: int = 16) -> int:
    """In one step on ``layers`` layers, cut over all ranks."""
    makers = cases.tensor_parallel("highest", dist.group.WORLD)
    matrices = cases.gpt_matrices(hidden, layers)
    (candidate,) = cases.candidates(makers, matrices, dist.group.WORLD, [f"shardstep {mode}"])
    return count_collectives(candidate.optimizer)


def check_collectives(mode: str) -> None:
    few = collectives(1, mode)
    assert few <= MODES[mode]
    assert collectives(5, mode) == few


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("mode", MODES)
def test_collectives_do_not_depend_on_the_number_of_matrices_on_2_ranks(world, mode):
    check_collectives(mode)


@pytest.mark.mpi(min_size=4)
@pytest.mark.parametrize("mode", MODES)
def test_collectives_do_not_depend_on_the_number_of_matrices_on_4_ranks(world, mode):
    check_collectives(mode)


@pytest.mark.parametrize("mode", MODES)
def test_no_collective_on_one_rank(world, mode):
    assert collectives(2, mode) == 0


def test_no_collective_without_groups():
    p = torch.nn.Parameter(torch.eye(4))
    p.grad = torch.ones_like(p)
    assert count_collectives(TensorParallelMuon([p], pg_collection=ProcessGroupCollection())) == 0


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("precision", bench.PRECISIONS)
def test_every_candidate_runs_on_2_ranks(world, precision, tmp_path, capsys):
    out = tmp_path / "out.json"
    bench.main(["--hidden", "16", "--layers", "2", "--reps", "2", "--precision", precision, "--json", str(out)])
    assert out.exists() == (world.rank == 0)
    if world.rank:
        return
    results = {result["name"]: result for result in json.loads(out.read_text())["results"]}
    assert len(results) == 7
    printed = capsys.readouterr().out
    for name, result in results.items():
        assert name in printed
        assert len(result["cpu"]) == len(result["wall"]) == 2
        # bfloat16 keeps two to three digits. A block alone gives another direction altogether.
        tolerance = 0.2 if precision == "medium" else 1e-4
        assert (result["error"] < tolerance) == result["exact"], (name, result["error"])


def check_whole_step(world, tmp_path, capsys) -> None:
    out = tmp_path / "out.json"
    small = ["--hidden", "16", "--layers", "2", "--vocabulary", "64", "--reps", "2"]
    bench.main(["--whole-step", *small, "--json", str(out)])
    if world.rank:
        return
    results = {result["name"]: result for result in json.loads(out.read_text())["results"]}
    printed = capsys.readouterr().out
    assert len(results) == 3
    for name, result in results.items():
        assert name in printed
        assert result["error"] < 1e-4, name
        assert result["adamw_error"] < 1e-6, name


@pytest.mark.mpi(min_size=2)
def test_whole_step_on_2_ranks(world, tmp_path, capsys):
    check_whole_step(world, tmp_path, capsys)


@pytest.mark.mpi(min_size=4)
def test_whole_step_on_4_ranks(world, tmp_path, capsys):
    check_whole_step(world, tmp_path, capsys)


@pytest.mark.parametrize("precision", bench.PRECISIONS)
def test_one_process(precision, capsys):
    bench.main(["--single", "--hidden", "16", "--layers", "2", "--reps", "1", "--precision", precision])
    printed = capsys.readouterr().out
    assert "shardstep" in printed and "emerging-optimizers" in printed
    assert ("torch.optim.Muon" in printed) == (precision == "medium")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--reps", "0"], "--reps 0: is out of range"),
        (["--hidden", "-8"], "--hidden -8: is out of range"),
        (["--hidden", "8"], "torchrun"),
        (["--single", "--only", "nobody"], "--only nobody: leaves no candidate"),
        (["--single", "--json", "no/such/folder/x.json"], "folder that does not exist"),
        (["--whole-step"], "torchrun"),
        (["--single", "--vocabulary", "0"], "--vocabulary 0: is out of range"),
        (["--virtual", "0"], "--virtual 0: is out of range"),
        (["--virtual", "6"], "possible: 2, 4, 8, 16"),
        (["--virtual", "8", "--hidden", "12"], "--hidden 12: cannot be cut over 8 ranks"),
        (["--virtual", "2", "--only", "nobody"], "--only nobody: leaves no candidate"),
    ],
)
def test_what_cannot_run_is_refused_in_one_line(argv, message, capsys, monkeypatch):
    # A process group that another test left would be taken for the ranks.
    monkeypatch.setattr(dist, "is_initialized", lambda: False)
    with pytest.raises(SystemExit) as stop:
        bench.main(argv)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
