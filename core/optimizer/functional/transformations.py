"""Wrappers of a functional optimizer: clipping, and averaging over several micro-steps."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ...process_groups_config import ProcessGroupCollection
from ...sharding.parameter_layout import layout_of, local
from ..clip import norm_and_factor
from ..steps.argument_checks import whole_number
from ..steps.global_norm import Entry, norm_domain
from .as_functions import FunctionalOptimizer, Gradients, Tensors, as_parameter


class Transformation(Protocol):
    """An optimizer as two functions."""

    @property
    def init(self) -> Callable[[Tensors], Any]:
        """``init(params)``: the state before the first step."""

    @property
    def update(self) -> Callable[[Gradients, Any, Tensors], tuple[dict[str, Tensor], Any]]:
        """``update(grads, state, params)``: new parameters and state."""


class Clipped:
    """``inner`` with gradients clipped by their global norm; the state is that of ``inner``.

    Args:
        inner: The optimizer.
        max_norm: Largest norm.
        groups: Process groups of the model; all their ranks must call :meth:`update` together.
    """

    def __init__(self, inner: Transformation, max_norm: float, groups: ProcessGroupCollection) -> None:
        self.inner = inner
        self._max_norm, self._groups = max_norm, groups

    def init(self, params: Tensors) -> Any:
        """As :meth:`Transformation.init`; makes the process group that the norm is summed over."""
        norm_domain(_entries(params, {}, self._groups), self._groups)
        return self.inner.init(params)

    def update(self, grads: Gradients, state: Any, params: Tensors) -> tuple[dict[str, Tensor], Any]:
        """As :meth:`Transformation.update`."""
        return self.inner.update(clipped(params, grads, self._max_norm, self._groups), state, params)


class AccumulationState(NamedTuple):
    """State of :class:`Accumulated`.

    Attributes:
        micro: Number of micro-steps since the last step.
        sums: Parameter name → sum of its gradients since then, in float32 at least; no entry if there was no gradient.
        inner: State of the optimizer.
    """

    micro: int
    sums: dict[str, Tensor]
    inner: Any


class Accumulated:
    """``inner``, run once every ``steps`` calls with the mean of their gradients, in which None counts as zeros.

    The other calls return the parameters unchanged. A parameter without a gradient in all of the calls has no mean.

    Args:
        inner: The optimizer.
        steps: Micro-steps, at least 1.
    """

    def __init__(self, inner: Transformation, steps: int) -> None:
        whole_number("steps", steps, 1)
        self.inner = inner
        self._steps = steps

    def init(self, params: Tensors) -> AccumulationState:
        """As :meth:`Transformation.init`."""
        return AccumulationState(0, {}, self.inner.init(params))

    @torch.no_grad()
    def update(
        self, grads: Gradients, state: AccumulationState, params: Tensors
    ) -> tuple[dict[str, Tensor], AccumulationState]:
        """As :meth:`Transformation.update`."""
        sums = dict(state.sums)
        for name, g in grads.items():
            if g is not None:
                wide = g.detach().to(torch.promote_types(g.dtype, torch.float32), copy=True)
                sums[name] = wide.add_(sums[name]) if name in sums else wide
        if state.micro + 1 < self._steps:
            return dict(params), AccumulationState(state.micro + 1, sums, state.inner)
        means = {name: (total / self._steps).to(params[name].dtype) for name, total in sums.items()}
        new, inner = self.inner.update(means, state.inner, params)
        return new, AccumulationState(0, {}, inner)


@torch.no_grad()
def clipped(
    params: Tensors, grads: Gradients, max_norm: float, groups: ProcessGroupCollection, *, in_place: bool = False
) -> Gradients:
    """Scale ``grads`` so that their global norm is at most ``max_norm``; see :func:`.clip.clip_grad_norm_`.

    Args:
        params: Parameters of this rank, by name, with their attributes.
        grads: Gradients of the parameters; None does not count.
        max_norm: Largest norm.
        groups: Process groups of the model; all their ranks must call this together, also those without gradients.
        in_place: Whether to scale the gradients themselves.

    Returns:
        ``grads`` if nothing is scaled, else scaled gradients: the same tensors with ``in_place``, new ones otherwise.

    Raises:
        NonFiniteGradientError: on every rank, when the norm is not finite; nothing was changed.
    """
    entries = _entries(params, grads, groups)
    _, factor = norm_and_factor(entries, max_norm, groups)
    if factor == 1:
        return grads
    # The alias has the gradient that the norm was measured on, which is placed like its parameter.
    return {
        name: None if alias.grad is None else alias.grad.mul_(factor) if in_place else alias.grad.mul(factor)
        for name, alias, _ in entries
    }


def _entries(params: Tensors, grads: Gradients, groups: ProcessGroupCollection) -> list[Entry]:
    """``params`` with ``grads`` in the form that the norm takes; aliases keep the ``.grad`` of ``params`` unchanged."""
    entries: list[Entry] = []
    for name, p in params.items():
        alias, g = as_parameter(p, copy=False), grads.get(name)
        alias.grad = None if g is None else g.detach()
        entries.append((name, alias, layout_of(alias, groups, name=name)))
    return entries


def free(params: Tensors, grads: Mapping[str, Tensor | None]) -> None:
    """Free the memory of ``grads`` that share it with nothing else, and set a ``.grad`` of ``params`` that uses it to None.

    A gradient that is a view of a larger buffer, as in Megatron-Core, keeps its memory.
    """
    for name, g in grads.items():
        if g is None:
            continue
        p, shard = params[name], local(g)
        storage = shard.untyped_storage()
        if p.is_leaf and p.grad is not None and local(p.grad).untyped_storage().data_ptr() == storage.data_ptr():
            p.grad = None
        if storage.nbytes() == shard.numel() * shard.element_size() and storage.resizable():
            storage.resize_(0)


def optimizer_of(tx: Any) -> FunctionalOptimizer | None:
    """The functional optimizer inside ``tx``; None if there is none."""
    while not isinstance(tx, FunctionalOptimizer) and hasattr(tx, "inner"):
        tx = tx.inner
    return tx if isinstance(tx, FunctionalOptimizer) else None
