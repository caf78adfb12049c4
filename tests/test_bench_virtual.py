"""The benchmark on ranks that do not exist: whose work is counted, and that received buffers hold numbers."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tools.bench import command as bench
from tools.bench import virtual
from tools.bench.cases import Candidate

ROOT = Path(__file__).parent.parent


@pytest.mark.soak
@pytest.mark.timeout(300)
def test_shares_of_the_work(tmp_path):
    out = tmp_path / "out.json"
    flags = ["--virtual", "4", "--hidden", "32", "--layers", "4", "--reps", "2", "--json", str(out)]
    # In a process of its own: its fake process group would be taken for this one's.
    done = subprocess.run(
        [sys.executable, "-m", "tools.bench", *flags], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    results = [virtual.Result(**result) for result in json.loads(out.read_text())["results"]]
    assert len(results) == 2 + 2 * 7
    assert all(len(result.cpu) == 2 for result in results)
    work = {(r.name, r.ranks): virtual.scaling(r, results)[1] for r in results}
    for ranks in (2, 4):
        # Everybody does all of it.
        assert work["shardstep duplicated", ranks] == work["Megatron-Core duplicated", ranks] == ranks
        # Four equal layers can be dealt evenly.
        assert 1 <= work["shardstep owner", ranks] <= 1.15
        assert all(f"{ranks} " in done.stdout and name in done.stdout for name, n in work if n == ranks)


def test_it_is_for_one_process(world, capsys):
    with pytest.raises(SystemExit) as stop:
        bench.main(["--virtual", "2"])
    assert stop.value.code == 2
    assert "--virtual 2: is for one process" in capsys.readouterr().err


def test_noise_is_received_and_counted(world):
    sent, received = torch.zeros(4, 5), torch.full((4, 5), torch.nan)
    with virtual.Noise() as noise:
        dist.all_gather([received], sent)
        dist.all_reduce(sent)
    assert noise.filled == 1
    assert received.isfinite().all() and received.abs().min() > 0
    dist.all_gather([received], sent)
    assert not received.any()


def test_a_collective_that_is_not_filled_is_an_error(world):
    received, sent = torch.zeros(2), torch.ones(2)

    class Hidden:
        def step(self) -> None:
            dist.distributed_c10d.all_gather([received], sent)

    with (
        virtual.Noise() as noise,
        pytest.raises(RuntimeError, match="hidden took 1 collectives that receive, and 0"),
    ):
        virtual._flops(Candidate("hidden", Hidden(), []), noise)
