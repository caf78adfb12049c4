"""A process killed at any file event of a save leaves a directory that loads: the old checkpoint or the new one, whole."""

import os
import shutil
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from core.checkpoint import Background, load, save
from core.checkpoint.directory import TRACKER
from tests.support.small_run import Cut, Run

KILLED, RAISED = 77, 3
EVENTS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree")
LAYOUTS = {
    "1": Cut(),
    "tp2": Cut(tp=2),
    "pp2": Cut(pp=2),
    "dp2": Cut(dp=2),
    "tp2 pp2": Cut(tp=2, pp=2),
    "tp2 dp2": Cut(tp=2, dp=2),
}
CASES = [(layout, how) for layout in LAYOUTS for how in ("sync", "async")]
FAST = [("1", "async")]
OLD, NEW = 1.0, 2.0


def run_here(*arguments: str, timeout: int = 100) -> str:
    """What this file says as a program: a process of its own, with one thread, can fork and be killed."""
    command = [sys.executable, "-m", "tests.test_checkpoint_crash", *arguments]
    result = subprocess.run(
        command, cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=timeout, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def check(layout: str, how: str, directory: Path, step: str = "2") -> list[str]:
    """Kill every rank at every event; what was found after each kill."""
    found = run_here(str(directory), layout, how, step, timeout=600).split()
    assert set(found) == {"old", "new"}
    assert len(found) > 20
    return found


@pytest.mark.parametrize(("layout", "how"), FAST)
def test_a_save_killed_at_any_event_leaves_the_old_or_the_new(tmp_path, layout, how):
    check(layout, how, tmp_path)


@pytest.mark.soak
def test_saving_a_step_again_does_not_lose_it(tmp_path):
    found = check("1", "sync", tmp_path, step="1")
    # Never back to the old one once the new one is in sight.
    assert found == sorted(found, reverse=True)


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_hundreds_of_kills_on_all_layouts_lose_and_mix_nothing(tmp_path):
    found = Counter()
    for layout, how in CASES:
        here = Counter(check(layout, how, tmp_path / f"{layout} {how}"))
        print(f"{layout:8} {how:6} {here['old']:4} old {here['new']:4} new, of {here.total()}", flush=True)
        found += here
    print(f"{found.total()} kills: {found['old']} old, {found['new']} new, 0 lost, 0 mixed")
    assert found.total() >= 300


class World:
    """What `Run` needs of the tests' world."""

    def mesh(self, sizes: tuple[int, ...], names: tuple[str, ...]) -> Any:
        return init_device_mesh("cpu", sizes, mesh_dim_names=names)


def write(directory: Path, cut: Cut, step: int, value: float, how: str = "sync") -> None:
    run = Run(World() if dist.is_initialized() else None, cut, {"optimizer": "muon"})
    for shard in run.shards.values():
        shard.fill_(value)
    background = Background() if how == "async" else None
    save(
        directory,
        step=step,
        model_chunks=run.chunks,
        optimizer=run.optimizer,
        consumed_samples=int(value),
        keep=2,
        background=background,
    )
    if background:
        for shard in run.shards.values():
            shard.fill_(3)  # training goes on
        background.wait()


def read(directory: Path) -> str:
    """``old`` or ``new``; an error when there is anything else."""
    run = Run(None, Cut(), {"optimizer": "muon"})
    loaded = load(directory, model_chunks=run.chunks, optimizer=run.optimizer)
    values = {x.item() for shard in run.shards.values() for x in shard.unique()}
    assert values == {loaded.consumed_samples}, values
    return {OLD: "old", NEW: "new"}[loaded.consumed_samples]


def die_at(event: int, where: str) -> None:
    """Kill this process at the ``event``-th file event from now: on a path that contains ``where``, or a write made durable."""
    events = count(1)
    fsync = os.fsync

    def tick() -> None:
        if next(events) == event:
            os._exit(KILLED)

    def hook(name: str, args: tuple[object, ...]) -> None:
        if name in EVENTS and args and isinstance(args[0], str | os.PathLike) and where in str(args[0]):
            tick()

    def durable(descriptor: int) -> None:
        tick()
        fsync(descriptor)

    sys.addaudithook(hook)
    os.fsync = durable


def child(do: Callable[[], None]) -> int:
    """Process that does ``do`` and exits with 0, or with 3 when it raises; its id."""
    pid = os.fork()
    if pid:
        return pid
    try:
        do()
    except BaseException as error:
        print(error, file=sys.stderr)
        os._exit(RAISED)
    os._exit(0)


def wait(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def job(directory: Path, cut: Cut, how: str, step: int, victim: int, event: int) -> list[int]:
    """Save on all ranks of the layout, and kill ``victim`` at its ``event``-th file event; their exit codes."""
    ranks = cut.pp * cut.dp * cut.tp

    def rank(index: int) -> None:
        if ranks > 1:
            store = dist.FileStore(f"{directory}.store", ranks)
            dist.init_process_group("gloo", store=store, rank=index, world_size=ranks, timeout=timedelta(seconds=20))
        if index == victim:
            die_at(event, f"{directory}/")
        write(directory, cut, step, NEW, how)

    return [wait(pid) for pid in [child(lambda i=i: rank(i)) for i in range(ranks)]]


def kill_everywhere(directory: Path, cut: Cut, how: str, step: int) -> None:
    """For each rank and each of its events: save the old one, be killed in saving the new one, and print what is there."""
    directory.mkdir(exist_ok=True)
    template = directory / "old"
    for older in (0, 1):  # the first is to be removed when there is a third
        write(template, Cut(), older, OLD)
    for victim in range(cut.pp * cut.dp * cut.tp):
        for event in count(1):
            here = directory / f"{victim} {event}"
            shutil.copytree(template, here)
            codes = job(here, cut, how, step, victim, event)
            if codes[victim] != KILLED:
                assert codes == [0] * len(codes), codes
                assert read(here) == "new"
                break
            print(read(here))
            write(here, Cut(), 3, NEW)  # what is left does not stand in the way
            assert read(here) == "new"
            names = {path.name for path in here.iterdir()}
            assert len(names) == 4 and {"iter_0000003", TRACKER, ".lock"} < names, names
            shutil.rmtree(here)


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    where, layout, how, step = sys.argv[1:]
    kill_everywhere(Path(where), LAYOUTS[layout], how, int(step))
