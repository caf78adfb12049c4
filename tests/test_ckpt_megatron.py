"""The format as the real Megatron-Core sees it: it loads what is saved here, and what it saves converts here and back."""

import json
import pickle
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import MetadataIndex

from core.checkpoint import load, save
from core.checkpoint.manifest import NAME
from core.checkpoint.saving import COMMON
from core.optimizer.chained import ChainedOptimizer
from core.optimizer.rules.adam import AdamW
from core.optimizer.rules.tensor_parallel_muon import TensorParallelMuon
from core.process_groups_config import ProcessGroupCollection
from tests.megatron.ranks import JOBS, RANKS
from tests.support.checkpoints import Malice, put
from tests.support.small_run import differing, module_at
from tools.ckpt import command as ckpt
from tools.ckpt.source import harmless, safe_reader

ROOT = Path(__file__).parents[1]
PATIENCE_S = 300
pytestmark = pytest.mark.timeout(2 * PATIENCE_S + 60)
pytest.importorskip("megatron.core.package_info", reason="megatron-core is not installed")


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, str]]]:
    """The folder of a play between this package and Megatron-Core, and what Megatron-Core's ranks said."""
    folder = tmp_path_factory.mktemp("megatron")
    expected = save_ours(folder / "ours")
    torch.save(expected, folder / "ours.pt")
    ranks = [start(rank, folder) for rank in range(RANKS)]
    try:
        wait_for(folder / "saved.ready", ranks)
        for job in JOBS:
            run("convert", folder / job, folder / f"{job}.ours", "--from", "megatron", "--files", "2")
            run("convert", folder / f"{job}.ours", folder / f"{job}.back", "--to", "megatron")
        resume(folder / "muon.ours", folder / "trained")
        run("convert", folder / "trained", folder / "trained.pt", "--to", "torch")
        run("convert", folder / "trained", folder / "trained.mega", "--to", "megatron", "--weights", "bfloat16")
        (folder / "saved.go").touch()
        for rank in ranks:
            rank.wait(timeout=PATIENCE_S)
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    assert [rank.returncode for rank in ranks] == [0] * RANKS, logs(folder)
    lines = [line.split(": ", 1) for line in (folder / "0.log").read_text().splitlines() if line.startswith("> ")]
    yield folder, {what.removeprefix("> "): outcome for what, outcome in lines}


def start(rank: int, folder: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-W", "ignore", "-m", "tests.megatron.ranks", str(rank), str(folder)]
    with (folder / f"{rank}.log").open("w") as log:
        return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)


def wait_for(path: Path, ranks: list[subprocess.Popen[bytes]]) -> None:
    end = time.monotonic() + PATIENCE_S
    while not path.exists():
        assert all(rank.poll() is None for rank in ranks), logs(path.parent)
        assert time.monotonic() < end, logs(path.parent)
        time.sleep(0.05)


def logs(folder: Path) -> str:
    return "\n".join(path.read_text()[-3000:] for path in sorted(folder.glob("*.log")))


def run(*flags: Any) -> None:
    assert ckpt.main([str(flag) for flag in flags]) == 0


def save_ours(folder: Path) -> dict[str, Tensor]:
    """Key → whole tensor of what is saved."""
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(8, 6), nn.LayerNorm(6))
    opt = AdamW(net.parameters())
    net(torch.randn(2, 8)).square().sum().backward()
    opt.step()
    save(folder, step=5, model_chunks=[net], optimizer=opt)
    state = {
        f"optimizer.state.{slot}.{name}": x for name, p in net.named_parameters() for slot, x in opt.state[p].items()
    }
    return {f"model.{name}": x for name, x in net.state_dict().items()} | {k: x for k, x in state.items() if x.ndim}


def tree(saved: dict[str, Any]) -> nn.Module:
    """Modules whose parameters have the names and shapes of a converted checkpoint."""
    root = nn.Module()
    for key, x in saved.items():
        if key.startswith("model."):
            parent, leaf = module_at(root, key.removeprefix("model."))
            parent.register_parameter(leaf, nn.Parameter(torch.zeros(x.size, dtype=x.properties.dtype)))
    return root


