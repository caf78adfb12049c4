"""What is not what was written is refused, or passed over for the checkpoint before it; nothing in it is executed."""

import json
import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed.checkpoint as dcp

from core.checkpoint import CheckpointError, digests, load
from core.checkpoint.directory import TRACKER
from core.checkpoint.manifest import FORMAT, NAME, OLDEST
from core.checkpoint.reader import SafeReader
from tests.support.saved_model import refused, saved


def forge(directory: Path, **changes: Any) -> None:
    """Let manifest and digests say what is there, as one who means harm would."""
    folder = directory / "iter_0000005"
    files = {f.name: f.stat().st_size for f in folder.iterdir() if f.name not in (NAME, digests.NAME)}
    manifest = json.loads((folder / NAME).read_text()) | {"files": files} | changes
    (folder / NAME).write_text(json.dumps(manifest))
    (folder / digests.NAME).write_text(digests.text(digests.digests(folder, [NAME, *files])))


def resum(directory: Path) -> None:
    folder = directory / "iter_0000005"
    names = [f.name for f in folder.iterdir() if f.name != digests.NAME]
    (folder / digests.NAME).write_text(digests.text(digests.digests(folder, names)))


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def poison(folder: Path) -> None:
    """Write a pickle that runs a program where each tensor begins."""
    content = bytearray((folder / "__0_0.distcp").read_bytes())
    evil = pickle.dumps(Malice(), protocol=2)  # the one that torch writes
    for info in SafeReader(folder).read_metadata().storage_data.values():
        content[info.offset : info.offset + len(evil)] = evil
    (folder / "__0_0.distcp").write_bytes(content)


class Malice:
    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, ("touch stolen",)


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no directory": (
        lambda d: d.rename(d.with_name("else")),
        "does not exist; give the directory that --save wrote to",
    ),
    "no manifest": (lambda d: (d / "iter_0000005" / NAME).unlink(), "was not written by this package, or is damaged"),
    "no digests": (lambda d: (d / "iter_0000005" / digests.NAME).unlink(), "SHA256SUMS is damaged: No such file"),
    "digests are cut": (
        lambda d: os.truncate(d / "iter_0000005" / digests.NAME, 100),
        "SHA256SUMS is damaged: it is not a list of SHA-256 digests",
    ),
    "manifest is cut": (
        lambda d: (d / "iter_0000005" / NAME).write_text('{"form'),
        "shardstep.json is not what SHA256SUMS says",
    ),
    "manifest is a list": (
        lambda d: (forge(d), (d / "iter_0000005" / NAME).write_text("[]"), resum(d)),
        "it is not the JSON that a save writes",
    ),
    "manifest has no step": (
        lambda d: (forge(d), (d / "iter_0000005" / NAME).write_text(f'{{"format": {FORMAT}}}'), resum(d)),
        "'step' is missing",
    ),
    "manifest has a list for a number": (lambda d: forge(d, step=[5]), "step is missing or wrong"),
    "older format": (lambda d: forge(d, format=OLDEST - 1), f"format {OLDEST - 1}, which .* can no longer be read"),
    "newer format": (lambda d: forge(d, format=FORMAT + 1), f"format {FORMAT + 1}, but .*Update shardstep"),
    "another step's folder": (lambda d: forge(d, step=6), "iter_0000005 holds step 6: folders were swapped or renamed"),
    "file is cut": (
        lambda d: os.truncate(d / "iter_0000005" / "__0_0.distcp", 100),
        "__0_0.distcp has 100 bytes; .* were written",
    ),
    "file is gone": (
        lambda d: (d / "iter_0000005" / "__0_0.distcp").unlink(),
        "__0_0.distcp is missing; .* were written",
    ),
    "a bit is flipped": (lambda d: flip(d / "iter_0000005" / "__0_0.distcp"), "contents of __0_0.distcp are not what"),
    "metadata is cut": (
        lambda d: (os.truncate(d / "iter_0000005" / ".metadata", 100), forge(d)),
        "metadata cannot be read .*load an older step",
    ),
    "metadata is a list": (
        lambda d: ((d / "iter_0000005" / ".metadata").write_bytes(pickle.dumps([])), forge(d)),
        "is not the metadata of a checkpoint",
    ),
    "metadata is malicious": (
        lambda d: ((d / "iter_0000005" / ".metadata").write_bytes(pickle.dumps(Malice())), forge(d)),
        "names posix.system, which no checkpoint needs.*Refused",
    ),
    "tensors are malicious": (
        lambda d: (poison(d / "iter_0000005"), forge(d)),
        "is damaged: rank 0: UnpicklingError.*load an older step",
    ),
}
TRACKERS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "gone": (lambda d: (d / TRACKER).unlink(), "is missing"),
    "empty": (lambda d: (d / TRACKER).write_text(""), "should hold the number of a step, but holds ''"),
    "garbage": (lambda d: (d / TRACKER).write_bytes(b"\xff\0"), "should hold the number of a step"),
    "of a step that is gone": (lambda d: (d / TRACKER).write_text("7"), "names step 7, which is not there"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_refused(tmp_path, monkeypatch, damage):
    monkeypatch.chdir(tmp_path)
    directory = tmp_path / "run"
    net, optimizer = saved(directory)
    do, expected = DAMAGE[damage]
    do(directory)
    with pytest.raises(CheckpointError, match=re.compile(expected, re.DOTALL)):
        load(directory, model_chunks=[net], optimizer=optimizer)
    assert not Path("stolen").exists()


@pytest.mark.parametrize("damage", TRACKERS)
def test_a_damaged_tracker_is_passed_over(tmp_path, damage):
    net, optimizer = saved(tmp_path)
    do, expected = TRACKERS[damage]
    do(tmp_path)
    with pytest.warns(UserWarning, match=expected):
        loaded = load(tmp_path, model_chunks=[net], optimizer=optimizer)
    assert loaded.step == 5
    assert re.search(f"passed over: .*{expected}", loaded.notes()[0])


@pytest.mark.parametrize(
    "damage", [name for name in DAMAGE if not re.search("directory|newer|metadata|malicious", name)]
)
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(tmp_path, damage):
    for step in (4, 5):
        net, optimizer = saved(tmp_path, step=step, consumed_samples=step)
    do, expected = DAMAGE[damage]
    do(tmp_path)
    with pytest.warns(UserWarning, match=f"{expected}.*Loading .*iter_0000004 instead"):
        loaded = load(tmp_path, model_chunks=[net], optimizer=optimizer)
    assert loaded.consumed_samples == 4
    with pytest.raises(CheckpointError, match="load another step"):
        load(tmp_path, model_chunks=[net], optimizer=optimizer, step=5)


def test_an_object_in_place_of_a_tensor_is_refused(tmp_path):
    net, _ = saved(tmp_path)
    state = {key: x.detach() for key, x in net.state_dict(prefix="model.").items()} | {"model.0.bias": 1}
    with pytest.warns(UserWarning, match=r"torch.distributed is disabled|existing checkpoint"):
        dcp.save(state, checkpoint_id=tmp_path / "iter_0000005", no_dist=True)
    forge(tmp_path)
    assert re.search(r"model.0.bias +a Python object +float32 \(4,\)", refused(tmp_path, net, None))
