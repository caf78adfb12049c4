"""The norm of the gradients of the whole model, or of something made of them: one reduction, copies counted once."""

from collections.abc import Callable, Iterable, Sequence
from math import prod

import torch
from torch import Tensor

from ... import engine
from ...cache_blocks import BLOCK_BYTES
from ...process_groups_config import Axis, Domain, ProcessGroupCollection, world_size
from ...sharding.layout import Layout
from ...sharding.parameter_layout import is_expert, local_gradient

Entry = tuple[str, Tensor, Layout]
"""Name, parameter, and where it lives."""


@torch.no_grad()
def global_norm(
    entries: Sequence[Entry],
    groups: ProcessGroupCollection,
    value: Callable[[Tensor, Tensor], Iterable[Tensor]] | None = None,
) -> Tensor:
    """Euclidean norm, over the whole model, of the gradients or of something made of them.

    Every rank of ``groups`` must call it. One reduction for all parameters; the host does not wait for it.

    Args:
        entries: Every parameter of this rank; those without a gradient do not count.
        groups: Process groups of the model.
        value: Makes of a parameter and this rank's shard of its gradient the pieces of what counts instead of that.

    Returns:
        A float64 scalar, the same on every rank.
    """
    return begin_norm(entries, groups, value)()


@torch.no_grad()
def begin_norm(
    entries: Sequence[Entry],
    groups: ProcessGroupCollection,
    value: Callable[[Tensor, Tensor], Iterable[Tensor]] | None = None,
) -> Callable[[], Tensor]:
    """As :func:`global_norm`, but the reduction is only sent off; what is returned waits for it and returns the norm."""
    axes, domain = _axes(entries, groups), norm_domain(entries, groups)
    with_gradient = [(p, local_gradient(p), lay) for _, p, lay in distinct(entries)]
    counted = [(p, g) for p, g, lay in with_gradient if _counts(p, lay, axes, groups)]
    squares = [_sum_of_squares(piece) for p, g in counted for piece in (value(p, g) if value else (g,))]
    mine = torch.stack(squares).sum() if squares else torch.zeros((), dtype=torch.float64, device=_device(entries))
    arrive = engine.reduced("global norm", mine, "sum", domain.group)
    return lambda: arrive().sqrt()


def norm_domain(entries: Sequence[Entry], groups: ProcessGroupCollection) -> Domain:
    """The ranks that :func:`global_norm` sums over. Asked for the first time, all of them make a process group together."""
    axes = _axes(entries, groups)
    domain = groups.domain(axes)
    if domain.size != prod(axis.size for axis in axes):
        sizes = ", ".join(f"{axis.name} {axis.size}" for axis in axes if axis.size > 1)
        raise NotImplementedError(
            f"the parameters are cut over mesh axes that overlap ({sizes}, {domain.size} ranks in all), for which the global "
            f"norm does not yet know who holds copies; cut all of them over axes of one mesh, or do not clip."
        )
    return domain


def clip_factor(norm: Tensor, max_norm: float) -> Tensor:
    """What to multiply by so that a ``norm`` becomes at most ``max_norm``; a float64 scalar. Rounded as Megatron-Core does."""
    return (max_norm / (norm + 1e-6)).clamp(max=1)


def _sum_of_squares(x: Tensor) -> Tensor:
    # In float64: the square of a large float32 overflows, and a long sum loses the small ones.
    norm = torch.linalg.vector_norm
    if x.device.type == "cpu":
        # A reduction that casts takes six times as long as casting what fits the cache.
        x = torch.stack([norm(piece.double()) for piece in x.reshape(-1).split(BLOCK_BYTES["cpu"] // 8)])
    total: Tensor = norm(x, dtype=torch.float64)
    return total.square()


def _axes(entries: Iterable[Entry], groups: ProcessGroupCollection) -> tuple[Axis, ...]:
    # Not dp, unless it cuts parameters: its ranks hold equal gradients.
    apart = _experts_apart(groups)
    axes = [groups.axis(name) for name in (("pp", "tp", "dp") if apart else ("pp", "tp"))]
    for name, p, lay in entries:
        if is_expert(p) and world_size() > 1:
            _check_experts(name, apart, groups)
        if not (is_expert(p) and apart):  # those lie within tp and dp, cut in another way
            axes += (one for axis in lay.axes for one in axis.of_mesh)
    # One axis may go by two names, a DTensor's own mesh's and ours; two meshes may have axes of one name.
    return tuple({axis.ranks: axis for axis in sorted(axes, key=lambda axis: axis.name)}.values())


def _experts_apart(groups: ProcessGroupCollection) -> bool:
    """Whether ranks of one tensor-parallel, data-parallel domain hold different experts: the same answer on all ranks."""
    if groups.expt_tp is None and groups.expt_dp is None:
        return False
    found = {name: groups.axis(name) for name in ("tp", "dp", "expt_tp", "expt_dp")}
    ranks = {name: axis.ranks if axis.size > 1 else () for name, axis in found.items()}
    return any(ranks[f"expt_{name}"] != ranks[name] for name in ("tp", "dp"))


def _check_experts(name: str, apart: bool, groups: ProcessGroupCollection) -> None:
    told = groups.expt_tp is not None or groups.expt_dp is not None
    everyone = groups.axis("pp").size * groups.axis("tp").size * groups.axis("dp").size
    if not told or (apart and groups.dp is None and everyone < world_size()):
        raise ValueError(
            f"{name} is an expert's, but which ranks hold others and which copies is not told, so that there is no norm over "
            f"the whole model; pass pg_collection=ProcessGroupCollection(dp=…, expt_tp=…, expt_dp=…), of a single rank where "
            f"there are no copies."
        )


def distinct(entries: Iterable[Entry]) -> list[Entry]:
    """The entries with a gradient, each parameter once."""
    return list({id(entry[1]): entry for entry in entries if entry[1].grad is not None}.values())


def _counts(p: Tensor, lay: Layout, axes: Sequence[Axis], groups: ProcessGroupCollection) -> bool:
    if getattr(p, "shared", False) or (getattr(p, "shared_embedding", False) and groups.axis("pp").index > 0):
        return False
    cut = {one.ranks for axis in lay.axes for one in axis.of_mesh}
    if is_expert(p) and _experts_apart(groups):
        axes = (groups.axis("expt_tp"), groups.axis("expt_dp"))
    return all(axis.index == 0 for axis in axes if axis.ranks not in cut and axis.name != "pp")


def _device(entries: Sequence[Entry]) -> torch.device:
    return entries[0][1].device if entries else torch.device("cpu")
