"""The benchmark's cases: the matrices of a GPT, and all optimizers that are compared, on the same weights and gradients."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
import torch.distributed as dist
from emerging_optimizers.orthogonalized_optimizers import Muon, get_muon_scale_factor
from torch import Tensor
from torch.distributed import ProcessGroup

from core.linalg.coefficients import coefficients
from core.optimizer.rules.tensor_parallel_muon import TensorParallelMuon
from core.process_groups_config import ProcessGroupCollection
from core.sharding.tp_modes import TP_MODES

from ..usage import UsageError

LR, DECAY, MOMENTUM, STEPS = 1.0, 0.01, 0.95, 5
# Torch's Muon knows one set of coefficients for all iterations, and one scale that the others have too.
TP_SET, TP_SCALE = "quintic", "spectral"
SINGLE_SET, SINGLE_SCALE = "simple", "shape_scaling"
OURS, MEGATRON = "shardstep", "Megatron-Core"
OWNER = f"{OURS} owner"
MEGATRON_EXACT = (f"{MEGATRON} duplicated", f"{MEGATRON} distributed")
Parameters = list[torch.nn.Parameter]
Make = Callable[[Parameters], torch.optim.Optimizer]


class Steps(Protocol):
    """An optimizer that is timed, or several that a training job steps one after the other."""

    def step(self) -> Any:
        """Take one step with the gradients of the parameters."""


@dataclass(frozen=True)
class Matrix:
    """A weight of (rows, cols), cut along dim ``cut``; ``seed`` tells it from the others."""

    rows: int
    cols: int
    cut: int
    seed: int

    def weight(self) -> Tensor:
        """(rows, cols) float32, the same on every rank."""
        return normal(self.seed, 0, self.rows, self.cols) * 0.02

    def gradient(self) -> Tensor:
        """(rows, cols) float32: gaussian in even layers; in odd ones of rank 8 with a tenth as much noise."""
        noise = normal(self.seed, 1, self.rows, self.cols)
        if self.seed // 4 % 2 == 0:
            return noise
        return 0.1 * noise + normal(self.seed, 2, self.rows, 8) @ normal(self.seed, 3, 8, self.cols)


def normal(seed: int, stream: int, *shape: int) -> Tensor:
    """``shape`` float32, the same on every rank; another one for each seed and each ``stream`` in 0…3."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(4 * seed + stream))


def gpt_matrices(hidden: int, layers: int) -> list[Matrix]:
    """qkv, projection, fc1 and fc2 of each layer, cut as Megatron cuts them."""
    h = hidden
    layer = [(3 * h, h, 0), (h, h, 1), (4 * h, h, 0), (h, 4 * h, 1)]
    return [Matrix(*matrix, seed=i) for i, matrix in enumerate(layer * layers)]


@dataclass
class Candidate:
    """An optimizer and its parameters, one for each matrix.

    Attributes:
        name: Name of the project, and the mode.
        optimizer: The optimizer.
        params: This rank's shards, one for each matrix.
        adamw_params: The parameters that AdamW updates, when the whole step of a model is taken.
    """

    name: str
    optimizer: Steps
    params: Parameters
    adamw_params: Parameters = field(default_factory=list)

    @property
    def exact(self) -> bool:
        """Whether the step is meant to be that of the whole matrix."""
        return not any(name in self.name for name, mode in TP_MODES.items() if not mode.exact)

    @property
    def ours(self) -> bool:
        """Whether the optimizer is this project's."""
        return self.name.startswith(OURS)


def tensor_parallel(precision: str, group: ProcessGroup) -> dict[str, Make]:
    """Name → a function that makes Megatron-Core's or our TensorParallelMuon of this rank's shards, in each mode.

    Raises:
        UsageError: when Megatron-Core is not installed.
    """
    megatron, their_groups = _megatron(group)
    settings: dict[str, Any] = {
        "lr": LR,
        "momentum": MOMENTUM,
        "weight_decay": DECAY,
        "nesterov": True,
        "fp32_matmul_prec": precision,
        "coefficient_type": TP_SET,
        "num_ns_steps": STEPS,
        "scale_mode": TP_SCALE,
    }
    peer = partial(megatron, **settings, pg_collection=their_groups)
    ours: Any = partial(TensorParallelMuon, **settings, pg_collection=ProcessGroupCollection(tp=group))
    return {
        **{f"{MEGATRON} {mode}": partial(peer, tp_mode=mode) for mode in ("duplicated", "distributed", "blockwise")},
        **{f"{OURS} {mode}": partial(ours, tp_mode=mode) for mode in TP_MODES},
    }


