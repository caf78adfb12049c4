"""The gradient norm of the whole model, and clipping by it or by value."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from .. import engine
from ..engine import Work
from ..process_groups_config import Axis, Domain, ProcessGroupCollection, world_size
from ..sharding.layout import Layout
from ..sharding.parameter_layout import is_expert, local, local_gradient
from .steps.argument_checks import non_negative
from .steps.base import ShardedStep, check_gradients
from .steps.weight_decay import METHOD, decay_first_

Entry = tuple[str, Tensor, Layout]
"""Name, parameter, and where it lives."""

PIECE = 2**16
"""Entries that are widened to float64 at a time on CPU."""


class NonFiniteGradientError(ArithmeticError):
    """A gradient has an entry that is not a number or infinite. Nothing was changed."""


@torch.no_grad()
def clip_grad_norm_(
    entries: Sequence[Entry], max_norm: float, groups: ProcessGroupCollection, total: Tensor | None = None
) -> float:
    """Scale all gradients in place so that their global norm is at most ``max_norm``.

    Shards are summed over the ranks that hold them, experts also over those that hold other experts. Copies count once: on
    replicas, and of tied weights, which Megatron's attributes tell (``shared`` on a copy, or ``shared_embedding`` on all of
    them, of which the first pipeline stage's counts). One reduction for all parameters.

    Args:
        entries: Every parameter of this rank; those without a gradient do not count, and one that comes twice counts once.
        max_norm: Largest norm; 0 only measures.
        groups: Process groups of the model.
        total: The norm, where it is known.

    Returns:
        The norm before clipping, the same on every rank.

    Raises:
        NonFiniteGradientError: on every rank, when the norm is not finite; names the first parameter and its rank.
    """
    norm, factor = norm_and_factor(entries, max_norm, groups, total)
    if factor < 1:
        torch._foreach_mul_([local_gradient(p) for _, p, _ in _distinct(entries)], factor)
    return norm


@torch.no_grad()
def norm_and_factor(
    entries: Sequence[Entry], max_norm: float, groups: ProcessGroupCollection, total: Tensor | None = None
) -> tuple[float, float]:
    """The norm, and what :func:`clip_grad_norm_` multiplies gradients by; arguments and errors as there, nothing is changed."""
    total = global_norm(entries, groups) if total is None else total
    norm = float(total)
    with_gradient = [(name, local_gradient(p)) for name, p, _ in _distinct(entries)]
    if norm != norm or norm == float("inf"):
        bad = [name for name, g in with_gradient if not torch.isfinite(g).all()]
        raise NonFiniteGradientError(_report(norm_domain(entries, groups).gather(bad)))
    return norm, float(clip_factor(total, max_norm)) if max_norm > 0 and with_gradient else 1.0


@torch.no_grad()
def clip_grad_value_(entries: Sequence[Entry], max_value: float) -> None:
    """Clamp every entry of the gradients in place to ``[-max_value, max_value]``, without communication; NaN stays NaN.

    Raises:
        ValueError: for a negative ``max_value``, before anything is changed.
    """
    non_negative("max_value", max_value)
    if gradients := [local_gradient(p) for _, p, _ in _distinct(entries)]:
        torch._foreach_clamp_min_(gradients, -max_value)
        torch._foreach_clamp_max_(gradients, max_value)


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
    with_gradient = [(p, local_gradient(p), lay) for _, p, lay in _distinct(entries)]
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


class GlobalClip(ShardedStep):
    """Mixin for a rule that scales by a norm over all parameters of its optimizer.

    Attributes:
        max_norm: Largest norm; None: the rule is not to scale.
        scale: Factor for the step that is being taken, a float64 scalar; None when there is no ``max_norm``.
    """

    max_norm: float | None
    scale: Tensor | None

    def scaled(self, p: Tensor, g: Tensor, group: Mapping[str, Any]) -> Iterable[Tensor]:
        """Pieces of what the rule is to scale, made of the parameter ``p`` and this rank's shard ``g`` of its gradient."""
        return (g,)

    def _scaled(self, p: Tensor, g: Tensor, group: Mapping[str, Any]) -> Iterable[Tensor]:
        if group.get(METHOD) == "l2":  # decay is part of the gradient that the rule is given
            wide = torch.promote_types(g.dtype, torch.float32)
            (g,), group = decay_first_([local(p).to(wide)], [g.to(wide)], group)
        return self.scaled(p, g, group)

    @torch.no_grad()
    def updates(self) -> Iterator[Work]:
        """As in the base class, after the reduction that the norm takes."""
        self.scale = None
        if self.max_norm is not None:
            check_gradients(self.param_groups)
            self.take_state()
            group_of = {p: group for group in self.param_groups for p in group["params"]}
            buckets = [bucket for group in self.param_groups for bucket in self._buckets(group)]
            entries = [(bucket.label, p, bucket.layout) for bucket in buckets for p in bucket.params]
            norm = global_norm(entries, self._groups, lambda p, g: self._scaled(p, g, group_of[p]))
            self.scale = clip_factor(norm, self.max_norm)
        return super().updates()


def _sum_of_squares(x: Tensor) -> Tensor:
    # In float64: the square of a large float32 overflows, and a long sum loses the small ones.
    norm = torch.linalg.vector_norm
    if x.device.type == "cpu":
        # A reduction that casts takes six times as long as casting what fits the cache.
        x = torch.stack([norm(piece.double()) for piece in x.reshape(-1).split(PIECE)])
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


def _distinct(entries: Iterable[Entry]) -> list[Entry]:
    """Those with a gradient, each parameter once."""
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


def _report(names_by_rank: Sequence[Sequence[str]]) -> str:
    found = [(rank, name) for rank, names in enumerate(names_by_rank) for name in names]
    if not found:
        return "the global gradient norm overflows float64 although every gradient is finite; lower the loss scale."
    rank, name = found[0]
    others = f" and {len(found) - 1} more" if len(found) > 1 else ""
    return (
        f"gradient of {name} on model-parallel rank {rank}{others} is not finite; nothing was changed. "
        f"Lower the learning rate, look at the data of this step, or skip it."
    )
