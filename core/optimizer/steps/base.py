"""What every optimizer here has, whatever its kind; a step runs the rules of its parameters through the engine."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT
from torch.utils.weak import WeakTensorKeyDictionary

from ... import engine
from ...process_groups_config import ProcessGroupCollection
from ...sharding.layout import Layout
from ...sharding.parameter_layout import check_gradient, layout_of
from ...sharding.state import StateSpec, sizes
from ..members import members_of
from .constructor_settings import constructor_arguments
from .weight_decay import METHOD, check_method


def check_gradients(param_groups: list[dict[str, Any]]) -> None:
    """Raise ValueError, before anything is changed, for a gradient that no rule can use."""
    for group in param_groups:
        for p in group["params"]:
            check_gradient(p)


def forget_gone(optimizer: Any) -> None:
    """Drop the state of parameters that no group has any longer: accelerate shards a model after its optimizer is built."""
    kept = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for p in [p for p in optimizer.state if isinstance(p, Tensor) and id(p) not in kept]:
        del optimizer.state[p]


def load_state(
    optimizer: Any, state_dict: dict[str, Any], load: Callable[[dict[str, Any]], None], take: Callable[[], None]
) -> None:
    """Load ``state_dict`` by torch's ``load``, then ``take`` it over; see :meth:`ShardedStep.load_state_dict`."""
    before = optimizer.state, optimizer.param_groups
    try:
        load(state_dict)
        # torch casts state to the parameter's dtype and device: bits and integers are lost, and host state leaves the host.
        ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        params = [p for group in optimizer.param_groups for p in group["params"]]
        for i, p in zip(ids, params, strict=True):
            for name, value in state_dict["state"].get(i, {}).items():
                kept = before[0].get(p, {}).get(name)
                if isinstance(kept, Tensor) and isinstance(value, Tensor | int | float):
                    optimizer.state[p][name] = torch.as_tensor(value).to(kept.device, kept.dtype)
        # Settings that the one who saved did not have.
        for member in members_of(optimizer):
            for group in member.param_groups:
                for name, value in member.defaults.items():
                    group.setdefault(name, value)
        take()
    except Exception:
        optimizer.__setstate__({"state": before[0], "param_groups": before[1]})
        raise


class Travelling(NamedTuple):
    """Parameters that are stepped together and whose matrices go to an owner.

    Attributes:
        params: The parameters.
        position: Place of the first of them in the model.
        entries: Entries of the largest tensor that travels, as in :class:`engine.Work`.
        begin: Makes the work; called when the gradients of the parameters are final.
    """

    params: list[Tensor]
    position: int
    entries: int
    begin: Callable[[], engine.Work]


