"""A checkpoint gives back what it was given, under names that wrappers do not change, or refuses to be saved."""

import collections
import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.parallel import DistributedDataParallel

from core.checkpoint import Background, CheckpointError, load, save
from core.checkpoint.plain import copied, value_of
from core.optimizer.emerging_optimizers import get_optimizer
from core.optimizer.optimizer_config import OptimizerConfig
from core.process_groups_config import ProcessGroupCollection
from tools.ckpt.command import main

KEYS = st.none() | st.booleans() | st.integers() | st.text() | st.floats(allow_nan=False)
KEYS |= st.tuples(st.integers(), st.text())
TENSORS = st.sampled_from(
    [
        torch.tensor(0.1),
        torch.arange(6).view(2, 3),
        torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
        torch.empty(0, 3),
        torch.tensor([True, False]),
        torch.tensor(3 + 4j),
    ]
)
VALUES = st.recursive(
    KEYS | st.binary() | st.complex_numbers(allow_nan=False) | TENSORS | st.sampled_from([torch.bfloat16, torch.int8]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.sets(KEYS, max_size=3)
        | st.frozensets(KEYS, max_size=3)
        | st.dictionaries(KEYS, inner, max_size=3)
        | st.dictionaries(st.sampled_from(["__shardstep__", "items"]), inner, max_size=2)
    ),
    max_leaves=12,
)


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return type(b) is dict and list(a) == list(b) and all(same(x, b[k]) for k, x in a.items())
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


@settings(max_examples=200, deadline=None)
@given(VALUES)
def test_values_come_back_equal_and_of_their_type(value):
    assert same(value, copied("extra", value))


def test_what_is_equal_to_a_plain_value_comes_back_as_that():
    point = collections.namedtuple("point", "x y")(1, 2)
    given = {"counter": collections.Counter({3: 1}), "numpy": np.float64(0.5), "point": point}
    assert copied("extra", given) == given
    assert copied("extra", io.BytesIO(b"abc")).getvalue() == b"abc"


@pytest.mark.parametrize(
    ("value", "match"),
    [
        ({"a": [1, {"b": object()}]}, r"extra\['a'\]\[1\]\['b'\] cannot be saved: it is of type builtins.object"),
        ({"a": np.int64(3)}, r"extra\['a'\] .* numpy.int64"),
        ({(1, print): 2}, r"a key of extra\[1\] cannot be saved"),
        ({"a": torch.zeros(2**22 + 1)}, "register it as a buffer"),
        ({"a": torch.eye(3).to_sparse()}, "not a dense tensor"),
    ],
)
def test_what_cannot_come_back_is_refused_before_anything_is_written(tmp_path, value, match):
    net = nn.Linear(2, 2)
    with pytest.raises(CheckpointError, match=match):
        save(tmp_path / "new", step=1, model_chunks=[net], extra=value)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "text",
    ['{"__shardstep__": "os.system"}', '{"__shardstep__": "tensor", "dtype": "load", "shape": [], "base64": ""}'],
)
def test_text_that_no_save_wrote_is_refused(text):
    with pytest.raises(ValueError, match="no value that a save writes"):
        value_of(text)