def single_process(precision: str) -> dict[str, Make]:
    """Name → a function that makes torch's, emerging-optimizers' or our Muon of whole matrices; torch's only for bfloat16."""
    common: Any = {"lr": LR, "momentum": MOMENTUM, "weight_decay": DECAY, "nesterov": True}
    peer: Any = {"fp32_matmul_prec": precision, "coefficient_type": SINGLE_SET, "scale_mode": SINGLE_SCALE}
    (abc,) = set(coefficients(SINGLE_SET, STEPS))
    makers: dict[str, Make] = {
        "torch.optim.Muon": partial(torch.optim.Muon, **common, ns_coefficients=abc, ns_steps=STEPS),
        "emerging-optimizers": partial(Muon, **common, num_ns_steps=STEPS, **peer),
        OURS: partial(TensorParallelMuon, **common, num_ns_steps=STEPS, **peer),
    }
    if precision != "medium":
        del makers["torch.optim.Muon"]
    return makers


def candidates(
    makers: Mapping[str, Make], matrices: Sequence[Matrix], group: ProcessGroup | None, only: Sequence[str] = ()
) -> list[Candidate]:
    """A candidate of each maker, with parameters of its own and gradients that all candidates share.

    Args:
        makers: Name → a function that makes an optimizer of parameters.
        matrices: The matrices that the parameters are shards of.
        group: The ranks that share the matrices; None for one process.
        only: Parts of names; makers whose name contains none of them are left out. Empty: all are taken.
    """
    gradients = [shard(m.gradient(), m.cut, group) for m in matrices]
    made = []
    for name, make in makers.items():
        if not only or any(part in name for part in only):
            params = parameters(matrices, gradients, group)
            made.append(Candidate(name, make(params), params))
    return made


def parameters(
    matrices: Sequence[Matrix], gradients: Sequence[Tensor], group: ProcessGroup | None, device: str = "cpu"
) -> Parameters:
    """This rank's shards of fresh weights on ``device``, with these gradients and Megatron's attributes."""
    return [
        sharded(shard(m.weight(), m.cut, group).to(device), gradient, m.cut)
        for m, gradient in zip(matrices, gradients, strict=True)
    ]


def sharded(weight: Tensor, gradient: Tensor, cut: int | None) -> torch.nn.Parameter:
    """A parameter with this gradient and Megatron's attributes for a cut along dim ``cut``; without attributes for None."""
    p = torch.nn.Parameter(weight)
    p.grad = gradient
    if cut is not None:
        p.tensor_model_parallel, p.partition_dim, p.partition_stride = True, cut, 1  # type: ignore[attr-defined]
    return p


def shard(whole: Tensor, cut: int | None, group: ProcessGroup | None) -> Tensor:
    """This rank's piece of ``whole`` along dim ``cut``; all of it for None, or without a group."""
    if group is None or cut is None:
        return whole
    return whole.chunk(dist.get_world_size(group), cut)[dist.get_rank(group)].contiguous()


def first_update(matrix: Matrix, coefficient_type: str, scale_mode: str) -> Tensor:
    """(rows, cols) float64: what an unsharded Muon without decay subtracts, over lr, in its first step.

    The momentum is then a multiple of the gradient, and the factor does not matter.
    """
    x: Tensor = matrix.gradient().double()
    tall = matrix.rows > matrix.cols
    x = (x.mT if tall else x) / x.norm()
    for a, b, c in coefficients(coefficient_type, STEPS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    x *= float(get_muon_scale_factor(matrix.rows, matrix.cols, mode=scale_mode))
    return x.mT if tall else x


def _megatron(group: ProcessGroup) -> tuple[Any, Any]:
    try:
        with warnings.catch_warnings():
            # It warns that its fused kernels are missing; this benchmark uses none of them.
            warnings.simplefilter("ignore")
            from megatron.core.optimizer.emerging_optimizers import TensorParallelMuon as MegatronMuon
            from megatron.core.process_groups_config import ProcessGroupCollection as MegatronGroups
    except ImportError as error:
        raise UsageError(
            "megatron-core",
            None,
            f"cannot be imported ({error})",
            hint="install the extra: bash scripts/bootstrap.sh megatron",
        ) from None
    groups = MegatronGroups(tp=group, expt_tp=group)
    # Its dataclass has no defaults, and the optimizer reads these two.
    groups.gtp_remat = groups.expt_gtp_remat = None
    return MegatronMuon, groups
