"""The optimizers of emerging-optimizers under their names here: the steps of their own classes, bit for bit."""

import importlib
import inspect
import pkgutil
from collections.abc import Mapping
from typing import Any

import emerging_optimizers
import pytest
import torch
from emerging_optimizers import registry
from torch import Tensor, nn
from torch.optim import Optimizer

from core.optimizer.emerging_optimizers import get_optimizer, list_optimizers
from core.optimizer.optimizer_config import OptimizerConfig
from core.optimizer.registry import entry_of
from core.optimizer.rules.emerging_library import library
from core.optimizer.steps.constructor_settings import constructor_arguments
from core.optimizer.steps.torch_class import noise_seed, on_whole_tensors

STEPS = 12
SHAPES = ((24, 40), (40, 24), (16, 16))
NAMES = tuple(library())
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "eo_adaptive_muon": [{"moment2_method": method} for method in ("adamuon", "normuon", "namo")],
    "eo_muon": [{}, {"nesterov": True, "weight_decay_method": "l2"}],
    "eo_soap": [{}, {"use_kl_shampoo": True, "max_update_rms": 1.0}],
    "laprop": [{}, {"frob_normalize": True}],
    "muon_hyperball": [{}, {"hyperball_radius": 3.0}],
    "oblique_sgd": [{}, {"dim": 1}],
    "psgd_pro": [{}, {"precond_init_scale": 0.5}, {"warmup_steps": 2}],
}
CASES = [(name, kwargs) for name in NAMES for kwargs in VARIANTS.get(name, [{}])]
NEEDED = {
    "eo_adaptive_muon": {"momentum": 0.95, "weight_decay": 0.01},
    "eo_soap": {"fp32_matmul_prec": "highest", "qr_fp32_matmul_prec": "highest"},
    "eo_tp_rekls": {"tp_group": None, "fp32_matmul_prec": "highest"},
}
SCALAR = ("laprop", "eo_lion", "eo_signum", "eo_sim_ademamix")


def theirs(name: str) -> type[Optimizer]:
    return registry.get_optimizer_cls(library()[name])


def takes(name: str, argument: str) -> inspect.Parameter | None:
    """The argument of the library's class."""
    entry_of(name)  # imports it
    return constructor_arguments(theirs(name)).get(argument)


def needs_radius(name: str) -> bool:
    """From release 0.4 on, the radius of a hyperball is the norm that every weight must already have."""
    radius = takes(name, "hyperball_radius")
    return radius is not None and radius.default is radius.empty


def sinkhorn(whole: Tensor) -> Tensor:
    from emerging_optimizers.utils import SinkhornMapper

    return SinkhornMapper()(whole)


def weights(
    name: str, shapes: tuple[tuple[int, ...], ...] = SHAPES, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    wholes = [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]
    return [sinkhorn(w) for w in wholes] if name == "sinkhorn_muon" else wholes


def gradient(i: int, step: int, like: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * i + step)
    return torch.randn(like.shape, generator=generator, dtype=like.dtype)


def plain(name: str, wholes: list[Tensor], lr: float, kwargs: Mapping[str, Any]) -> list[Tensor]:
    """Each weight stepped by an optimizer of its own; it draws what ours draws for a parameter of that name."""
    out = []
    for i, whole in enumerate(wholes):
        p = nn.Parameter(whole.clone())
        radius = {"hyperball_radius": whole.norm().item()} if needs_radius(name) else {}
        optimizer = theirs(name)([p], lr=lr, **{**NEEDED.get(name, {}), **radius, **kwargs})
        for step in range(STEPS):
            p.grad = gradient(i, step, p)
            if name == "psgd_pro" and step:
                optimizer.state[p]["step"] = step  # release 0.3 does not count
            torch.manual_seed(noise_seed(1234, f"weight{i}", step))
            with torch.compiler.set_stance("force_eager"):
                optimizer.step()
        out.append(p.detach())
    return out


def steps(optimizer: Optimizer, params: list[nn.Parameter], start: int = 0, stop: int = STEPS) -> list[Tensor]:
    for step in range(start, stop):
        for i, p in enumerate(params):
            p.grad = gradient(i, step, p)
        optimizer.step()
    return [p.detach() for p in params]


def ours(name: str, wholes: list[Tensor], **kwargs: Any) -> tuple[Any, list[nn.Parameter]]:
    params = [nn.Parameter(w.clone()) for w in wholes]
    return entry_of(name).optimizer_cls([(f"weight{i}", p) for i, p in enumerate(params)], **kwargs), params


def assert_same(name: str, got: list[Tensor], expected: list[Tensor]) -> None:
    """The same bits; to rounding where the library keeps a norm that it was told, and this package the norm that is there."""
    if needs_radius(name):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    else:
        assert_same_bits(got, expected)


def assert_same_bits(got: list[Tensor], expected: list[Tensor]) -> None:
    for mine, other in zip(got, expected, strict=True):
        assert mine.isfinite().all()
        assert torch.equal(mine, other)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, on the way to its compiler
def test_whatever_the_library_registers_is_here():
    for module in pkgutil.walk_packages(emerging_optimizers.__path__, "emerging_optimizers."):
        importlib.import_module(module.name)
    assert set(library().values()) == set(registry.get_optimizer_name_list())
    assert set(library()) <= set(list_optimizers())


@pytest.mark.parametrize(("name", "kwargs"), CASES, ids=[f"{n}-{'-'.join(map(str, k.values()))}" for n, k in CASES])
def test_the_steps_are_those_of_the_class(name, kwargs):
    wholes, before = weights(name), torch.get_rng_state()
    if needs_radius(name):
        kwargs = {**kwargs, "weight_decay": 0.0}  # a radius undoes it, and a norm that is kept does not
        wholes = [w * (kwargs.get("hyperball_radius", 1.0) / w.norm()) for w in wholes]
    got = steps(*ours(name, wholes, lr=0.02, **kwargs))
    assert torch.equal(torch.get_rng_state(), before)
    assert_same(name, got, plain(name, wholes, 0.02, kwargs))


@pytest.mark.parametrize("name", [name for name in SCALAR if name in NAMES])
def test_tensors_of_any_number_of_dims_and_float64(name):
    wholes = weights(name, ((), (7,), (3, 4, 5)), torch.float64)
    assert_same_bits(steps(*ours(name, wholes, lr=0.02)), plain(name, wholes, 0.02, {}))


@pytest.mark.parametrize("name", NAMES)
def test_by_name_from_a_config(name):
    """Settings reach the class; its own defaults decide the others, but for Adam's betas."""
    model, wholes = nn.Module(), weights(name)
    for i, whole in enumerate(wholes):
        model.register_parameter(f"weight{i}", nn.Parameter(whole.clone()))
    decay = 0.0 if needs_radius(name) else 0.1
    config = OptimizerConfig(optimizer=name, lr=0.02, weight_decay=decay, adam_beta2=0.9, clip_grad=0.0)
    optimizer = get_optimizer(config, [model])
    expected: dict[str, Any] = {"weight_decay": decay} if takes(name, "weight_decay") else {}
    if takes(name, "betas"):
        expected["betas"] = (0.9, 0.99 if name == "eo_lion" else 0.9)
    assert_same(name, steps(optimizer, list(model.parameters())), plain(name, wholes, 0.02, expected))


@pytest.mark.parametrize("name", NAMES)
def test_resumed_runs_go_on_bit_for_bit(name):
    wholes = weights(name)
    expected = steps(*ours(name, wholes, lr=0.02))
    first, params = ours(name, wholes, lr=0.02)
    half = steps(first, params, stop=5)
    again, params = ours(name, [p.clone() for p in half] if name != "sinkhorn_muon" else wholes, lr=0.02)
    again.load_state_dict(first.state_dict())
    for p, h in zip(params, half, strict=True):
        p.data.copy_(h)
    assert_same_bits(steps(again, params, start=5), expected)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in SCALAR])
