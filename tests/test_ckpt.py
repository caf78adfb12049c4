"""tools.ckpt on checkpoints of real runs: inspect, verify, diff and reshard, and that plain torch reads the same."""

import shutil
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from core.checkpoint import digests, save
from core.checkpoint.directory import TRACKER
from core.checkpoint.manifest import NAME
from core.checkpoint.reader import SafeReader
from core.optimizer.rules.adam import AdamW
from tests.support.checkpoints import STEP, flip, same, saved, trained
from tests.support.small_run import Cut, Run, noise, shared
from tools.ckpt import command as ckpt
from tools.ckpt import writer as ckpt_write
from tools.ckpt.diff import distance


def test_inspect_says_what_there_is(tmp_path, capsys):
    saved(tmp_path)
    assert ckpt.main(["inspect", str(tmp_path), "--keys", "model.0.*", "--keys", "*step.2.bias"]) == 0
    out = capsys.readouterr().out
    lines = [line.split() for line in out.splitlines()]
    assert ["step", "5,", "40", "samples"] in lines
    assert ["layout", "pp", "1", "x", "dp", "1", "x", "tp", "1"] in lines
    assert ["optimizers", "AdamW", "(6", "parameters)"] in lines
    assert ["model.0.weight", "float32", "64", "x", "96", "24,576", "1", "1"] in lines
    assert ["optimizer.state.step.2.bias", "float32", "scalar", "4", "1", "1"] in lines
    assert f"torch {torch.__version__}" in out
    assert "model.2.weight" not in out
    written = sum(file.stat().st_size for file in (tmp_path / STEP).iterdir() if file.name not in (NAME, digests.NAME))
    assert f"{written:,} in 3 files" in out


def test_a_folder_or_a_step_is_one_of_several(tmp_path, capsys):
    for step in (5, 6):
        saved(tmp_path, step)
    for flags, step in (([str(tmp_path)], 6), ([str(tmp_path), "--step", "5"], 5), ([str(tmp_path / STEP)], 5)):
        assert ckpt.main(["inspect", *flags]) == 0
        assert f"step        {step}, 40 samples" in capsys.readouterr().out


USAGE = {
    "no directory": (["inspect", "nowhere"], "DIR nowhere: does not exist; possible: what --save wrote to"),
    "a file": (["verify", "{run}/" + TRACKER], "is a file"),
    "no key": (
        ["inspect", "{run}", "--keys", "nope*"],
        "--keys nope*: no key matches; possible: keys like model.0.weight",
    ),
    "a step of one folder": (
        ["inspect", "{run}/" + STEP, "--step", "4"],
        "is one checkpoint; hint: give the directory above",
    ),
    "over another": (["reshard", "{run}", "{run}"], "holds a checkpoint of step 5 already"),
    "older than another": (["reshard", "{run}", "{newer}"], "holds step 7; step 5 would become the newest"),
    "no file": (["convert", "{run}", "{run}/x", "--from", "torch"], "is not a file; possible: what torch.save wrote"),
    "over a file": (["convert", "{run}", "{run}/" + TRACKER, "--to", "torch"], "is there already"),
    "not to megatron": (["convert", "a", "b", "--from", "torch", "--layers", "stacked"], "belong to --to megatron"),
}


@pytest.mark.parametrize("case", USAGE)
def test_wrong_commands_are_told_in_one_line(tmp_path, capsys, monkeypatch, case):
    flags, said = USAGE[case]
    saved(tmp_path / "run")
    saved(tmp_path / "newer", step=7)
    with pytest.raises(SystemExit) as exit:
        ckpt.main([flag.format(run=tmp_path / "run", newer=tmp_path / "newer") for flag in flags])
    error = capsys.readouterr().err
    assert (exit.value.code, error.count("\n")) == (2, 1)
    assert said in error


@pytest.mark.parametrize(
    "flags", [["reshard", "a", "b", "--files", "0"], ["inspect", "a", "--step", "x"], ["convert", "a", "b"]]
)
def test_wrong_flags_exit_with_2(flags):
    with pytest.raises(SystemExit) as exit:
        ckpt.main(flags)
    assert exit.value.code == 2


def test_no_checkpoint_and_no_such_step_are_told(tmp_path, capsys):
    saved(tmp_path / "run")
    (tmp_path / "empty").mkdir()
    for flags, said in (
        (["empty"], "no save was ever completed there"),
        (["run", "--step", "4"], "no checkpoint of step 4"),
    ):
        assert ckpt.main(["verify", str(tmp_path / flags[0]), *flags[1:]]) == 1
        assert said in capsys.readouterr().err


