"""What does not fit is refused before anything is touched, in words that say what to do."""

import json
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint import filesystem
from torch.optim.lr_scheduler import LambdaLR

from core.checkpoint import CheckpointError, latest_step, load, save
from core.checkpoint.boxes import Boxes, cut
from core.checkpoint.directory import TRACKER
from core.checkpoint.manifest import NAME
from core.optimizer.rules.adam import AdamW
from core.optimizer.rules.sgd import SGD
from core.process_groups_config import Axis
from core.sharding.layout import Layout, Split
from tests.support.saved_model import model, refused, saved
from tests.support.small_run import CUTS, Run, read_plainly, shared


def test_an_empty_directory_holds_no_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match=r"no checkpoint in .*: no save was ever completed there"):
        load(tmp_path, model_chunks=[model()])
    assert latest_step(tmp_path) is None
    assert latest_step(tmp_path / "none") is None


def test_a_file_holds_no_checkpoint(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="it is a file"):
        load(tmp_path / "file", model_chunks=[model()])


@pytest.mark.parametrize("path", ["file", "file/below"])
def test_nothing_is_saved_to_a_file(tmp_path, path):
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="that is a file, or below one; give a directory"):
        saved(tmp_path / path)


def test_the_folder_of_one_checkpoint_is_not_the_directory(tmp_path):
    net, _ = saved(tmp_path)
    with pytest.raises(CheckpointError, match="is one checkpoint of several; give the directory above it"):
        load(tmp_path / "iter_0000005", model_chunks=[net])


def test_any_step_can_be_loaded(tmp_path):
    for step in (5, 6):
        net, optimizer = saved(tmp_path, step=step, consumed_samples=10 * step)
    assert latest_step(tmp_path) == 6
    assert load(tmp_path, model_chunks=[net], optimizer=optimizer).consumed_samples == 60
    assert load(tmp_path, model_chunks=[net], optimizer=optimizer, step=5).consumed_samples == 50
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 4 in .*; there are steps 5, 6"):
        load(tmp_path, model_chunks=[net], step=4)


def test_what_was_given_comes_back(tmp_path):
    net, optimizer = saved(tmp_path, schedule={"last_epoch": 5, "base_lrs": (0.1,)}, extra={"seed": 3})
    loaded = load(tmp_path, model_chunks=[net], optimizer=optimizer)
    assert (loaded.step, loaded.schedule, loaded.extra) == (5, {"last_epoch": 5, "base_lrs": (0.1,)}, {"seed": 3})
    assert loaded.path == tmp_path / "iter_0000005"
    manifest = json.loads((loaded.path / NAME).read_text())
    assert manifest["optimizers"] == ["AdamW"]
    assert manifest["layout"] == {"pp": 1, "dp": 1, "tp": 1}
    assert manifest["versions"]["torch"] == torch.__version__


def test_python_objects_are_not_saved(tmp_path):
    with pytest.raises(CheckpointError, match=r"extra\['it'\] cannot be saved: it is of type builtins.object"):
        saved(tmp_path, extra={"it": object()})
    assert list(tmp_path.iterdir()) == []


def test_another_model_is_refused_with_one_table(tmp_path):
    saved(tmp_path)
    net = nn.Sequential(nn.Linear(3, 8), nn.Linear(8, 2, bias=False), nn.LayerNorm(2))
    text = refused(tmp_path, net, AdamW(net.parameters()))
    rows = [re.split("  +", line.strip()) for line in text.splitlines()]
    assert ["model.0.weight", "float32 (4, 3)", "float32 (8, 3)"] in rows
    assert ["model.1.bias", "float32 (2,)", "missing"] in rows
    assert ["model.2.weight", "missing", "float32 (2,)"] in rows
    assert ["optimizer.state.exp_avg.1.weight", "float32 (2, 4)", "float32 (2, 8)"] in rows
    assert "Build the model that was saved" in text


def test_a_long_table_is_cut(tmp_path):
    saved(tmp_path)
    net = nn.Sequential(*(nn.Linear(3, 3) for _ in range(20)))
    text = refused(tmp_path, net, None)
    assert len(text.splitlines()) < 30
    assert re.search(r"… and \d+ more", text)


