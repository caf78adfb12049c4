"""MicroAdam against algorithm 1 of its paper in numpy, and against Adam, which it is when it compresses nothing."""

import math
from typing import Any

import numpy as np
import pytest
import torch

from core.optimizer.rules.micro_adam import MicroAdam, dequantize, quantize_

STEPS = 12
SHAPES = ((), (7,), (8, 13), (13, 8), (3, 4, 5))

Array = np.ndarray[Any, np.dtype[np.float64]]


def gradients(shape: tuple[int, ...], steps: int = STEPS) -> list[Array]:
    rng = np.random.default_rng(1)
    return [np.asarray(rng.standard_normal(shape)) for _ in range(steps)]


def train(shape: tuple[int, ...], grads: list[Array], dtype: torch.dtype = torch.float64, **kwargs: Any) -> Any:
    """The weights before and after, and the optimizer."""
    start = np.asarray(np.random.default_rng(0).standard_normal(shape))
    p = torch.nn.Parameter(torch.tensor(start, dtype=dtype))
    optimizer = MicroAdam([("w", p)], **kwargs)
    for g in grads:
        p.grad = torch.tensor(g, dtype=dtype)
        optimizer.step()
    return start, p.detach(), optimizer


def bfloat16(x: Array) -> Array:
    rounded: Array = torch.tensor(x).bfloat16().double().numpy()
    return rounded


def four_bits(x: Array) -> Array:
    """``x`` rounded to the nearest of 16 values from its smallest to its largest."""
    unit = (x.max() - x.min()) / 15
    return np.floor((x - x.min()) / unit + 0.5) * unit + x.min() if unit > 0 else x