def test_verify_names_every_damaged_file(tmp_path, capsys):
    for step in (5, 6):
        saved(tmp_path, step)
    assert ckpt.main(["verify", str(tmp_path), "--all"]) == 0
    assert capsys.readouterr().out.count("as they were written") == 2
    for name in ("__0_0.distcp", ".metadata"):
        flip(tmp_path / STEP / name)
    assert ckpt.main(["verify", str(tmp_path)]) == 0
    capsys.readouterr()
    assert ckpt.main(["verify", str(tmp_path), "--all"]) == 1
    out = capsys.readouterr().out
    assert f"{STEP}/__0_0.distcp: its contents are not what was written" in out or ".metadata cannot be read" in out
    assert "iter_0000006: 4 files" in out
    (tmp_path / "iter_0000006" / "metadata.json").unlink()
    assert ckpt.main(["verify", str(tmp_path)]) == 1
    assert "metadata.json is missing" in capsys.readouterr().out


def test_verify_and_diff_find_a_flipped_bit(tmp_path, capsys):
    saved(tmp_path / "run")
    shutil.copytree(tmp_path / "run", tmp_path / "bad")
    reader = SafeReader(tmp_path / "run" / STEP)
    file = tmp_path / "bad" / STEP / "__0_0.distcp"
    flip(
        file, file.read_bytes().index(reader.whole("model.0.weight").numpy().tobytes()) + 400
    )  # a last bit of entry 100
    assert ckpt.main(["verify", str(tmp_path / "bad")]) == 1
    assert f"{file}: its contents are not what was written" in capsys.readouterr().out
    flags = ["diff", str(tmp_path / "run"), str(tmp_path / "bad")]
    assert ckpt.main(flags) == 0
    assert "values were not compared" in capsys.readouterr().out
    assert ckpt.main([*flags, "--values"]) == 1
    out = capsys.readouterr().out
    before = reader.whole("model.0.weight").flatten()[100]
    bits = (before.view(torch.int32) ^ 1).view(torch.float32)
    row = next(line.split() for line in out.splitlines() if line.startswith("model.0.weight"))
    assert float(row[1]) == pytest.approx(float((before.double() - bits.double()).abs()), rel=1e-3)
    assert "27 of 28 tensors that both have are equal" in out
    for command in (["reshard"], ["convert", "--to", "torch"], ["convert", "--to", "megatron"]):
        assert ckpt.main([*command, str(tmp_path / "bad"), str(tmp_path / "new")]) == 1
        assert "__0_0.distcp are not what was written" in capsys.readouterr().err


def test_diff_says_what_differs(tmp_path, capsys):
    saved(tmp_path / "a")
    net, opt = trained(lambda params, **kwargs: AdamW(params, **kwargs | {"weight_decay": 0.3}), steps=3)
    net[2].register_buffer("more", torch.ones(2, dtype=torch.int8))
    save(tmp_path / "b", step=6, model_chunks=[net], optimizer=opt, consumed_samples=40, extra={"seed": {"x": 1}})
    assert ckpt.main(["diff", str(tmp_path / "a"), str(tmp_path / "b"), "--values"]) == 1
    out = capsys.readouterr().out
    rows = [line.split() for line in out.splitlines()]
    for row in (
        ["step", "5", "6"],
        ["weight_decay", "of", "6", "parameters", "0.1", "0.3"],
        ["model.2.more", "missing", "int8", "(2,)"],
    ):
        assert row in rows
    assert ["extra.seed.x", "left", "out", "1"] in rows
    table = [row for row in rows if len(row) == 3 and row[0].startswith(("model.", "optimizer."))]
    relative = [float(row[2]) for row in table]
    assert relative == sorted(relative, reverse=True)
    assert all(value > 0 for value in relative)
    expected = (torch.load(as_file(tmp_path / "a"))["model"]["0.weight"] - net[0].weight.detach()).abs().max()
    row = next(row for row in table if row[0] == "model.0.weight")
    assert float(row[1]) == pytest.approx(float(expected), rel=1e-3)


def as_file(directory: Path) -> Path:
    path = directory.with_suffix(".pt")
    assert ckpt.main(["convert", str(directory), str(path), "--to", "torch"]) == 0
    return path


@pytest.mark.parametrize(
    ("x", "y", "largest"),
    [
        ([1.0, float("nan")], [1.0, 2.0], float("nan")),
        ([1.0, float("inf")], [1.5, float("inf")], 0.5),
        ([0.0], [-0.0], 0.0),
        ([1 + 2j], [1 + 5j], 3.0),
        ([True, False], [True, True], 1.0),
    ],
)
def test_values_that_are_hard_to_compare(x, y, largest):
    found = distance("x", torch.tensor(x), torch.tensor(y))
    assert not found.equal
    assert found.largest == pytest.approx(largest, nan_ok=True)
    assert distance("x", torch.tensor(x), torch.tensor(x)).equal