def test_another_dtype_is_refused(tmp_path):
    saved(tmp_path)
    assert re.search(
        r"model.0.weight +float32 \(4, 3\) +bfloat16 \(4, 3\)", refused(tmp_path, model(dtype=torch.bfloat16), None)
    )


def test_another_optimizer_is_refused_by_name_or_starts_fresh(tmp_path):
    net, _ = saved(tmp_path)
    other = model()
    for p in other.parameters():
        p.data.zero_()
    sgd = SGD(other.parameters(), momentum=0.9)
    text = refused(tmp_path, other, sgd)
    assert re.search(r"optimizer of 0.weight and 3 more +AdamW +SGD", text)
    assert "exp_avg" not in text
    assert "load_optimizer=False" in text
    loaded = load(tmp_path, model_chunks=[other], optimizer=sgd, load_optimizer=False)
    assert not loaded.optimizer_loaded
    assert "the optimizer starts with fresh state" in loaded.notes()
    assert torch.equal(other[0].weight, net[0].weight)


def test_state_that_was_not_saved_is_missing(tmp_path):
    net = model()
    save(tmp_path, step=5, model_chunks=[net], optimizer=SGD(net.parameters()))
    text = refused(tmp_path, net, SGD(net.parameters(), momentum=0.9))
    assert re.search(r"optimizer.state.momentum_buffer.0.bias +missing +float32 \(4,\)", text)


def test_a_checkpoint_without_optimizer(tmp_path):
    net = model()
    save(tmp_path, step=5, model_chunks=[net])
    assert re.search(r"optimizer of 0.weight and 3 more +none +AdamW", refused(tmp_path, net, AdamW(net.parameters())))
    assert load(tmp_path, model_chunks=[net]).step == 5


def test_settings_that_differ_are_told_and_the_new_ones_stay(tmp_path):
    net = model()
    optimizer = AdamW(net.parameters(), lr=0.1, weight_decay=0.2)
    LambdaLR(optimizer, lambda step: 0.5)
    save(tmp_path, step=5, model_chunks=[net], optimizer=optimizer)
    same = AdamW(net.parameters(), lr=0.1, weight_decay=0.2)
    assert load(tmp_path, model_chunks=[net], optimizer=same).differences == ()
    changed = AdamW(
        [{"params": net[0].parameters()}, {"params": net[1].parameters(), "weight_decay": 0.0}],
        lr=0.3, betas=(0.8, 0.9), weight_decay=0.2,
    )  # fmt: skip
    loaded = load(tmp_path, model_chunks=[net], optimizer=changed)
    found = {d.name: (d.saved, d.now, len(d.parameters)) for d in loaded.differences}
    assert found == {
        "AdamW.betas": ([0.9, 0.999], [0.8, 0.9], 4),
        "AdamW.lr": (0.1, 0.3, 4),
        "AdamW.weight_decay": (0.2, 0.0, 2),
    }
    assert "AdamW.weight_decay was 0.2 and is now 0.0 (2 parameters)" in loaded.notes()
    assert [group["lr"] for group in changed.param_groups] == [0.3, 0.3]


def test_names_must_be_global(tmp_path):
    with pytest.raises(CheckpointError, match=r"two model chunks have different tensors called '0.weight'"):
        save(tmp_path, step=1, model_chunks=[model(), model()])


def test_a_parameter_without_a_name_is_refused(tmp_path):
    with pytest.raises(
        CheckpointError, match=r"AdamW has a parameter of shape \(8, 3\) that is in none of the 4 named"
    ):
        save(tmp_path, step=1, model_chunks=[model()], optimizer=AdamW(model(8).parameters()))


def test_an_optimizer_that_cannot_say_its_layout_is_refused(tmp_path):
    net = model()
    with pytest.raises(CheckpointError, match="Adagrad does not say how its state is laid out"):
        save(tmp_path, step=1, model_chunks=[net], optimizer=torch.optim.Adagrad(net.parameters()))


