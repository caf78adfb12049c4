"""The gradient norm of the whole model, and clipping by it."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import engine
from ..engine import Work
from ..layout import Layout, Reduce, Rule
from ..placements import local_gradient
from ..process_groups_config import Axis, ProcessGroupCollection
from .sharded_optimizer import ShardedStep, check_gradients, checks_ranks

Entry = tuple[str, Tensor, Layout]
"""Name, parameter, and where it lives."""

PIECE = 2**16
"""Entries that are widened to float64 at a time on CPU."""


class NonFiniteGradientError(ArithmeticError):
    """A gradient has an entry that is not a number or infinite. Nothing was changed."""


@torch.no_grad()
def clip_grad_norm_(entries: Sequence[Entry], max_norm: float, groups: ProcessGroupCollection) -> float:
    """Scale all gradients in place so that their global norm is at most ``max_norm``.

    Shards are summed over the ranks that hold them; copies, on replicas or of tied weights (attribute ``shared``), count
    once. One reduction for all parameters.

    Args:
        entries: Every parameter of this rank; those without a gradient do not count.
        max_norm: Largest norm; 0 only measures.
        groups: Process groups of the model.

    Returns:
        The norm before clipping, the same on every rank.

    Raises:
        NonFiniteGradientError: on every rank, when the norm is not finite; names the first parameter and its rank.
    """
    total = global_norm(entries, groups)
    norm = float(total)
    with_gradient = [(name, local_gradient(p)) for name, p, _ in entries if p.grad is not None]
    if norm != norm or norm == float("inf"):
        bad = [name for name, g in with_gradient if not torch.isfinite(g).all()]
        raise NonFiniteGradientError(_report(groups.gather(groups.domain(_axes(entries, groups)), bad)))
    factor = float(clip_factor(total, max_norm))
    if max_norm > 0 and factor < 1 and with_gradient:
        torch._foreach_mul_([g for _, g in with_gradient], factor)
    return norm


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
    axes = _axes(entries, groups)
    with_gradient = [(p, local_gradient(p), lay) for _, p, lay in entries if p.grad is not None]
    counted = [(p, g) for p, g, lay in with_gradient if _counts(p, lay, axes)]
    squares = [_sum_of_squares(piece) for p, g in counted for piece in (value(p, g) if value else (g,))]
    mine = torch.stack(squares).sum() if squares else torch.zeros((), dtype=torch.float64, device=_device(entries))
    norm = _sum(mine, groups.domain(axes).group)
    total: Tensor = engine.run([("global norm", norm)], check=checks_ranks())[0]
    return total.sqrt()


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
            norm = global_norm(entries, self._groups, lambda p, g: self.scaled(p, g, group_of[p]))
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


def _sum(x: Tensor, group: Any) -> Rule:
    return (yield Reduce(x, "sum", () if group is None else (group,)))


def _axes(entries: Iterable[Entry], groups: ProcessGroupCollection) -> tuple[Axis, ...]:
    # Not dp, unless it cuts parameters: its ranks hold equal gradients.
    axes = {name: groups.axis(name) for name in ("pp", "tp")}
    for name, _, lay in entries:
        for axis in lay.axes:
            if axis.name.startswith("expt"):
                raise NotImplementedError(f"{name}: the global norm does not yet cover expert-parallel parameters.")
            axes[axis.name] = axis
    # One axis may go by two names, a DTensor's own mesh's and ours.
    distinct = {axes[name].ranks: axes[name] for name in sorted(axes)}
    return tuple(distinct.values())


def _counts(p: Tensor, lay: Layout, axes: Sequence[Axis]) -> bool:
    if getattr(p, "shared", False):
        return False
    cut = {axis.ranks for axis in lay.axes}
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
