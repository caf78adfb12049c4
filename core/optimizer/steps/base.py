"""Common base of all optimizers of this package; a step runs the rules of its parameters through the engine."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT
from torch.utils.weak import WeakTensorKeyDictionary

from ... import engine
from ...eager import runs_eagerly
from ...process_groups_config import ProcessGroupCollection
from ...sharding.layout import Layout
from ...sharding.parameter_layout import check_gradient, layout_of
from ...sharding.state import StateSpec, sizes
from .bookkeeping import (
    StateChange,
    apply,
    check_settings,
    fingerprint,
    keep_names,
    load_state,
    make_ready,
    pending,
    without_gone,
)
from .constructor_settings import constructor_arguments
from .weight_decay import METHOD, check_method


def check_gradients(param_groups: list[dict[str, Any]]) -> None:
    """Raise ValueError, before anything is changed, for a gradient that no rule can use."""
    for group in param_groups:
        for p in group["params"]:
            check_gradient(p)


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
    same keys. Parameters without a gradient in a step are left alone, and so is their state. Between two steps, state and
    groups may be replaced as in torch: a parameter whose state is gone begins anew, and a part of a state is refused.

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

    has_stepped = False
    """Whether a step was taken. Before the first one, parameters that are replaced by others leave no state behind."""
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
        self._seen: tuple[Any, list[Tensor]] = ((), [])

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

    @runs_eagerly
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
        make_ready((self,))
        engine.run(self.updates())
        return loss

    def updates(self) -> Iterator[engine.Work]:
        """The rules of one step, for :func:`engine.run`; a chain of optimizers runs those of all its members together."""
        raise NotImplementedError

    def travelling(self) -> Iterator[Travelling]:
        """Matrices that may be sent to their owners during backward; :meth:`updates` then leaves out those already sent."""
        return iter(())

    def check_step(self) -> None:
        """Raise, before anything is changed, when no step can be taken: for gradients that no rule can use."""
        check_gradients(self.param_groups)

    def check_groups(self) -> None:
        """Notice parameters and groups that were replaced, and let names follow them.

        Raises:
            ValueError: for a group that lacks a setting.
        """
        check_settings(self)
        seen = fingerprint(self.param_groups)
        if seen == self._seen[0]:
            return
        keep_names(self.param_groups, self._names)
        params = [p for group in self.param_groups for p in group["params"]]
        if not self.has_stepped:
            # As when accelerate shards a model after this was built; later, they may come back, as in torch.
            kept = set(map(id, params))
            for p in self._seen[1]:
                if id(p) not in kept:
                    self.state.pop(p, None)
        self._seen = seen, params

    def state_changes(self, group: dict[str, Any]) -> Iterable[StateChange]:
        """What must be done so that each parameter of ``group`` has its state; changes nothing itself.

        State that is missing is made. State that was loaded, or put into ``self.state``, is taken over.

        Raises:
            ValueError: for state that does not fit.
        """
        raise NotImplementedError

    def _init_group(self, group: dict[str, Any], skip_non_grad_params: bool = False) -> None:
        """Make the :meth:`state_changes` of ``group``.

        ``skip_non_grad_params`` has no effect; Megatron passes it. State exists for every parameter from the start.
        """
        apply(list(self.state_changes(group)))

    def take_state(self) -> None:
        """Make missing state, and take over state that was put into ``self.state`` from outside.

        Raises:
            ValueError: before anything is changed, for groups or state that do not fit.
        """
        apply(pending((self,)))
        self._ready = True

    @runs_eagerly
    def state_dict(self) -> dict[str, Any]:
        """As in torch, for the parameters that the groups have now."""
        self.take_state()
        with without_gone(self):
            return super().state_dict()

    @runs_eagerly
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch, but state tensors keep their dtype and are copied; when the new state does not fit, nothing changes.

        Raises:
            ValueError: when the state of a parameter lacks a part, or a part has another shape than this optimizer keeps.
        """
        load_state(self, state_dict, super().load_state_dict)

    @runs_eagerly
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
                cls([torch.nn.Parameter(torch.empty(1024, 1024, dtype=torch.float32, device="meta"))], **settings)
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

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        """Refuse copies and pickles, because process groups and views of shared memory cannot be copied."""
        raise TypeError(
            f"{type(self).__name__} cannot be copied or pickled; build another one for the same parameters and call its "
            f"load_state_dict(optimizer.state_dict()), or save with shardstep.save (core.checkpoint)."
        )

    def _name(self, p: Tensor) -> str:
        if p not in self._names:
            for group in self.param_groups:
                for known, name in zip(group["params"], group.get("param_names", ()), strict=False):
                    self._names.setdefault(known, name)
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