def test_boxes():
    axis = Axis("tp", (0, 1), 1)
    shard = torch.arange(24.0).view(4, 6)
    layout = Layout((8, 12), (Split.even(axis, 8, stride=2), Split.even(axis, 12)))
    boxes = cut(shard, layout)
    assert {tuple(at): tuple(x.shape) for at, x in boxes.items()} == {(2, 6): (2, 6), (6, 6): (2, 6)}
    assert torch.equal(boxes[torch.Size((6, 6))], shard[2:])
    assert boxes[torch.Size((6, 6))].data_ptr() == shard[2:].data_ptr()
    assert list(cut(torch.tensor(3.0), Layout.whole(()))) == [torch.Size(())]
    assert cut(torch.empty(0, 3), Layout((2, 3), (Split(axis, (((0, 2),), ())), None))) == {}
    with pytest.raises(ValueError, match=r"shape \(3, 6\) was given for \(8, 12\).*check partition_dim"):
        Boxes(shard[:3], layout)
    with pytest.raises(NotImplementedError, match="compute with the shard itself"):
        Boxes(shard, layout) + 1


def test_a_tensor_without_entries_is_saved(tmp_path):
    net = nn.ParameterDict({"none": nn.Parameter(torch.empty(0, 3)), "one": nn.Parameter(torch.ones(()))})
    path = save(tmp_path, step=1, model_chunks=[net])
    read: dict[str, Tensor] = read_plainly(path, {"model.none": torch.empty(0, 3), "model.one": torch.zeros(())})
    assert read["model.one"] == 1
    load(tmp_path, model_chunks=[net])


BLOCKWISE = {"optimizer": "adaptive_muon", "muon_tp_mode": "blockwise", "adaptive_muon_moment2_method": "normuon"}


@pytest.mark.mpi(min_size=2)
def test_state_of_a_block_loads_at_its_tensor_parallel_size_only(world, tmp_path):
    folder = shared(tmp_path)
    run = Run(world, CUTS[2]["tp2"], BLOCKWISE)
    torch.manual_seed(world.rank)
    for key, x in run.shards.items():
        if key.startswith("optimizer.state.moment2_buffer"):
            x.normal_()
    save(folder, step=1, model_chunks=run.chunks, optimizer=run.optimizer)
    again = Run(world, CUTS[2]["tp2"], BLOCKWISE)
    load(folder, model_chunks=again.chunks, optimizer=again.optimizer)
    cut_here = [key for key in run.shards if "moment2_buffer" in key and "adapter" not in key]
    assert cut_here and all(torch.equal(again.shards[key], run.shards[key]) for key in cut_here)
    for other in (
        Run(world, CUTS[2]["copies"], BLOCKWISE),
        Run(world, CUTS[2]["tp2"], BLOCKWISE | {"muon_tp_mode": "owner"}),
    ):
        with pytest.raises(
            CheckpointError, match=r"moment2_buffer.layers.0.qkv.weight +2 blocks, one a rank +whole"
        ) as error:
            load(folder, model_chunks=other.chunks, optimizer=other.optimizer)
        assert "loads at the tensor-parallel size that saved it" in str(error.value)


@pytest.mark.mpi(min_size=2)
def test_all_ranks_refuse_what_one_finds(world, tmp_path):
    folder = shared(tmp_path)
    run = Run(world, CUTS[2]["pp2"], {"optimizer": "adamw"})
    save(folder, step=1, model_chunks=run.chunks, optimizer=run.optimizer)
    if world.rank == 1:
        run.chunks[0].register_buffer("late", torch.zeros(3))
    with pytest.raises(CheckpointError, match=r"model.late +missing +float32 \(3,\)"):
        load(folder, model_chunks=run.chunks, optimizer=run.optimizer)


@pytest.mark.mpi(min_size=2)
def test_a_write_that_fails_on_one_rank_fails_on_all_and_leaves_nothing(world, tmp_path, monkeypatch):
    folder = shared(tmp_path)
    run = Run(world, CUTS[2]["tp2"], {"optimizer": "adamw"})
    save(folder, step=1, model_chunks=run.chunks, optimizer=run.optimizer)

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    if world.rank == 1:
        monkeypatch.setattr(filesystem, "_write_item", full)
    with pytest.raises(
        CheckpointError, match=r"rank 1: OSError: .*No space left on device. Earlier checkpoints are as they were"
    ):
        save(folder, step=2, model_chunks=run.chunks, optimizer=run.optimizer)
    monkeypatch.undo()
    assert load(folder, model_chunks=run.chunks, optimizer=run.optimizer).step == 1
    torch.distributed.barrier()
    assert sorted(path.name for path in folder.iterdir()) == [".lock", "iter_0000001", TRACKER]
