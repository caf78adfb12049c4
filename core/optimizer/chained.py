"""Several optimizers, each with its own parameters, as one ``torch.optim.Optimizer``."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .. import engine
from ..process_groups_config import ProcessGroupCollection
from ..sharding.parameter_layout import layout_of
from .clip import clip_grad_norm_, clip_grad_value_
from .steps.base import ShardedStep, forget_gone, load_state
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
    """

    name: str
    optimizer: str
    shape: tuple[int, ...]
    sharding: str
    mode: str


class ChainedOptimizer(Optimizer):
    """Several optimizers that schedulers and checkpoints see as one; their rules run together and share collectives.

    Parameter groups and state are those of the members, not copies.

    Args:
        optimizers: Registered name → member. No parameter may belong to two members.
        pg_collection: Process groups of the model.
    """

    def __init__(self, optimizers: dict[str, Optimizer], pg_collection: ProcessGroupCollection) -> None:
        self.members = optimizers
        self.pg_collection = pg_collection
        self._entries: tuple[tuple[int, ...], list[Entry]] = ((), [])
        groups = [group for member in optimizers.values() for group in member.param_groups]
        super().__init__(groups, {})
        for member in optimizers.values():
            self.state.update(member.state)
        self._share()

    @property
    def optimizers(self) -> Sequence[Optimizer]:
        """The members."""
        return list(self.members.values())

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take one step with the gradients in ``.grad``; mutates parameters and state. Returns what ``closure`` returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        forget_gone(self)
        finish_step(self.optimizers, engine.Run())
        return loss

    def train(self) -> None:
        """Put the training weights into the parameters, for members that evaluate with other weights (schedule-free)."""
        self._switch("train")

    def eval(self) -> None:
        """Put the weights for evaluation into the parameters, in place; :meth:`train` reverts it."""
        self._switch("eval")

    def _switch(self, to: str) -> None:
        for member in self.optimizers:
            if hasattr(member, to):
                getattr(member, to)()

    def clip_grad_norm_(self, max_norm: float, total: Tensor | None = None) -> float:
        """Clip the gradients of all members by their global norm; see :func:`clip.clip_grad_norm_`."""
        return clip_grad_norm_(self.entries(), max_norm, self.pg_collection, total)

    def clip_grad_value_(self, max_value: float) -> None:
        """Clamp the gradients of all members; see :func:`clip.clip_grad_value_`."""
        clip_grad_value_(self.entries(), max_value)

    def entries(self) -> list[Entry]:
        """Name, parameter and layout of every parameter of this rank."""
        named = [
            (name, p)
            for group in self.param_groups
            for name, p in zip(group.get("param_names", ["?"] * len(group["params"])), group["params"], strict=True)
        ]
        key = tuple(id(p) for _, p in named)
        if key != self._entries[0]:
            self._entries = key, [(name, p, layout_of(p, self.pg_collection, name=name)) for name, p in named]
        return self._entries[1]

    def assignments(self) -> list[Assignment]:
        """What happens to each parameter of this rank, for tables."""
        where = {id(p): (name, lay) for name, p, lay in self.entries()}
        return [
            Assignment(where[id(p)][0], optimizer, where[id(p)][1].shape, where[id(p)][1].describe(), _mode(member, p))
            for optimizer, member in self.members.items()
            for group in member.param_groups
            for p in group["params"]
        ]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of one of the members, while the chain is being built.

        Raises:
            ValueError: for any other group, because a new parameter must be given to one of the members.
        """
        if not any(param_group is group for member in self.members.values() for group in member.param_groups):
            raise ValueError(
                "a chained optimizer cannot take a parameter group of its own; build it anew with get_optimizer."
            )
        super().add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """As :meth:`ShardedStep.state_dict`, of all members."""
        for member in self.optimizers:
            if isinstance(member, ShardedStep):
                for group in member.param_groups:
                    member._init_group(group)
        forget_gone(self)
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As :meth:`ShardedStep.load_state_dict`, for all members."""

        def take() -> None:
            for member in self.optimizers:
                if isinstance(member, ShardedStep):
                    member.take_state()

        load_state(self, state_dict, super().load_state_dict, take)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """As in torch, and let the members share the new state."""
        super().__setstate__(state)
        self._share()

    def _share(self) -> None:
        at = 0
        for member in self.members.values():
            count = len(member.param_groups)
            member.param_groups = self.param_groups[at : at + count]
            member.state = self.state
            at += count


def finish_step(members: Sequence[Any], run: engine.Run) -> None:
    """Finish a step that ``run`` may have begun: the rules of this package's members together, then the other members."""
    run.finish(update for member in members if isinstance(member, ShardedStep) for update in member.updates())
    for member in members:
        if not isinstance(member, ShardedStep):
            member.step()


def _mode(member: Optimizer, p: Tensor) -> str:
    return member.mode_of(p) if isinstance(member, ShardedStep) else "as it is"
