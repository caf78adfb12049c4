"""eFormer's configs: their defaults as its documentation has them, their optimizers' steps as optax's formulas have them."""

import math
from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import Any

import pytest
import torch

from core.optimizer.functional.builders import make_transformation
from core.optimizer.functional.config_builders import (
    AdafactorOptimizer,
    AdamWOptimizer,
    ConfigBuilder,
    LionOptimizer,
    MarsOptimizer,
    RMSPropOptimizer,
)
from core.optimizer.functional.configs import (
    AdafactorConfig,
    AdamWConfig,
    Config,
    LionConfig,
    MarsConfig,
    MuonConfig,
    RMSPropConfig,
    WhiteKronConfig,
)
from tests.support.trees import SHAPES, lr, tree

DEFAULTS: dict[type[Config], dict[str, Any]] = {
    AdamWConfig: {"b1": 0.9, "b2": 0.999, "eps": 1e-8, "eps_root": 0.0, "mu_dtype": None},
    AdafactorConfig: {
        "min_dim_size_to_factor": 128,
        "decay_rate": 0.8,
        "decay_offset": 0,
        "multiply_by_parameter_scale": True,
        "clipping_threshold": 1.0,
        "momentum": None,
        "dtype_momentum": torch.float32,
        "weight_decay_rate": None,
        "eps": 1e-30,
        "factored": True,
    },
    LionConfig: {"b1": 0.9, "b2": 0.99, "mu_dtype": None},
    RMSPropConfig: {"decay": 0.9, "initial_scale": 0.0, "momentum": None, "nesterov": False, "eps": 1e-8},
    MuonConfig: {
        "ns_coeffs": (3.4445, -4.775, 2.0315),
        "ns_steps": 5,
        "beta": 0.95,
        "eps": 1e-8,
        "weight_decay": 0.0,
        "weight_decay_mask": None,
        "mu_dtype": None,
        "nesterov": True,
        "adaptive": False,
        "adam_b1": 0.9,
        "adam_b2": 0.999,
        "adam_eps_root": 0.0,
        "adam_weight_decay": 0.0,
    },
    WhiteKronConfig: {
        "lr_style": "adam",
        "b1": 0.95,
        "normalize_grads": False,
        "max_size_dense": 16384,
        "preconditioner_lr": 0.7,
        "preconditioner_init_scale": 1.0,
        "dtype": torch.bfloat16,
        "scanned_layers": None,
        "block_size": 256,
        "pipeline_axis_name": None,
        "pipeline_axis_size": 1,
        "params_partition_specs": None,
        "noise_scale": 1e-9,
        "weight_decay": 0.1,
        "weight_decay_mask": None,
    },
    MarsConfig: {
        "weight_decay": 0.1,
        "beta1": 0.95,
        "beta2": 0.99,
        "gamma": 0.025,
        "epsilon": 1e-8,
        "max_grad_norm": 1.0,
    },
}
STEPS = 4


@pytest.mark.parametrize("config", DEFAULTS)
def test_the_defaults_are_the_source_s(config):
    made = config()
    assert {f.name: getattr(made, f.name) for f in fields(made)} == DEFAULTS[config]
    assert config.from_json(made.to_json()) == config.from_dict(made.to_dict()) == made


# The updates u of optax, p <- p - u, one generator a tree: it is sent gradients and gives u.


def adamw(b1: float, b2: float, eps: float, eps_root: float = 0.0) -> Iterator[Any]:
    m, v, u = dict.fromkeys(SHAPES, 0.0), dict.fromkeys(SHAPES, 0.0), None
    for t in range(1, STEPS + 1):
        g = yield u
        m = {k: b1 * m[k] + (1 - b1) * g[k] for k in g}
        v = {k: b2 * v[k] + (1 - b2) * g[k] ** 2 for k in g}
        u = {k: lr(t - 1) * m[k] / (1 - b1**t) / ((v[k] / (1 - b2**t) + eps_root).sqrt() + eps) for k in g}
    yield u


def lion(b1: float, b2: float) -> Iterator[Any]:
    m, u = dict.fromkeys(SHAPES, 0.0), None
    for t in range(STEPS):
        g = yield u
        u = {k: lr(t) * (b1 * m[k] + (1 - b1) * g[k]).sign() for k in g}
        m = {k: b2 * m[k] + (1 - b2) * g[k] for k in g}
    yield u


def rmsprop(decay: float, eps: float, initial: float, momentum: float, nesterov: bool) -> Iterator[Any]:
    v, trace, u = dict.fromkeys(SHAPES, initial), dict.fromkeys(SHAPES, 0.0), None
    for t in range(STEPS):
        g = yield u
        v = {k: decay * v[k] + (1 - decay) * g[k] ** 2 for k in g}
        u = {k: lr(t) * g[k] / (v[k] + eps).sqrt() for k in g}
        trace = {k: u[k] + momentum * trace[k] for k in g}
        u = {k: u[k] + momentum * trace[k] for k in g} if nesterov else trace
    yield u


