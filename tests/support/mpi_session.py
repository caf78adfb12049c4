"""One run of mpiexec for the MPI bridge: starts the ranks, follows their tests, and stops them when one is stuck."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.support.mpi_ranks import OUTER_PID, REPORTS_FOLDER
from tests.support.mpi_reports import blame, merge

START_S = 180.0  # until the first test starts: importing torch on a busy machine
GRACE_S = 5.0  # for the others, after one rank has failed
LIMIT_S = 300.0  # for a test without a time-out
EXTRA_S = 15.0  # for the ranks to act on a time-out themselves
EXIT_S = 20.0  # for the ranks to end after the last test

# Lines of a faulthandler stack that every test has in common.
MACHINERY = re.compile(r'^  File "(.*/(_pytest|pytest|pluggy)/.*|<frozen runpy>)", line \d+ in .*\n', re.MULTILINE)

Outcomes = dict[str, list[pytest.TestReport]]  # node id -> reports


def find_mpiexec() -> str | None:
    """The mpiexec of this environment, or else of the machine."""
    return shutil.which("mpiexec", path=os.path.dirname(sys.executable)) or shutil.which("mpiexec")


@dataclass
class Running:
    """A test that has started and has not ended on all ranks."""

    since: float
    reports: dict[int, dict[str, pytest.TestReport]] = field(default_factory=dict)
    failed_since: float | None = None

    def add(self, rank: int, report: pytest.TestReport) -> None:
        self.reports.setdefault(rank, {})[report.when] = report
        if report.failed:
            self.failed_since = self.failed_since or time.monotonic()

    def ranks_past_call(self) -> set[int]:
        return {rank for rank, of in self.reports.items() if "call" in of or not of["setup"].passed}

    def ranks_at_end(self) -> set[int]:
        return {rank for rank, of in self.reports.items() if "teardown" in of}


class RankSession:
    """The ranks of one mpiexec; in step, they run the tests ``nodeids``, each rank in a pytest of its own."""

    def __init__(self, config: pytest.Config, size: int, nodeids: list[str]) -> None:
        self.config = config
        self.size = size
        self.left = list(nodeids)
        self.over = False
        self.any_ended = False
        self.running: dict[str, Running] = {}
        self.pids: dict[int, int] = {}
        self.rank_ended: float | None = None
        self.offsets = dict.fromkeys(range(size), 0)
        self.since = time.monotonic()
        self.folder = Path(tempfile.mkdtemp(prefix="mpi-bridge-"))
        (self.folder / "arguments").write_text("\n".join(self._arguments()))
        with (self.folder / "log").open("wb") as log:
            self.process = subprocess.Popen(
                [find_mpiexec(), "-n", str(size), sys.executable, "-m", "pytest", f"@{self.folder}/arguments"],
                cwd=config.rootpath,
                env=self._environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def advance(self, limit: float | None) -> Outcomes:
        """Wait until a test ends on all ranks, or until the session cannot go on; then it is over.

        Args:
            limit: Seconds that a test may take; None for the default.

        Returns:
            The reports of the tests that ended. Of a session that is over, also of the test that is to blame; none if
            it ended between two tests, and those of all tests if it ended before the first one.
        """
        while True:
            exited = self.process.poll() is not None  # asked before reading: what the ranks wrote last is then there
            self._read()
            if ended := self._take_ended():
                return ended
            if problem := self._problem(exited, limit or LIMIT_S):
                return self._give_up(problem)
            time.sleep(0.01)

    def end(self, patience: float = EXIT_S) -> None:
        """Stop the ranks, unless they end by themselves within ``patience`` seconds."""
        if self.over:
            return
        self.over = True
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(patience)
        if self.process.poll() is None:
            self.process.terminate()  # mpiexec then ends its ranks
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(5)
            self._signal(self.pids, signal.SIGKILL)
            self.process.kill()
            self.process.wait()
        shutil.rmtree(self.folder)

    def _arguments(self) -> list[str]:
        inherited = [f"--override-ini={value}" for value in self.config.getoption("override_ini") or ()]
        if (limit := self.config.getoption("timeout", None)) is not None:
            inherited.append(f"--timeout={limit}")
        if self.config.inipath:
            inherited += ["-c", str(self.config.inipath)]
        inherited.append(f"--tb={self.config.getoption('tbstyle')}")
        if marked := self.config.getoption("markexpr"):  # or the ranks would leave out what has to be asked for
            inherited += ["-m", marked]
        mine = ["--only-mpi", "--rootdir", str(self.config.rootpath), "-p", "no:cacheprovider", "-q", "--no-summary"]
        return [*inherited, *mine, *self.left]

    def _environment(self) -> dict[str, str]:
        return os.environ | {
            REPORTS_FOLDER: str(self.folder),
            OUTER_PID: str(os.getpid()),
            "OMP_NUM_THREADS": "1",
            # Open MPI refuses to run as root, and more ranks than cores, unless told. MPICH has no such rules.
            "OMPI_ALLOW_RUN_AS_ROOT": "1",
            "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
            "OMPI_MCA_rmaps_base_oversubscribe": "1",
            "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
        }

    def _read(self) -> None:
        for rank, offset in self.offsets.items():
            path = self.folder / f"{rank}.jsonl"
            if not path.exists():
                continue
            with path.open("rb") as events:
                events.seek(offset)
                # The last line may be half written: leave it for the next time.
                lines, newline, _ = events.read().rpartition(b"\n")
            self.offsets[rank] = offset + len(lines) + len(newline)
            for line in lines.splitlines():
                self._take(rank, json.loads(line))

    def _take(self, rank: int, event: dict) -> None:
        match event:
            case {"pid": pid}:
                self.pids[rank] = pid
            case {"end": _}:
                self.rank_ended = self.rank_ended or time.monotonic()
            case {"start": nodeid}:
                self.running.setdefault(nodeid, Running(time.monotonic()))
            case {"report": data}:
                report = self.config.hook.pytest_report_from_serializable(config=self.config, data=data)
                if report.skipped and isinstance(report.longrepr, list):
                    report.longrepr = tuple(report.longrepr)  # JSON knows lists only
                self.running[report.nodeid].add(rank, report)

    def _take_ended(self) -> Outcomes:
        everybody = set(range(self.size))
        ended = {
            nodeid: merge(test.reports) for nodeid, test in self.running.items() if test.ranks_at_end() == everybody
        }
        for nodeid in ended:
            del self.running[nodeid]
            self.left.remove(nodeid)
        self.any_ended = self.any_ended or bool(ended)
        # A failed teardown leaves what the tests share (process groups) in an unknown state: go on with fresh ranks.
        if any(report.when == "teardown" and report.failed for reports in ended.values() for report in reports):
            self.end(patience=0)
        return ended

    def _problem(self, exited: bool, limit: float) -> str | None:
        now = time.monotonic()
        if exited:
            return f"The {self.size} ranks ended in this test (exit code {self.process.returncode} of mpiexec)."
        if not self.running:
            late = not self.any_ended and now - self.since > START_S
            return f"The {self.size} ranks started no test within {START_S:.0f} s." if late else None
        test = next(iter(self.running.values()))
        waiting = sorted(set(range(self.size)) - test.ranks_past_call())
        if waiting and test.failed_since and now - test.failed_since > GRACE_S:
            return f"Ranks {waiting} were still in this test {GRACE_S:.0f} s after another rank had failed."
        at_work = sorted(set(range(self.size)) - test.ranks_at_end())
        if self.rank_ended and now - self.rank_ended > GRACE_S:
            return f"Ranks {at_work} did not end this test, and another rank has ended its pytest."
        if now - test.since > limit + EXTRA_S:
            return f"Ranks {at_work} did not end this test within {limit:.0f} s."
        return None

    def _give_up(self, problem: str) -> Outcomes:
        sections = self._stacks() if self.process.poll() is None else []
        self._read()
        log = self._text("log")
        sections.append(("the end of what the ranks printed", log))
        outcomes: Outcomes = {}
        if self.running:
            nodeid, test = next(iter(self.running.items()))
            outcomes[nodeid] = blame(nodeid, test.reports, problem, sections)
        elif not self.any_ended:
            # Another try would end the same way.
            outcomes = {nodeid: blame(nodeid, {}, f"{problem}\n{log}", []) for nodeid in self.left}
        self.end(patience=0)
        return outcomes

    def _stacks(self) -> list[tuple[str, str]]:
        test = next(iter(self.running.values()), None)
        past = test.ranks_past_call() if test else set()
        stuck = {rank: pid for rank, pid in self.pids.items() if rank not in past}
        self._signal(stuck, signal.SIGUSR1)
        time.sleep(0.5)
        return [(f"where rank {rank} was", self._text(f"{rank}.stacks")) for rank in stuck]

    def _text(self, name: str) -> str:
        return MACHINERY.sub("", (self.folder / name).read_text(errors="replace").replace("\0", ""))[-3000:]

    @staticmethod
    def _signal(pids: dict[int, int], number: signal.Signals) -> None:
        for pid in pids.values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
