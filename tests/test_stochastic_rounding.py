"""Stochastic rounding to bfloat16, and AdamW that uses it."""

import copy
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from core.optimizer.rules.adafactor import AdafactorSR
from core.optimizer.rules.adamw_sr import AdamWSR
from core.philox import Key, bits
from core.precision.stochastic_rounding import stochastic_round
from tests.support.sharding import CUTS, sharded, unsharded

MAX = torch.finfo(torch.bfloat16).max
BORDERS = [0.0, -0.0, 1.0, -1.0, 1e-45, -1e-45, 1.1754942e-38, MAX, -MAX]


def neighbours(x: Tensor) -> tuple[Tensor, Tensor]:
    """The bfloat16 values next to ``x``, towards zero and away from it, by its bits."""
    down = (x.view(torch.int32) & -(2**16)).view(torch.float32)
    up = torch.where(down == x, x, (down.view(torch.int32) + 2**16).view(torch.float32))
    return down, up


def noise(n: int, step: int = 0) -> Tensor:
    return bits(Key(1, "x", step), (n,))[0]


def test_it_gives_a_neighbour_and_keeps_what_fits() -> None:
    x = torch.cat([torch.tensor(BORDERS), torch.randn(10000) * torch.logspace(-30, 30, 10000)])
    down, up = neighbours(x)
    got = stochastic_round(x, noise(len(x))).float()
    assert ((got == down) | (got == up)).all()
    assert (got != down).any() and (got != up).any()
    exact = x.bfloat16()
    assert torch.equal(stochastic_round(exact.float(), noise(len(x))).view(torch.int16), exact.view(torch.int16))


def test_its_mean_is_what_was_rounded() -> None:
    n = 2**16
    for value in (1.001, -3.3e-5, 7.77e20):
        x = torch.full((n,), value)
        down, up = (float(v[0]) for v in neighbours(x))
        chance = (float(x[0]) - down) / (up - down)
        share = (stochastic_round(x, noise(n)).double() == up).double().mean()
        assert abs(share - chance) < 5 * math.sqrt(chance * (1 - chance) / n)


def test_every_noise_once_gives_exactly_the_mean() -> None:
    x = torch.full((2**16,), 1.00390625 + 3 * 2**-20)
    mean = stochastic_round(x, torch.arange(2**16)).double().mean()
    assert mean == x[0].double()


def test_it_is_the_rule_on_bits() -> None:
    x = torch.randn(1000)
    n = noise(1000)
    bit_rule = (x.numpy().view(np.uint32) + (n.numpy() & 0xFFFF).astype(np.uint32)) & np.uint32(0xFFFF0000)
    assert np.array_equal(stochastic_round(x, n).float().numpy(), bit_rule.view(np.float32))


def test_infinities_and_nan_are_kept() -> None:
    signalling = torch.tensor([0x7F800001, -0x7FFFFF], dtype=torch.int32).view(torch.float32)
    x = torch.cat([torch.tensor([math.inf, -math.inf, math.nan]), signalling])
    got = stochastic_round(x, torch.full((5,), 0xFFFF))
    assert torch.equal(got[:2], torch.tensor([math.inf, -math.inf], dtype=torch.bfloat16))
    assert got[2:].isnan().all()


def test_only_float32_is_rounded() -> None:
    with pytest.raises(ValueError, match="from float32 to bfloat16; got torch"):
        stochastic_round(torch.ones(3, dtype=torch.float64), noise(3))


def train(p: Tensor, grads: list[Tensor], **kwargs: Any) -> AdamWSR:
    optimizer = AdamWSR([("w", torch.nn.Parameter(p))], **kwargs)
    for g in grads:
        optimizer.param_groups[0]["params"][0].grad = g
        optimizer.step()
    return optimizer


def weights(optimizer: AdamWSR) -> Tensor:
    p: Tensor = optimizer.param_groups[0]["params"][0]
    return p.detach()


