"""Malicious and random checkpoints: every command of tools.ckpt refuses them, and executes nothing."""

import json
import pickle
import re
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import nn
from torch.distributed.checkpoint import metadata

from core.checkpoint import digests, save
from core.checkpoint.contents import base_of
from core.checkpoint.directory import TRACKER
from core.checkpoint.manifest import NAME
from core.checkpoint.saving import COMMON
from core.optimizer.rules.adam import AdamW
from tests.support.checkpoints import STEP, Malice, put, saved, seal, sign
from tools.ckpt import command as ckpt


def malicious_metadata(folder: Path) -> None:
    found = pickle.loads((folder / ".metadata").read_bytes())
    found.planner_data = Malice()
    (folder / ".metadata").write_bytes(pickle.dumps(found))


def malicious_object(folder: Path) -> None:
    put(folder, COMMON, Malice())


def malicious_tensor(folder: Path) -> None:
    put(folder, "model.0.bias", Malice())


def elsewhere(folder: Path) -> None:
    found = pickle.loads((folder / ".metadata").read_bytes())
    for info in found.storage_data.values():
        info.relative_path = "../outside.distcp"
    (folder / ".metadata").write_bytes(pickle.dumps(found))


REFUSED = re.compile("could execute code|cannot be read|is not the metadata|this package wrote it")
COMMANDS = {
    "inspect": ["inspect", "{run}"],
    "verify": ["verify", "{run}", "--all"],
    "diff": ["diff", "{good}", "{run}", "--values"],
    "diff the other way": ["diff", "{run}", "{good}", "--values"],
    "reshard": ["reshard", "{run}", "{new}"],
    "to torch": ["convert", "{run}", "{new}.pt", "--to", "torch"],
    "to megatron": ["convert", "{run}", "{new}", "--to", "megatron"],
    "from megatron": ["convert", "{run}", "{new}", "--from", "megatron"],
}


@pytest.mark.parametrize(
    "malice", [malicious_metadata, malicious_object, malicious_tensor, elsewhere], ids=lambda m: m.__name__
)
def test_every_command_refuses_a_malicious_checkpoint(tmp_path, capsys, monkeypatch, malice):
    monkeypatch.chdir(tmp_path)
    saved(tmp_path / "good")
    shutil.copytree(tmp_path / "good", tmp_path / "run")
    malice(tmp_path / "run" / STEP)
    sign(tmp_path / "run" / STEP)
    paths = {name: str(tmp_path / name) for name in ("run", "good", "new")}
    # Where a tensor should be, something else is found by those who read tensors.
    tensors = malice is malicious_tensor
    for name, flags in COMMANDS.items():
        expected = 0 if tensors and name in ("inspect", "verify") else 1
        assert ckpt.main([flag.format(**paths) for flag in flags]) == expected, name
        said = "".join(capsys.readouterr())
        assert expected == 0 or REFUSED.search(said), (name, said)
        assert not (tmp_path / "new.pt").exists()
        assert not list(tmp_path.glob("new/*iter*")), name
    assert not (tmp_path / "stolen").exists()


@pytest.mark.parametrize("value", [Malice(), {"model": {"a": Malice()}}], ids=["file", "entry"])
def test_a_malicious_file_of_torch_is_refused(tmp_path, capsys, monkeypatch, value):
    monkeypatch.chdir(tmp_path)
    torch.save(value, tmp_path / "x.pt")
    assert ckpt.main(["convert", "x.pt", "run", "--from", "torch"]) == 1
    assert "x.pt is refused: it names posix.system, which could execute code" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.pt"]


