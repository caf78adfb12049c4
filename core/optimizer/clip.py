"""The gradient norm of the whole model, and clipping by it."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import engine
from ..layout import Layout, Reduce, Rule
from ..placements import local_gradient
from ..process_groups_config import Axis, ProcessGroupCollection

Entry = tuple[str, Tensor, Layout]
"""Name, parameter, and where it lives."""


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
    axes = _axes(entries, groups)
    domain = groups.domain(axes)
    with_gradient = [(name, p, local_gradient(p), lay) for name, p, lay in entries if p.grad is not None]
    counted = [g for name, p, g, lay in with_gradient if _counts(p, lay, axes)]
    # In float64: the square of a large float32 overflows, and a long sum loses the small ones.
    squares = [torch.linalg.vector_norm(g, dtype=torch.float64).square() for g in counted]
    mine = torch.stack(squares).sum() if squares else torch.zeros((), dtype=torch.float64, device=_device(entries))
    total = engine.run([("gradient norm", _sum(mine, domain.group))])[0]
    norm = float(total.sqrt())
    if norm != norm or norm == float("inf"):
        bad = [name for name, _, g, _ in with_gradient if not torch.isfinite(g).all()]
        raise NonFiniteGradientError(_report(groups.gather(domain, bad)))
    factor = max_norm / (norm + 1e-6)
    if max_norm > 0 and factor < 1 and with_gradient:
        torch._foreach_mul_([g for _, _, g, _ in with_gradient], factor)
    return norm


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
