"""pytest plugin: one ``pytest`` command runs single-process tests here and MPI tests under mpiexec.

The tests marked ``@pytest.mark.mpi(min_size=N)`` run after the others, all those of one N in one
``mpiexec -n N python -m pytest --only-mpi``. Their reports are gathered over the ranks and shown as if they had run
here, so there is one summary and one exit code. A test whose ranks crash or hang fails; the rest go on in new ranks.

With ``--only-mpi`` or ``--with-mpi`` (somebody else started the ranks), or under torchrun, the bridge does nothing.
"""

import importlib.util
import os
from pathlib import Path

import pytest

from tests.support.mpi_ranks import REPORTS_FOLDER, RankPlugin, ranks_of, under_torchrun
from tests.support.mpi_session import EXIT_S, RankSession, find_mpiexec


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    if folder := os.environ.get(REPORTS_FOLDER):
        config.pluginmanager.register(RankPlugin(config, Path(folder)))
    elif under_torchrun():
        # pytest-mpi would skip every MPI test, because MPI knows of one rank only.
        for plugin in config.pluginmanager.get_plugins():
            if type(plugin).__name__ == "MPIPlugin":
                config.pluginmanager.unregister(plugin)
    elif not (config.getoption("--with-mpi", False) or config.getoption("--only-mpi", False)):
        config.pluginmanager.register(Bridge(config))


class Bridge:
    """Runs the MPI tests of this pytest session in sessions of their own, and reports what became of them."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.limits: dict[str, float] = {}  # node id -> seconds, from pytest-timeout
        self.waiting: dict[int, list[str]] = {}  # number of ranks -> node ids without an outcome
        self.outcomes: dict[str, list[pytest.TestReport]] = {}
        self.session: RankSession | None = None

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items.sort(key=ranks_of)
        for item in items:
            if size := ranks_of(item):
                self.waiting.setdefault(size, []).append(item.nodeid)
        if self.waiting and not self.config.option.collectonly:
            needed = {"mpiexec": find_mpiexec(), "mpi4py": importlib.util.find_spec("mpi4py")}
            if missing := [name for name, found in needed.items() if not found]:
                raise pytest.UsageError(
                    f"{sum(map(len, self.waiting.values()))} of the tests need MPI, but {' and '.join(missing)} "
                    f"cannot be found. Install them (pip install mpich mpi4py) or leave these tests out (-m 'not mpi')."
                )

    @pytest.hookimpl(tryfirst=True, optionalhook=True)
    def pytest_timeout_set_timer(self, item: pytest.Item, settings) -> bool | None:
        if not ranks_of(item):
            return None
        # The ranks keep the time themselves; here it would count their start as well.
        self.limits[item.nodeid] = settings.timeout
        return True

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> bool | None:
        size = ranks_of(item)
        if not size:
            return None
        item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        for report in self._outcome(item, size):
            item.ihook.pytest_runtest_logreport(report=report)
        item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
        return True

    def pytest_sessionfinish(self) -> None:
        if self.session:
            self.session.end(patience=0 if self.waiting[self.session.size] else EXIT_S)

    def _outcome(self, item: pytest.Item, size: int) -> list[pytest.TestReport]:
        while item.nodeid not in self.outcomes:
            if self.session is None or self.session.over or self.session.size != size:
                if self.session:
                    self.session.end()
                self.session = RankSession(self.config, size, self.waiting[size])
            for nodeid, reports in self.session.advance(self.limits.get(item.nodeid)).items():
                self.outcomes[nodeid] = reports
                self.waiting[size].remove(nodeid)
        return self.outcomes.pop(item.nodeid)
