"""A process killed at any file event of a save leaves a directory that loads: the old checkpoint or the new one, whole."""

import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from core.checkpoint import load, save
from core.checkpoint.directory import TRACKER
from core.optimizer.adam import AdamW

KILLED = 77
EVENTS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree")


def run_here(mode: str, directory: Path) -> str:
    """What this file says as a program: a process of its own, with one thread, can fork and be killed."""
    command = [sys.executable, "-m", "tests.test_checkpoint_crash", mode, str(directory)]
    result = subprocess.run(
        command, cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=100, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.mark.parametrize("mode", ["next_step", "same_step"])
def test_a_save_killed_at_any_event_leaves_the_old_or_the_new(tmp_path, mode):
    found = run_here(mode, tmp_path).split()
    assert set(found) == {"old", "new"}
    # Never back to the old one once the new one is in sight.
    assert found == sorted(found, reverse=True)
    assert len(found) > 10


def test_a_rank_killed_in_a_save_leaves_the_old(tmp_path):
    assert run_here("two_ranks", tmp_path).split() == ["old", "raised", "old", "raised", "old", "new"]


def write(directory: Path, step: int, value: float) -> None:
    net, optimizer = run(value)
    save(directory, step=step, model_chunks=[net], optimizer=optimizer, consumed_samples=int(value))


def read(directory: Path) -> str:
    """``old`` (1), ``new`` (2), or an error when there is anything else."""
    net, optimizer = run(0)
    loaded = load(directory, model_chunks=[net], optimizer=optimizer)
    values = {x.item() for p in net.parameters() for x in (*p.unique(), *optimizer.state[p]["exp_avg"].unique())}
    assert values == {loaded.consumed_samples}, values
    return {1: "old", 2: "new"}[loaded.consumed_samples]


def run(value: float) -> tuple[nn.Module, AdamW]:
    net = nn.Linear(3, 2)
    optimizer = AdamW(net.parameters())
    for p in net.parameters():
        p.data.fill_(value)
        optimizer.state[p]["exp_avg"].fill_(value)
    return net, optimizer


def die_at(event: int, where: str) -> None:
    """Kill this process at the ``event``-th file event from now on a path that contains ``where``."""
    seen = 0

    def hook(name: str, args: tuple[object, ...]) -> None:
        nonlocal seen
        if name in EVENTS and args and isinstance(args[0], str | os.PathLike) and where in str(args[0]):
            seen += 1
            if seen == event:
                os._exit(KILLED)

    sys.addaudithook(hook)


def child(do: Callable[[], None]) -> int:
    """Process that does ``do`` and exits with 0, or with 3 when it raises; its id."""
    pid = os.fork()
    if pid:
        return pid
    try:
        do()
    except BaseException as error:
        print(error, file=sys.stderr)
        os._exit(3)
    os._exit(0)


def wait(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def kill_everywhere(directory: Path, step: int) -> None:
    """For each event in turn: save 1, be killed in saving 2, and print what is there."""
    event, code = 0, KILLED
    while code == KILLED:
        event += 1
        here = directory / str(event)
        write(here, 1, 1)

        def save_and_die(here: Path = here, event: int = event) -> None:
            die_at(event, str(here))
            write(here, step, 2)

        code = wait(child(save_and_die))
        print(read(here))
        write(here, 3, 2)  # what is left does not stand in the way
        assert read(here) == "new"
    assert code == 0
    assert sorted(path.name for path in here.iterdir()) == sorted(
        {f"iter_000000{step}", "iter_0000001", "iter_0000003", TRACKER, ".lock"}
    )


def kill_one_rank(directory: Path) -> None:
    """Rank 1 dies before its data file, then before it reports that it is written; then nobody dies."""
    write(directory, 1, 1)
    print(read(directory))
    for attempt, where in enumerate(("__1_0.distcp", "", "nowhere")):

        def rank(index: int, attempt: int = attempt, where: str = where) -> None:
            store = dist.FileStore(f"{directory}.store{attempt}", 2)
            dist.init_process_group("gloo", store=store, rank=index, world_size=2, timeout=timedelta(seconds=20))
            if index == 1 and where:
                die_at(1, where)
            if index == 1 and not where:
                os.fsync = lambda _: os._exit(KILLED)
            write(directory, 2, 2)

        pids = [child(lambda i=i: rank(i)) for i in (0, 1)]
        codes = [wait(pid) for pid in pids]
        if codes == [3, KILLED]:
            print("raised")
        else:
            assert codes == [0, 0], codes
        print(read(directory))


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    mode, directory = sys.argv[1], Path(sys.argv[2])
    if mode == "two_ranks":
        kill_one_rank(directory / "run")
    else:
        kill_everywhere(directory, {"next_step": 2, "same_step": 1}[mode])
