"""Several optimizers, each with its own parameters, as one ``torch.optim.Optimizer``."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .. import engine
from ..eager import runs_eagerly
from ..process_groups_config import ProcessGroupCollection
from ..sharding.parameter_layout import layout_of
from .clip import clip_grad_norm_, clip_grad_value_
from .shared_groups import SharedGroups, common_defaults
from .steps.base import ShardedStep
from .steps.bookkeeping import apply, load_state, make_ready, pending, without_gone
from .steps.global_clip import GlobalClip
from .steps.global_norm import Entry


@dataclass(frozen=True)
class Assignment:
    """What happens to one parameter of this rank.

    Attributes:
        name: Name of the parameter.
        optimizer: Registered name of its optimizer.
        shape: Shape of the whole parameter.
        sharding: Description of how the whole parameter is cut into shards.
        mode: Mode in which the optimizer combines the shards.
        reason: Why it goes to this optimizer, in words; empty where nobody chose.
    """

    name: str
    optimizer: str
    shape: tuple[int, ...]
    sharding: str
    mode: str
    reason: str = ""


class ChainedOptimizer(Optimizer):
    """Several optimizers that schedulers and checkpoints see as one; their rules run together and share collectives.

    Parameter groups and state are those of the members, not copies. They may be replaced and changed as those of any torch
    optimizer; the members follow (:class:`.shared_groups.SharedGroups`). ``defaults`` has the settings that all members have,
    with the values of the first; if some members call it ``momentum`` and the others have ``betas``, it has ``momentum``, and a
    schedule that sets that in every group sets the first of the ``betas``.

    Args:
        optimizers: Registered name → member. No parameter may belong to two members.
        pg_collection: Process groups of the model.
        bystanders: Name and parameter of all parameters of this rank, also frozen ones, by which a member without parameters
            here knows the ranks that its norms over the model are summed over.
        reasons: Name of a parameter → why it goes to its optimizer.
    """

    def __init__(
        self,
        optimizers: dict[str, Optimizer],
        pg_collection: ProcessGroupCollection,
        bystanders: Sequence[tuple[str, Tensor]] = (),
        reasons: Mapping[str, str] | None = None,
    ) -> None:
        self.pg_collection = pg_collection
        self.reasons = dict(reasons or {})
        self._entries: tuple[Any, list[Entry]] = ((), [])
        self._shared: SharedGroups | None = None
        groups = [group for member in optimizers.values() for group in member.param_groups]
        super().__init__(groups, {})
        self.defaults = common_defaults(optimizers.values())
        for member in optimizers.values():
            self.state.update(member.state)
        self._shared = SharedGroups(self, optimizers)
        # Kept only where they are needed: whoever exchanges the parameters of a model wants their memory back.
        self._bystanders = [] if any(group["params"] for group in groups) else list(bystanders)
        for member in optimizers.values():
            if isinstance(member, GlobalClip) and not any(group["params"] for group in member.param_groups):
                member.bystanders = self._entries_of(bystanders)

    @property
    def members(self) -> dict[str, Optimizer]:
        """Registered name → member, with the groups and the state that this chain has now."""
        return self._follow()

    @property
    def optimizers(self) -> Sequence[Optimizer]:
        """The members."""
        return list(self.members.values())

    @runs_eagerly
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take one step with the gradients in ``.grad``; mutates parameters and state. Returns what ``closure`` returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        finish_step(self.optimizers, engine.Run())
        return loss

    def train(self) -> None:
        """Put the training weights into the parameters, for members that evaluate with other weights (schedule-free)."""
        self._switch("train")

    def eval(self) -> None:
        """Put the weights for evaluation into the parameters, in place; :meth:`train` reverts it."""
        self._switch("eval")

    @runs_eagerly
    def _switch(self, to: str) -> None:
        for member in self.optimizers:
            if hasattr(member, to):
                getattr(member, to)()

    @runs_eagerly
    def clip_grad_norm_(self, max_norm: float, total: Tensor | None = None) -> float:
        """Clip the gradients of all members by their global norm; see :func:`clip.clip_grad_norm_`."""
        return clip_grad_norm_(self.entries(), max_norm, self.pg_collection, total)

    @runs_eagerly
    def clip_grad_value_(self, max_value: float) -> None:
        """Clamp the gradients of all members; see :func:`clip.clip_grad_value_`."""
        clip_grad_value_(self.entries(), max_value)

    def entries(self) -> list[Entry]:
        """Name, parameter and layout of every parameter of this rank; of frozen ones, if there are no others."""
        self._follow()
        named = [
            (name, p)
            for group in self.param_groups
            for name, p in zip(group.get("param_names", ["?"] * len(group["params"])), group["params"], strict=True)
        ]
        named = named or self._bystanders
        key = tuple((id(p), p.shape) for _, p in named)
        if key != self._entries[0]:
            self._entries = key, self._entries_of(named)
        return self._entries[1]

    def _entries_of(self, named: Iterable[tuple[str, Tensor]]) -> list[Entry]:
        return [(name, p, layout_of(p, self.pg_collection, name=name)) for name, p in named]

    def assignments(self) -> list[Assignment]:
        """What happens to each parameter of this rank, for tables."""
        where = {id(p): (name, lay) for name, p, lay in self.entries()}
        return [
            Assignment(name, optimizer, lay.shape, lay.describe(), _mode(member, p), self.reasons.get(name, ""))
            for optimizer, member in self.members.items()
            for group in member.param_groups
            for p in group["params"]
            for name, lay in [where[id(p)]]
        ]

    @runs_eagerly
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the member that its entry ``optimizer`` names, which a chain of one member does not need.

        The member completes and checks the group, and makes state for its parameters.

        Raises:
            ValueError: when the group does not say which of several members is to step it, or the member refuses it.
        """
        if self._shared is None:  # a member's own group, while the chain is being built
            super().add_param_group(param_group)
        else:
            self._shared.add(param_group)

    @runs_eagerly
    def state_dict(self) -> dict[str, Any]:
        """As :meth:`ShardedStep.state_dict`, of all members."""
        apply(pending(self.optimizers))
        with without_gone(self):
            return super().state_dict()

    @runs_eagerly
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As :meth:`ShardedStep.load_state_dict`, for all members."""
        load_state(self, state_dict, super().load_state_dict)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """As in torch, and let the members share the new state."""
        super().__setstate__(state)
        self._follow()

    def _follow(self) -> dict[str, Optimizer]:
        assert self._shared is not None
        return self._shared.followed()


def finish_step(members: Sequence[Any], run: engine.Run) -> None:
    """Finish a step that ``run`` may have begun: the rules of this package's members together, then the other members."""
    make_ready(members)
    run.finish(update for member in members if isinstance(member, ShardedStep) for update in member.updates())
    for member in members:
        if not isinstance(member, ShardedStep):
            member.step()


def _mode(member: Optimizer, p: Tensor) -> str:
    return member.mode_of(p) if isinstance(member, ShardedStep) else "as it is"
