"""The norm of the whole model's gradients, or of tensors derived from them, by one reduction that counts copies once."""

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
"""Name, parameter and layout."""


@torch.no_grad()
def global_norm(
    entries: Sequence[Entry],
    groups: ProcessGroupCollection,
    value: Callable[[Tensor, Tensor], Iterable[Tensor]] | None = None,
) -> Tensor:
    """Euclidean norm, over the whole model, of the gradients or of tensors derived from them.

    Every rank of ``groups`` must call this function. All parameters share one reduction; the host does not wait for it.

    Args:
        entries: Every parameter of this rank; those without a gradient do not count.
        groups: Process groups of the model.
        value: ``value(p, g)`` for a parameter and this rank's shard of its gradient returns the tensors to count instead
            of ``g``.

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
    """Start the reduction of :func:`global_norm`; the returned function waits for it and returns the norm."""
    axes, domain = _axes(entries, groups), norm_domain(entries, groups)
    with_gradient = [(p, local_gradient(p), lay) for _, p, lay in distinct(entries)]
    counted = [(p, g) for p, g, lay in with_gradient if _counts(p, lay, axes, groups)]
    squares = [_sum_of_squares(piece) for p, g in counted for piece in (value(p, g) if value else (g,))]
    local_sum = torch.stack(squares).sum() if squares else torch.zeros((), dtype=torch.float64, device=_device(entries))
    arrive = engine.reduced("global norm", local_sum, "sum", domain.group)
    return lambda: arrive().sqrt()


def norm_domain(entries: Sequence[Entry], groups: ProcessGroupCollection) -> Domain:
    """The ranks that :func:`global_norm` sums over. The first call creates their process group, so all of them must make it.

    Raises:
        NotImplementedError: when parameters are cut over mesh axes that overlap without being of one mesh.
    """
    axes = _axes(entries, groups)
    domain = groups.domain(axes)
    if domain.size != prod(axis.size for axis in axes):
        sizes = ", ".join(f"{axis.name} {axis.size}" for axis in axes if axis.size > 1)
        raise NotImplementedError(
            f"the parameters are cut over mesh axes that overlap ({sizes}, {domain.size} ranks in all), and for these the "
            f"global norm cannot tell which ranks hold copies; cut all parameters over axes of one mesh, or do not clip."
        )
    return domain


def clip_factor(norm: Tensor, max_norm: float) -> Tensor:
    """``min(1, max_norm / (norm + 1e-6))``, a float64 scalar: the factor that clips to ``max_norm``, as in Megatron-Core."""
    return (max_norm / (norm + 1e-6)).clamp(max=1)


def _sum_of_squares(x: Tensor) -> Tensor:
    # In float64, because the square of a large float32 overflows, and a long float32 sum loses its small terms.
    norm = torch.linalg.vector_norm
    if x.device.type == "cpu":
        # A reduction with dtype=float64 takes six times as long as casting pieces that fit the cache.
        x = torch.stack([norm(piece.double()) for piece in x.reshape(-1).split(BLOCK_BYTES["cpu"] // 8)])
    total: Tensor = norm(x, dtype=torch.float64)
    return total.square()


def _axes(entries: Iterable[Entry], groups: ProcessGroupCollection) -> tuple[Axis, ...]:
    # dp is left out unless it cuts parameters, because its ranks hold equal gradients.
    apart = _experts_apart(groups)
    axes = [groups.axis(name) for name in (("pp", "tp", "dp") if apart else ("pp", "tp"))]
    for name, p, lay in entries:
        if is_expert(p) and world_size() > 1:
            _check_experts(name, apart, groups)
        if not (is_expert(p) and apart):  # the axes of experts divide the ranks of tp and dp in another way
            axes += (one for axis in lay.axes for one in axis.of_mesh)
    # Axes are told apart by ranks: a DTensor's mesh may name an axis otherwise, and two meshes may use one name.
    return tuple({axis.ranks: axis for axis in sorted(axes, key=lambda axis: axis.name)}.values())


def _experts_apart(groups: ProcessGroupCollection) -> bool:
    """Whether ranks of one tensor- and data-parallel domain hold different experts; the answer is equal on all ranks."""
    if groups.expt_tp is None and groups.expt_dp is None:
        return False
    axes = {name: groups.axis(name) for name in ("tp", "dp", "expt_tp", "expt_dp")}
    ranks = {name: axis.ranks if axis.size > 1 else () for name, axis in axes.items()}
    return any(ranks[f"expt_{name}"] != ranks[name] for name in ("tp", "dp"))


def _check_experts(name: str, apart: bool, groups: ProcessGroupCollection) -> None:
    has_groups = groups.expt_tp is not None or groups.expt_dp is not None
    everyone = groups.axis("pp").size * groups.axis("tp").size * groups.axis("dp").size
    if not has_groups or (apart and groups.dp is None and everyone < world_size()):
        raise ValueError(
            f"{name} is an expert's, but the process groups do not say which ranks hold other experts and which hold "
            f"copies, so the norm over the whole model is unknown; pass pg_collection=ProcessGroupCollection(dp=…, "
            f"expt_tp=…, expt_dp=…), with a group of a single rank where there are no copies."
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
