"""One parameter of a comparison: brought whole to one rank, stepped there without process groups, and compared on all ranks."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .. import engine
from ..sharding.layout import Layout
from ..sharding.parameter_layout import local, local_gradient
from ..sharding.requests import Move, Rule
from .probe_bound import entry_bounds
from .steps.base import ShardedStep
from .unsharded import step_unsharded, unsharded

_CUT = {"tensor_model_parallel", "partition_dim", "partition_stride", "expert_tp", "allreduce"}
"""Attributes that say how a parameter is cut, which the whole one must not have."""


@dataclass(frozen=True)
class Row:
    """What came of one parameter; differences are between entries of the parameter after the step.

    Attributes:
        parameter: Name of the parameter.
        optimizer: Name of its optimizer.
        difference: Difference at the entry where it is largest in proportion to its bound.
        bound: Bound of that entry (:func:`.probe_bound.entry_bounds`).
        layout: How the parameter is cut, and the mode in which its shards come together.
    """

    parameter: str
    optimizer: str
    difference: float
    bound: float
    layout: str

    @property
    def share(self) -> float:
        """Difference in parts of the bound."""
        return self.difference / self.bound if self.bound else float("inf") if self.difference else 0.0


@dataclass
class Place:
    """A parameter of this rank, and where it is stepped.

    Attributes:
        name: Name of the parameter.
        p: The parameter.
        layout: Its layout, with the ranks that hold shards and copies as domain.
        optimizer: Name of its optimizer.
        member: Its optimizer.
        group: Its parameter group.
        mode: Mode in which its shards come together.
    """

    name: str
    p: Tensor
    layout: Layout
    optimizer: str
    member: Optimizer
    group: dict[str, Any]
    mode: str


@dataclass
class Sample:
    """A parameter that is compared.

    Attributes:
        place: The parameter.
        owner: Index in its domain of the rank that steps it whole.
        alone: Optimizer of the whole parameter before the step; None on other ranks.
    """

    place: Place
    owner: int
    alone: Optimizer | None


def sampled(place: Place, turn: int) -> Sample:
    """Bring the parameter, with its gradient and state, to the rank whose ``turn`` it is. All ranks of its domain call this."""
    owner = turn % _size(place.layout)
    arrived = engine.run([(place.name, _brought(place, owner))])[0]
    return Sample(place, owner, None if arrived is None else _alone(place, *arrived))


def _brought(place: Place, owner: int) -> Rule:
    """The whole parameter, its gradient and its state, on the owner; None elsewhere."""
    p, member = place.p, place.member
    state = {name: x for name, x in member.state.get(p, {}).items() if isinstance(x, Tensor)}
    layouts: Mapping[str, Layout | None] = (
        member.state_layouts(p, place.group)
        if isinstance(member, ShardedStep)
        else {name: place.layout if x.shape == p.shape else Layout.whole(x.shape) for name, x in state.items()}
    )
    device = local(p).device
    wholes = yield [
        _to_owner(local(p), place.layout, place.layout, owner, device),
        _to_owner(local_gradient(p), place.layout, place.layout, owner, device),
        *(
            _to_owner(local(x), layouts[name] or Layout.whole(x.shape), place.layout, owner, device)
            for name, x in state.items()
        ),
    ]
    if wholes[0] is None:
        return None
    others = {name: x for name, x in member.state.get(p, {}).items() if name not in state}
    return wholes[0], wholes[1], dict(zip(state, wholes[2:], strict=True)) | others


def _to_owner(x: Tensor, layout: Layout, parameter: Layout, owner: int, device: torch.device) -> Rule:
    """A copy of the whole tensor with the shard ``x`` on the owner; None elsewhere."""
    layout = _among(parameter, layout)
    assert layout.domain is not None
    if layout.domain.size == 1:
        return x.detach().clone()
    # Backends move numbers of few dtypes, and tensors of their device only.
    travels = x.detach().to(device, x.dtype if x.is_floating_point() else torch.int64)
    arrived = yield Move(travels[None], 1, layout.placement, layout.owners[owner], travels.dtype, device)
    return None if arrived is None else arrived[0].clone().to(x.device, x.dtype)


def _among(parameter: Layout, layout: Layout) -> Layout:
    """``layout`` of a state tensor, with the domain of the parameter."""
    domain = parameter.domain
    assert domain is not None
    (axis, *_) = (*layout.axes, None)
    if axis is not None and axis not in parameter.axes:
        # State of an owner is cut over all ranks of the domain, as if they were one axis.
        domain = replace(domain, axes=(axis.name,), coords=tuple((r,) for r in range(domain.size)))
    return replace(layout, domain=domain)


def _alone(place: Place, whole: Tensor, gradient: Tensor, state: dict[str, Any]) -> Optimizer:
    p: Any = nn.Parameter(whole)
    p.grad = gradient
    for attribute, value in vars(place.p).items():
        if attribute not in _CUT and not attribute.startswith("_"):
            setattr(p, attribute, value)
    return unsharded(place.member, place.group, place.name, p, state)


def stepped(sample: Sample) -> tuple[list[Tensor] | None, str]:
    """The whole parameter after the step, and the bound of each of its entries, on the owner; and an error."""
    if sample.alone is None:
        return None, ""
    (p,) = sample.alone.param_groups[0]["params"]
    before = p.detach().clone()
    try:
        step_unsharded(sample.alone, sample.place.member)
    except Exception as error:  # raised when the other ranks have what they wait for
        return [before, before], f"{sample.place.name}: {type(error).__name__}: {error}"
    return [p.detach(), entry_bounds(before, p.detach(), sample.place.member, sample.place.mode)], ""


def compared(sample: Sample, whole: list[Tensor] | None) -> Row:
    """Compare this rank's shard with the result of the owner."""
    place = sample.place
    mine = local(place.p).detach()
    wide = torch.promote_types(mine.dtype, torch.float32)
    wanted, bounds = engine.run([(place.name, _returned(whole, place.layout, sample.owner, mine, wide))])[0]
    equal = (mine == wanted) | (mine.isnan() & wanted.isnan())
    difference = torch.where(equal, 0, (mine.double() - wanted.double()).abs().nan_to_num(torch.inf)).flatten()
    if not difference.numel():
        return Row(place.name, place.optimizer, 0.0, 0.0, _layout(place))
    bounds = bounds.double().flatten()
    worst = int(torch.where(difference > 0, difference / bounds, 0).argmax())
    return Row(place.name, place.optimizer, float(difference[worst]), float(bounds[worst]), _layout(place))


def _returned(whole: list[Tensor] | None, layout: Layout, owner: int, like: Tensor, wide: torch.dtype) -> Rule:
    if _size(layout) == 1:
        assert whole is not None
        return whole
    wanted, bounds = (None, None) if whole is None else (whole[0][None], whole[1].to(wide)[None])
    there, here = layout.owners[owner], layout.placement
    answers = yield [
        Move(wanted, 1, there, here, like.dtype, like.device),
        Move(bounds, 1, there, here, wide, like.device),
    ]
    return [answer[0] for answer in answers]


def _size(layout: Layout) -> int:
    return 1 if layout.domain is None else layout.domain.size


def _layout(place: Place) -> str:
    return f"{place.layout.describe()}, {place.mode}"
