"""Hundreds of steps and tens of saves of the training job leave nothing behind in the process."""

import json
import os
from pathlib import Path
from statistics import median

import pytest

from tests.support.processes import on_ranks, train
from tools.pretrain import job

STEPS, SAVES = 500, 50
SETTLED, WINDOW = 100, 50
JOB = (
    "--num-layers 2 --hidden-size 192 --num-attention-heads 4 --seq-length 32 --micro-batch-size 1 --global-batch-size 2 "
    "--eval-interval 0 --log-interval 100 --optimizer muon --muon-num-ns-steps 2 --distributed-backend gloo "
    f"--train-iters {STEPS} --save-interval {STEPS // SAVES} --keep-checkpoints 2"
).split()


def status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


class Watch(job.Progress):
    """Notes after every step what the process has."""

    def tick(self, step: int) -> None:
        super().tick(step)
        SEEN.append((status("VmRSS"), len(os.listdir("/proc/self/fd")), status("Threads")))


SEEN: list[tuple[int, int, int]] = []
"""kB, descriptors, threads after each step of this process."""


def one_rank(rank: int, flags: list[str], out: Path) -> None:
    job.Progress = Watch  # type: ignore[misc]
    train(rank, flags)
    (out / f"{rank}.json").write_text(json.dumps(SEEN))


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("how", ["sync", "async"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_memory_descriptors_and_threads_stay(tmp_path, ranks, how):
    flags = [*JOB, "--save", str(tmp_path / "saved"), "--tensor-model-parallel-size", str(ranks)]
    on_ranks(ranks, one_rank, flags + ["--async-save"] * (how == "async"), tmp_path)
    for rank in range(ranks):
        seen = json.loads((tmp_path / f"{rank}.json").read_text())
        assert len(seen) == STEPS
        first, last = (list(zip(*part, strict=True)) for part in (seen[SETTLED : SETTLED + WINDOW], seen[-WINDOW:]))
        growth = [max(after) / max(before) - 1 for before, after in zip(first, last, strict=True)]
        middle = median(last[0]) / median(first[0]) - 1
        print(
            f"{ranks} ranks, {how}, rank {rank}: RSS {max(first[0]) / 1024:.1f} → {max(last[0]) / 1024:.1f} MB "
            f"({growth[0]:+.2%}; medians {middle:+.2%}), descriptors {max(first[1])} → {max(last[1])}, "
            f"threads {max(first[2])} → {max(last[2])}; RSS at every {WINDOW} steps "
            f"{[round(max(seen[at : at + WINDOW])[0] / 1024) for at in range(0, STEPS, WINDOW)]}",
            flush=True,
        )
        assert growth[0] < 0.02
        assert middle < 0.02
        assert max(last[1]) <= max(first[1])
        assert max(last[2]) <= max(first[2])
