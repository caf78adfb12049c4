"""Common base of all optimizers of this package; a step runs the rules of its parameters through the engine."""

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
    """Drop the state of parameters that are in no group any longer, as when accelerate shards a model after building this."""
    kept = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for p in [p for p in optimizer.state if isinstance(p, Tensor) and id(p) not in kept]:
        del optimizer.state[p]


def load_state(
    optimizer: Any, state_dict: dict[str, Any], load: Callable[[dict[str, Any]], None], take: Callable[[], None]
) -> None:
    """Load ``state_dict`` into ``optimizer``; on an error, restore the state and groups from before.

    Args:
        optimizer: An optimizer, or a chain of them.
        state_dict: State dict of such an optimizer.
        load: torch's own ``load_state_dict``.
        take: Checks and copies the loaded state; called last.
    """
    before = optimizer.state, optimizer.param_groups
    try:
        load(state_dict)
        # torch has cast the state to the parameter's dtype and device, which rounds it and moves host state to the device.
        ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        params = [p for group in optimizer.param_groups for p in group["params"]]
        for i, p in zip(ids, params, strict=True):
            for name, value in state_dict["state"].get(i, {}).items():
                kept = before[0].get(p, {}).get(name)
                if isinstance(kept, Tensor) and isinstance(value, Tensor | int | float):
                    optimizer.state[p][name] = torch.as_tensor(value).to(kept.device, kept.dtype)
        # An optimizer of an older version may have saved groups without some of the settings.
        for member in members_of(optimizer):
            for group in member.param_groups:
                for name, value in member.defaults.items():
                    group.setdefault(name, value)
        take()
    except Exception:
        optimizer.__setstate__({"state": before[0], "param_groups": before[1]})
        raise


class Travelling(NamedTuple):
    """Parameters that are stepped together and whose matrices are sent to an owner.

    Attributes:
        params: The parameters.
        position: Index, among all parameters of the optimizer, of the first of these.
        entries: Entries of the largest tensor that is sent, as in :class:`engine.Work`.
        begin: Returns the work of the step; called when the gradients of the parameters are final.
    """

    params: list[Tensor]
    position: int
    entries: int
    begin: Callable[[], engine.Work]


