"""The optimizers of the installed emerging-optimizers, by name, exact on shards."""

import importlib
import re
import warnings
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from emerging_optimizers import registry
from torch.optim.optimizer import Optimizer

from ..steps.constructor_settings import constructor_arguments
from ..steps.torch_class import LibraryStep, on_whole_tensors
from .parts.emerging_corrections import CORRECTED, SPECIAL

UNPREFIXED = (
    "laprop mop muon_hyperball oblique_adam oblique_sgd polargrad psgd_pro rekls scion sinkhorn_muon spel".split()
)
"""Names that are the same here and in emerging-optimizers' registry; any other ``name`` there is ``eo_<name>`` here."""

NOT_IN_EVERY_RELEASE = {
    "eo_iso": "0.4 and later",
    "eo_kl_m_soap": "0.4 and later",
    "eo_kl_soap": "0.5 and later",
    "eo_kl_soap_v3": "0.4 only",
    "eo_moso": "0.4 and later",
    "eo_rekls_v3": "0.5 and later",
    "eo_signum": "0.4 and later",
    "eo_sim_ademamix": "0.4 and later",
    "eo_stacked_soap": "0.4 and later",
    "eo_tp_rekls": "0.4 and later",
    "sinkhorn_muon": "0.3 only",
}
"""Name in this package → the releases of emerging-optimizers, from 0.3 on, that have the optimizer."""

_REGISTRATION = re.compile(r"""^@(?:registry\.)?register_optimizer\(\s*["'](\w+)["']\s*\)""", re.MULTILINE)


@cache
def library() -> dict[str, str]:
    """Name in this package → name in the registry of the installed emerging-optimizers."""
    return {name if name in UNPREFIXED else f"eo_{name}": name for name in sorted(_modules())}


def missing() -> dict[str, str]:
    """Name in this package → why the installed emerging-optimizers cannot serve it, for what some release of it has."""
    here = version("emerging-optimizers")
    return {
        name: f"emerging-optimizers {here} has no optimizer {name.removeprefix('eo_')!r}; it is in release {releases}."
        for name, releases in NOT_IN_EVERY_RELEASE.items()
        if name not in library()
    }


@cache
def library_optimizer(name: str) -> type[LibraryStep]:
    """The whole-tensor version of the class that :func:`library` lists as ``name``; imports the class's module."""
    library_name = library()[name]
    module = _modules()[library_name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # raised inside torch while its compiler loads
        importlib.import_module(module)
    cls: type[Optimizer] = registry.get_optimizer_cls(library_name)
    if library_name in CORRECTED:
        cls = CORRECTED[library_name](cls)
    scalar = {"any_shape": True, "float32_only": False} if ".scalar_optimizers" in module else {}
    arguments: dict[str, Any] = {**scalar, **_exact_products(cls), **SPECIAL.get(library_name, {})}
    return on_whole_tensors(cls, **arguments)


def _exact_products(cls: type[Optimizer]) -> dict[str, str]:
    """Defaults that keep float32 products in float32, where the class would let an accelerator round them to TF32."""
    return {
        name: "highest"
        for name, argument in constructor_arguments(cls).items()
        if name.endswith("fp32_matmul_prec") and argument.default == "high"
    }


@cache
def _modules() -> dict[str, str]:
    """Name in the registry of emerging-optimizers → the module that registers it.

    The names are read in the source, without importing it: some modules load torch's compiler, and an optimizer moves to
    another module from one release to the next.
    """
    spec = find_spec("emerging_optimizers")
    assert spec is not None
    found: dict[str, str] = {}
    for folder in map(Path, spec.submodule_search_locations or ()):
        for path in sorted(folder.rglob("*.py")):
            parts = ("emerging_optimizers", *path.relative_to(folder).with_suffix("").parts)
            module = ".".join(parts).removesuffix(".__init__")
            found |= dict.fromkeys(_REGISTRATION.findall(path.read_text(encoding="utf-8")), module)
    return found
