"""What can go wrong with files and directories: every damage is found, and no trouble in saving costs a checkpoint."""

import os
import random
import re
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from core.checkpoint import Background, CheckpointError, load, save
from core.checkpoint.directory import TRACKER
from tests.support.saved_steps import NEWEST, STEPS, Saved


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return Saved(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture
def copy(saved, tmp_path):
    """A copy of the directory to damage."""
    return Path(shutil.copytree(saved.directory, tmp_path / "copy"))


def files_of(directory: Path, folder: str = NEWEST) -> list[Path]:
    return sorted(path for path in (directory / folder).iterdir() if path.is_file())


@contextmanager
def told() -> Iterator[list[str]]:
    """The warnings given meanwhile."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        texts: list[str] = []
        yield texts
        texts += [str(w.message) for w in caught]


@contextmanager
def holding(path: Path, content: bytes) -> Iterator[None]:
    """The file has other contents meanwhile."""
    whole = path.read_bytes()
    path.write_bytes(content)
    yield
    path.write_bytes(whole)


def expect_fall_back(saved: Saved, directory: Path, damaged: Path) -> None:
    """The checkpoint before is loaded, and the damaged file named."""
    with told() as texts:
        step = saved.load(directory)
    assert step == 2
    assert any(damaged.name in text and "Loading" in text for text in texts), texts
    with pytest.raises(CheckpointError, match=re.escape(damaged.name)):
        saved.load(directory, step=3)


def test_two_hundred_flipped_bits_are_found(saved, copy):
    draw = random.Random(5)
    paths = files_of(copy)
    for _ in range(200):
        path = draw.choice(paths)
        damaged = bytearray(path.read_bytes())
        damaged[draw.randrange(len(damaged))] ^= 1 << draw.randrange(8)
        with holding(path, damaged), told() as texts:
            step = saved.load(copy)
        assert step == 2, f"a bit of {path.name} was flipped, and step {step} loaded"
        assert any(NEWEST in text for text in texts), texts
    assert saved.load(copy) == 3


def test_fifty_truncations_are_found(saved, copy):
    draw = random.Random(6)
    paths = files_of(copy)
    for _ in range(50):
        path = draw.choice(paths)
        whole = path.read_bytes()
        with holding(path, whole[: draw.randrange(len(whole))]):
            expect_fall_back(saved, copy, path)
    assert saved.load(copy) == 3


@pytest.mark.parametrize("what", ["removed", "emptied", "of another step", "a directory"])
def test_every_file_that_is_not_its_own_is_found(saved, copy, what):
    for path in files_of(copy):
        whole = path.read_bytes()
        other = copy / "iter_0000002" / path.name
        if what == "of another step" and other.read_bytes() == whole:
            assert path.name == "metadata.json"  # says only that Megatron can read it
            continue
        path.unlink()
        if what == "emptied":
            path.touch()
        elif what == "of another step":
            shutil.copy(other, path)
        elif what == "a directory":
            path.mkdir()
        expect_fall_back(saved, copy, path)
        if path.is_dir():
            path.rmdir()
        path.write_bytes(whole)
    assert saved.load(copy) == 3


def test_swapped_folders_are_found(saved, copy):
    first, second = copy / "iter_0000001", copy / NEWEST
    first.rename(copy / "aside")
    second.rename(first)
    (copy / "aside").rename(second)
    with told() as texts:
        assert saved.load(copy) == 2
    assert any("iter_0000003 holds step 1: folders were swapped or renamed" in text for text in texts)
    with pytest.raises(CheckpointError, match="iter_0000001 holds step 3"):
        saved.load(copy, step=1)


def test_without_a_whole_checkpoint_nothing_is_loaded(saved, copy):
    for step in STEPS:
        (copy / f"iter_000000{step}" / "__0_0.distcp").unlink()
    saved._fill(9)
    before = [x.clone() for x in saved._tensors()]
    with pytest.raises(CheckpointError, match=r"none is whole. .*iter_0000003.*iter_0000002.*iter_0000001"):
        load(copy, model_chunks=[saved.net], optimizer=saved.optimizer)
    assert all(torch.equal(x, y) for x, y in zip(before, saved._tensors(), strict=True))


def test_without_verification_only_sizes_are_compared(saved, copy):
    path = copy / NEWEST / "__0_0.distcp"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1  # of the archive's end, which nothing reads
    path.write_bytes(content)
    assert load(copy, model_chunks=[saved.net], optimizer=saved.optimizer, verify=False).step == 3
    os.truncate(path, 100)
    with told() as texts:
        assert saved.load(copy, verify=False) == 2
    assert texts


def test_the_newest_stay(tmp_path):
    run = Saved(tmp_path / "run")
    run.save(4, keep=2)
    assert sorted(path.name for path in run.directory.glob("iter_*")) == [NEWEST, "iter_0000004"]
    run.save(1, keep=2)  # a run that went back
    assert {path.name for path in run.directory.glob("iter_*")} == {"iter_0000001", NEWEST, "iter_0000004"}
    assert run.load() == 1
    with pytest.raises(CheckpointError, match="keep is 1; keep at least 2"):
        run.save(5, keep=1)


@pytest.mark.soak
def test_a_second_job_does_not_save_to_the_directory(tmp_path):
    run = Saved(tmp_path)
    script = (
        "import sys; from pathlib import Path; from tests.support.saved_steps import Saved\n"
        "try: Saved(Path(sys.argv[1]))\nexcept RuntimeError as error: print(error)"
    )
    command = [sys.executable, "-W", "ignore", "-c", script, str(tmp_path)]

    def other_job() -> str:
        return subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=True).stdout

    assert re.search(rf"another job \(process {os.getpid()} on .*\) is saving there. Give each job", other_job())
    assert run.load() == 3
    shutil.rmtree(tmp_path)
    run.save(7)  # the directory was made again, and is locked again
    assert "is saving there" in other_job()
    assert run.load() == 7


@contextmanager
def mounted(path: Path, *arguments: str) -> Iterator[Path]:
    """A file system that can be full, or read-only, also for root."""
    path.mkdir()
    done = subprocess.run(["mount", *arguments, str(path)], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"mounting is not allowed here: {done.stderr.strip()}")
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


@pytest.mark.parametrize("how", ["sync", "async"])
def test_a_full_disk_costs_no_checkpoint(tmp_path, how):
    with mounted(tmp_path / "disk", "-t", "tmpfs", "-o", "size=512k", "tmpfs") as disk:
        run = Saved(disk / "run")
        filler = disk / "filler"
        left = shutil.disk_usage(disk).free
        for room in range(0, left, 4096):
            filler.write_bytes(bytes(left - room - left % 4096))
            background = Background() if how == "async" else None
            before = {path.name for path in run.directory.glob("iter_*")}
            try:
                run.save(4, background=background)
                if background:
                    background.wait()
            except CheckpointError as error:
                assert re.search(r"with 0\.\d MB free there: .*Earlier checkpoints are as they were", str(error)), error
                assert {path.name for path in run.directory.glob("iter_*")} >= before
                assert run.load() in (3, 4)
                continue
            assert run.load() == 4
            assert room > 0
            return
        pytest.fail("it never had room enough")


def test_a_read_only_directory_is_refused(tmp_path):
    run = Saved(tmp_path / "run")
    with mounted(tmp_path / "view", "--bind", str(tmp_path / "run")) as view:
        subprocess.run(["mount", "-o", "remount,bind,ro", str(view)], check=True)
        with pytest.raises(CheckpointError, match=r"cannot save to .*: Read-only file system; give a directory"):
            save(view, step=4, model_chunks=[run.net], optimizer=run.optimizer)
        assert run.load(view) == 3


def test_the_clock_does_not_matter(tmp_path, monkeypatch):
    run = Saved(tmp_path)
    monkeypatch.setattr(time, "time", lambda: 0.0)
    for path in (*tmp_path.iterdir(), *files_of(tmp_path)):
        os.utime(path, (2**33, 2**33))
    run.save(4, keep=2)
    assert run.load() == 4
    assert (tmp_path / TRACKER).read_text() == "4"


def test_some_keys_can_be_loaded_alone(saved):
    saved._fill(9)
    before = {name: p.detach().clone() for name, p in saved.net.named_parameters()}
    loaded = load(
        saved.directory, model_chunks=[saved.net], optimizer=saved.optimizer, only=["model.0.*", "*.exp_avg.1.weight"]
    )
    changed = {name for name, p in saved.net.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {"0.weight", "0.bias"}
    assert sorted(loaded.keys) == ["model.0.bias", "model.0.weight", "optimizer.state.exp_avg.1.weight"]
    assert not loaded.rng_restored
    with pytest.raises(CheckpointError, match=r"no key of this run matches 'model.2\.\*'; nothing was loaded"):
        load(saved.directory, model_chunks=[saved.net], only=["model.0.*", "model.2.*"])


def test_a_save_in_the_background_holds_what_was_there(tmp_path):
    run = Saved(tmp_path)
    background = Background()
    path = run.save(4, background=background)
    run._fill(8)  # training goes on
    assert background.wait() == path
    assert background.wait() is None
    assert run.load() == 4


def test_a_save_that_failed_in_the_background_is_told(tmp_path, monkeypatch):
    run = Saved(tmp_path)
    background = Background()

    def fail(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("core.checkpoint.saving.commit", fail)
    run.save(4, background=background)
    with pytest.raises(CheckpointError, match=r"No space left on device. Earlier checkpoints are as they were"):
        run.save(5, background=background)
    monkeypatch.undo()
    assert run.load() == 3
    run.save(5, background=background)
    background.wait()
    assert run.load() == 5