def resume(source: Path, target: Path) -> None:
    """A job of this package goes on from ``source`` for a step, and saves."""
    saved = safe_reader(source / "iter_0000003").tensors()
    net = tree(saved)
    of_muon = [name for name, _ in net.named_parameters() if f"optimizer.state.momentum_buffer.{name}" in saved]
    first = TensorParallelMuon([p for name, p in net.named_parameters() if name in of_muon], lr=0.01)
    second = AdamW([p for name, p in net.named_parameters() if name not in of_muon], lr=0.01)
    opt = ChainedOptimizer({"muon": first, "adamw": second}, ProcessGroupCollection())
    loaded = load(source, model_chunks=[net], optimizer=opt)
    assert loaded.step == 3
    assert {int(second.state[p]["step"]) for p in second.param_groups[0]["params"]} == {1}
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    opt.step()
    save(target, step=4, model_chunks=[net], optimizer=opt)


@pytest.mark.parametrize("tp", [1, 2])
def test_megatron_loads_what_is_saved_here(played, tp):
    _, said = played
    assert said[f"ours at tp {tp}"] == "[]"


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("job", JOBS)
def test_megatron_loads_its_own_state_converted_and_back(played, job, tp):
    _, said = played
    assert said[f"{job} back at tp {tp}"] == "[]"
    assert said[f"{job} tensors at tp {tp}"] == "True"


def test_megatron_loads_what_was_trained_on_here(played):
    _, said = played
    assert said["trained here"] == "(28, [])"


@pytest.mark.parametrize("job", JOBS)
def test_a_checkpoint_of_megatron_converts_and_back_exactly(played, job):
    folder, _ = played
    first, ours, back = (safe_reader(folder / name / "iter_0000003") for name in (job, f"{job}.ours", f"{job}.back"))
    wholes = {key: first.whole(key) for key in first.tensors()}
    assert differing({key: back.whole(key) for key in back.tensors()}, wholes) == []
    assert back.tensors().keys() == wholes.keys()
    assert {key: back.raw(key) for key in back.objects()} == {key: first.raw(key) for key in first.objects()}
    # Layer by layer, and the weights are those that the optimizer steps.
    name = "decoder.layers.self_attention.linear_qkv.weight"
    slot = {"adam": "exp_avg_sq", "muon": "momentum_buffer"}[job]
    for layer in range(3):
        one = name.replace("layers", f"layers.{layer}")
        assert torch.equal(ours.whole(f"optimizer.state.{slot}.{one}"), wholes[f"optimizer.state.{slot}.{name}"][layer])
        master = wholes.get(f"optimizer.state.fp32_param.{name}", wholes[name])[layer]
        assert torch.equal(ours.whole(f"model.{one}"), master)
        assert master.dtype == torch.float32
    said = json.loads((folder / f"{job}.ours" / "iter_0000003" / NAME).read_text())
    counts = {group["optimizer"]: len(group["parameters"]) for group in said["groups"]}
    assert counts == {"adam": {"AdamW": 28}, "muon": {"TensorParallelMuon": 12, "AdamW": 16}}[job]
    assert float(ours.whole("optimizer.state.step.output_layer.weight")) == 1


def test_layers_can_be_separate(played, tmp_path):
    folder, _ = played
    run("convert", folder / "adam.ours", tmp_path / "mega", "--to", "megatron", "--layers", "separate")
    names = safe_reader(tmp_path / "mega" / "iter_0000003").tensors()
    assert "decoder.layers.2.mlp.linear_fc1.weight" in names
    assert not any("layers.mlp" in name for name in names)
    run("convert", tmp_path / "mega", tmp_path / "ours", "--from", "megatron")
    a, b = safe_reader(folder / "adam.ours" / "iter_0000003"), safe_reader(tmp_path / "ours" / "iter_0000003")
    assert a.tensors().keys() == b.tensors().keys()
    assert differing({key: b.whole(key) for key in b.tensors()}, {key: a.whole(key) for key in a.tensors()}) == []


def test_what_the_common_state_holds_is_said(played):
    folder, _ = played
    reader = safe_reader(folder / "trained.mega" / "iter_0000004")
    (common,) = harmless(reader.raw(COMMON), COMMON)
    assert common == {
        "iteration": 4,
        "checkpoint_version": 3.0,
        "optimizer": {"state": {"common_step": torch.tensor(2.0)}, "param_groups": []},
    }


def refused(capsys: Any, source: Path, target: Path) -> str:
    assert ckpt.main(["convert", str(source), str(target), "--from", "megatron"]) == 1
    assert not list(target.glob("iter*"))
    said: str = capsys.readouterr().err
    return said