class ShardedStep(Optimizer):
    """What every optimizer here has: names, layouts, state from the start, loading, checks, and the step itself.

    A class is one of three kinds, each with a base class of its own:

    * elementwise (:class:`~.elementwise.ElementwiseStep`): an entry's update needs nothing but that entry. Lion is one:
      ``update_`` changes lists of tensors, which may be cut anywhere.
    * stacked (:class:`~.stacked.StackedStep`): an update needs numbers of the whole tensor, and asks for them. LAMB is one:
      its rule is a generator that yields two norms and is sent their values.
    * whole-tensor (:class:`~.whole_tensor.WholeStep`): an update is a function of the whole parameter, gradient and state.
      SOAP is one: ``update_whole_`` knows nothing of shards.

    State exists from construction on for every parameter, with or without a gradient, so that a checkpoint always has the
    same keys. Parameters without a gradient in a step are left alone, and so is their state.

    Args:
        params: Parameters or parameter groups, any shapes, DTensors or plain tensors with Megatron's attributes.
        pg_collection: Process groups, ours or Megatron-Core's; None: DTensors say themselves, plain tensors are whole.
        defaults: What each parameter group has, unless it says otherwise: ``lr`` and what the rule reads.
    """

    kind: Literal["elementwise", "reducing", "matrix"] = "reducing"
    """What the rule asks of other ranks: nothing, reductions, or whole matrices."""
    matrices_only = False
    """Whether parameters that are not 2-D are refused."""
    modes: tuple[str, ...] = ()
    """Tensor-parallel modes that are exact, for a class that takes ``tp_mode``."""

    _ready = False

    def __init__(
        self, params: ParamsT, pg_collection: ProcessGroupCollection | None = None, /, **defaults: Any
    ) -> None:
        self.prepare(pg_collection)
        super().__init__(params, defaults)
        self.take_state()

    def prepare(self, pg_collection: ProcessGroupCollection | None) -> None:
        """Make what :meth:`add_param_group` needs; before torch's constructor, which calls it."""
        self.pg_collection = pg_collection
        self._groups = (
            ProcessGroupCollection() if pg_collection is None else ProcessGroupCollection.from_any(pg_collection)
        )
        self._names = WeakTensorKeyDictionary()

    def state_specs(self, group: Mapping[str, Any], layout: Layout) -> Mapping[str, StateSpec]:
        """What each parameter of ``layout`` in ``group`` keeps between steps."""
        raise NotImplementedError

    def layout(self, p: Tensor) -> Layout:
        """Where ``p`` lives, as this optimizer's rule sees it."""
        return layout_of(p, self._groups, name=self._name(p))

    def state_layouts(self, p: Tensor, group: Mapping[str, Any]) -> dict[str, Layout | None]:
        """Where each state tensor of ``p`` lives in the whole model; None for state that belongs to this rank's block."""
        lay = self.layout(p)
        return {name: spec.layout(lay) for name, spec in self.state_specs(group, lay).items()}

    def state_sizes(self, p: Tensor, group: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
        """Bytes of each state tensor of ``p``: on this rank, and of the whole one."""
        lay = self.layout(p)
        return {
            name: sizes(spec.layout(lay), spec.dtype_for(p.dtype))
            for name, spec in self.state_specs(group, lay).items()
        }

    def mode_of(self, p: Tensor) -> str:
        """How shards come together, for tables."""
        return "elementwise"

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take one step with the gradients in ``.grad``; mutates parameters and state.

        Args:
            closure: Reevaluates the model with gradients enabled and returns the loss.

        Returns:
            What ``closure`` returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        forget_gone(self)
        engine.run(self.updates())
        return loss

    def updates(self) -> Iterator[engine.Work]:
        """The rules of one step, for :func:`engine.run`; a chain of optimizers runs those of all its members together."""
        raise NotImplementedError

    def travelling(self) -> Iterator[Travelling]:
        """The rules of those matrices that may leave for their owners during backward; :meth:`updates` leaves out what left."""
        return iter(())

    def _init_group(self, group: dict[str, Any], skip_non_grad_params: bool = False) -> None:
        """Make state for the parameters of ``group`` and take over what was loaded or put into ``self.state``.

        ``skip_non_grad_params`` is accepted for Megatron's sake: state exists for every parameter from the start.
        """
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """As in torch, for the parameters that the groups have now."""
        for group in self.param_groups:
            self._init_group(group)
        forget_gone(self)
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch, but state keeps its own dtype, is copied at once, and is left as it was when the new one does not fit.

        Raises:
            ValueError: when a state tensor has another shape than this optimizer keeps.
        """
        load_state(self, state_dict, super().load_state_dict, self.take_state)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch; refuses parameters that the rule cannot serve before they are added, and makes their state.

        Raises:
            ValueError: for such parameters, and for an argument of the constructor that is the same for all groups.
        """
        self._check_settings(param_group)
        super().add_param_group(param_group)
        try:
            for p in self.param_groups[-1]["params"]:
                self.check(p, self.param_groups[-1])
        except ValueError:
            self.param_groups.pop()
            raise
        if self._ready:
            self._init_group(self.param_groups[-1])

    def _check_settings(self, param_group: Mapping[str, Any]) -> None:
        check_method(param_group)
        arguments = constructor_arguments(type(self)).keys() - {"params", METHOD}
        given = {k: v for k, v in param_group.items() if k in arguments}
        for argument in given:
            if argument not in self.defaults:
                raise ValueError(
                    f"{type(self).__name__} takes {argument} for all parameters alike, not in a parameter group; give it to the "
                    f"constructor, or make a second optimizer."
                )
        if given:
            # The constructor knows what is possible.
            cls: Any = type(self)
            try:
                cls([torch.nn.Parameter(torch.empty(1024, 1024, device="meta"))], **given)
            except (TypeError, ValueError) as error:
                raise ValueError(f"in a parameter group of {cls.__name__}: {error}") from error

    def check(self, p: Tensor, group: Mapping[str, Any]) -> None:
        """Raise ValueError, naming ``p``, when the rule cannot serve it with the settings of ``group``."""
        if self.matrices_only and p.ndim != 2:
            raise ValueError(
                f"{self._name(p)}: {type(self).__name__} works on matrices, but this parameter has shape {tuple(p.shape)}; "
                f"give it to an elementwise optimizer (adamw)."
            )
        self.layout(p)

    def take_state(self) -> None:
        """Make what state is missing, and copy what somebody put into ``self.state``."""
        for group in self.param_groups:
            self._init_group(group)
        self._ready = True

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        """Refuse copies and pickles: process groups and shared memory have none."""
        raise TypeError(
            f"{type(self).__name__} cannot be copied or pickled; make another one of the same parameters and give it "
            f"load_state_dict(optimizer.state_dict()), or save with core.checkpoint."
        )

    def _name(self, p: Tensor) -> str:
        if p not in self._names:
            for group in self.param_groups:
                self._names.update(zip(group["params"], group.get("param_names", ()), strict=False))
            self._names.setdefault(p, f"parameter of shape {tuple(p.shape)}")
        return str(self._names[p])

    def _key(self, p: Tensor) -> str:
        """Key of the randomness of ``p``: its name, or else its position among the parameters of this optimizer.

        A position is the same on every tensor-parallel layout; over pipeline stages only names are.
        """
        at = 0
        for group in self.param_groups:
            names = group.get("param_names", ())
            for k, other in enumerate(group["params"]):
                if other is p:
                    return str(names[k]) if names else f"parameter {at + k}"
            at += len(group["params"])
        raise AssertionError("the parameter is in none of the groups")
