"""torchrun starts a job again whose rank was killed, and it ends as the one that nobody touched; signals end it in order."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from torch import Tensor

from core.checkpoint import latest_step
from tests.support.small_run import differing, read_plainly
from tools.pretrain.launch import Launch
from tools.pretrain.report import Record, read_log
from tools.usage import UsageError

ROOT = Path(__file__).parents[1]
STEPS = 8
FLAGS = (
    "--num-layers 2 --hidden-size 32 --num-attention-heads 4 --seq-length 16 --micro-batch-size 1 --global-batch-size 4 "
    f"--tensor-model-parallel-size 2 --eval-interval 0 --save-interval 3 --train-iters {STEPS} --exit-signal-handler "
    "--distributed-timeout-minutes 0.5"
).split()
PLACES = {
    "forward": ("1:0:2", "3:1:4", "6:2:5", "2:3:8"),
    "backward": ("1:0:8", "2:1:7", "5:2:5", "8:3:2"),
    "optimizer": ("1:0:1", "2:1:4", "1:2:6", "2:3:8"),
    "save": ("3:0:3", "1:1:3", "2:2:6", "1:3:8"),
    "load": ("2:0:3", "1:1:3", "2:2:3", "1:3:3"),
}

pytestmark = pytest.mark.timeout(400)


class Directory:
    """One job's."""

    def __init__(self, path: Path, text: Path, ranks: int) -> None:
        self.path, self.ranks, self.mark = path, ranks, path / "mark"
        self.checkpoints, self.log = path / "checkpoints", path / "log"
        files = ("--save", self.checkpoints, "--load", self.checkpoints, "--log-dir", self.log, "--data-path", text)
        self.flags = [*FLAGS, *map(str, files), "--pipeline-model-parallel-size", str(ranks // 2)]
        path.mkdir()

    def command(self, fault: str, *launcher: str) -> list[str]:
        launcher = launcher or ("--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", str(self.ranks))
        run = [sys.executable, "-m", "torch.distributed.run", "--max-restarts", "2", *launcher]
        return [*run, "-m", "tests.support.faulty_job", fault, str(self.mark), *self.flags]

    def tensors(self) -> dict[str, Tensor]:
        """Weights and state of the newest checkpoint, as plain torch reads it."""
        folder = self.checkpoints / f"iter_{latest_step(self.checkpoints):07d}"
        # Not the generators: Python seeds its own anew in every process, and nothing here draws from it.
        return read_plainly(folder)

    def rows(self) -> list[Record]:
        return [replace(row, tokens_per_s=0) for row in read_log(self.log)]


def environ() -> dict[str, str]:
    inherited = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "MASTER_PORT", "MASTER_ADDR")}
    return inherited | {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


def run(command: list[str]) -> str:
    done = subprocess.run(command, cwd=ROOT, env=environ(), capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"{n} times {n} is {n * n}.\n" for n in range(400)))
    return path


@pytest.fixture(scope="module")
def untouched(tmp_path_factory, text):
    """Runs the job without a fault, once for each number of ranks."""
    known: dict[int, Directory] = {}

    def of(ranks: int) -> Directory:
        if ranks not in known:
            known[ranks] = Directory(tmp_path_factory.mktemp("untouched") / "job", text, ranks)
            run(known[ranks].command("never:1:0:0:kill"))
        return known[ranks]

    return of


def check_same(here: Directory, there: Directory) -> None:
    mine, whole = here.tensors(), there.tensors()
    assert mine.keys() == whole.keys()
    assert differing(mine, whole) == []
    assert here.rows() == there.rows()
    assert [row.step for row in here.rows()] == list(range(1, STEPS + 1))


def check_restart(tmp_path: Path, text: Path, whole: Directory, place: str, where: str) -> None:
    job = Directory(tmp_path / "job", text, whole.ranks)
    if place == "load":
        shutil.copytree(whole.checkpoints / "iter_0000003", job.checkpoints / "iter_0000003")
        (job.checkpoints / "latest_checkpointed_iteration.txt").write_text("3")
        shutil.copytree(whole.log, job.log)
    said = run(job.command(f"{place}:{where}:kill"))
    assert job.mark.exists(), "nobody was killed"
    step = int(where.split(":")[2])
    assert ("resumed from" in said) == (place == "load" or step > 3), said
    check_same(job, whole)


