"""The whole step of a GPT, matrices by Muon and the rest by AdamW: ours, and Megatron-Core's Muon with torch's AdamW."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from core.optimizer.emerging_optimizers import get_optimizer
from core.optimizer.optimizer_config import OptimizerConfig
from core.process_groups_config import ProcessGroupCollection

from . import cases
from .cases import Candidate, Matrix, Parameters, Steps

VOCABULARY = 50304
"""Rows of GPT-2's embedding, padded to a multiple of 128."""
BETAS, EPS = (0.9, 0.999), 1e-8
_SEEDS = 1_000_000  # first seed of these parameters, above the seeds of the matrices


@dataclass(frozen=True)
class Other:
    """A parameter that AdamW updates: ``name``, whole ``shape``, sharded along the dim ``cut`` or, for None, copied."""

    name: str
    shape: tuple[int, ...]
    cut: int | None
    seed: int

    @property
    def decay(self) -> float:
        """Weight decay; 0 for vectors."""
        return cases.DECAY if len(self.shape) > 1 else 0.0

    def weight(self) -> Tensor:
        """The whole weight, ``shape`` in float32, the same on every rank."""
        return cases.normal(self.seed, 0, *self.shape) * 0.02

    def gradient(self) -> Tensor:
        """The whole gradient, ``shape`` in float32, gaussian."""
        return cases.normal(self.seed, 1, *self.shape)

    def first_update(self) -> Tensor:
        """First update of AdamW, ``shape`` in float64: without weight decay, and before it is multiplied by lr."""
        g = self.gradient().double()
        return g / (g.abs() + EPS)


def gpt_others(hidden: int, layers: int, vocabulary: int) -> list[Other]:
    """The embedding, and the norms and biases of each layer and of the end, sharded as in Megatron."""
    h = hidden
    shapes: list[tuple[str, tuple[int, ...], int | None]] = [("embedding", (vocabulary, h), 0)]
    for i in range(layers):
        cut = [(f"qkv_bias_{i}", (3 * h,), 0), (f"fc1_bias_{i}", (4 * h,), 0)]
        copied = ("norm1_weight", "norm1_bias", "proj_bias", "norm2_weight", "norm2_bias", "fc2_bias")
        shapes += [*cut, *((f"{name}_{i}", (h,), None) for name in copied)]
    shapes += [("norm_weight", (h,), None), ("norm_bias", (h,), None)]
    return [Other(*shape, seed=_SEEDS + i) for i, shape in enumerate(shapes)]


class Both:
    """An optimizer that steps Muon, then AdamW."""

    def __init__(self, muon: Steps, adamw: Steps) -> None:
        self.muon, self.adamw = muon, adamw

    def step(self) -> None:
        """Step both."""
        self.muon.step()
        self.adamw.step()


def candidates(
    matrices: Sequence[Matrix], others: Sequence[Other], precision: str, group: ProcessGroup, only: Sequence[str] = ()
) -> list[Candidate]:
    """Megatron-Core's exact modes with torch's foreach AdamW, and the optimizer that :func:`get_optimizer` makes of ``owner``.

    Args:
        matrices: Parameters that Muon updates.
        others: Parameters that AdamW updates.
        precision: Precision of Newton-Schulz.
        group: Ranks over which both are sharded.
        only: Parts of names; only candidates with one of them in their name are built. Empty for all.
    """
    makers = cases.tensor_parallel(precision, group)
    gradients = [cases.shard(m.gradient(), m.cut, group) for m in matrices]
    other_gradients = [cases.shard(o.gradient(), o.cut, group) for o in others]
    made = []
    for name in (*cases.MEGATRON_EXACT, cases.OWNER):
        if only and not any(part in name for part in only):
            continue
        params = cases.parameters(matrices, gradients, group)
        vectors = [
            cases.sharded(cases.shard(o.weight(), o.cut, group), gradient, o.cut)
            for o, gradient in zip(others, other_gradients, strict=True)
        ]
        ours = name.startswith(cases.OURS)
        optimizer = (
            _ours(params, vectors, others, precision, group) if ours else Both(makers[name](params), _adamw(vectors))
        )
        made.append(Candidate(f"{name}, {'adamw' if ours else 'foreach AdamW'}", optimizer, params, vectors))
    return made


def _ours(
    params: Parameters, vectors: Parameters, others: Sequence[Other], precision: str, group: ProcessGroup
) -> torch.optim.Optimizer:
    model = torch.nn.Module()
    for i, p in enumerate(params):
        model.register_parameter(f"matrix_{i}", p)
    for other, p in zip(others, vectors, strict=True):
        model.register_parameter(other.name, p)
    config = OptimizerConfig(
        optimizer="muon",
        lr=cases.LR,
        weight_decay=cases.DECAY,
        adam_beta1=BETAS[0],
        adam_beta2=BETAS[1],
        adam_eps=EPS,
        muon_momentum=cases.MOMENTUM,
        muon_nesterov=True,
        muon_scale_mode=cases.TP_SCALE,
        muon_fp32_matmul_prec=precision,
        muon_coefficient_type=cases.TP_SET,
        muon_num_ns_steps=cases.STEPS,
        muon_tp_mode="owner",
    )
    return get_optimizer(config, [model], ProcessGroupCollection(tp=group))


def _adamw(vectors: Parameters) -> torch.optim.Optimizer:
    tables, rest = ([p for p in vectors if (p.ndim > 1) == whether] for whether in (True, False))
    groups = [{"params": tables, "weight_decay": cases.DECAY}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, cases.LR, BETAS, EPS, foreach=True)