@pytest.mark.parametrize("shape", [(), (7,), (4, 9), (9, 4), (2, 3, 4)])
def test_adamw_sr_is_its_formula(shape: tuple[int, ...]) -> None:
    """The rule of Forgather's AdamW: ε beside √v that is not corrected for bias."""
    rng = np.random.default_rng(0)
    w, grads = rng.standard_normal(shape), [rng.standard_normal(shape) for _ in range(12)]
    lr, b1, b2, eps, decay = 0.1, 0.9, 0.99, 1e-3, 0.05
    args = {"lr": lr, "betas": (b1, b2), "eps": eps, "weight_decay": decay, "bf16_stochastic_round": True}
    optimizer = train(torch.tensor(w), [torch.tensor(g) for g in grads], **args)
    m = v = np.zeros(shape)
    for t, g in enumerate(grads, 1):
        w = w - lr * decay * w
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        w = w - lr * math.sqrt(1 - b2**t) / (1 - b1**t) * m / (np.sqrt(v) + eps)
    np.testing.assert_allclose(weights(optimizer).numpy(), w, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rounds", [False, True])
def test_bfloat16_state_is_bfloat16_and_steps_are_in_float32(rounds: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    p, g = (torch.randn(6, 5, generator=generator).bfloat16() for _ in range(2))
    optimizer = train(p.clone(), [g], lr=0.1, bf16_stochastic_round=rounds)
    (state,) = optimizer.state.values()
    words = bits(Key(5489, "w", 1, "bfloat16 rounding"), (6, 5), words=3)
    m, v = 0.1 * g.float(), g.float().square() * (1 - 0.999)
    value = p.float() * (1 - 0.1 * 0.01) - 0.1 * math.sqrt(1 - 0.999) / (1 - 0.9) * m / (v.sqrt() + 1e-6)
    for got, wide, n in zip(
        [weights(optimizer), state["exp_avg"], state["exp_avg_sq"]], [value, m, v], words, strict=True
    ):
        assert got.dtype == torch.bfloat16
        # The last bit of float32 may differ, and with it, rarely, a rounding.
        expected = stochastic_round(wide, n) if rounds else wide.bfloat16()
        assert (got != expected).sum() <= 1


def test_small_steps_are_kept_on_average() -> None:
    """A step of 1e-4 on weights of 1 is below half a unit of bfloat16 (2⁻⁸): rounded to nearest, nothing ever moves."""
    grads = [torch.ones(4096, dtype=torch.bfloat16)] * 50
    args = {"lr": 1e-4, "weight_decay": 0.0}
    nearest = train(torch.ones(4096, dtype=torch.bfloat16), grads, bf16_stochastic_round=False, **args)
    assert (weights(nearest) == 1).all()
    moved = weights(train(torch.ones(4096, dtype=torch.bfloat16), grads, **args))  # at random by default
    assert abs(float(moved.double().mean()) - (1 - 50 * 1e-4)) < 5e-4


def test_the_noise_depends_on_the_seed_and_is_the_same_when_resumed() -> None:
    grads = [torch.randn(64, generator=torch.Generator().manual_seed(i)).bfloat16() for i in range(6)]
    start = torch.linspace(-1, 1, 64).bfloat16()
    args = {"lr": 1e-3, "bf16_stochastic_round": True}
    through = train(start.clone(), grads, **args)
    assert not torch.equal(weights(through), weights(train(start.clone(), grads, seed=1, **args)))
    half = train(start.clone(), grads[:3], **args)
    rest = train(weights(half).clone(), [], **args)
    rest.load_state_dict(half.state_dict())
    for g in grads[3:]:
        rest.param_groups[0]["params"][0].grad = g
        rest.step()
    assert torch.equal(weights(rest), weights(through))
    for name, value in through.state[through.param_groups[0]["params"][0]].items():
        assert torch.equal(rest.state[rest.param_groups[0]["params"][0]][name], value)


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("cut", ["rows", "columns", "copies", "uneven columns", "gate/up stride"])
def test_every_layout_rounds_alike(world, cut) -> None:
    cut = replace(CUTS[2][cut], dtype=torch.bfloat16)
    got, shard = sharded("adamw_sr", cut, 5, world, bf16_stochastic_round=True)
    for mine, whole in zip(got, unsharded("adamw_sr", cut, 5, bf16_stochastic_round=True), strict=True):
        assert torch.equal(mine, shard(whole))


def test_adafactor_keeps_updates_below_half_a_unit_on_average() -> None:
    """bfloat16 has 2⁻⁷ between 1 and 2: steps of 2⁻¹⁰ are lost by rounding to nearest, and add up when rounded at random."""
    moved = []
    for rounds in ({"bf16_stochastic_round": False}, {}):  # at random by default
        p = torch.nn.Parameter(torch.full((128, 64), 1.5, dtype=torch.bfloat16))
        optimizer = AdafactorSR([("w", p)], lr=2.0**-10, weight_decay=0.0, **rounds)
        for _ in range(16):
            p.grad = torch.ones_like(p)
            optimizer.step()
        moved.append(1.5 - float(p.detach().double().mean()))
    assert moved[0] == 0
    assert abs(moved[1] - 16 * 2.0**-10) < 1e-3


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("cut", ["copies", "rows", "columns"])
def test_adafactor_rounds_by_the_same_noise_on_every_layout(world, cut) -> None:
    """Its sums are rounded otherwise on shards, so that a few entries may fall on the other side."""
    whole_cut = replace(CUTS[2][cut], dtype=torch.bfloat16)
    got, shard = sharded("adafactor_sr", whole_cut, 5, world, bf16_stochastic_round=True)
    for mine, whole in zip(got, unsharded("adafactor_sr", whole_cut, 5, bf16_stochastic_round=True), strict=True):
        assert (mine != shard(whole)).double().mean() < 0.01


def two_groups(cls: type[AdamWSR] | type[AdafactorSR], seeds: tuple[int, int] = (3, 4)) -> AdamWSR | AdafactorSR:
    params = [torch.nn.Parameter(torch.linspace(-1, 1, 64).view(8, 8).bfloat16()) for _ in seeds]
    groups = [{"params": [(f"w{i}", p)], "seed": seed} for i, (p, seed) in enumerate(zip(params, seeds, strict=True))]
    return cls(groups, lr=1e-3)


def advance(optimizer: AdamWSR | AdafactorSR, steps: range) -> list[Tensor]:
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for t in steps:
        for i, p in enumerate(params):
            p.grad = torch.randn(8, 8, generator=torch.Generator().manual_seed(10 * t + i)).bfloat16()
        optimizer.step()
    return [p.detach().clone() for p in params]


@pytest.mark.parametrize("cls", [AdamWSR, AdafactorSR])
def test_the_state_dict_resumes_the_noise_whatever_seed_the_new_optimizer_was_given(cls) -> None:
    through = two_groups(cls)
    halfway = advance(through, range(3))
    saved = copy.deepcopy(through.state_dict())
    assert saved["sr_generator_state"] == {"seed": [3, 4], "step": [3, 3]}
    before = copy.deepcopy(saved)
    for leave_out in (False, True):
        rest = two_groups(cls, seeds=(7, 8))
        for group, value in zip(rest.param_groups, halfway, strict=True):
            with torch.no_grad():
                group["params"][0].copy_(value)
        rest.load_state_dict({k: v for k, v in saved.items() if not leave_out or k != "sr_generator_state"})
        assert [group["seed"] for group in rest.param_groups] == [3, 4]
        if not leave_out:
            resumed = advance(rest, range(3, 6))
    for mine, whole in zip(resumed, advance(through, range(3, 6)), strict=True):
        assert torch.equal(mine, whole)
    assert saved["sr_generator_state"] == before["sr_generator_state"] and saved.keys() == before.keys()


@pytest.mark.parametrize(
    ("noise", "said"),
    [
        (torch.Generator().get_state(), "is the state of a torch.Generator.*from_forgather_state"),
        ({"seed": [1]}, "a whole number for each of the 2 parameter groups"),
        ({"seed": [1, 2.5]}, "a whole number for each"),
        (None, "is None; give"),
    ],
    ids=["generator", "one seed", "no whole number", "none"],
)
@pytest.mark.parametrize("cls", [AdamWSR, AdafactorSR])
def test_noise_of_another_form_is_refused_and_nothing_changes(cls, noise, said) -> None:
    optimizer = two_groups(cls)
    saved = copy.deepcopy(optimizer.state_dict())
    advance(optimizer, range(1))
    with pytest.raises(ValueError, match=said):
        optimizer.load_state_dict({**saved, "sr_generator_state": noise})
    assert optimizer.state_dict()["sr_generator_state"]["step"] == [1, 1]


@pytest.mark.parametrize("cls", [AdamWSR, AdafactorSR])
def test_kernels_that_do_not_exist_are_refused(cls, monkeypatch) -> None:
    p = [torch.nn.Parameter(torch.ones(2, 2))]
    with pytest.raises(ValueError, match="torch_compile=True: this optimizer has no compiled step"):
        cls(p, torch_compile=True)
    monkeypatch.setattr("core.optimizer.rules.parts.rounding.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="needs Triton, which is not installed: pip install triton"):
        cls(p, use_triton=True)
    monkeypatch.setattr("core.optimizer.rules.parts.rounding.find_spec", lambda name: name)
    with pytest.raises(ValueError, match="there are no Triton kernels yet"):
        cls(p, use_triton=True)


def test_triton_does_not_go_with_a_relative_step() -> None:
    with pytest.raises(ValueError, match="use_triton=True does not go with relative_step=True"):
        AdafactorSR([torch.nn.Parameter(torch.ones(2, 2))], use_triton=True, relative_step=True)
