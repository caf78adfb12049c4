"""What all tests share: the bridge that runs MPI tests, the ranks they run on, and reproducible examples."""

import os
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest

# The resolver's default of 5 s a name would be spent now and then on a reverse look-up of this machine.
os.environ.setdefault("RES_OPTIONS", "timeout:1 attempts:1")

import hypothesis
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from tests.support.mpi_ranks import ranks_of, under_mpiexec, under_torchrun

pytest_plugins = ["tests.support.mpi_bridge"]

# All ranks must draw the same examples, and a busy machine is not a failure.
hypothesis.settings.register_profile("ranks", derandomize=True, database=None, deadline=None)
hypothesis.settings.load_profile("ranks")
torch.set_num_threads(1)

TIMEOUT = timedelta(seconds=60)


@pytest.fixture
def job_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A small text, for the main job in this process alone; its path."""
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{n} times {n} is {n * n}.\n" for n in range(400)))
    return str(text)


@pytest.fixture
def job(tmp_path: Path, job_text: str) -> Callable[..., Any]:
    """Runs the main job, as small as it can be, in this process; gives the rows of its log."""
    from tests.support import tiny_job  # few tests need it, and it imports all of the job

    return partial(tiny_job.run, tmp_path / "log", job_text)


class World:
    """The ranks that run this test, on gloo.

    Attributes:
        rank: This process, from 0.
        size: Number of ranks; 1 in a test that is not marked ``mpi``.
    """

    def __init__(self) -> None:
        if under_torchrun():
            dist.init_process_group("gloo", timeout=TIMEOUT)
        else:
            rank, size, store = _store()
            dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=TIMEOUT)
        self.rank = dist.get_rank()
        self.size = dist.get_world_size()
        self._meshes: dict[tuple[tuple[int, ...], tuple[str, ...]], DeviceMesh] = {}

    def mesh(self, shape: tuple[int, ...], names: tuple[str, ...]) -> DeviceMesh:
        """The CPU mesh of this shape over all ranks; made once, so that its process groups are."""
        if (shape, names) not in self._meshes:
            self._meshes[shape, names] = init_device_mesh("cpu", shape, mesh_dim_names=names)
        return self._meshes[shape, names]

    def check_in_step(self) -> None:
        """Fail if a rank left a collective of the world unmatched: the next test would receive its data."""
        mine = torch.arange(3) + self.rank
        received = [torch.empty_like(mine) for _ in range(self.size)]
        try:
            dist.all_gather(received, mine, async_op=True).wait(timedelta(seconds=20))
        except RuntimeError as error:
            pytest.fail(f"the test left a collective unmatched on some rank: {error}", pytrace=False)
        if any(row[0] != rank for rank, row in enumerate(received)):
            pytest.fail(f"the test left a collective unmatched on some rank: received {received}", pytrace=False)


def _store() -> tuple[int, int, dist.Store]:
    """This rank, the number of ranks, and the one store that they share."""
    if not under_mpiexec():
        return 0, 1, dist.HashStore()
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) if comm.rank == 0 else None
    port = comm.bcast(store.port if store else None)
    return comm.rank, comm.size, store or dist.TCPStore("127.0.0.1", port)


def _scope(**_: object) -> str:
    # Alone in a process a group is quickly made, and other tests there may want to make theirs.
    return "session" if under_mpiexec() or under_torchrun() else "function"


@pytest.fixture(scope=_scope)
def world() -> Iterator[World]:
    """The ranks that run this test. One process group and one store serve all tests: making them is slow."""
    yield World()
    dist.destroy_process_group()


@pytest.fixture(autouse=True)
def _ranks_in_step(request: pytest.FixtureRequest) -> Iterator[None]:
    if "world" not in request.fixturenames:
        yield
        return
    world, wanted = request.getfixturevalue("world"), ranks_of(request.node) or 1
    if world.size != wanted:
        pytest.skip(f"written for {wanted} ranks; this session has {world.size}")
    yield
    world.check_in_step()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "soak" in (config.option.markexpr or ""):
        return
    soak = [item for item in items if item.get_closest_marker("soak")]
    config.hook.pytest_deselected(items=soak)
    items[:] = [item for item in items if item not in soak]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if stages := os.environ.get("FAILED_STAGES"):
        terminalreporter.section("test.sh fails whatever the tests say", red=True)
        terminalreporter.line(f"failed before the tests: {stages}; see above")
