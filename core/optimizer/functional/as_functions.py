"""Optimizers as functions: parameters, gradients and state in, new parameters and new state out."""

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from ...eager import runs_eagerly
from ...sharding.parameter_layout import local
from ..members import members_of
from ..steps.argument_checks import choice
from ..steps.base import ShardedStep

Tensors = Mapping[str, Tensor]
"""Parameter name → tensor: this rank's shard with Megatron's attributes, or a DTensor."""

Gradients = Mapping[str, Tensor | None]
"""Parameter name → gradient, laid out like the parameter; a missing name means None."""

Schedule = Callable[[int], float | Tensor]
"""Number of finished steps → learning rate."""

NoneGrads = Literal["zero", "skip"]
"""Meaning of a gradient that is None: ``zero`` takes it as zeros; ``skip`` leaves parameter and state alone, as ``step()``."""


class OptimizerState(NamedTuple):
    """State of a :class:`FunctionalOptimizer` between steps.

    Attributes:
        step: Number of finished steps.
        slots: Parameter name → state name → tensor, as in ``optimizer.state``.
    """

    step: int
    slots: dict[str, dict[str, Any]]


class FunctionalOptimizer:
    """The ``step()`` of a ``torch.optim.Optimizer`` as a function, which runs that ``step()`` on its own parameters.

    Results are therefore those of the class, bit for bit. The optimizer is built at the first call, for the names, shapes and
    attributes (``tensor_model_parallel``, ``shared``, …) of the parameters passed to that call.

    Args:
        make: Builds the optimizer for named parameters.
        schedule: Learning rate by number of finished steps; None keeps the optimizer's own.
        lr: Learning rate in the optimizer that ``make`` builds. Under a schedule, a group with another learning rate keeps its
            ratio to this one.
        donate: Update the passed tensors in place and return them, without copies if the call before returned them. Otherwise
            passed tensors do not change, which takes the memory of two more copies of this rank's parameters and state.
    """

    def __init__(
        self,
        make: Callable[[dict[str, nn.Parameter]], Optimizer],
        schedule: Schedule | None = None,
        *,
        lr: float = 1.0,
        donate: bool = False,
    ) -> None:
        self._make = make
        self.schedule = schedule
        self._lr = lr
        self.donate = donate
        self._params: dict[str, nn.Parameter] = {}
        self._key: Any = None

    @runs_eagerly
    @torch.no_grad()
    def init(self, params: Tensors) -> OptimizerState:
        """State before the first step.

        ``params`` change where the optimizer's constructor changes its parameters (``sinkhorn_muon`` normalizes them).
        This communicates whenever the constructor does.
        """
        self._key = None
        self._bind(params)
        for name, p in self._params.items():
            if not torch.equal(local(params[name]), local(p)):
                local(params[name]).copy_(local(p))
        return OptimizerState(0, self._slots())

    def update(
        self, grads: Gradients, state: OptimizerState, params: Tensors
    ) -> tuple[dict[str, Tensor], OptimizerState]:
        """:meth:`apply` with the schedule, and with torch's convention for gradients that are None (``skip``).

        Returns the new parameters and not a difference, because adding a difference would round once more; :meth:`updates`
        returns it.
        """
        return self.apply(params, grads, state, none_grads="skip")

    def updates(
        self, grads: Gradients, state: OptimizerState, params: Tensors
    ) -> tuple[dict[str, Tensor], OptimizerState]:
        """:meth:`update`, with the difference that it makes to each parameter, as optax returns it; ``params`` do not change."""
        return differences(self.update, grads, state, params)

    @runs_eagerly
    @torch.no_grad()
    def apply(
        self,
        params: Tensors,
        grads: Gradients,
        state: OptimizerState,
        *,
        learning_rate_fn: Schedule | None = None,
        none_grads: NoneGrads = "zero",
    ) -> tuple[dict[str, Tensor], OptimizerState]:
        """Take one step.

        Args:
            params: Parameters.
            grads: Gradients; not changed.
            state: State from :meth:`init` or from the step before.
            learning_rate_fn: Learning rate by number of finished steps, in place of the schedule.
            none_grads: Meaning of None among ``grads``.

        Returns:
            New parameters and state; with ``donate`` the passed tensors, updated in place.

        Raises:
            ValueError: for a gradient without a parameter, or of another shape or dtype; nothing is changed then.
            NotImplementedError: for a state that this optimizer did not make; nothing is changed then.
        """
        choice("none_grads", none_grads, ("zero", "skip"))
        _check_gradients(params, grads)
        self._bind(params)
        self._check_state(state)
        for name, p in self._params.items():
            _put(local(p), local(params[name]))
        self._put_state(state)
        self._set_rate(learning_rate_fn or self.schedule, state.step)
        try:
            for name, p in self._params.items():
                g = grads.get(name)
                if g is not None:
                    p.grad = g.detach()
                elif none_grads == "zero":
                    p.grad = torch.zeros_like(p)
            self._optimizer.step()
        finally:
            for p in self._params.values():
                p.grad = None
        if not self.donate:
            new = {name: p.detach().clone() for name, p in self._params.items()}
            return new, OptimizerState(state.step + 1, self._slots())
        for name, p in self._params.items():
            _put(local(params[name]), local(p))
            self._give_back(state.slots[name], self._optimizer.state[p])
        return dict(params), OptimizerState(state.step + 1, state.slots)

    def _bind(self, params: Tensors) -> None:
        """Build the optimizer, unless the present one is for such parameters."""
        key = [
            (k, p.shape, p.dtype, p.device, p.placements if isinstance(p, DTensor) else ()) for k, p in params.items()
        ]
        if key != self._key:
            self._params = {name: as_parameter(p, copy=not self.donate) for name, p in params.items()}
            self._optimizer = self._make(self._params)
            self._rates = [float(group["lr"]) for group in self._optimizer.param_groups]
            members = members_of(self._optimizer)
            self._declares = all(isinstance(member, ShardedStep) for member in members)
            self._key = key

    def _set_rate(self, schedule: Schedule | None, count: int) -> None:
        lr = self._lr if schedule is None else float(schedule(count))
        for group, own in zip(self._optimizer.param_groups, self._rates, strict=True):
            group["lr"] = own if lr == self._lr else lr * (own / self._lr if self._lr else 1.0)

    def _slots(self) -> dict[str, dict[str, Any]]:
        """The optimizer's state; copies, unless it is donated."""
        return {
            name: {k: v.clone() if isinstance(v, Tensor) and not self.donate else v for k, v in slots.items()}
            for name, p in self._params.items()
            for slots in [self._optimizer.state[p]]
        }

    def _check_state(self, state: Any) -> None:
        if not isinstance(state, OptimizerState):
            raise NotImplementedError(
                f"the state is a {type(state).__name__}, not an OptimizerState; make it with init(params) of this optimizer."
            )
        for name, p in self._params.items() if self._declares else ():
            expected, passed = _shapes(self._optimizer.state[p]), _shapes(state.slots.get(name, {}))
            if expected != passed:
                raise NotImplementedError(
                    f"{name}: the state has {passed}, but this optimizer keeps {expected} here; make it with init(params), or "
                    f"reshard it first."
                )

    def _put_state(self, state: OptimizerState) -> None:
        for name, p in self._params.items():
            kept, slots = self._optimizer.state[p], state.slots.get(name, {})
            if not self._declares:  # an optimizer of another library, which may make state at any time
                kept.clear()
                kept.update({k: v.clone() if isinstance(v, Tensor) else v for k, v in slots.items()})
                continue
            for slot, value in slots.items():
                _put(local(kept[slot]), local(value))

    def _give_back(self, slots: dict[str, Any], kept: dict[str, Any]) -> None:
        """Put the optimizer's state ``kept`` into the donated ``slots``, in place."""
        for slot, value in kept.items():
            if self._declares:
                _put(local(slots[slot]), local(value))
            else:
                slots[slot] = value


