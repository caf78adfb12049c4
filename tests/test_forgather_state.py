"""States that Forgather saved: its rules written out here, with its names and layouts, go on in our optimizers."""

import copy
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from core import OptimizerConfig, from_forgather_state, get_optimizer
from core.optimizer.rules.adafactor import AdafactorSR
from core.optimizer.rules.adamw_sr import AdamWSR
from core.optimizer.rules.apollo import Apollo
from tests.support.sharding import CUTS, cutter

SHAPES = ((6, 5), (7,), (2, 3, 4))
LR = 0.03


def draw(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def adamw(p: Tensor, g: Tensor, s: dict[str, Any]) -> None:
    s.setdefault("step", torch.tensor(0.0))
    for name in "mv":
        s.setdefault(name, torch.zeros_like(p))
    s["step"] += 1
    t = float(s["step"])
    p.mul_(1 - LR * 0.01)
    s["m"].mul_(0.9).add_(0.1 * g)
    s["v"].mul_(0.999).add_(0.001 * g * g)
    p.sub_(LR * math.sqrt(1 - 0.999**t) / (1 - 0.9**t) * s["m"] / (s["v"].sqrt() + 1e-6))


def adafactor(p: Tensor, g: Tensor, s: dict[str, Any]) -> None:
    """With ``row`` and ``col`` as running sums over the last dim, and over all others flattened."""
    flat = g.reshape(-1, g.shape[-1]) if g.ndim > 1 else g
    s.setdefault("step", torch.tensor(0.0))
    s.setdefault("row", torch.zeros(flat.shape[0], dtype=g.dtype))
    s.setdefault("col", torch.zeros(flat.shape[1], dtype=g.dtype) if g.ndim > 1 else None)
    s["step"] += 1
    fresh = 1 - min(1 - float(s["step"]) ** -0.8, 0.999)
    square = flat**2 + 1e-30
    p.mul_(1 - LR * 0.01)
    if s["col"] is None:
        s["row"].lerp_(square, fresh)
        u = flat / s["row"].sqrt()
    else:
        s["row"].lerp_(square.sum(1), fresh)
        s["col"].lerp_(square.sum(0), fresh)
        u = flat / (s["row"][:, None] * s["col"][None] / s["row"].sum()).sqrt()
    u = u / max(1.0, float(u.square().mean().sqrt()))
    p.sub_(LR * u.reshape(g.shape))


RULES = {
    "adamw": (adamw, AdamWSR, {"betas": (0.9, 0.999), "eps": 1e-6}),
    "adafactor": (
        adafactor,
        AdafactorSR,
        {
            "betas": (0.9, 0.999),
            "eps": (1e-30, 1e-3),
            "decay_rate": -0.8,
            "clip_threshold": 1.0,
            "relative_step": False,
            "bf16_stochastic_round": True,
        },
    ),
}


def saved_by_forgather(
    name: str, shapes: tuple[tuple[int, ...], ...], steps: int
) -> tuple[list[Tensor], dict[str, Any]]:
    """Weights after so many steps, and the state dict."""
    rule, _, settings = RULES[name]
    weights, states = [draw(shape, i) for i, shape in enumerate(shapes)], [{} for _ in shapes]
    for t in range(steps):
        for i, (w, state) in enumerate(zip(weights, states, strict=True)):
            rule(w, draw(shapes[i], 100 * t + i), state)
    group = {
        "lr": torch.tensor(LR, dtype=torch.float64),
        "weight_decay": 0.01,
        **settings,
        "params": [*range(len(shapes))],
    }
    noise = torch.Generator().manual_seed(5489).get_state()
    return weights, {"state": dict(enumerate(states)), "param_groups": [group], "sr_generator_state": noise}


@pytest.mark.parametrize("name", RULES)
def test_ours_goes_on_where_forgather_s_stopped(name) -> None:
    cls = RULES[name][1]
    halfway, saved = saved_by_forgather(name, SHAPES, 4)
    before = copy.deepcopy(saved)
    params = [torch.nn.Parameter(w.clone()) for w in halfway]
    optimizer = cls(params, lr=1.0, betas=(0.5, 0.6), seed=7)
    optimizer.load_state_dict(from_forgather_state(optimizer, saved))
    for t in range(4, 8):
        for i, p in enumerate(params):
            p.grad = draw(SHAPES[i], 100 * t + i)
        optimizer.step()
    for p, w in zip(params, saved_by_forgather(name, SHAPES, 8)[0], strict=True):
        torch.testing.assert_close(p.detach(), w, rtol=1e-12, atol=1e-12)
    for state, kept in zip(saved["state"].values(), before["state"].values(), strict=True):
        assert all(kept[k] is None or torch.equal(state[k], kept[k]) for k in kept)
    assert optimizer.param_groups[0]["seed"] == 7


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("cut", ["rows", "columns", "uneven rows"])
@pytest.mark.parametrize("name", RULES)
def test_each_rank_takes_its_part(world, cut, name) -> None:
    _, shard, _ = cutter(CUTS[2][cut], world)
    parameter, _, groups = cutter(CUTS[2][cut], world)
    shapes = CUTS[2][cut].shapes
    halfway, saved = saved_by_forgather(name, shapes, 4)
    params = []
    for w in halfway:
        piece = parameter(w)
        attributes = dict(vars(piece)) if not CUTS[2][cut].dtensor else {}
        params.append(torch.nn.Parameter(piece))
        for attribute, value in attributes.items():
            setattr(params[-1], attribute, value)
    optimizer = RULES[name][1](params, pg_collection=groups)
    optimizer.load_state_dict(from_forgather_state(optimizer, saved))
    for i, p in enumerate(params):
        p.grad = parameter(draw(shapes[i], 400 + i))
    optimizer.step()
    for p, w in zip(params, saved_by_forgather(name, shapes, 5)[0], strict=True):
        mine = p.detach().to_local() if CUTS[2][cut].dtensor else p.detach()
        torch.testing.assert_close(mine, shard(w), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("shape", [(3, 8), (8, 3)])
def test_apollo_s_moments_and_the_matrix_of_online_pca(shape) -> None:
    wide = shape[0] < shape[1]
    moments = {name: draw((2, 8), i) for i, name in enumerate("mv")}
    a = draw((3, 2) if wide else (2, 3), 3)
    state = {"step": torch.tensor(5.0), **moments, "scaled_grad": torch.tensor(1.5), "projector": SimpleNamespace(A=a)}
    saved = {"state": {0: state}, "param_groups": [{"lr": LR, "rank": 2, "projector_factory": None, "params": [0]}]}
    p = torch.nn.Parameter(draw(shape, 0))
    for projector in ("online_pca", "normal"):
        optimizer = Apollo([p], rank=2, projector=projector)
        optimizer.load_state_dict(from_forgather_state(optimizer, saved))
        got = optimizer.state[p]
        assert torch.equal(got["exp_avg"], moments["m"]) and torch.equal(got["exp_avg_sq"], moments["v"])
        assert (float(got["step"]), float(got["update_norm"])) == (5, 1.5)
        if projector == "online_pca":
            assert torch.equal(got["projection"], a if wide else a.mT)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda saved: saved["state"][0].pop("v"), r"from which \['exp_avg_sq'\] of this optimizer cannot be made"),
        (
            lambda saved: saved["state"][0].update(m=torch.ones(3, 5)),
            r"for 'exp_avg' has shape \(3, 5\), and the whole one is of \(6, 5\)",
        ),
        (
            lambda saved: saved["param_groups"][0]["params"].pop(),
            r"groups of \[2\] parameters and this optimizer of \[3\]",
        ),
    ],
    ids=["a part is missing", "another shape", "another group"],
)
def test_what_does_not_fit_is_refused_by_name(change, said) -> None:
    _, saved = saved_by_forgather("adamw", SHAPES, 1)
    change(saved)
    with pytest.raises(ValueError, match=said):
        from_forgather_state(AdamWSR([torch.nn.Parameter(draw(shape, 0)) for shape in SHAPES]), saved)


def test_a_chain_is_refused_in_words() -> None:
    chain = get_optimizer(OptimizerConfig(optimizer="adamw_sr", lr=LR), torch.nn.Linear(3, 2))
    with pytest.raises(ValueError, match="a ChainedOptimizer is none of AdamWSR, AdafactorSR and Apollo"):
        from_forgather_state(chain, {})


def test_without_conversion_such_a_state_is_refused() -> None:
    weights, saved = saved_by_forgather("adamw", SHAPES, 1)
    optimizer = AdamWSR([torch.nn.Parameter(w) for w in weights])
    for state in (saved, {key: value for key, value in saved.items() if key != "sr_generator_state"}):
        with pytest.raises(ValueError, match=r"from_forgather_state|lacks"):
            optimizer.load_state_dict(state)
