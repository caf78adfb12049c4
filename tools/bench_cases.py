"""What the benchmark steps: the matrices of a GPT, and every optimizer that is compared, on the same weights and gradients."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from emerging_optimizers.orthogonalized_optimizers import Muon, get_muon_scale_factor
from torch import Tensor
from torch.distributed import ProcessGroup

from core.linalg.newton_schulz import coefficients
from core.optimizer.muon import TensorParallelMuon
from core.process_groups_config import ProcessGroupCollection

from .usage import UsageError

LR, DECAY, MOMENTUM, STEPS = 1.0, 0.01, 0.95, 5
# Torch's Muon knows one set of coefficients for all iterations, and one scale that the others have too.
TP_SET, TP_SCALE = "quintic", "spectral"
SINGLE_SET, SINGLE_SCALE = "simple", "shape_scaling"
EXACT_MODES = ("duplicated", "distributed", "owner")


@dataclass(frozen=True)
class Matrix:
    """A weight of (rows, cols), cut along dim ``cut``; ``seed`` tells it from the others."""

    rows: int
    cols: int
    cut: int
    seed: int

    def weight(self) -> Tensor:
        """(rows, cols) float32, the same on every rank."""
        return self._normal(0, self.rows, self.cols) * 0.02

    def gradient(self) -> Tensor:
        """(rows, cols) float32: gaussian in even layers; in odd ones of rank 8 with a tenth as much noise."""
        noise = self._normal(1, self.rows, self.cols)
        if self.seed // 4 % 2 == 0:
            return noise
        return 0.1 * noise + self._normal(2, self.rows, 8) @ self._normal(3, 8, self.cols)

    def _normal(self, stream: int, *shape: int) -> Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(4 * self.seed + stream))


def gpt_matrices(hidden: int, layers: int) -> list[Matrix]:
    """qkv, projection, fc1 and fc2 of each layer, cut as Megatron cuts them."""
    h = hidden
    layer = [(3 * h, h, 0), (h, h, 1), (4 * h, h, 0), (h, 4 * h, 1)]
    return [Matrix(*matrix, seed=i) for i, matrix in enumerate(layer * layers)]


@dataclass
class Candidate:
    """An optimizer and its parameters, one for each matrix.

    Attributes:
        name: Whose, and the mode.
        exact: Whether its step is meant to be that of the whole matrix.
        ours: Whether it is this project's.
    """

    name: str
    optimizer: torch.optim.Optimizer
    params: list[torch.nn.Parameter]
    exact: bool = True
    ours: bool = False


def tensor_parallel(
    matrices: Sequence[Matrix], precision: str, group: ProcessGroup, only: Sequence[str] = ()
) -> list[Candidate]:
    """Megatron-Core's and our TensorParallelMuon in each mode, on this rank's shards.

    Args:
        only: Parts of names; candidates with none of them in their name are left out.

    Raises:
        UsageError: when Megatron-Core is not installed.
    """
    theirs, their_groups = _megatron(group)
    ours = ProcessGroupCollection(tp=group)
    makers: list[tuple[str, Any, Any, Any]] = [
        *((f"Megatron-Core {mode}", theirs, their_groups, mode) for mode in ("duplicated", "distributed", "blockwise")),
        *((f"shardstep {mode}", TensorParallelMuon, ours, mode) for mode in (*EXACT_MODES, "blockwise")),
    ]
    gradients = [shard(m.gradient(), m, group) for m in matrices]
    made = []
    for name, cls, groups, mode in makers:
        if only and not any(part in name for part in only):
            continue
        params = _parameters(matrices, gradients, lambda whole, m: shard(whole, m, group))
        optimizer = cls(
            params,
            lr=LR,
            momentum=MOMENTUM,
            weight_decay=DECAY,
            nesterov=True,
            fp32_matmul_prec=precision,
            coefficient_type=TP_SET,
            num_ns_steps=STEPS,
            scale_mode=TP_SCALE,
            pg_collection=groups,
            tp_mode=mode,
        )
        made.append(Candidate(name, optimizer, params, exact=mode != "blockwise", ours=cls is TensorParallelMuon))
    return made


def single_process(matrices: Sequence[Matrix], precision: str, only: Sequence[str] = ()) -> list[Candidate]:
    """torch's, emerging-optimizers' and our Muon on whole matrices. torch's computes in bfloat16 only."""
    gradients = [m.gradient() for m in matrices]
    common = {"lr": LR, "momentum": MOMENTUM, "weight_decay": DECAY, "nesterov": True}
    peer = {"fp32_matmul_prec": precision, "coefficient_type": SINGLE_SET, "scale_mode": SINGLE_SCALE}
    ((a, b, c),) = set(coefficients(SINGLE_SET, STEPS))
    makers: dict[str, Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]] = {
        "torch.optim.Muon": lambda params: torch.optim.Muon(
            params,
            LR,
            DECAY,
            momentum=MOMENTUM,
            ns_coefficients=(a, b, c),
            ns_steps=STEPS,
        ),
        "emerging-optimizers": lambda params: Muon(params, **common, num_ns_steps=STEPS, **peer),
        "shardstep": lambda params: TensorParallelMuon(params, **common, num_ns_steps=STEPS, **peer),  # type: ignore[arg-type]
    }
    if precision != "medium":
        del makers["torch.optim.Muon"]
    made = []
    for name, make in makers.items():
        if not only or any(part in name for part in only):
            params = _parameters(matrices, gradients, lambda whole, m: whole)
            made.append(Candidate(name, make(params), params, ours=name == "shardstep"))
    return made


def shard(whole: Tensor, matrix: Matrix, group: ProcessGroup | None) -> Tensor:
    """This rank's piece of ``whole``; all of it without a group."""
    if group is None:
        return whole
    return whole.chunk(dist.get_world_size(group), matrix.cut)[dist.get_rank(group)].contiguous()


def first_update(matrix: Matrix, coefficient_type: str, scale_mode: str) -> Tensor:
    """(rows, cols) float64: what an unsharded Muon subtracts, times lr, in its first step, decay aside.

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


def _parameters(
    matrices: Sequence[Matrix], gradients: Sequence[Tensor], cut: Callable[[Tensor, Matrix], Tensor]
) -> list[torch.nn.Parameter]:
    def parameters() -> Iterator[torch.nn.Parameter]:
        for matrix, gradient in zip(matrices, gradients, strict=True):
            p = torch.nn.Parameter(cut(matrix.weight(), matrix))
            p.grad = gradient
            p.tensor_model_parallel, p.partition_dim, p.partition_stride = True, matrix.cut, 1  # type: ignore[attr-defined]
            yield p

    return list(parameters())


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