# What is random.

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
NUMBERS = st.integers(-3, 70) | st.sampled_from([2**31, 2**63, 10**30]) | st.none() | st.text(max_size=2)


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a checkpoint, to be changed and put back."""
    folder = tmp_path_factory.mktemp("fuzz")
    net = nn.Linear(2, 2)
    save(folder / "run", step=5, model_chunks=[net], optimizer=AdamW(net.parameters()))
    shutil.copytree(folder / "run", folder / "good")
    return folder


def survives(
    example: Path, change: Callable[[Path], Any], *, reseal: bool = True, commands: Iterable[str] = COMMANDS
) -> None:
    """Each of ``commands`` ends with a code, never with a traceback, on what ``change`` makes of a checkpoint."""
    shutil.rmtree(example / "run")
    shutil.copytree(example / "good", example / "run")
    change(example / "run")
    if reseal:
        seal(example / "run" / STEP)
    for name in commands:
        for made in (example / "new", example / "new.pt"):
            shutil.rmtree(made, ignore_errors=True)
            made.unlink(missing_ok=True)
        paths = {part: example / part for part in ("run", "good", "new")}
        try:
            code = ckpt.main([flag.format(**paths) for flag in COMMANDS[name]])
        except SystemExit as refused:
            code = refused.code
        assert code in (0, 1, 2), name


def random_file(name: str) -> st.SearchStrategy[Callable[[Path], Any]]:
    return st.binary(max_size=200).map(lambda data: lambda run: (run / name).write_bytes(data))


def changed_file(name: str) -> st.SearchStrategy[Callable[[Path], Any]]:
    """Some bytes of the real one are others."""

    def change(edits: list[tuple[int, int]]) -> Callable[[Path], Any]:
        def write(run: Path) -> None:
            data = bytearray((run / name).read_bytes())
            for at, byte in edits:
                data[at % len(data)] = byte
            (run / name).write_bytes(data)

        return write

    return st.lists(st.tuples(st.integers(0, 1 << 16), st.integers(0, 255)), min_size=1, max_size=5).map(change)


@st.composite
def changed_manifest(draw: st.DrawFn) -> Callable[[Path], Any]:
    keys = (
        "step",
        "layout",
        "ranks",
        "optimizers",
        "groups",
        "schedule",
        "extra",
        "files",
        "config",
        "versions",
        "format",
    )
    changes = draw(
        st.dictionaries(st.sampled_from([*keys, "consumed_samples"]), JSON | NUMBERS, min_size=1, max_size=3)
    )

    def write(run: Path) -> None:
        path = run / STEP / NAME
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return write


@st.composite
def changed_metadata(draw: st.DrawFn) -> Callable[[Path], Any]:
    """A well-formed pickle whose contents are not."""
    part = draw(
        st.sampled_from(["offsets", "sizes", "size", "chunks", "dtype", "place", "offset", "length", "keys", "storage"])
    )
    value = draw(st.lists(st.integers(-3, 5), max_size=3).map(torch.Size) | NUMBERS | st.just([]) | st.just(torch.int8))

    def write(run: Path) -> None:
        path = run / STEP / ".metadata"
        found = pickle.loads(path.read_bytes())
        x = next(x for x in found.state_dict_metadata.values() if isinstance(x, metadata.TensorStorageMetadata))
        info = next(iter(found.storage_data.values()))
        match part:
            case "offsets" | "sizes":
                setattr(x.chunks[0], part, value)
            case "size" | "chunks":
                setattr(x, part, value)
            case "dtype":
                x.properties.dtype = value
            case "place" | "offset" | "length":
                setattr(info, {"place": "relative_path"}.get(part, part), value)
            case "keys":
                found.state_dict_metadata[value if value.__hash__ else 0] = x
            case "storage":
                found.storage_data = value
        path.write_bytes(pickle.dumps(found))

    return write


# Manifest, digests, metadata, tracker; as a job would meet them, and as someone who makes the digests right would.
RANDOM = {
    "manifest": (changed_manifest(), True),
    "manifest of random bytes": (random_file(f"{STEP}/{NAME}"), True),
    "digests": (random_file(f"{STEP}/{digests.NAME}") | changed_file(f"{STEP}/{digests.NAME}"), False),
    "metadata": (random_file(f"{STEP}/.metadata") | changed_file(f"{STEP}/.metadata") | changed_metadata(), True),
    "tracker": (
        random_file(TRACKER) | st.text(max_size=20).map(lambda text: lambda run: (run / TRACKER).write_text(text)),
        True,
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("what", RANDOM)
def test_random_contents_never_give_a_traceback(example, what):
    fuzz(example, what, 40)


@pytest.mark.soak
@pytest.mark.timeout(3000)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("what", RANDOM)
def test_many_random_contents_never_give_a_traceback(example, what):
    fuzz(example, what, 400)


def fuzz(example: Path, what: str, examples: int) -> None:
    changes, reseal = RANDOM[what]
    # The tracker is read in one place, and what it leads to is whole.
    commands = ("inspect", "diff the other way") if what == "tracker" else COMMANDS

    @settings(max_examples=examples, suppress_health_check=list(HealthCheck))
    @given(changes)
    def check(change: Callable[[Path], Any]) -> None:
        survives(example, change, reseal=reseal, commands=commands)

    check()


@pytest.mark.parametrize("text", ["[" * 100_000, '{"format": 1e999}', '{"format": 2, "step": true}'])
def test_json_that_python_stumbles_over_is_damage(example, capsys, text):
    survives(example, lambda run: (run / STEP / NAME).write_text(text))
    assert "is damaged" in capsys.readouterr().err


def test_keys_of_megatrons_objects_are_not_blocks():
    assert base_of("rng_state/shard_0.0_2.2") == ("rng_state/shard_0.0_2.2", 0)
    assert base_of("optimizer.state.q.w/shard_1_of_2") == ("optimizer.state.q.w", 2)
