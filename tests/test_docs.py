"""The README and the pages of docs/: Python runs as it stands, commands and links exist, the table is the registry's."""

import functools
import importlib
import importlib.util
import json
import re
import runpy
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

import core
from core import list_optimizers
from tools import optimizer_table
from tools.plot import layout_errors

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
README_BYTES = 10_240
EXAMPLES = {"hf_trainer": ("transformers", "accelerate"), "lightning_module": ("lightning",)}
"""Packages that an example needs, of the extra ``examples``."""


def named(page: Path) -> str:
    return page.stem


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)


def runs_here(page: Path) -> bool:
    """Whether the page has Python, which tests/test_adding_an_optimizer.py does not run."""
    return bool(blocks(page, "python")) and page.stem != "adding-an-optimizer"


@pytest.fixture
def shardstep(monkeypatch):
    """The installed name of the package stands for the checkout's, so that no module is loaded twice."""
    monkeypatch.setitem(sys.modules, "shardstep", core)
    for name in [name for name in sys.modules if name == "core" or name.startswith("core.")]:
        monkeypatch.setitem(sys.modules, f"shardstep.{name}", sys.modules[name])


@pytest.mark.mpi(min_size=2)
@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")
@pytest.mark.parametrize("page", [page for page in PAGES if runs_here(page)], ids=named)
def test_examples_run(world, shardstep, monkeypatch, page):
    monkeypatch.setattr(dist, "init_process_group", lambda backend: None)
    torch.manual_seed(0)
    names: dict[str, Any] = {}
    if page == README:
        names["model"] = a_sharded_model(world)
    for code in blocks(page, "python"):
        exec(compile(code, page.name, "exec"), names)
    check = {"README": check_readme, "library": check_library}.get(page.stem)
    if check:
        check(names)


def a_sharded_model(world: Any) -> nn.Module:
    """What the README's first lines are given: matrices, biases and gradients on FSDP2's shards."""
    model = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
    fully_shard(model, mesh=world.mesh((world.size,), ("data",)))
    model(torch.ones(4, 16)).square().mean().backward()
    return model


def check_readme(names: dict[str, Any]) -> None:
    """torch's Muon on shards takes the step that it takes on the whole matrices."""
    params = [p for p in names["model"].parameters() if p.ndim == 2]
    wholes = [nn.Parameter(p.full_tensor().detach().clone()) for p in params]
    for p, whole in zip(params, wholes, strict=True):
        assert p.grad is not None
        whole.grad = p.grad.full_tensor()
    torch.optim.Muon(wholes, lr=1e-3).step()
    names["optimizer"].step()
    for p, whole in zip(params, wholes, strict=True):
        assert torch.equal(p.full_tensor(), whole)


def check_library(names: dict[str, Any]) -> None:
    assert [a.optimizer for a in names["optimizer"].assignments()].count("muon") == 2
    assert torch.isfinite(names["weight"]).all()


@pytest.mark.mpi(min_size=2)
@pytest.mark.timeout(300)
def test_table_of_optimizers_is_the_registrys(world):
    assert optimizer_table.written() == optimizer_table.table(dist.group.WORLD), (
        "run torchrun --nproc-per-node 2 -m tools.optimizer_table --write"
    )


def test_the_front_door_leads_into_the_checkout(shardstep):
    assert importlib.import_module("shardstep").get_optimizer is core.get_optimizer


def test_the_readme_is_one_page():
    assert README.stat().st_size <= README_BYTES


def commands(page: Path) -> list[list[str]]:
    """The words of each command of the page's bash blocks, without comments."""
    lines = "".join(blocks(page, "bash")).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


@functools.cache
def help_of(module: str, subcommand: str = "") -> str:
    """What the command prints for ``--help``."""
    for package in EXAMPLES.get(module.rpartition(".")[2], ()):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed: bash scripts/bootstrap.sh examples")
    with pytest.MonkeyPatch.context() as patch, CapturedOutput() as out:
        patch.setattr(sys, "argv", [module, *([subcommand] if subcommand else []), "--help"])
        patch.setenv("COLUMNS", "200")
        try:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        except SystemExit as left:
            assert left.code in (0, None), module
    return out.text


class CapturedOutput:
    """Collects what is printed."""

    text = ""

    def __enter__(self) -> "CapturedOutput":
        self._patch = pytest.MonkeyPatch()
        self._patch.setattr(sys.stdout, "write", self._write)
        return self

    def _write(self, text: str) -> int:
        self.text += text
        return len(text)

    def __exit__(self, *_: object) -> None:
        self._patch.undo()