def mars(b1: float, b2: float, gamma: float, eps: float, max_norm: float | None) -> Iterator[Any]:
    inner, before, u = adamw(b1, b2, eps), dict.fromkeys(SHAPES, 0.0), None
    next(inner)
    for _ in range(STEPS):
        g = yield u
        c = {k: g[k] + gamma * b1 / (1 - b1) * (g[k] - before[k]) for k in g}
        norm = math.sqrt(sum(float((x**2).sum()) for x in c.values()))
        factor = min(1.0, max_norm / (norm + 1e-6)) if max_norm else 1.0
        before, u = g, inner.send({k: factor * x for k, x in c.items()})
    yield u


def adafactor(decay_rate: float, eps: float, threshold: float | None, rate: float | None) -> Iterator[Any]:
    """Without factors, which tensors below 128 have not; the parameters are sent beside the gradients."""
    v, u = dict.fromkeys(SHAPES, 0.0), None
    for t in range(1, STEPS + 1):
        g, p = yield u
        decay = 1 - t**-decay_rate
        v = {k: decay * v[k] + (1 - decay) * (g[k] ** 2 + eps) for k in g}
        u = {k: g[k] / v[k].sqrt() for k in g}
        if threshold:
            u = {k: x / max(1.0, float(x.square().mean().sqrt()) / threshold) for k, x in u.items()}
        u = {k: lr(t - 1) * x * max(1e-3, float(p[k].square().mean().sqrt())) for k, x in u.items()}
        u = {k: x + (rate or 0.0) * p[k] for k, x in u.items()}
    yield u


CASES: dict[str, tuple[type[ConfigBuilder], Config, Callable[[], Iterator[Any]], float]] = {
    "adamw": (AdamWOptimizer, AdamWConfig(), lambda: adamw(0.9, 0.999, 1e-8), 0.0),
    "adamw, others": (AdamWOptimizer, AdamWConfig(0.8, 0.95, 1e-4, 1e-3), lambda: adamw(0.8, 0.95, 1e-4, 1e-3), 0.0),
    "lion": (LionOptimizer, LionConfig(), lambda: lion(0.9, 0.99), 1e-3),
    "lion, others": (LionOptimizer, LionConfig(0.8, 0.7), lambda: lion(0.8, 0.7), 1e-3),
    "rmsprop": (RMSPropOptimizer, RMSPropConfig(), lambda: rmsprop(0.9, 1e-8, 0.0, 0.0, False), 0.0),
    "rmsprop, others": (
        RMSPropOptimizer,
        RMSPropConfig(0.8, 0.5, 0.7, True, 1e-3),
        lambda: rmsprop(0.8, 1e-3, 0.5, 0.7, True),
        0.0,
    ),
    "rmsprop, nesterov alone": (
        RMSPropOptimizer,
        RMSPropConfig(nesterov=True),
        lambda: rmsprop(0.9, 1e-8, 0.0, 0.0, False),
        0.0,
    ),
    "mars": (MarsOptimizer, MarsConfig(), lambda: mars(0.95, 0.99, 0.025, 1e-8, 1.0), 0.0),
    "mars, others": (
        MarsOptimizer,
        MarsConfig(0.5, 0.8, 0.9, 0.1, 1e-3, None),
        lambda: mars(0.8, 0.9, 0.1, 1e-3, None),
        0.0,
    ),
    "adafactor": (AdafactorOptimizer, AdafactorConfig(), lambda: adafactor(0.8, 1e-30, 1.0, None), 0.0),
    "adafactor, others": (
        AdafactorOptimizer,
        AdafactorConfig(decay_rate=0.5, eps=1e-3, clipping_threshold=None, weight_decay_rate=0.01),
        lambda: adafactor(0.5, 1e-3, None, 0.01),
        0.0,
    ),
}


@pytest.mark.parametrize("outside", [None, 0.3])
@pytest.mark.parametrize("case", CASES)
def test_steps_are_optax_s(case, outside):
    cls, config, formula, own = CASES[case]
    updates = formula()
    next(updates)
    tx = make_transformation(cls(config), lr, weight_decay=outside)
    mine = wanted = by_stage = tree(0)
    state = stage_state = tx.init(mine)
    for step in range(STEPS):
        g = tree(step + 1)
        u = updates.send((g, wanted) if cls is AdafactorOptimizer else g)
        # Weight decay is scheduled and of all parameters, 1-D ones too; it is of the parameters before the step.
        wanted = {k: p - u[k] - lr(step) * (own + (outside or 0.0)) * p for k, p in wanted.items()}
        mine, state = tx.update(g, state, mine)
        by_stage, stage_state = tx.apply_gradients_stage_local(params=by_stage, grads=g, opt_state=stage_state)
        for name, p in wanted.items():
            torch.testing.assert_close(mine[name], p, rtol=1e-10, atol=1e-12)
            torch.testing.assert_close(by_stage[name], p, rtol=1e-10, atol=1e-12)
