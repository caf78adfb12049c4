"""Adafactor and CAME against other people's classes, and against their definitions where no class has them."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from pytorch_optimizer import CAME
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from core.optimizer.rules.adafactor import Adafactor, AdafactorSR
from core.optimizer.rules.came import Came
from core.process_groups_config import Axis
from core.sharding.layout import Layout, Split
from core.sharding.state import StateSpec

STEPS = 12
SHAPES = ((6, 20), (20, 6), (9, 9), (13,), (), (3, 5, 8), (4, 2, 7, 3), (8, 5, 2))
Formula = Callable[[np.ndarray, np.ndarray, dict[str, Any], int, float], np.ndarray]


def gradients(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    scale = torch.rand(shape, generator=generator, dtype=torch.float64) * 4
    return [(torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype) for _ in range(STEPS)]


def run(make: Callable[[list[Tensor]], torch.optim.Optimizer], shape: tuple[int, ...]) -> Tensor:
    p = torch.nn.Parameter(torch.linspace(-1, 1.5, max(1, int(np.prod(shape))), dtype=torch.float64).reshape(shape))
    optimizer = make([p])
    for g in gradients(shape):
        p.grad = g.clone()
        optimizer.step()
    return p.detach()


def iterate(formula: Formula, shape: tuple[int, ...], lr: float) -> Tensor:
    p = np.linspace(-1, 1.5, max(1, int(np.prod(shape)))).reshape(shape)
    state: dict[str, Any] = {}
    for t, g in enumerate(gradients(shape), 1):
        p = formula(p, g.numpy(), state, t, lr)
    return torch.from_numpy(np.asarray(p))


def assert_same(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


def rms(x: np.ndarray) -> float:
    return float(np.sqrt(np.mean(x**2)))


def mean_of(state: dict[str, Any], name: str, x: np.ndarray, beta: float) -> np.ndarray:
    state[name] = beta * state.get(name, 0) + (1 - beta) * x
    return state[name]


def optax(
    min_dim: int = 128,
    decay_rate: float = 0.8,
    offset: int = 0,
    threshold: float | None = 1.0,
    scale: bool = True,
    momentum: float | None = None,
    weight_decay_rate: float = 0.0,
) -> Formula:
    """The chain of ``optax.adafactor``: factored RMS, block-RMS clipping, lr, parameter scale, EMA, decayed weights."""

    def step(p: np.ndarray, g: np.ndarray, state: dict[str, Any], t: int, lr: float) -> np.ndarray:
        beta = 1 - (t - offset) ** -decay_rate if t > offset else 0.0
        square = g**2 + 1e-30
        by_size = np.argsort(g.shape, kind="stable")
        if g.ndim >= 2 and g.shape[by_size[-2]] >= min_dim:
            smaller, larger = by_size[-2], by_size[-1]
            v_row = mean_of(state, "row", square.mean(axis=larger, keepdims=True), beta)
            v_col = mean_of(state, "col", square.mean(axis=smaller, keepdims=True), beta)
            u = g * (v_row / v_row.mean(axis=smaller, keepdims=True)) ** -0.5 * v_col**-0.5
        else:
            u = g * mean_of(state, "v", square, beta) ** -0.5
        if threshold is not None:
            u = u / max(1.0, rms(u) / threshold)
        u = u * lr
        if scale:
            u = u * max(rms(p), 1e-3)
        if momentum is not None:
            u = mean_of(state, "m", u, momentum)
        return p - (u + weight_decay_rate * p)

    return step


def forgather(
    weight_decay: float = 0.01, relative_step: bool = False, beta2: float = 0.999, threshold: float = 1.0
) -> Formula:
    """Sums instead of means, a capped decay, weight decay first; more than two dims are (all but the last, last)."""

    def step(p: np.ndarray, g: np.ndarray, state: dict[str, Any], t: int, lr: float) -> np.ndarray:
        if relative_step:
            lr = max(1e-3, rms(p)) * lr
        p = p * (1 - lr * weight_decay)
        beta = min(1 - t**-0.8, beta2)
        square = g**2 + 1e-30
        if g.ndim < 2:
            u = g / np.sqrt(mean_of(state, "row", square, beta))
        else:
            flat = square.reshape(-1, g.shape[-1])
            row = mean_of(state, "row", flat.sum(axis=1), beta)
            col = mean_of(state, "col", flat.sum(axis=0), beta)
            u = g / np.sqrt(np.outer(row, col) / row.sum()).reshape(g.shape)
        return p - lr * u / max(1.0, rms(u) / threshold)

    return step


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("lr", [0.01, 0.9])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_torch_variant_is_torchs_adafactor(shape, lr, weight_decay):
    got = run(lambda ps: Adafactor(ps, lr, variant="torch", weight_decay=weight_decay), shape)
    assert_same(got, run(lambda ps: torch.optim.Adafactor(ps, lr, weight_decay=weight_decay), shape))


def test_torch_variant_takes_torchs_constants():
    got = run(
        lambda ps: Adafactor(ps, 0.1, variant="torch", decay_rate=0.5, eps=0.3, min_scale=2.0, clip_threshold=1.1),
        (6, 20),
    )
    assert_same(got, run(lambda ps: torch.optim.Adafactor(ps, 0.1, beta2_decay=-0.5, eps=(0.3, 2.0), d=1.1), (6, 20)))


@pytest.mark.parametrize("shape", [*SHAPES, (130, 128), (128, 127), (2, 128, 129), (129, 3, 128)])
def test_optax_variant_is_the_definition(shape):
    assert_same(run(lambda ps: Adafactor(ps, 0.05), shape), iterate(optax(), shape, 0.05))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "kwargs",
    [
        {"min_dim": 1},
        {"min_dim": 6, "momentum": 0.9, "weight_decay_rate": 1e-2},
        {"min_dim": 1, "offset": 3, "decay_rate": 0.6, "scale": False},
        {"min_dim": 7, "threshold": None},
        {"min_dim": 1, "threshold": 0.4},
    ],
)
def test_optax_variant_with_settings_is_the_definition(shape, kwargs):
    ours = {"offset": "decay_offset", "threshold": "clip_threshold", "min_dim": "min_dim_size_to_factor"}
    given = {ours.get(k, k): v for k, v in kwargs.items()}
    if "scale" in given:
        given["multiply_by_parameter_scale"] = given.pop("scale")
    assert_same(run(lambda ps: Adafactor(ps, 0.05, **given), shape), iterate(optax(**kwargs), shape, 0.05))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kwargs", [{}, {"relative_step": True, "weight_decay": 0.3}])
def test_forgather_variant_is_the_definition(shape, kwargs):
    assert_same(run(lambda ps: AdafactorSR(ps, 0.05, **kwargs), shape), iterate(forgather(**kwargs), shape, 0.05))
    ours = {"weight_decay": 0.01, **kwargs}
    ours["multiply_by_parameter_scale"] = ours.pop("relative_step", False)
    got = run(lambda ps: Adafactor(ps, 0.05, variant="forgather", **ours), shape)
    assert_same(got, iterate(forgather(**kwargs), shape, 0.05))


def test_forgather_decay_is_capped():
    got = run(lambda ps: AdafactorSR(ps, 0.05, betas=(0.9, 0.5), clip_threshold=0.7), (6, 20))
    assert_same(got, iterate(forgather(beta2=0.5, threshold=0.7), (6, 20), 0.05))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_came_is_pytorch_optimizers(shape, weight_decay):
    got = run(lambda ps: Came(ps, 0.05, weight_decay=weight_decay), shape)
    assert_same(got, run(lambda ps: CAME(ps, 0.05, weight_decay=weight_decay), shape))


def test_came_takes_came_constants():
    betas, eps = (0.8, 0.9, 0.95), (1e-3, 1e-2)
    got = run(lambda ps: Came(ps, 0.05, betas, eps, clip_threshold=0.6), (6, 20))
    expected = run(lambda ps: CAME(ps, 0.05, betas, clip_threshold=0.6, eps1=eps[0], eps2=eps[1]), (6, 20))
    assert_same(got, expected)


MAKERS = {
    "optax": lambda ps: Adafactor(ps, 0.1, min_dim_size_to_factor=1, momentum=0.9),
    "optax unfactored": lambda ps: Adafactor(ps, 0.1, factored=False),
    "torch": lambda ps: Adafactor(ps, 0.1, variant="torch"),
    "forgather": lambda ps: AdafactorSR(ps, 0.1),
    "came": lambda ps: Came(ps, 0.1),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_zero_gradients_and_zero_rows_give_numbers(make, shape, dtype):
    p = torch.nn.Parameter(torch.ones(shape, dtype=dtype))
    optimizer = make([p])
    row = torch.zeros(shape, dtype=dtype)
    if shape:
        row[0] = 3.0
    for g in (torch.zeros(shape, dtype=dtype), row, torch.zeros(shape, dtype=dtype), torch.ones(shape, dtype=dtype)):
        p.grad = g
        optimizer.step()
        assert p.isfinite().all()
        assert all(x.isfinite().all() for x in optimizer.state[p].values())


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_blocks_do_not_change_the_step(make, monkeypatch):
    shapes = ((6, 20), (3, 5, 8), (13,), (2, 7, 3, 4))
    whole = [run(make, shape) for shape in shapes]
    monkeypatch.setattr("core.cache_blocks.BLOCK_BYTES", {"cpu": 34})
    for shape, expected in zip(shapes, whole, strict=True):
        assert_same(run(make, shape), expected)


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_parameters_that_share_a_bucket_step_alone(make):
    shapes = ((6, 20), (6, 20), (), ())
    params = [torch.nn.Parameter(torch.full(shape, 1.0 + i, dtype=torch.float64)) for i, shape in enumerate(shapes)]
    alone = [torch.nn.Parameter(p.detach().clone()) for p in params]
    together, singles = make(params), [make([p]) for p in alone]
    for t in range(4):
        for i, (p, q) in enumerate(zip(params, alone, strict=True)):
            p.grad = q.grad = None if t == 1 and i == 1 else gradients(shapes[i])[t] * (i + 1)
        together.step()
        for single in singles:
            single.step()
    for p, q in zip(params, alone, strict=True):
        assert_same(p.detach(), q.detach())


def test_momentum_is_kept_in_its_dtype_and_used_before_it_is_rounded():
    p = torch.nn.Parameter(torch.ones(4, 3, dtype=torch.float64))
    optimizer = Adafactor([p], 0.1, momentum=0.9, dtype_momentum=torch.bfloat16, multiply_by_parameter_scale=False)
    p.grad = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(4, 3)
    optimizer.step()
    u = p.grad.sign()  # of one step without factors
    assert_same(p.detach(), 1 - 0.1 * 0.1 * u)
    assert torch.equal(optimizer.state[p]["m"], (0.1 * 0.1 * u).bfloat16())


def test_factors_are_sharded_with_the_dims_they_keep():
    axis = Axis("tp", (0, 1), 1)
    conv = Layout((6, 4, 3), (Split.even(axis, 6), None, None))
    kept, reduced = StateSpec("k1k").layout(conv), StateSpec("1kk").layout(conv)
    assert (kept.shape, kept.local_shape) == ((6, 1, 3), (3, 1, 3))
    assert (reduced.shape, reduced.local_shape) == ((1, 4, 3), (1, 4, 3))
    assert StateSpec("k1").layout(Layout.whole((5, 2))) == StateSpec("i1").layout(Layout.whole((5, 2)))


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("cls", [Adafactor, AdafactorSR, Came])
@pytest.mark.parametrize("dim", [0, 1, 2])
def test_state_of_a_dtensor_is_that_of_the_whole(cls, dim, world):
    kwargs = {"min_dim_size_to_factor": 1} if cls is Adafactor else {}
    mesh = world.mesh((world.size,), ("tp",))
    shape = (8, 4, 12)
    whole = torch.nn.Parameter(torch.linspace(-1, 1, 384, dtype=torch.float64).reshape(shape))
    sharded = torch.nn.Parameter(distribute_tensor(whole.detach().clone(), mesh, [Shard(dim)]))
    optimizers = cls([whole], 0.1, **kwargs), cls([sharded], 0.1, **kwargs)
    for g in gradients(shape)[:3]:
        whole.grad, sharded.grad = g, distribute_tensor(g, mesh, [Shard(dim)])
        for optimizer in optimizers:
            optimizer.step()
    for name, expected in optimizers[0].state[whole].items():
        got = optimizers[1].state[sharded][name]
        assert_same(got.full_tensor() if isinstance(got, DTensor) else got, expected)


def test_state_is_factors():
    p = torch.nn.Parameter(torch.zeros(200, 130))
    state = Adafactor([p]).state[p]
    assert {name: tuple(x.shape) for name, x in state.items()} == {"step": (), "row": (200, 1), "col": (1, 130)}
    kernel = torch.nn.Parameter(torch.zeros(130, 3, 140))
    assert tuple(Adafactor([kernel]).state[kernel]["row"].shape) == (130, 3, 1)
    assert tuple(AdafactorSR([kernel]).state[kernel]["col"].shape) == (1, 1, 140)


@pytest.mark.parametrize(
    ("cls", "kwargs", "message"),
    [
        (Adafactor, {"variant": "jax"}, "possible: optax, torch, forgather"),
        (Adafactor, {"eps": 0.0}, "eps=0.0 must be a finite number above 0"),
        (Adafactor, {"beta2_cap": 1.5}, "beta2_cap=1.5 must be at most 1"),
        (Adafactor, {"clip_threshold": 0.0}, "clip_threshold=0.0"),
        (Adafactor, {"momentum": 1.0}, "momentum=1.0"),
        (AdafactorSR, {"decay_rate": 0.8}, "decay_rate=0.8 must be at most 0"),
        (AdafactorSR, {"betas": (0.9,)}, "must be two numbers"),
        (Came, {"betas": (0.9, 0.999)}, "must be three numbers"),
        (Came, {"eps": (1e-30, 0.0)}, r"eps\[1\]=0.0"),
    ],
)
def test_bad_arguments_are_refused(cls, kwargs, message):
    with pytest.raises(ValueError, match=message):
        cls([torch.nn.Parameter(torch.zeros(2))], 0.1, **kwargs)
