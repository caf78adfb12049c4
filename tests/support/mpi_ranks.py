"""The part of the MPI bridge that lives in a rank: it writes down what happens, and keeps the ranks in step."""

import faulthandler
import json
import os
import signal
import time
from pathlib import Path

import pytest

REPORTS_FOLDER = "MPI_BRIDGE_FOLDER"  # environment variable; set in the ranks
OUTER_PID = "MPI_BRIDGE_PID"


def ranks_of(item: pytest.Item) -> int:
    """Number of ranks that the test asks for; 0 for a test of a single process."""
    marker = item.get_closest_marker("mpi")
    return int(marker.kwargs.get("min_size", 2)) if marker else 0


def under_mpiexec() -> bool:
    """Whether mpiexec (of MPICH and its kin, or of Open MPI) started this process."""
    return "PMI_RANK" in os.environ or "OMPI_COMM_WORLD_RANK" in os.environ


def under_torchrun() -> bool:
    """Whether torchrun started this process as one of several ranks."""
    return "TORCHELASTIC_RUN_ID" in os.environ


class RankPlugin:
    """Appends this rank's events to ``<folder>/<rank>.jsonl``, one JSON object a line.

    ``{"pid": 4242}`` first, ``{"start": node id}`` and ``{"report": serialized report}`` for each test, last
    ``{"end": exit status}``. mpi_session.py reads them meanwhile, so a rank that dies has still said how far it came.
    """

    def __init__(self, config: pytest.Config, folder: Path) -> None:
        from mpi4py import MPI

        self.config = config
        self.comm = MPI.COMM_WORLD
        self.events = (folder / f"{self.comm.rank}.jsonl").open("a", buffering=1)
        self.stacks = (folder / f"{self.comm.rank}.stacks").open("w")
        faulthandler.register(signal.SIGUSR1, file=self.stacks)
        self._write(pid=os.getpid())

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_logstart(self, nodeid: str) -> None:
        if os.getppid() == 1 or not _alive(int(os.environ[OUTER_PID])):
            pytest.exit("the pytest that started these ranks is gone", returncode=1)
        self._meet()
        if len(tests := set(self.comm.allgather(nodeid))) > 1:
            raise RuntimeError(f"the ranks collected the tests in different orders; now they are at {sorted(tests)}.")
        self._write(start=nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._write(report=self.config.hook.pytest_report_to_serializable(config=self.config, report=report))
        # Fixtures may communicate in their teardown, also after a failure: only when every rank has come that far.
        if report.when == "call" or (report.when == "setup" and not report.passed):
            signal.setitimer(
                signal.ITIMER_REAL, 0
            )  # pytest-timeout's: the wait for the others is not this rank's fault
            self._meet()

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, exitstatus: int) -> None:
        self._write(end=int(exitstatus))

    def _meet(self) -> None:
        # A plain barrier would spin, and there may be more ranks than cores.
        request = self.comm.Ibarrier()
        while not request.Test():
            time.sleep(0.001)

    def _write(self, **event: object) -> None:
        self.events.write(json.dumps(event) + "\n")


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