def copied(played: Any, tmp_path: Path) -> Path:
    return Path(shutil.copytree(played[0] / "adam", tmp_path / "adam")) / "iter_0000003"


def test_malicious_checkpoints_of_megatron_are_refused(played, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for key in (COMMON, "decoder.layers.mlp.linear_fc1._extra_state/shard_0_3", "output_layer.weight"):
        shutil.rmtree(tmp_path / "adam", ignore_errors=True)
        put(copied(played, tmp_path), key, Malice())
        said = refused(capsys, tmp_path / "adam", tmp_path / "ours")
        assert "could execute code" in said or "cannot be read" in said
    assert not (tmp_path / "stolen").exists()


def legacy(step: Path) -> dict[str, Any]:
    """Move what is no tensor to where older versions kept it."""
    reader = safe_reader(step)
    (common,) = harmless(reader.raw(COMMON), COMMON)
    found = reader.read_metadata()
    del found.state_dict_metadata[COMMON]
    del found.storage_data[MetadataIndex(COMMON)]
    (step / ".metadata").write_bytes(pickle.dumps(found))
    torch.save(common, step / "common.pt")
    return dict(common)


def test_an_older_checkpoint_of_megatron_converts_and_back(played, tmp_path, capsys):
    step = copied(played, tmp_path)
    legacy(step)
    run("convert", tmp_path / "adam", tmp_path / "ours", "--from", "megatron")
    run("convert", tmp_path / "ours", tmp_path / "back", "--to", "megatron")
    assert (tmp_path / "back" / step.name / "common.pt").read_bytes() == (step / "common.pt").read_bytes()
    a, b = safe_reader(played[0] / "adam.ours" / step.name), safe_reader(tmp_path / "ours" / step.name)
    assert differing({key: b.whole(key) for key in b.tensors()}, {key: a.whole(key) for key in a.tensors()}) == []


def test_a_malicious_common_file_is_refused(played, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    step = copied(played, tmp_path)
    torch.save(Malice(), step / "common.pt")
    said = refused(capsys, tmp_path / "adam", tmp_path / "ours")
    assert "common.pt is refused: it names posix.system, which could execute code" in said
    assert not (tmp_path / "stolen").exists()


def test_other_formats_of_megatron_are_refused(played, tmp_path, capsys):
    step = copied(played, tmp_path)
    (step / "metadata.json").write_text('{"sharded_backend": "zarr"}')
    assert "is of format zarr; possible: torch_dist" in refused(capsys, tmp_path / "adam", tmp_path / "ours")
    (step / "metadata.json").write_text("[")
    assert "has no metadata.json that says its format" in refused(capsys, tmp_path / "adam", tmp_path / "ours")


@pytest.mark.parametrize(
    ("common", "said"),
    [
        ([{"iteration": "x"}], "the iteration of .* is 'x'; a whole number is needed"),
        ([{"optimizer": {"state": {"common_step": torch.ones(2)}}}], "common_step of .* a whole number is needed"),
        ([{"optimizer": [{"common_step": 1}, {"common_step": 2}]}], r"optimizers at different steps, \[1, 2\]"),
        ([{"iteration": 3}], "does not say how many steps Adam has made"),
        ([1], "is not what Megatron-Core writes"),
        ({}, "is not what Megatron-Core writes"),
    ],
)
def test_a_common_state_that_is_none_is_refused(played, tmp_path, capsys, common, said):
    put(copied(played, tmp_path), COMMON, common)
    assert re.search(said, refused(capsys, tmp_path / "adam", tmp_path / "ours"))


def test_state_that_no_optimizer_here_has_is_refused(played, tmp_path, capsys):
    step = copied(played, tmp_path)
    reader = safe_reader(step)
    found = reader.read_metadata()
    for old, new in (
        ("optimizer.state.exp_avg_sq.output_layer.weight", "optimizer.state.odd.output_layer.weight"),
        ("optimizer.state.exp_avg.output_layer.weight", "optimizer.distributed.bucket_0.param"),
    ):
        found.state_dict_metadata[new] = found.state_dict_metadata.pop(old)
        for index in [index for index in found.storage_data if index.fqn == old]:
            found.storage_data[MetadataIndex(new, index.offset)] = found.storage_data.pop(index)
        (step / ".metadata").write_bytes(pickle.dumps(found))
        text = refused(capsys, tmp_path / "adam", tmp_path / "ours")
        assert ("which no optimizer here has" if "odd" in new else "--dist-ckpt-optim-fully-reshardable") in text