def test_a_job_whose_rank_is_killed_ends_as_if_nothing_had_happened(tmp_path, text, untouched):
    check_restart(tmp_path, text, untouched(2), "optimizer", "1:1:5")


@pytest.mark.soak
@pytest.mark.parametrize(("place", "where"), [(place, where) for place, all_of in PLACES.items() for where in all_of])
def test_a_rank_killed_anywhere(tmp_path, text, untouched, place, where):
    check_restart(tmp_path, text, untouched(4), place, where)


@pytest.mark.soak
def test_a_signal_to_one_rank_saves_and_ends_all(tmp_path, text):
    job = Directory(tmp_path / "job", text, 2)
    said = run(job.command("forward:1:1:4:SIGUSR1"))
    assert "leaving after step 4: SIGUSR1 was received" in said
    assert latest_step(job.checkpoints) == 4
    assert len(job.rows()) == 4


@pytest.mark.soak
def test_a_signal_to_torchrun_saves_and_ends_all(tmp_path, text):
    job = Directory(tmp_path / "job", text, 2)
    job.flags += ["--train-iters", "100000", "--save-interval", "100000"]
    with subprocess.Popen(
        job.command("never:1:0:0:kill"),
        cwd=ROOT,
        env=environ(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        while len(read_log(job.log)) < 3:
            assert process.poll() is None
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        said = process.communicate(timeout=100)[0]
    assert "SIGTERM was received" in said
    assert latest_step(job.checkpoints) == len(job.rows()) >= 3


def test_a_restart_that_cannot_work_is_refused_at_the_start():
    given = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
    launch = Launch.from_environ(given | {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_MAX_RESTARTS": "3"})
    with pytest.raises(UsageError, match=r"--max-restarts 3: .*set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"):
        launch.check_restarts()
    for good in ({"TORCHELASTIC_MAX_RESTARTS": "3"}, {"TORCHELASTIC_USE_AGENT_STORE": "True"}):
        Launch.from_environ(given | good).check_restarts()


@contextmanager
def two_hosts() -> Iterator[tuple[str, str]]:
    """Two network namespaces that see each other, as ``a`` at 10.77.5.1 and ``b`` at 10.77.5.2."""
    names = tuple(f"shardstep{os.getpid()}{end}" for end in "ab")
    links = [f"ss{os.getpid() % 100000}{end}" for end in "ab"]

    def ip(*words: str) -> None:
        try:
            subprocess.run(["ip", *words], check=True, capture_output=True, text=True)
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"network namespaces are not allowed here: {getattr(error, 'stderr', '') or error}")

    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", links[0], "type", "veth", "peer", "name", links[1])
        for i, (name, link) in enumerate(zip(names, links, strict=True), 1):
            ip("link", "set", link, "netns", name)
            ip("-n", name, "addr", "add", f"10.77.5.{i}/24", "dev", link)
            for device in ("lo", link):
                ip("-n", name, "link", "set", device, "up")
        yield names[0], names[1]
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


@pytest.mark.soak
@pytest.mark.parametrize("where", ["2:1:5", "1:2:7"])
def test_two_hosts_restart_together(tmp_path, text, untouched, where):
    whole = untouched(4)
    job = Directory(tmp_path / "job", text, 4)
    with two_hosts() as hosts, ExitStack() as stack:
        processes = []
        for i, name in enumerate(hosts, 1):
            link = f"ss{os.getpid() % 100000}{'ab'[i - 1]}"
            launcher = (
                "--nnodes 2 --nproc-per-node 2 --rdzv-backend c10d --rdzv-endpoint 10.77.5.1:29400 --rdzv-id job "
                f"--rdzv-conf is_host={int(i == 1)} --local-addr 10.77.5.{i}"
            ).split()
            command = ["ip", "netns", "exec", name, *job.command(f"forward:{where}:kill", *launcher)]
            log = stack.enter_context((tmp_path / f"{i}.txt").open("w"))
            host = environ() | {"GLOO_SOCKET_IFNAME": link}
            process = stack.enter_context(subprocess.Popen(command, cwd=ROOT, env=host, stdout=log, stderr=log))
            stack.callback(process.terminate)  # torchrun ends its ranks, too
            processes.append(process)
        codes = [process.wait(timeout=280) for process in processes]
    assert codes == [0, 0], "".join((tmp_path / f"{i}.txt").read_text()[-2000:] for i in (1, 2))
    assert job.mark.exists(), "nobody was killed"
    check_same(job, whole)