class Block(nn.Module):
    """A layer with a persistent buffer, one that is not, and an extra state."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.module = nn.Linear(4, 4, bias=False)  # a user's own name, which stays
        self.register_buffer("bias", torch.zeros(4))
        self.register_buffer("scratch", torch.zeros(4), persistent=False)
        self.scale: Any = {"amax": torch.zeros(3), 7: (1, 2)}

    def get_extra_state(self) -> Any:
        return self.scale

    def set_extra_state(self, state: Any) -> None:
        self.scale = state

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.module(self.fc(x)) + self.bias


def wrapped(how: str) -> tuple[nn.Module, Block]:
    torch.manual_seed(0)
    block = Block()
    inner: nn.Module = nn.Sequential(checkpoint_wrapper(block) if "checkpoint" in how else block)
    if "compile" in how:
        inner = torch.compile(inner, backend="eager")
    if "ddp" in how:
        inner = DistributedDataParallel(inner)
    return inner, block


NAMES = ["0.bias", "0.fc.bias", "0.fc.weight", "0.module.weight"]


@pytest.mark.parametrize("loads", ["", "checkpoint compile ddp"])
@pytest.mark.parametrize("saves", ["", "checkpoint", "compile", "ddp", "checkpoint compile ddp"])
def test_wrappers_do_not_change_names(tmp_path, world, saves, loads):
    net, block = wrapped(saves)
    optimizer = get_optimizer(OptimizerConfig(optimizer="adamw", lr=0.1), net)
    assert sorted(n for g in optimizer.param_groups for n in g["param_names"]) == NAMES[1:]
    net(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    block.bias.fill_(7)
    block.scale["amax"].fill_(3)
    save(tmp_path, step=1, model_chunks=[net], optimizer=optimizer)
    other, other_block = wrapped(loads)
    again = get_optimizer(OptimizerConfig(optimizer="adamw", lr=0.1), other)
    loaded = load(tmp_path, model_chunks=[other], optimizer=again)
    assert [key.removeprefix("model.") for key in loaded.keys if key.startswith("model.")] == NAMES
    assert loaded.keys[-1] == "extra_state.0"
    assert other_block.bias.eq(7).all()
    assert same(other_block.scale, block.scale)
    for p, q in zip(net.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)
        assert torch.equal(optimizer.state[p]["exp_avg"], again.state[q]["exp_avg"])


def test_a_tensor_that_only_state_dict_knows_is_refused(tmp_path):
    net = nn.Linear(2, 2)
    net.register_state_dict_post_hook(lambda module, state, prefix, _: state.update({f"{prefix}packed": torch.ones(2)}))
    with pytest.raises(
        CheckpointError, match=r"state_dict has 'packed' \(Tensor\), which is neither a parameter nor a buffer"
    ):
        save(tmp_path / "new", step=1, model_chunks=[net])
    assert not (tmp_path / "new").exists()


def test_an_extra_state_that_cannot_be_saved_is_refused(tmp_path):
    net, block = wrapped("")
    block.scale = object()
    with pytest.raises(CheckpointError, match="extra state of 0 cannot be saved"):
        save(tmp_path / "new", step=1, model_chunks=[net])
    assert not (tmp_path / "new").exists()


def test_extra_states_must_fit(tmp_path):
    net, block = wrapped("")
    save(tmp_path / "with", step=1, model_chunks=[net])
    block.scale = None  # nothing to keep
    save(tmp_path / "without", step=1, model_chunks=[net])
    load(tmp_path / "without", model_chunks=[net])
    load(tmp_path / "with", model_chunks=[net])
    assert block.scale is not None
    with pytest.raises(CheckpointError, match=r"extra_state\.0 +missing +an extra state"):
        load(tmp_path / "without", model_chunks=[net])
    plain = nn.Sequential(nn.Module())
    plain[0].fc, plain[0].module = nn.Linear(4, 4), nn.Linear(4, 4, bias=False)
    plain[0].register_buffer("bias", torch.zeros(4))
    with pytest.raises(CheckpointError, match=r"extra_state\.0 +an extra state +missing"):
        load(tmp_path / "with", model_chunks=[plain])
    load(tmp_path / "with", model_chunks=[plain], only=["model.*"])


def test_tools_ckpt_carries_extra_states(tmp_path):
    net, block = wrapped("")
    block.scale = {"amax": torch.tensor([1.0, 2.0]), 7: (1, "a")}
    save(tmp_path / "a", step=1, model_chunks=[net], schedule={3: (1, 2)})
    assert main(["reshard", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    assert main(["convert", str(tmp_path / "b"), str(tmp_path / "c.pt"), "--to", "torch"]) == 0
    file = torch.load(tmp_path / "c.pt", weights_only=True)
    assert same(file["model"]["0._extra_state"], block.scale)
    nn.Sequential(Block()).load_state_dict(file["model"])
    assert main(["convert", str(tmp_path / "c.pt"), str(tmp_path / "d"), "--from", "torch"]) == 0
    again, other = wrapped("")
    assert load(tmp_path / "d", model_chunks=[again]).schedule == {3: (1, 2)}
    assert same(other.scale, block.scale)


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("alike", [True, False])
def test_extra_states_of_ranks(world, tmp_path_factory, alike):
    folders: list[Any] = [tmp_path_factory.mktemp("saved")] if world.rank == 0 else [None]
    torch.distributed.broadcast_object_list(folders)
    groups = ProcessGroupCollection.from_mesh(world.mesh((2,), ("tp",)))
    net, block = wrapped("")
    block.scale = {"of": 0 if alike else world.rank}
    save(folders[0], step=1, model_chunks=[net], pg_collection=groups)
    net, block = wrapped("")
    load(folders[0], model_chunks=[net], pg_collection=groups)
    assert block.scale == {"of": 0 if alike else world.rank}
    copies = ProcessGroupCollection.from_mesh(world.mesh((2,), ("dp",)))
    if alike:
        load(folders[0], model_chunks=[net], pg_collection=copies)
    else:
        with pytest.raises(CheckpointError, match=r"another on each of 2 ranks .* another layout"):
            load(folders[0], model_chunks=[net], pg_collection=copies)


class TestFiles:
    def test_a_link_in_the_place_of_a_pruned_checkpoint_is_unlinked(self, tmp_path):
        net, archive = nn.Linear(2, 2), tmp_path / "archive"
        archive.mkdir()
        folder = tmp_path / "saved"
        for step in (1, 2):
            save(folder, step=step, model_chunks=[net], keep=2)
        (folder / "iter_0000001").rename(archive / "iter_0000001")
        (folder / "iter_0000001").symlink_to(archive / "iter_0000001")
        (folder / ".tmp_iter_0000009").symlink_to(archive)  # what an older version left
        for step in (3, 4):
            save(folder, step=step, model_chunks=[net], keep=2)
        assert sorted(path.name for path in folder.glob("*iter_*")) == ["iter_0000003", "iter_0000004"]
        assert len(list((archive / "iter_0000001").iterdir())) > 3

    def test_a_checkpoint_that_cannot_be_pruned_does_not_end_the_run(self, tmp_path, monkeypatch):
        net = nn.Linear(2, 2)

        def fails(path: Path) -> None:
            raise OSError("busy")

        monkeypatch.setattr("core.checkpoint.directory.shutil.rmtree", fails)
        save(tmp_path, step=1, model_chunks=[net], keep=2)
        save(tmp_path, step=2, model_chunks=[net], keep=2)
        with pytest.warns(UserWarning, match="cannot be removed and takes up space: busy"):
            save(tmp_path, step=3, model_chunks=[net], keep=2)
        assert load(tmp_path, model_chunks=[net]).step == 3

    def test_a_relative_path_means_the_directory_at_the_time_of_the_call(self, tmp_path, monkeypatch):
        (tmp_path / "here").mkdir()
        monkeypatch.chdir(tmp_path / "here")
        net, background = nn.Linear(2, 2), Background()
        start, after_chdir = background.start, []

        def later(write: Any) -> None:
            os.chdir(tmp_path)  # as a trainer may, while the thread writes
            after_chdir.append(True)
            start(write)

        monkeypatch.setattr(background, "start", later)
        made = save("ckpt", step=1, model_chunks=[net], background=background)
        assert background.wait() == made == tmp_path / "here" / "ckpt" / "iter_0000001"
        assert after_chdir
        assert load(tmp_path / "here" / "ckpt", model_chunks=[net]).step == 1

    def test_a_file_system_without_fsync_of_directories_is_said_once(self, tmp_path, monkeypatch):
        fsync = os.fsync

        def refuses(descriptor: int) -> None:
            if os.path.isdir(f"/proc/self/fd/{descriptor}"):
                raise OSError(22, "Invalid argument")
            fsync(descriptor)

        monkeypatch.setattr("core.checkpoint.directory.os.fsync", refuses)
        net = nn.Linear(2, 2)
        with pytest.warns(UserWarning, match="cannot make the names of files durable") as said:
            save(tmp_path, step=1, model_chunks=[net])
        assert len(said) == 1
        save(tmp_path, step=2, model_chunks=[net])
        assert load(tmp_path, model_chunks=[net]).step == 2

    def test_no_reason_is_none(self, tmp_path, monkeypatch):
        def fails(*_: Any, **__: Any) -> None:
            raise OSError("the quota is used up")

        monkeypatch.setattr(Path, "mkdir", fails)
        with pytest.raises(CheckpointError, match="the quota is used up"):
            save(tmp_path / "new", step=1, model_chunks=[nn.Linear(2, 2)])
