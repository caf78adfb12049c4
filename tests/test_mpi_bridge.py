"""The bridge on tests with deliberate faults, in a pytest of their own; and the ranks that it gives to our tests."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
import torch.distributed as dist

CONFTEST = 'pytest_plugins = ["pytest_mpi", "pytest_timeout", "tests.support.mpi_bridge"]\n'

FAULTS = """
import os, time
import pytest
from mpi4py import MPI

comm = MPI.COMM_WORLD
two = pytest.mark.mpi(min_size=2)

def test_single_process():
    assert comm.size == 1

@pytest.mark.parametrize("size", [1, *(pytest.param(n, marks=pytest.mark.mpi(min_size=n)) for n in (2, 3))])
def test_size_of_parameter(size):
    assert comm.allreduce(1) == size

@two
def test_one_rank_fails():
    assert comm.rank != 1

@two
def test_each_rank_fails_otherwise():
    assert comm.rank == 5

@two
def test_raises_before_a_collective():
    if comm.rank == 1:
        raise ValueError("no data")
    comm.Barrier()

@two
def test_exits():
    if comm.rank == 1:
        os._exit(3)
    comm.Barrier()

@two
@pytest.mark.timeout(2)
def test_sleeps():
    if comm.rank == 0:
        time.sleep(60)

@two
def test_skipped_everywhere():
    pytest.skip("no reason")

@two
def test_skipped_on_one_rank():
    if comm.rank == 0:
        pytest.skip("a rank's reason")

@two
@pytest.mark.xfail(strict=True, raises=ZeroDivisionError)
def test_expected_to_fail():
    1 / 0

@pytest.fixture
def broken_teardown():
    yield
    assert comm.rank == 0

@two
def test_fails_in_teardown(broken_teardown):
    pass

@two
def test_last():
    assert comm.allreduce(1) == 2
"""


@dataclass
class Outcome:
    kind: str  # passed, failure, error or skipped
    text: str


def run_pytest(folder: Path, tests: str, *arguments: str, conftest: str = CONFTEST) -> subprocess.CompletedProcess[str]:
    (folder / "pytest.ini").write_text("[pytest]\ntimeout = 30\n")
    (folder / "conftest.py").write_text(conftest)
    (folder / "test_faults.py").write_text(tests)
    return subprocess.run(
        [sys.executable, "-m", "pytest", f"--junitxml={folder}/outcomes.xml", *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        capture_output=True,
        text=True,
    )


def outcomes(folder: Path) -> dict[str, Outcome]:
    """Of every test that ran, by its name; of its phases the last that is told about."""
    found = {}
    for case in ElementTree.parse(folder / "outcomes.xml").iter("testcase"):
        found[case.get("name")] = Outcome("passed", "")
        for child in case:
            if child.tag in ("failure", "error", "skipped"):
                found[case.get("name")] = Outcome(child.tag, f"{child.get('message')}\n{child.text}")
    return found


@pytest.fixture(scope="module")
def faults(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    folder = tmp_path_factory.mktemp("faults")
    run = run_pytest(folder, FAULTS)
    assert run.returncode == pytest.ExitCode.TESTS_FAILED, run.stdout + run.stderr
    # The test that fails in its teardown counts as passed as well, as pytest has it.
    summary = run.stdout.splitlines()[-1].strip("= ")
    assert summary.startswith("6 failed, 6 passed, 1 skipped, 1 xfailed, 1 error in"), run.stdout
    return outcomes(folder)


@pytest.mark.parametrize(
    ("name", "kind", "texts"),
    [
        ("test_single_process", "passed", ()),
        ("test_size_of_parameter[1]", "passed", ()),
        ("test_size_of_parameter[2]", "passed", ()),
        ("test_size_of_parameter[3]", "passed", ()),
        ("test_one_rank_fails", "failure", ("rank 1: assert 1 != 1", "> ")),
        ("test_each_rank_fails_otherwise", "failure", ("rank 0: assert 0 == 5",)),
        ("test_raises_before_a_collective", "failure", ("rank 1: ValueError: no data",)),
        ("test_exits", "failure", ("The 2 ranks ended in this test",)),
        ("test_sleeps", "failure", ("rank 0: Failed: Timeout",)),
        ("test_skipped_everywhere", "skipped", ("no reason",)),
        ("test_skipped_on_one_rank", "failure", ("skipped on rank 0 but not on the others: Skipped: a rank's reason",)),
        ("test_expected_to_fail", "skipped", ()),
        ("test_fails_in_teardown", "error", ("rank 1: assert 1 == 0",)),
        ("test_last", "passed", ()),
    ],
)
def test_each_fault_stays_in_its_test(faults: dict[str, Outcome], name: str, kind: str, texts: tuple[str, ...]) -> None:
    assert faults[name].kind == kind, faults[name].text
    for text in texts:
        assert text in faults[name].text


def test_only_selected_tests_run(tmp_path: Path) -> None:
    run = run_pytest(
        tmp_path, FAULTS, "test_faults.py::test_size_of_parameter[3]", "test_faults.py::test_last", "-k", "3"
    )
    assert run.returncode == pytest.ExitCode.OK, run.stdout
    assert outcomes(tmp_path) == {"test_size_of_parameter[3]": Outcome("passed", "")}


def test_ranks_that_cannot_start_fail_every_test(tmp_path: Path) -> None:
    run = run_pytest(
        tmp_path,
        "import os, sys\nsys.exit('no start') if 'PMI_RANK' in os.environ else None\n" + FAULTS,
        "-k",
        "exits or last",
    )
    assert run.returncode == pytest.ExitCode.TESTS_FAILED, run.stdout
    found = outcomes(tmp_path)
    assert {name: outcome.kind for name, outcome in found.items()} == {"test_exits": "failure", "test_last": "failure"}
    assert "no start" in found["test_last"].text


def test_without_mpiexec_says_what_to_do(tmp_path: Path) -> None:
    hidden = "import shutil\nshutil.which = lambda *_, **__: None\n"
    run = run_pytest(tmp_path, FAULTS, conftest=hidden + CONFTEST)
    assert run.returncode == pytest.ExitCode.USAGE_ERROR
    assert "mpiexec cannot be found. Install them (pip install mpich mpi4py)" in run.stderr
    assert run_pytest(tmp_path, FAULTS, "-m", "not mpi", conftest=hidden + CONFTEST).returncode == pytest.ExitCode.OK


SIZES = [1, *(pytest.param(size, marks=pytest.mark.mpi(min_size=size)) for size in (2, 4))]


@pytest.mark.parametrize("size", SIZES)
def test_world_communicates(world, size: int) -> None:
    ranks = torch.tensor([float(world.rank)])
    dist.all_reduce(ranks)
    assert (world.size, ranks.item()) == (size, sum(range(size)))
    assert torch.get_num_threads() == 1


@pytest.mark.mpi(min_size=4)
def test_world_makes_a_mesh_once(world) -> None:
    mesh = world.mesh((2, 2), ("pp", "tp"))
    assert world.mesh((2, 2), ("pp", "tp")) is mesh
    ranks = torch.tensor([float(world.rank)])
    dist.all_reduce(ranks, group=mesh.get_group("tp"))
    assert ranks.item() == {0: 0 + 1, 1: 2 + 3}[mesh.get_local_rank("pp")]