def micro_adam(w: Array, grads: list[Array], group: dict[str, Any]) -> Array:
    """Modoranu et al. 2024, algorithm 1; the window is a list, newest last."""
    (b1, b2), lr, size, shape = group["betas"], group["lr"], w.size, w.shape
    w, error = w.ravel(), np.zeros(size)
    window: list[tuple[Array, Array]] = []
    for t, g in enumerate(grads, 1):
        a = g.ravel() + error
        largest = []
        for start in range(0, size, group["block_size"]):
            block = np.abs(a[start : start + group["block_size"]])
            count = max(1, math.ceil(block.size * group["density"]))
            largest += list(start + np.argsort(-block)[:count])
        where = np.array(largest)
        values = bfloat16(a[where]) if group["bf16_window"] else a[where]
        window = [*window, (where, values)][-group["window"] :]
        a[where] = 0
        step = group["quant_block_size"]
        error = np.concatenate([four_bits(a[start : start + step]) for start in range(0, size, step)])
        m, v = np.zeros(size), np.zeros(size)
        for age, (where, values) in enumerate(reversed(window)):
            m[where] += b1**age * values
            v[where] += b2**age * values**2
        m *= (1 - b1) / (1 - b1**t)
        v *= (1 - b2) / (1 - b2**t)
        w = w - lr * group["weight_decay"] * w - lr * m / (group["eps"] + np.sqrt(v))
    return w.reshape(shape)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "kwargs",
    [
        {"density": 0.1, "window": 4, "block_size": 20, "quant_block_size": 9},
        {"density": 0.3, "bf16_window": False, "weight_decay": 0.1, "quant_block_size": 16},
        {"weight_decay": 0.1},
    ],
    ids=["blocks", "one block", "defaults"],
)
def test_micro_adam_is_algorithm_1(shape, kwargs) -> None:
    grads = gradients(shape)
    start, got, optimizer = train(shape, grads, lr=0.1, **kwargs)
    expected = micro_adam(start, grads, optimizer.param_groups[0])
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_without_compression_it_is_adam(shape) -> None:
    grads = gradients(shape)
    start, got, _ = train(shape, grads, lr=0.1, density=1.0, window=STEPS, bf16_window=False)
    p = torch.nn.Parameter(torch.tensor(start))
    adam = torch.optim.Adam([p], lr=0.1)
    for g in grads:
        p.grad = torch.tensor(g)
        adam.step()
    torch.testing.assert_close(got, p.detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", [1, 2, 63, 64, 65, 200])
def test_4_bits_are_within_half_a_unit_and_ends_are_exact(size: int) -> None:
    x = torch.tensor(gradients((size,), 1)[0])
    blocks = -(-size // 64)
    codes = torch.zeros(-(-size // 2), dtype=torch.uint8)
    lows, highs = torch.zeros(2, blocks, dtype=torch.float64)
    quantize_(x, codes, lows, highs, 64)
    back = dequantize(codes, lows, highs, size, 64)
    for old, new in zip(x.split(64), back.split(64), strict=True):
        assert (old - new).abs().max() <= (old.max() - old.min()) / 30 * (1 + 1e-12)
        assert new.min() == old.min() and abs(new.max() - old.max()) <= 1e-15


def test_what_is_left_out_is_fed_back() -> None:
    """The window gets one entry of eight a step; what the others had waits in the error, and none is forgotten."""
    grads = [np.linspace(1.0, 0.3, 8)] * 40
    *_, optimizer = train((8,), grads, lr=0.1, density=0.125, window=40, bf16_window=False)
    (state,) = optimizer.state.values()
    sent = torch.zeros(8, dtype=torch.float64).index_add_(0, state["indices"].long().view(-1), state["values"].view(-1))
    left = dequantize(state["error"], state["error_min"], state["error_max"], 8, 64)
    wanted = torch.tensor(np.sum(grads, 0))
    assert (sent > 0).all()
    # Each step loses at most half a unit of what is left.
    assert ((sent + left - wanted).abs() <= 40 * float(left.max()) / 30).all()


def test_zero_gradients_change_nothing() -> None:
    start, got, _ = train((8, 13), [np.zeros((8, 13))] * 3)
    assert np.array_equal(start, got.numpy())
    _, got, _ = train((8, 13), [np.zeros((8, 13)), *gradients((8, 13)), np.zeros((8, 13))])
    assert got.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_takes_what_the_docstring_says(dtype: torch.dtype) -> None:
    *_, optimizer = train((1000, 64), [], dtype)
    (state,) = optimizer.state.values()
    used = sum(x.numel() * x.element_size() for x in state.values())
    assert abs(used / 64000 - (0.5 + 8 / 64 + 4 * 10 * 0.01)) < 1e-3
    assert {name: x.dtype for name, x in state.items() if name in ("indices", "values", "error")} == {
        "indices": torch.int16,
        "values": torch.bfloat16,
        "error": torch.uint8,
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_resumes_where_it_was(dtype: torch.dtype) -> None:
    grads = gradients((40, 30))
    args = {"lr": 0.1, "density": 0.1, "block_size": 700}
    _, through, optimizer = train((40, 30), grads, dtype, **args)
    _, half, saved = train((40, 30), grads[:5], dtype, **args)
    p = torch.nn.Parameter(half.clone())
    resumed = MicroAdam([("w", p)], **args)
    resumed.load_state_dict(saved.state_dict())
    for g in grads[5:]:
        p.grad = torch.tensor(g, dtype=dtype)
        resumed.step()
    assert torch.equal(p, through)
    for a, b in zip(resumed.state.values(), optimizer.state.values(), strict=True):
        assert all(torch.equal(a[name], b[name]) for name in b)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"density": 0.0}, r"density=0\.0 must be above 0 and at most 1"),
        ({"window": 0}, r"window=0 must be a whole number of at least 1"),
        ({"block_size": 40000}, r"block_size=40000 must be at most 32768"),
        ({"eps": 0.0}, r"eps=0\.0 must be a finite number above 0"),
    ],
)
def test_arguments_out_of_range_are_refused(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MicroAdam([torch.nn.Parameter(torch.ones(3))], **kwargs)
