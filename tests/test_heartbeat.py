"""A rank that is missing from a collective is named within the time-out, with what it was at, and so are those that wait."""

import os
import re
import socket
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist

from tools.pretrain.heartbeat import Beat, Heartbeat, LostRankError, meet
from tools.pretrain.parallel import Engine

ROOT = Path(__file__).parents[1]
FLAGS = (
    "--num-layers 2 --hidden-size 32 --num-attention-heads 4 --seq-length 16 --micro-batch-size 1 --global-batch-size 4 "
    "--tensor-model-parallel-size 2 --eval-interval 0 --train-iters 1000000 --log-interval 1000000"
).split()


@pytest.fixture
def text(tmp_path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("".join(f"{n} times {n} is {n * n}.\n" for n in range(400)))
    return path


def job(fault: str, tmp_path: Path, text: Path, minutes: float) -> str:
    """What the rank without a fault says; there is no launcher that ends it when the other one ends."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    mark = tmp_path / "mark"
    given = os.environ | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": "2",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "tests.support.faulty_job", fault, str(mark), *FLAGS, "--data-path", str(text)]
    command += ["--distributed-timeout-minutes", str(minutes)]
    faulty = int(fault.split(":")[2])
    ranks = [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env=given | {"RANK": str(rank)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        said = ranks[1 - faulty].communicate(timeout=100)[1]
    finally:
        for process in ranks:
            process.kill()
            process.communicate()
    assert ranks[1 - faulty].returncode == 2, said
    return said


@pytest.mark.soak
def test_a_rank_that_sleeps(tmp_path, text):
    said = job("forward:2:1:3:sleep", tmp_path, text, 0.1)
    place = r"decoder\.layers\.0\.self_attention\.linear_proj, tests/support/faulty_job\.py"
    stuck = f"rank 1 is stuck in step 3, forward, at {place}"
    waits = r"Waiting for it: rank 0 in step 3, forward, at decoder\.layers\.\d\.\S+, tools/pretrain/model\.py:\d+ in forward"
    assert re.search(f"pretrain: error: {stuck}.*{waits}.*--distributed-timeout-minutes 0.1", said), said


@pytest.mark.soak
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_exits(tmp_path, text, rank):
    """With rank 0 the store goes, too."""
    said = job(f"optimizer:1:{rank}:3:exit", tmp_path, text, 1)
    gone = {
        0: r"rank 0 is gone, and with it the store: it was last heard of at step 3, optimizer",
        1: r"rank 1 does not answer \(dead, or stopped\): it was last heard of in step 3, optimizer",
    }[rank]
    waits = rf"[Rr]ank {1 - rank}.* in step 3, optimizer, at decoder\.[\w.]+\.weight, core/[\w/]+\.py:\d+ in \w+"
    assert re.search(f"pretrain: error: {gone}.*{waits}", said), said


def test_a_rank_that_does_not_start_is_named():
    with pytest.raises(LostRankError, match=r"rank 1, 2 did not start within 0.1 s of rank 0"):
        meet(dist.HashStore(), 0, 3, timedelta(seconds=0.1))


def fails(store: dist.Store, error: Exception, *others: Beat) -> str:
    """What rank 0 says when a collective fails with ``error`` and the other ranks told ``others``."""
    heart = Heartbeat(store, 0, 1 + len(others), timedelta(seconds=30))
    for rank, beat in enumerate(others, 1):
        told = Heartbeat(store, rank, 1 + len(others), timedelta(seconds=30))
        told._own_beat = beat
        told._write()
    heart.at("clip", 7)
    with pytest.raises(LostRankError) as raised, heart.watch():
        raise error
    return str(raised.value)


def test_who_failed_and_who_waits():
    error = RuntimeError("[gloo/transport/tcp/pair.cc:537] Connection closed by peer\nmore")
    failed = Beat(step=7, phase="backward", inside="mlp", place="a.py:3 in f", state="failed: KeyError")
    said = fails(dist.HashStore(), error, failed, Beat(step=7, phase="optimizer", state="waiting"))
    assert said.startswith(
        "rank 1 failed: KeyError, in step 7, backward, at mlp, a.py:3 in f. Waiting for it: rank 0 in step 7, clip"
    )
    assert "; rank 2 in step 7, optimizer. (--distributed-timeout-minutes 0.5) [[gloo" in said
    assert said.endswith("Connection closed by peer]")


def test_ranks_that_wait_for_each_other():
    said = fails(dist.HashStore(), RuntimeError("gloo: Timed out"), Beat(step=6, phase="optimizer", state="waiting"))
    assert "every rank waits for another one" in said
    assert "rank 0 in step 7, clip" in said
    assert "rank 1 in step 6, optimizer" in said


def test_another_error_is_left_as_it_is_and_told():
    store = dist.HashStore()
    heart = Heartbeat(store, 0, 1, timedelta(seconds=30))
    with pytest.raises(KeyError), heart.watch():
        raise KeyError("x")
    assert heart._read([0])[0].state == "failed: KeyError"


def test_the_engine_tells_its_reductions():
    from tests.support.small_gpt import UNTIED, batch

    engine, told = Engine(UNTIED), []
    engine.tell = told.append
    engine.train_step(batch(0))
    assert told == ["gradients", "loss"]
