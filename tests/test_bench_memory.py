"""What the memory benchmark counts."""

import pytest
import torch
import torch.distributed as dist

from tools.bench import memory as bench_memory
from tools.bench.memory import Memory

MB = 1_000_000


def test_allocations_are_counted():
    kept = []

    def run() -> None:
        first = torch.empty(3 * MB, dtype=torch.uint8)
        kept.append(torch.empty(MB, dtype=torch.uint8))
        del first
        torch.empty(2 * MB, dtype=torch.uint8)

    assert bench_memory.allocated(run, "cpu") == (4 * MB, MB)


def test_a_storage_of_several_states_counts_once():
    params = [torch.nn.Parameter(torch.zeros(4)) for _ in range(2)]
    optimizer = torch.optim.SGD(params)
    stack = torch.zeros(2, 4)
    for p, view in zip(params, stack, strict=True):
        optimizer.state[p] = {"momentum_buffer": view, "step": 1}
    assert bench_memory.state_bytes(optimizer) == 2 * 4 * 4


def test_growth_of_the_process():
    def run() -> None:
        torch.ones(64 * MB, dtype=torch.uint8)

    run()
    assert 60 * MB < bench_memory.rss_growth(run) < 80 * MB


def test_rows_are_per_element_of_the_largest_matrix():
    measured = {"a": [Memory(30.0, 10.0, 0.0), Memory(30.0, 10.0, 0.0)], "b": [Memory(40, 0, 0), Memory(80, 0, 0)]}
    head, a, b = bench_memory.rows(measured, [1, 2], 2)
    assert head[0] == "optimizer" and len(head) == len(a) == len(b)
    assert [cell for h, cell in zip(head, a, strict=True) if h == "B/element"] == ["20.0", "20.0"]
    assert (a[-1], b[-1]) == ("yes", "no")


def check_table(world, capsys) -> None:
    bench_memory.main(["--hidden", "16", "--layers", "1", "2"])
    assert dist.is_initialized()
    if world.rank == 0:
        lines = capsys.readouterr().out.splitlines()
        names = ("Megatron-Core duplicated", "shardstep owner", "torch.optim.Muon (local)")
        assert len(lines) == 1 + 3 + 4 + 2
        assert all(any(line.startswith(name) for line in lines) for name in names)


@pytest.mark.soak
@pytest.mark.mpi(min_size=2)
def test_every_optimizer_on_2_ranks(world, capsys):
    check_table(world, capsys)


@pytest.mark.soak
@pytest.mark.mpi(min_size=4)
def test_every_optimizer_on_4_ranks(world, capsys):
    check_table(world, capsys)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "torchrun"),
        (["--layers", "0"], "--layers 0: is out of range"),
        (["--virtual", "0"], "--virtual 0: is out of range"),
        (["--virtual", "4", "--hidden", "6"], "--hidden 6: cannot be cut over 4 ranks"),
        (["--virtual", "2", "--only", "nobody"], "--only nobody: leaves no optimizer"),
        (["--virtual", "2", "--device", "cuda"], "needs 1 GPUs, there are 0"),
    ],
)
def test_what_cannot_run_is_refused_in_one_line(argv, message, capsys, monkeypatch):
    monkeypatch.setattr(dist, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(SystemExit) as stop:
        bench_memory.main(argv)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