def test_what_a_class_cannot_take_is_refused_by_name(name):
    cls = entry_of(name).optimizer_cls
    with pytest.raises(ValueError, match=r"bias.*works on matrices"):
        cls([("bias", nn.Parameter(torch.ones(8)))], lr=0.1)
    if cls.float32_only:
        with pytest.raises(ValueError, match=r"layer.*float64"):
            cls([("layer", nn.Parameter(torch.ones(4, 4, dtype=torch.float64)))], lr=0.1)


@pytest.mark.parametrize(
    ("name", "kwargs", "match"),
    [
        ("eo_muon", {"scale_mode": "none"}, "scale_mode='none' is unknown; possible: shape_scaling"),
        ("eo_muon", {"tp_mode": "blockwise"}, "tp_mode='blockwise' is unknown; possible: duplicated, owner"),
        ("eo_lion", {"weight_decay": -1.0}, "weight_decay=-1.0 must be"),
        ("eo_lion", {"betas": (0.9, 1.5)}, "1.5"),
        ("muon_hyperball", {}, "weight0: .*non-zero norm"),
        ("sinkhorn_muon", {"map_weights": False}, "weight0: .*negative"),
    ],
)
def test_arguments_and_weights_are_checked(name, kwargs, match):
    if name not in NAMES:
        pytest.skip("this release does not have it")
    whole = torch.zeros(4, 4) if name == "muon_hyperball" else -torch.ones(4, 4)
    with pytest.raises(ValueError, match=match):
        ours(name, [whole], **{"lr": 0.1, **kwargs})


@pytest.mark.skipif("sinkhorn_muon" not in NAMES, reason="this release does not have it")
def test_sinkhorn_muon_maps_weights_that_are_not_normalized():
    wholes = [torch.randn(24, 40, generator=torch.Generator().manual_seed(1))]
    mapped = [sinkhorn(w) for w in wholes]
    _, params = ours("sinkhorn_muon", wholes, lr=0.02)
    assert_same_bits([p.detach() for p in params], mapped)
    _, params = ours("sinkhorn_muon", mapped, lr=0.02)
    assert_same_bits([p.detach() for p in params], mapped)


def test_scion_keeps_its_own_weight_decay():
    optimizer, params = ours("scion", weights("scion"), lr=0.02)
    optimizer.param_groups[0]["weight_decay"] = 0.0
    assert_same_bits(steps(optimizer, params), plain("scion", weights("scion"), 0.02, {}))


class _Bare(Optimizer):
    """Says nothing of its state."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    def step(self, closure: Any = None) -> None:
        for p in self.param_groups[0]["params"]:
            self.state[p]["late"] = p.grad.clone()


def test_a_class_that_says_nothing_of_its_state_is_refused():
    p = nn.Parameter(torch.ones(3, 2))
    with pytest.raises(ValueError, match=r"_Bare does not say what state.*initialise="):
        on_whole_tensors(_Bare)([p])
    with pytest.raises(ValueError, match=r"begins with state.*average"):
        on_whole_tensors(_Bare, initialise=lambda optimizer, p: {"average": p.detach().clone()})([p])
    with pytest.raises(ValueError, match=r"initialise=.*that returns|'text'"):
        on_whole_tensors(_Bare, initialise=lambda optimizer, p: {"text": "a"})([p])
    optimizer = on_whole_tensors(_Bare, initialise=lambda optimizer, p: {})([p])
    p.grad = torch.ones(3, 2)
    with pytest.raises(ValueError, match=r"state \['late'\] that was not there"):
        optimizer.step()