@torch.no_grad()
def differences(
    update: Callable[[Gradients, Any, Tensors], tuple[dict[str, Tensor], Any]],
    grads: Gradients,
    state: Any,
    params: Tensors,
) -> tuple[dict[str, Tensor], Any]:
    """What ``update`` makes of ``params``, minus ``params``, which have their values again afterwards; and the new state."""
    before = {name: p.detach().clone() for name, p in params.items()}
    new, state = update(grads, state, params)
    difference = {name: new[name].detach() - p for name, p in before.items()}
    for name, p in params.items():
        if new[name] is p:  # donated
            local(p).copy_(local(before[name]))
    return difference, state


def as_parameter(p: Tensor, *, copy: bool) -> nn.Parameter:
    """A parameter with the values and attributes of ``p``, in memory of its own if ``copy``."""
    made = nn.Parameter(p.detach().clone() if copy else p.detach())
    for name, value in vars(p).items():
        if not name.startswith("_"):
            setattr(made, name, value)
    return made


def _check_gradients(params: Tensors, grads: Gradients) -> None:
    if unknown := sorted(grads.keys() - params.keys()):
        raise ValueError(f"gradients of {unknown}, but no such parameters; there are {sorted(params)}.")
    for name, g in grads.items():
        p = params[name]
        if g is not None and (g.shape != p.shape or g.dtype != p.dtype):
            raise ValueError(
                f"{name}: the gradient is {tuple(g.shape)} of {g.dtype}, but the parameter is {tuple(p.shape)} of {p.dtype}; "
                f"give one like the parameter."
            )


def _shapes(slots: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return {k: tuple(local(v).shape) if isinstance(v, Tensor) else () for k, v in slots.items()}


def _put(target: Tensor, value: Tensor) -> None:
    if target.data_ptr() != value.data_ptr():
        target.copy_(value)