@pytest.mark.parametrize("files", [1, 3, 4])
def test_reshard_keeps_everything(tmp_path, capsys, monkeypatch, files):
    monkeypatch.setattr(ckpt_write, "SMALLEST_BOX", 1 << 10)
    net, opt = saved(tmp_path / "run")
    assert ckpt.main(["reshard", str(tmp_path / "run"), str(tmp_path / "new"), "--files", str(files)]) == 0
    assert "generators are restored only on the layout that saved, pp 1 x dp 1 x tp 1" in capsys.readouterr().out
    assert ckpt.main(["diff", str(tmp_path / "run"), str(tmp_path / "new"), "--values"]) == 0
    assert ckpt.main(["verify", str(tmp_path / "new")]) == 0
    new = tmp_path / "new" / STEP
    assert len(list(new.glob("*.distcp"))) == files
    boxes = SafeReader(new).tensors()["model.0.weight"].chunks
    assert [tuple(chunk.sizes) for chunk in boxes] == [(64, 96 // files)] * files
    sizes = [file.stat().st_size for file in new.glob("*.distcp")]
    assert max(sizes) < 1.6 * min(sizes)
    same(net, opt, tmp_path / "new")


def test_reshard_holds_one_tensor_at_a_time(tmp_path, monkeypatch):
    saved(tmp_path / "run")
    alive: list[Any] = []
    read = SafeReader.whole

    def whole(reader: SafeReader, key: str) -> Tensor:
        assert [x for x in alive if x() is not None] in ([], alive[-1:]), "only the loop variable may be left"
        x = read(reader, key)
        alive.append(weakref.ref(x))
        return x

    monkeypatch.setattr(SafeReader, "whole", whole)
    assert ckpt.main(["reshard", str(tmp_path / "run"), str(tmp_path / "new"), "--files", "3"]) == 0
    assert len(alive) == 28


def test_a_write_that_fails_leaves_what_was(tmp_path, capsys, monkeypatch):
    saved(tmp_path / "run")
    saved(tmp_path / "new", step=4)

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ckpt_write.torch, "save", full)
    assert ckpt.main(["reshard", str(tmp_path / "run"), str(tmp_path / "new")]) == 1
    assert "cannot write to" in (error := capsys.readouterr().err)
    assert "No space left on device" in error
    monkeypatch.undo()
    assert ckpt.main(["verify", str(tmp_path / "new"), "--all"]) == 0
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [".lock", "iter_0000004", TRACKER]


# What others read.

PLAIN = """
import sys, torch, torch.distributed.checkpoint as dcp
try:
    import core
except ImportError:
    pass
else:
    raise SystemExit("this package is importable")
reference, *folders = sys.argv[1:]
expected = torch.load(reference, weights_only=True)
for folder in folders:
    got = {key: torch.full_like(x, -1) for key, x in expected.items()}
    dcp.load(got, checkpoint_id=folder, no_dist=True)
    assert len(got) and all(torch.equal(got[key], expected[key]) for key in expected), folder
print("read", len(folders))
"""


def read_without_us(expected: dict[str, Tensor], scratch: Path, *folders: Path) -> None:
    """A process of its own, where this package cannot be imported, reads the same with torch alone."""
    torch.save(expected, scratch / "expected.pt")
    command = [sys.executable, "-I", "-W", "ignore", "-c", PLAIN, str(scratch / "expected.pt"), *map(str, folders)]
    result = subprocess.run(command, cwd=scratch, capture_output=True, text=True, timeout=100, check=False)
    assert result.stdout == f"read {len(folders)}\n", result.stdout + result.stderr


def test_plain_torch_reads_what_one_process_saved(tmp_path):
    net, opt = saved(tmp_path / "run")
    keys = SafeReader(tmp_path / "run" / STEP).tensors()
    expected = {f"model.{name}": x for name, x in net.state_dict().items()}
    expected |= {
        f"optimizer.state.{slot}.{name}": x for name, p in net.named_parameters() for slot, x in opt.state[p].items()
    }
    assert expected.keys() == keys.keys() - {"rng/rank_00000"}
    assert ckpt.main(["reshard", str(tmp_path / "run"), str(tmp_path / "new"), "--files", "3"]) == 0
    read_without_us(expected, tmp_path, tmp_path / "run" / STEP, tmp_path / "new" / STEP)


@pytest.mark.mpi(min_size=2)
def test_plain_torch_reads_what_2_ranks_saved(world, tmp_path):
    check_plain(world, tmp_path, Cut(tp=2))


@pytest.mark.mpi(min_size=4)
def test_plain_torch_reads_what_4_ranks_saved(world, tmp_path):
    check_plain(world, tmp_path, Cut(pp=2, tp=2))


def check_plain(world: Any, path: Path, cut: Cut) -> None:
    folder, settings = shared(path), {"optimizer": "muon", "muon_tp_mode": "owner"}
    wholes = {key: noise(key, x.shape).to(x.dtype) for key, x in Run(None, Cut(), settings).shards.items()}
    run = Run(world, cut, settings)
    for key, shard in run.shards.items():
        shard.copy_(run.part(wholes[key], key))
    save(folder / "run", step=5, model_chunks=run.chunks, optimizer=run.optimizer)
    if world.rank == 0:
        read_without_us(wholes, folder, folder / "run" / STEP)
