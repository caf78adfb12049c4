"""MicroAdam: Adam of a window of sparse gradients, with the rest fed back in 4 bits."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from ...process_groups_config import ProcessGroupCollection
from ..steps.argument_checks import check_adam, positive, whole_number
from ..steps.weight_decay import decay_
from ..steps.whole_tensor import STEP_COUNT, WholeMode, WholeState, WholeStep

LEVELS = 15
"""Steps between the smallest and the largest value of a block in 4 bits."""


class MicroAdam(WholeStep):
    """Adam whose moments are computed anew in every step, from the largest entries of the last ``window`` gradients.

    Algorithm 1, on the whole tensor as one row: ``a = g + Q⁻¹(e)``; of each block of ``block_size`` entries the largest,
    a share ``density``, leave ``a`` for the window, and what is left is the next ``e = Q(a)``, 4 bits an entry between the
    smallest and the largest of ``quant_block_size`` entries. With the window's sparse vectors aᵢ, and t - i steps since:
    ``m = (1-β1)/(1-β1ᵗ) · Σ β1^(t-i) aᵢ``; ``v = (1-β2)/(1-β2ᵗ) · Σ β2^(t-i) aᵢ²``;
    ``p ← (1 - lr·wd)·p - lr · m / (ε + √v)``.

    State takes, in bytes a parameter, ½ + 8/quant_block_size for e (float32 ends) and 4·window·density for the window: 1.025
    with the defaults. "Micro" is about memory: it has nothing to do with micro-batches.

    Args:
        params: Parameters or parameter groups, any shapes, DTensors or plain tensors.
        lr: Learning rate.
        betas: β1, β2, in [0, 1).
        eps: ε > 0.
        weight_decay: wd ≥ 0, decoupled.
        density: Share of each block that enters the window, in (0, 1]; at least one entry.
        window: Gradients that the window holds.
        block_size: Entries of a block, up to 32768: positions in it take 16 bits.
        quant_block_size: Entries that share their smallest and largest value.
        bf16_window: Keep the window's values in bfloat16, not in the parameter's dtype (float32 at least).
        pg_collection: Process groups; needed when plain tensors are sharded.
        tp_mode: ``owner`` or ``duplicated``, see :class:`WholeStep`.

    Raises:
        ValueError: for an argument out of range.

    Source: Modoranu et al. 2024, algorithm 1, https://arxiv.org/abs/2405.15593
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        density: float = 0.01,
        window: int = 10,
        block_size: int = 16384,
        quant_block_size: int = 64,
        bf16_window: bool = True,
        tp_mode: WholeMode = "owner",
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        check_adam(lr, betas, eps, weight_decay)
        positive("eps", eps)  # Where the window has no entry, m and v are 0.
        if not 0 < density <= 1:
            raise ValueError(f"density={density} must be above 0 and at most 1.")
        for name, size, most in (
            ("window", window, math.inf),
            ("block_size", block_size, 2**15),
            ("quant_block_size", quant_block_size, math.inf),
        ):
            whole_number(name, size, 1)
            if size > most:
                raise ValueError(f"{name}={size} must be at most {most}.")
        self.tp_mode = tp_mode
        super().__init__(
            params,
            pg_collection,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            density=density,
            window=window,
            block_size=block_size,
            quant_block_size=quant_block_size,
            bf16_window=bf16_window,
        )

    def whole_specs(self, shape: tuple[int, ...], group: Mapping[str, Any]) -> Mapping[str, WholeState]:
        """``indices``, ``values`` (window, entries); ``error`` two codes a byte, ``error_min``, ``error_max``; ``step``."""
        size = math.prod(shape)
        entries = sum(_largest(n, group["density"]) for n in _blocks(size, group["block_size"]))
        ends = WholeState((-(-size // group["quant_block_size"]),))
        return {
            "step": STEP_COUNT,
            "indices": WholeState((group["window"], entries), dtype=torch.int16),
            "values": WholeState((group["window"], entries), dtype=torch.bfloat16 if group["bf16_window"] else None),
            "error": WholeState((-(-size // 2),), dtype=torch.uint8),
            "error_min": ends,
            "error_max": ends,
        }

    def cost(self, shape: tuple[int, ...]) -> float:
        """Entries."""
        return float(math.prod(shape))

    def update_whole_(self, p: Tensor, g: Tensor, s: Any, group: Mapping[str, Any], name: str) -> None:
        """Algorithm 1, by its line numbers."""
        if not p.numel():
            return
        t, window, lr = int(s.step.add_(1)), group["window"], float(group["lr"])
        a = g.reshape(-1)
        a += dequantize(s.error, s.error_min, s.error_max, len(a), group["quant_block_size"])  # 4
        positions, starts = top(a.abs(), group["block_size"], group["density"])  # 5
        newest = (t - 1) % window
        s.indices[newest] = positions
        s.values[newest] = a[starts + positions]  # 9
        a[starts + positions] = 0  # 6
        quantize_(a, s.error, s.error_min, s.error_max, group["quant_block_size"])  # 7, 8
        m, v = torch.zeros_like(a), torch.zeros_like(a)
        beta1, beta2 = group["betas"]
        for slot, (where, values) in enumerate(zip(s.indices.long() + starts, s.values.to(a.dtype), strict=True)):  # 10
            age = (newest - slot) % window
            m[where] += beta1**age * values
            v[where] += beta2**age * values.square()
        m *= (1 - beta1) / (1 - beta1**t)
        v *= (1 - beta2) / (1 - beta2**t)
        decay_([p], [g], group, "decoupled")
        p.view(-1).sub_(m.div_(v.sqrt_().add_(group["eps"])), alpha=lr)  # 12


def top(magnitude: Tensor, block_size: int, density: float) -> tuple[Tensor, Tensor]:
    """Where the largest entries of each block of ``magnitude`` (d,) are: positions in their blocks, and the blocks' starts."""
    positions, starts = [], []
    for at, n in enumerate(_blocks(len(magnitude), block_size)):
        start = at * block_size
        positions.append(magnitude[start : start + n].topk(_largest(n, density), sorted=False).indices)
        starts.append(torch.full_like(positions[-1], start))
    return torch.cat(positions), torch.cat(starts)


def quantize_(x: Tensor, codes: Tensor, lows: Tensor, highs: Tensor, block_size: int) -> None:
    """Store ``x`` (d,) as 4-bit ``codes`` (⌈d/2⌉) between the ``lows`` and ``highs`` (blocks) of its blocks, rounded."""
    rows = torch.cat([x, x[-1:].expand(-len(x) % block_size)]).view(-1, block_size)
    torch.amin(rows, 1, out=lows)
    torch.amax(rows, 1, out=highs)
    unit = ((highs - lows) / LEVELS)[:, None]
    code = torch.where(unit > 0, (rows - lows[:, None]) / unit + 0.5, 0.0).clamp_(max=LEVELS).byte().view(-1)[: len(x)]
    pairs = torch.cat([code, code.new_zeros(len(x) % 2)]).view(-1, 2)
    codes.copy_(pairs[:, 0] | pairs[:, 1] << 4)


def dequantize(codes: Tensor, lows: Tensor, highs: Tensor, size: int, block_size: int) -> Tensor:
    """What :func:`quantize_` stored, (size,), in the dtype of ``lows``."""
    code = torch.stack([codes & LEVELS, codes >> 4], 1).view(-1)[:size].to(lows.dtype)
    rows = torch.cat([code, code.new_zeros(-size % block_size)]).view(-1, block_size)
    return torch.addcmul(lows[:, None], rows, ((highs - lows) / LEVELS)[:, None]).view(-1)[:size]


def _blocks(size: int, block_size: int) -> list[int]:
    """Sizes of the blocks of a row of ``size`` entries."""
    return [min(block_size, size - start) for start in range(0, size, block_size)]


def _largest(size: int, density: float) -> int:
    return max(1, math.ceil(size * density))