class ShardedStep(Optimizer):
    """Common base of all optimizers: parameter names, layouts, initial state, loading, checks and the step itself.

    An optimizer class is one of three kinds, each with a base class of its own:

    * elementwise (:class:`~.elementwise.ElementwiseStep`): the update of an entry depends on that entry alone. An example is
      Lion, whose ``update_`` changes lists of tensors that may be cut anywhere.
    * stacked (:class:`~.stacked.StackedStep`): the update needs a few numbers of the whole tensor and requests them. An
      example is LAMB, whose rule is a generator that yields two norms and is sent their values.
    * whole-tensor (:class:`~.whole_tensor.WholeStep`): the update is a function of the whole parameter, gradient and state.
      An example is SOAP, whose ``update_whole_`` knows nothing of shards.

    State exists from construction on for every parameter, with or without a gradient, so that a checkpoint always has the
    same keys. Parameters without a gradient in a step are left alone, and so is their state.

    Args:
        params: Parameters or parameter groups, any shapes, DTensors or plain tensors with Megatron's attributes.
        pg_collection: Process groups, ours or Megatron-Core's. None suffices for DTensors, which carry their mesh; plain
            tensors are then whole.
        defaults: Default settings of each parameter group: ``lr`` and the settings that the rule reads.
    """

    kind: Literal["elementwise", "reducing", "matrix"] = "reducing"
    """Communication that the rule needs: none, reductions, or whole matrices."""
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
        """Set the attributes that :meth:`add_param_group` reads; called before torch's constructor, which calls that."""
        self.pg_collection = pg_collection
        self._groups = (
            ProcessGroupCollection() if pg_collection is None else ProcessGroupCollection.from_any(pg_collection)
        )
        self._names = WeakTensorKeyDictionary()

    def state_specs(self, group: Mapping[str, Any], layout: Layout) -> Mapping[str, StateSpec]:
        """Declarations, by name, of the state that each parameter of ``layout`` in ``group`` keeps between steps."""
        raise NotImplementedError

    def layout(self, p: Tensor) -> Layout:
        """Layout of ``p`` as this optimizer's rule sees it."""
        return layout_of(p, self._groups, name=self._name(p))

    def state_layouts(self, p: Tensor, group: Mapping[str, Any]) -> dict[str, Layout | None]:
        """Layout of each state tensor of ``p`` in the whole model; None for state that belongs to this rank's block alone."""
        lay = self.layout(p)
        return {name: spec.layout(lay) for name, spec in self.state_specs(group, lay).items()}

    def state_sizes(self, p: Tensor, group: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
        """Bytes of each state tensor of ``p``: of this rank's shard, and of the whole tensor."""
        lay = self.layout(p)
        return {
            name: sizes(spec.layout(lay), spec.dtype_for(p.dtype))
            for name, spec in self.state_specs(group, lay).items()
        }

    def mode_of(self, p: Tensor) -> str:
        """Name, for tables, of the mode in which the shards of ``p`` are combined."""
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
        """Matrices that may be sent to their owners during backward; :meth:`updates` then leaves out those already sent."""
        return iter(())

    def _init_group(self, group: dict[str, Any], skip_non_grad_params: bool = False) -> None:
        """Make the missing state of the parameters of ``group`` and adopt state that was loaded or put into ``self.state``.

        ``skip_non_grad_params`` has no effect; Megatron passes it. State exists for every parameter from the start.
        """
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """As in torch, for the parameters that the groups have now."""
        for group in self.param_groups:
            self._init_group(group)
        forget_gone(self)
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch, but state tensors keep their dtype and are copied; when the new state does not fit, nothing changes.

        Raises:
            ValueError: when a state tensor has another shape than this optimizer keeps.
        """
        load_state(self, state_dict, super().load_state_dict, self.take_state)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch, and makes the state of the new parameters; parameters that the rule cannot serve are refused.

        Raises:
            ValueError: for such parameters, and for a constructor argument that cannot differ between groups; no group is
                added then.
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
        settings = {k: v for k, v in param_group.items() if k in arguments}
        for argument in settings:
            if argument not in self.defaults:
                raise ValueError(
                    f"{type(self).__name__} takes {argument} for all parameters alike, not in a parameter group; give it to the "
                    f"constructor, or make a second optimizer."
                )
        if settings:
            # The constructor checks the values.
            cls: Any = type(self)
            try:
                cls([torch.nn.Parameter(torch.empty(1024, 1024, device="meta"))], **settings)
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
        """Make the missing state, and copy tensors that were put into ``self.state`` from outside."""
        for group in self.param_groups:
            self._init_group(group)
        self._ready = True

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        """Refuse copies and pickles, because process groups and views of shared memory cannot be copied."""
        raise TypeError(
            f"{type(self).__name__} cannot be copied or pickled; build another one for the same parameters and call its "
            f"load_state_dict(optimizer.state_dict()), or save with shardstep.save (core.checkpoint)."
        )

    def _name(self, p: Tensor) -> str:
        if p not in self._names:
            for group in self.param_groups:
                self._names.update(zip(group["params"], group.get("param_names", ()), strict=False))
            self._names.setdefault(p, f"parameter of shape {tuple(p.shape)}")
        return str(self._names[p])

    def _key(self, p: Tensor) -> str:
        """Key of the random numbers for ``p``: its name, or its position in this optimizer when parameters have no names.

        Positions agree between tensor-parallel layouts; only names also agree between splits into pipeline stages.
        """
        at = 0
        for group in self.param_groups:
            names = group.get("param_names", ())
            for k, other in enumerate(group["params"]):
                if other is p:
                    return str(names[k]) if names else f"parameter {at + k}"
            at += len(group["params"])
        raise AssertionError("the parameter is in none of the groups")