def known_flags(module: str, subcommand: str = "") -> set[str]:
    """Flags of the command's help; the command that draws a schedule takes those of the training job too."""
    flags = set(re.findall(r"--[a-z][a-z0-9-]*", help_of(module, subcommand)))
    return flags | known_flags("tools.pretrain") if module == "tools.plot.schedule" else flags


def check_command(words: list[str]) -> None:
    """That a command of a page can be typed: files, modules and flags of ours exist."""
    words = [word for word in words if not re.match(r"[A-Z_]+=", word)]
    if words[0] in ("export", "pip"):
        return
    if words[0] == "bash":
        assert (ROOT / words[1]).is_file(), words
        return
    assert words[0] in ("python", "torchrun"), words
    if "pretrain_gpt.py" in words:
        name = words[words.index("--optimizer") + 1]
        assert name.removeprefix("shardstep_") in list_optimizers()
        assert "-m" not in words or words[words.index("-m") + 1] == "shardstep.core.megatron"
        return
    at = words.index("-m") + 1
    module, arguments = words[at], words[at + 1 :]
    assert importlib.util.find_spec(module) is not None, module
    subcommand = arguments[0] if module == "tools.ckpt" else ""
    given = {word.partition("=")[0] for word in arguments if word.startswith("--")}
    assert given <= known_flags(module, subcommand), (module, given - known_flags(module, subcommand))
    for file in (word for word in arguments if word.startswith("configs/")):
        assert (ROOT / file).is_file(), file


@pytest.mark.filterwarnings("ignore")
@pytest.mark.timeout(300)
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "bash")], ids=named)
def test_commands_exist(page):
    for words in commands(page):
        check_command(words)


PROSE = ("training", "optimizers", "modes", "checkpoints", "faults", "planning", "benchmarks", "library")
COMMANDS = ("tools.pretrain", "tools.plan", "tools.bench", "tools.plot.schedule", "tools.plot.layout_errors")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.timeout(300)
def test_flags_in_sentences_exist():
    """In pages about our own commands; those about Megatron-Core name its flags too."""
    known = set().union(*map(known_flags, COMMANDS), *(known_flags("tools.ckpt", "reshard"),))
    for name in PROSE:
        text = re.sub(r"```.*?```", "", (ROOT / "docs" / f"{name}.md").read_text(), flags=re.DOTALL)
        used = {flag for code in re.findall(r"`(--[^`]*)`", text) for flag in re.findall(r"--[a-z][a-z0-9-]*", code)}
        assert used <= known | {"--help"}, (name, used - known)


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.strip().lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?://", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


def test_no_page_is_out_of_reach():
    linked = {(README.parent / target).resolve() for target in re.findall(r"\]\(([^)#\s]+)", README.read_text())}
    assert linked >= set(PAGES) - {README}


def test_environment_variables_are_listed():
    """All that core and the wheel's path file read."""
    sources = [*(ROOT / "core").rglob("*.py"), ROOT / "setup.py"]
    read = {name for file in sources for name in re.findall(r"\bSHARDSTEP_[A-Z]+\b", file.read_text())}
    assert read == set(
        re.findall(r"^\| `(SHARDSTEP_[A-Z]+)`", (ROOT / "docs/environment.md").read_text(), re.MULTILINE)
    )


def test_the_picture_is_of_every_layout_and_ours_is_rounding(tmp_path):
    pytest.importorskip("matplotlib")
    found = json.loads(layout_errors.RESULTS.read_text())
    for name in layout_errors.OUR_MODES:
        assert found["errors"][name].keys() == layout_errors.LAYOUTS.keys()
        assert max(found["errors"][name].values()) < 1e-5
    layout_errors.draw(found, tmp_path / "errors.png")
    assert (tmp_path / "errors.png").stat().st_size > 10_000


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("title", [title for title, layout in layout_errors.LAYOUTS.items() if layout.ranks == 2])
def test_the_errors_of_the_picture_can_be_measured(world, title):
    layout = layout_errors.LAYOUTS[title]
    mesh = world.mesh((1, 2), ("dp", "tp"))
    ours, blockwise = (
        layout_errors.joined([layout_errors.plain(f"{layout_errors.OURS} {mode}", layout, mesh)])
        for mode in ("owner", "blockwise")
    )
    assert ours < 1e-5
    assert blockwise > 0.1
