"""Base of optimizers that need whole tensors: each tensor goes to the rank that works on it and keeps its state."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial, reduce
from math import prod
from types import SimpleNamespace
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ...engine import Work
from ...process_groups_config import Axis, Domain, ProcessGroupCollection
from ...sharding import tp_modes
from ...sharding.dealing import deal_to_least
from ...sharding.layout import Layout, Split
from ...sharding.parameter_layout import layout_of, local, local_gradient
from ...sharding.requests import Rule
from ...sharding.state import StateTensor, sizes
from ...sharding.tp_modes import Deferred, work_at
from .argument_checks import choice
from .base import ShardedStep
from .bookkeeping import StateChange, fitting, refuse_part
from .weight_decay import decay_first_

WholeMode = tp_modes.WholeMode


@dataclass(frozen=True)
class WholeState(StateTensor):
    """One state tensor of one whole tensor, declared by its shape; storage as in :class:`StateTensor`.

    Attributes:
        shape: Shape of the state tensor; () is kept as (1,).
        init: Value before the first step: a number for every entry, or ``eye`` for the identity matrix.
    """

    shape: tuple[int, ...]
    init: float | Literal["eye"] = 0.0

    def layout(self, home: "Home") -> Layout:
        """Layout of the state tensor: whole on the owner and empty elsewhere, or whole on every rank without an owner."""
        shape = self.shape or (1,)
        if home.owner is None:
            return Layout.whole(shape)
        held = tuple(((0, shape[0]),) if r == home.owner else () for r in range(home.domain.size))
        axis = Axis("+".join(home.domain.axes), tuple(range(home.domain.size)), home.domain.index, home.domain.group)
        return Layout(shape, (Split(axis, held), *(None for _ in shape[1:])))

    def allocate(self, home: "Home", like: Tensor) -> Tensor:
        """The initial state of a parameter with the dtype and device of ``like``; no entries on ranks that do not keep it."""
        shape = self.layout(home).local_shape
        dtype, device = self.dtype_for(like.dtype), self.device_for(like.device)
        if self.init == "eye":
            return torch.eye(*shape[-2:], dtype=dtype, device=device).expand(shape).clone()
        return torch.full(shape, self.init, dtype=dtype, device=device)


STEP_COUNT = WholeState((), dtype=torch.float32, host=True)
"""Declaration of a step counter, which the host reads in every step."""


@dataclass(frozen=True)
class Home:
    """The ranks that work on a whole tensor.

    Attributes:
        domain: The ranks that hold a shard or a copy of the tensor.
        owner: Index in ``domain`` of the rank that works on the tensor; None when all of them do.
    """

    domain: Domain
    owner: int | None

    @property
    def travels(self) -> bool:
        """Whether one of several ranks works on the tensor."""
        return self.owner is not None and self.domain.size > 1

    @property
    def here(self) -> bool:
        """Whether this rank works on the tensor."""
        return self.owner in (None, self.domain.index)


@dataclass(frozen=True)
class Unit:
    """A whole tensor: a parameter, or one part of a fused one.

    Attributes:
        name: Name that randomness is keyed by.
        layout: Layout of the tensor.
        home: The ranks that work on it.
        suffix: End of the names of its state tensors.
    """

    name: str
    layout: Layout
    home: Home
    suffix: str


@dataclass(frozen=True)
class Parameter:
    """A parameter and the whole tensors it is made of.

    Attributes:
        layout: Layout of the parameter and its parts.
        units: The parameter itself, or its parts.
    """

    layout: Layout
    units: tuple[Unit, ...]


Change = Callable[..., None]
"""``work(unit, p, *others)``: changes the whole tensor ``p`` in place; called on the ranks that work on it."""


class WholeStep(ShardedStep):
    """Base of optimizers whose update is a function of the whole parameter, gradient and state.

    With ``tp_mode="owner"`` every parameter is dealt once to an owner among the ranks that hold a shard or a copy. A step
    sends parameters and gradients to their owners and the new parameters back, in two collectives for all of them together;
    only the owner keeps the state. With ``duplicated`` every rank of the tensor-parallel group gathers the whole parameter
    and keeps all state. Both give, bit for bit, the result for the unsharded parameter. Each part of a fused weight (the
    parameter's attribute ``matrix_parts``) is a tensor of its own.

    State tensors have the whole shape on ranks that work on the parameter, and no entries on the others. A rank's
    ``state_dict()`` therefore holds only that rank's share: save with ``shardstep.save`` (``core.checkpoint``), which knows
    where each share is, or use ``duplicated`` with checkpoint code that treats plain tensors as replicated.
    """

    kind = "matrix"
    tp_mode: WholeMode
    modes = get_args(WholeMode)

    def prepare(self, pg_collection: ProcessGroupCollection | None) -> None:
        """As in the base class."""
        super().prepare(pg_collection)
        self._parameters: Any = WeakTensorKeyDictionary()  # parameter → Parameter
        self._loads: dict[Domain, list[float]] = {}

    def whole_specs(self, shape: tuple[int, ...], group: Mapping[str, Any]) -> Mapping[str, WholeState]:
        """Declarations, by name, of the state that is kept between steps for a whole tensor of ``shape``."""
        raise NotImplementedError

    def update_whole_(self, p: Tensor, g: Tensor, s: Any, group: Mapping[str, Any], name: str) -> None:
        """Update the whole parameter ``p`` and its state ``s`` in place; ``g`` may be overwritten.

        Args:
            p: Parameter, at least float32.
            g: Gradient, of the dtype of ``p``.
            s: State tensors by name.
            group: Parameter group.
            name: The parameter's name, by which randomness is keyed.
        """
        raise NotImplementedError

    def cost(self, shape: tuple[int, ...]) -> float:
        """Relative work for a whole tensor of ``shape``, by which owners are chosen: the products with both Gram matrices."""
        return float(prod(shape)) * (sum(shape) if len(shape) > 1 else 1)

    def layout(self, p: Tensor) -> Layout:
        """Layout of ``p`` and its parts."""
        choice("tp_mode", self.tp_mode, self.modes)
        lay = layout_of(p, self._groups, part_sizes=getattr(p, "matrix_parts", None), name=self._name(p))
        return replace(lay, domain=self._groups.domain(tp_modes.working_axes(lay, self.tp_mode)))

    def state_layouts(self, p: Tensor, group: Mapping[str, Any]) -> dict[str, Layout | None]:
        """As in the base class."""
        return {slot: spec.layout(unit.home) for slot, spec, unit in self._slots(p, group)}

    def state_sizes(self, p: Tensor, group: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
        """As in the base class."""
        return {
            slot: sizes(spec.layout(unit.home), spec.dtype_for(p.dtype)) for slot, spec, unit in self._slots(p, group)
        }

    def fresh_state(self, unit: Unit, like: Tensor, group: Mapping[str, Any]) -> dict[str, Tensor]:
        """Initial state of a parameter like ``like``; no entries on ranks that do not work on it."""
        specs = self.whole_specs(unit.layout.shape, group)
        return {slot: spec.allocate(unit.home, like) for slot, spec in specs.items()}

    def mode_of(self, p: Tensor) -> str:
        """The tensor-parallel mode."""
        return self.tp_mode

    def updates(self) -> Iterator[Work]:
        """One rule per parameter; parameters that travel to an owner go in waves."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    yield self._whole_work(p, self._update(p, group), tensors=2)

    def state_changes(self, group: dict[str, Any]) -> Iterator[StateChange]:
        """As in the base class."""
        self._find_homes()
        for p in group["params"]:
            held = self.state.get(p, {})
            for unit in self._parameters[p].units:
                specs = self.whole_specs(unit.layout.shape, group)
                slots = {slot: slot + unit.suffix for slot in specs}
                if not all(name in held for name in slots.values()):
                    # Ranks that do not work on the tensor keep no entries of it, and some checkpoints give them nothing.
                    if unit.home.here:
                        refuse_part(unit.name, held, list(slots.values()))
                    yield partial(self._make_state, p, unit, group)
                    continue
                for slot, spec in specs.items():
                    name, shape = slots[slot], spec.layout(unit.home).local_shape
                    dtype, device = spec.dtype_for(p.dtype), spec.device_for(local(p).device)
                    of_unit = partial(getattr, unit, "name")
                    taken = fitting(of_unit, name, held[name], shape, dtype, device, reshapes=True)
                    if taken is not held[name]:
                        yield partial(held.__setitem__, name, taken)

    def _make_state(self, p: Tensor, unit: Unit, group: Mapping[str, Any]) -> None:
        fresh = self.fresh_state(unit, local(p), group)
        self.state.setdefault(p, {}).update({slot + unit.suffix: x for slot, x in fresh.items()})

    def _whole_work(self, p: Tensor, rule: Rule, *, tensors: int) -> Work:
        """The work of ``rule``, which gathers ``tensors`` tensors of the shape of ``p``."""
        shapes = [unit.layout.shape for unit in self._parameters[p].units if unit.home.travels]
        cost = max(map(self.cost, shapes), default=0.0)
        return Work(self._name(p), rule, cost, tensors * max(map(prod, shapes), default=0))

    def on_wholes(self, p: Tensor, others: list[Tensor], work: Change) -> Rule:
        """Change ``p`` in place by calling ``work`` on the whole parameter, or on each whole part.

        Args:
            p: The parameter.
            others: Further tensors that ``work`` needs whole, each of the shape of this rank's shard.
            work: Receives all of them whole, in float32 at least; it may overwrite ``others`` too.
        """
        lay, shard = self._parameters[p].layout, local(p)
        dtype = reduce(torch.promote_types, (x.dtype for x in others), shard.dtype)
        tensors = (shard, *others)

        def write(out: Tensor) -> None:
            for place, x in zip(out, tensors, strict=True):
                place.copy_(x)

        together = Deferred((len(tensors), *shard.shape), dtype, shard.device, write)
        units = self._parameters[p].units
        if units[0].home.travels and not lay.parts:
            new = [(yield self._on_whole(together, units[0], shard.dtype, work))]
        else:
            pieces = zip(lay.split_parts(together.form()), units, strict=True)
            new = yield [self._on_whole(x, unit, shard.dtype, work) for (x, _), unit in pieces]
        shard.copy_(lay.join_parts(new)[0])

    def _on_whole(self, x: Tensor | Deferred, unit: Unit, dtype: torch.dtype, work: Change) -> Rule:
        failures: list[Exception] = []

        def change(stack: Tensor) -> Tensor:
            wholes = [_in_order(y) for y in stack.to(torch.promote_types(stack.dtype, torch.float32))]
            try:
                if prod(unit.layout.shape):
                    work(unit, *wholes)
            except Exception as error:  # raised after the return trip, for which the other ranks are waiting
                failures.append(error)
            return wholes[0].to(dtype).unsqueeze(0)

        back = yield work_at(unit.home.owner, change, x, unit.layout, batch=1, dtype=dtype)
        for failure in failures:
            failure.add_note(f"{unit.name}: this rank failed to update it; the other ranks went on.")
            raise failure
        return back

    def _update(self, p: Tensor, group: Mapping[str, Any]) -> Rule:
        def work(unit: Unit, whole: Tensor, g: Tensor) -> None:
            slots = self.whole_specs(unit.layout.shape, group)
            state = SimpleNamespace(**{slot: self.state[p][slot + unit.suffix] for slot in slots})
            (g,), rest = decay_first_([whole], [g], group)
            self.update_whole_(whole, g, state, rest, unit.name)

        return self.on_wholes(p, [local_gradient(p)], work)

    def _slots(self, p: Tensor, group: Mapping[str, Any]) -> Iterator[tuple[str, WholeState, Unit]]:
        self._find_homes()
        for unit in self._parameters[p].units:
            for slot, spec in self.whole_specs(unit.layout.shape, group).items():
                yield slot + unit.suffix, spec, unit

    def _find_homes(self) -> None:
        """Give every parameter without a home one: the costliest first, each to the rank with the least work so far."""
        layouts = {}
        for group in self.param_groups:
            for p in group["params"]:
                if p not in self._parameters or self._parameters[p].layout.local_shape != local(p).shape:
                    self.check(p, group)
                    layouts[p] = self.layout(p)
        units: dict[Tensor, dict[int, Unit]] = {p: {} for p in layouts}
        parts = [
            (part, p, k, f"#{k}" if lay.parts else "")
            for p, lay in layouts.items()
            for k, (_, part) in enumerate(lay.split_parts(local(p).unsqueeze(0)))
        ]
        before = self._owners_before(parts)
        for part, p, k, suffix in sorted(parts, key=lambda entry: -self.cost(entry[0].shape)):
            domain, owner = part.domain, before.get((id(p), suffix))
            assert domain is not None
            if owner is None and self.tp_mode == "owner" and domain.size > 1:
                load = self._loads.setdefault(domain, [0.0] * domain.size)
                owner = deal_to_least(load, self.cost(part.shape))
            units[p][k] = Unit(self._key(p) + suffix, part, Home(domain, owner), suffix)
        for p, by_part in units.items():
            self._parameters[p] = Parameter(layouts[p], tuple(by_part[k] for k in sorted(by_part)))

    def _owners_before(self, parts: list[tuple[Layout, Tensor, int, str]]) -> dict[tuple[int, str], int]:
        """(id of a parameter, suffix of a part) → the owner that holds its state already and stays the owner.

        State is there before its owner is chosen when a parameter replaces another one, as Megatron's float32 copies do.
        """
        holds_state: dict[Domain, dict[tuple[int, str], bool]] = {}
        for part, p, _, suffix in parts if self.tp_mode == "owner" else ():
            state = {k: v for k, v in self.state.get(p, {}).items() if isinstance(v, Tensor) and k.endswith(suffix)}
            if state and part.domain is not None and part.domain.size > 1:
                holds_state.setdefault(part.domain, {})[id(p), suffix] = any(x.numel() for x in state.values())
        owners = {}
        for domain, held in holds_state.items():
            for key, *ranks in zip(held, *domain.gather(list(held.values())), strict=True):
                if sum(ranks) == 1:
                    owners[key] = ranks.index(True)
        return owners


def _in_order(x: Tensor) -> Tensor:
    """``x``, or a copy when its strides or alignment differ from a fresh tensor's, which may change how kernels sum."""
    in_order = x.is_contiguous() and x.data_ptr() % 64 == 0
    return x if in_order else x.clone(memory_format=torch.contiguous_format)
