"""Clipping of gradients, by the norm of all gradients of the model or by value."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..process_groups_config import ProcessGroupCollection
from ..sharding.parameter_layout import local_gradient
from .steps.argument_checks import non_negative
from .steps.global_norm import Entry, clip_factor, distinct, global_norm, norm_domain


class NonFiniteGradientError(ArithmeticError):
    """A gradient has an entry that is NaN or infinite; no gradient was changed."""


@torch.no_grad()
def clip_grad_norm_(
    entries: Sequence[Entry], max_norm: float, groups: ProcessGroupCollection, total: Tensor | None = None
) -> float:
    """Scale all gradients in place so that their global norm is at most ``max_norm``.

    The norm sums over the ranks that hold shards, and for experts also over the ranks that hold other experts. Copies count
    once, on replicas and for tied weights, which Megatron's attributes mark (``shared`` on a copy, or ``shared_embedding`` on
    all of them, of which the first pipeline stage's counts). All parameters share one reduction.

    Args:
        entries: Every parameter of this rank; those without a gradient do not count, and one that comes twice counts once.
        max_norm: Largest norm; with 0 the norm is measured and nothing is scaled.
        groups: Process groups of the model.
        total: Global norm, if it is known already.

    Returns:
        The norm before clipping, the same on every rank.

    Raises:
        NonFiniteGradientError: on every rank, when the norm is not finite; names the first parameter and its rank.
    """
    norm, factor = norm_and_factor(entries, max_norm, groups, total)
    if factor < 1:
        torch._foreach_mul_([local_gradient(p) for _, p, _ in distinct(entries)], factor)
    return norm


@torch.no_grad()
def norm_and_factor(
    entries: Sequence[Entry], max_norm: float, groups: ProcessGroupCollection, total: Tensor | None = None
) -> tuple[float, float]:
    """The norm and the factor of :func:`clip_grad_norm_`, with the same arguments and errors; changes nothing."""
    total = global_norm(entries, groups) if total is None else total
    norm = float(total)
    with_gradient = [(name, local_gradient(p)) for name, p, _ in distinct(entries)]
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
    if gradients := [local_gradient(p) for _, p, _ in distinct(entries)]:
        torch._foreach_clamp_min_(gradients, -max_value)
        torch._foreach_clamp_max_(gradients, max_value)


def _report(names_by_rank: Sequence[Sequence[str]]) -> str:
    bad = [(rank, name) for rank, names in enumerate(names_by_rank) for name in names]
    if not bad:
        return "the global gradient norm overflows float64 although every gradient is finite; lower the loss scale."
    rank, name = bad[0]
    others = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
    return (
        f"gradient of {name} on model-parallel rank {rank}{others} is not finite; nothing was changed. "
        f"Lower the learning rate, look at the data of this step, or skip it."
    )
