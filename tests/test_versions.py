"""What differs between versions of torch, emerging-optimizers and Megatron-Core, and is served, or refused by name."""

import re
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from emerging_optimizers import registry as theirs
from torch import nn

from core.optimizer import registry
from core.optimizer.emerging_optimizers import (
    TensorParallelAdaptiveMuon,
    TensorParallelMuon,
    list_optimizers,
    missing_optimizers,
)
from core.optimizer.rules import emerging_library
from core.optimizer.rules.parts.emerging_corrections import CORRECTED
from core.process_groups_config import ProcessGroupCollection

ROOT = Path(__file__).parents[1]


class Later(torch.optim.Optimizer):
    """Stands for a class of a later release: an argument without default, a product in TF32, and state of its own."""

    def __init__(self, params: Any, lr: float = 0.1, *, radius: float, fp32_matmul_prec: str = "high") -> None:
        self.fp32_matmul_prec = fp32_matmul_prec
        super().__init__(params, {"lr": lr, "radius": radius})

    def _init_group(self, group: dict[str, Any], skip_non_grad_params: bool = True) -> None:
        for p in group["params"]:
            self.state[p].setdefault("average", torch.zeros_like(p))

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["average"].lerp_(p.grad, 0.5)
                p.data.sub_(self.state[p]["average"], alpha=group["lr"] * group["radius"])


@pytest.fixture
def later_release(monkeypatch, tmp_path) -> str:
    """A release that registers one optimizer more, ``later``, in a module that nothing has imported."""
    package = tmp_path / "emerging_optimizers"
    (package / "new").mkdir(parents=True)
    (package / "new" / "__init__.py").write_text('@registry.register_optimizer("later")\nclass Later: ...\n')
    monkeypatch.setattr(emerging_library, "find_spec", lambda _: SimpleNamespace(submodule_search_locations=[package]))
    monkeypatch.setattr(theirs, "get_optimizer_cls", {"later": Later}.__getitem__)
    monkeypatch.setitem(sys.modules, "emerging_optimizers.new", ModuleType("emerging_optimizers.new"))
    monkeypatch.setattr(
        registry, "_EMERGING_OPTIMIZERS", {name: registry._EMERGING_OPTIMIZERS[name] for name in registry._OPTIMIZERS}
    )
    cached = (emerging_library.library, emerging_library._modules, emerging_library.library_optimizer)
    for function in cached:
        function.cache_clear()
    yield "eo_later"
    for function in cached:
        function.cache_clear()


def test_what_a_later_release_registers_is_served(later_release):
    assert later_release in list_optimizers()
    cls = registry.entry_of(later_release).optimizer_cls
    whole = nn.Parameter(torch.ones(3, 2))
    optimizer = cls([whole], lr=0.1, radius=2.0)
    assert optimizer.fp32_matmul_prec == "highest"
    whole.grad = torch.ones(3, 2)
    optimizer.step()
    assert torch.equal(whole, torch.ones(3, 2) - 0.1 * 2.0 * 0.5)
    with pytest.raises(TypeError, match="radius"):
        cls([whole], lr=0.1)
    (needed,) = (setting for setting in registry.settings_of(later_release).values() if setting.argument == "radius")
    assert needed.kind is float


def test_what_an_earlier_release_had_is_missing_with_a_reason(later_release):
    assert missing_optimizers().keys() == emerging_library.NOT_IN_EVERY_RELEASE.keys()
    assert "sinkhorn_muon" not in list_optimizers()
    here = re.escape(version("emerging-optimizers"))
    with pytest.raises(ValueError, match=rf"emerging-optimizers {here} has no optimizer 'sinkhorn_muon'; .*0\.3"):
        registry.entry_of("sinkhorn_muon")
    with pytest.raises(ValueError, match=rf"emerging-optimizers {here} has no optimizer 'kl_soap'; .*0\.5"):
        registry.entry_of("EO_kl_soap")


def test_the_table_of_releases_is_true_of_this_one():
    here = tuple(int(part) for part in version("emerging-optimizers").split(".")[:2])
    for name, releases in emerging_library.NOT_IN_EVERY_RELEASE.items():
        first = tuple(int(part) for part in re.findall(r"\d+", releases)[:2])
        expected = here == first if "only" in releases else here >= first
        assert (name in list_optimizers()) is expected, name


@pytest.mark.parametrize("name", sorted(CORRECTED))
def test_no_product_is_rounded_to_tf32_by_default(name):
    """Every release's SOAP leaves it to its caller; its kin do not say."""
    if name not in list_optimizers() and f"eo_{name}" not in list_optimizers():
        pytest.skip("this release does not have it")
    cls = registry.entry_of(name if name in list_optimizers() else f"eo_{name}").optimizer_cls
    p = nn.Parameter(torch.eye(4))
    optimizer = cls([p], lr=0.1)
    p.grad = torch.ones(4, 4)
    optimizer.step()
    chosen = {k: v for k, v in vars(optimizer._inner).items() if k in ("fp32_matmul_prec", "qr_fp32_matmul_prec")}
    assert "high" not in chosen.values()


@pytest.mark.parametrize("cls", [TensorParallelMuon, TensorParallelAdaptiveMuon])
def test_a_kernel_that_is_not_there_is_refused(cls):
    cls([nn.Parameter(torch.eye(4))], lr=0.1, use_syrk=False)
    with pytest.raises(ValueError, match=r"use_syrk=True asks for .*leave it out"):
        cls([nn.Parameter(torch.eye(4))], lr=0.1, use_syrk=True)


@pytest.mark.parametrize("axis", ["gtp_remat", "expt_gtp_remat"])
def test_padded_shards_of_weights_are_refused(axis):
    one, two = SimpleNamespace(size=lambda: 1), SimpleNamespace(size=lambda: 2)
    ProcessGroupCollection.from_any(SimpleNamespace(**{axis: one}))
    with pytest.raises(ValueError, match=f"2 ranks of {axis} hold rows of each weight"):
        TensorParallelMuon([nn.Parameter(torch.eye(4))], lr=0.1, pg_collection=SimpleNamespace(**{axis: two}))


def test_the_lower_bounds_and_the_pins_are_in_the_table_of_versions():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = [*project["dependencies"], *project["optional-dependencies"]["megatron"]]
    page = (ROOT / "docs/versions.md").read_text()
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    for package in ("torch", "emerging-optimizers", "megatron-core"):
        (bound,) = (re.search(r">=([\d.]+)", line) for line in needed if line.startswith(package))
        assert bound is not None
        rows = [line for line in page.splitlines() if line.startswith("|")]
        assert any(f" {bound[1]}." in row for row in rows), (package, bound[1])
        assert f"{package} {pins[package]}" in page.replace("\n", " "), (package, pins[package])
