"""Process groups by name, and groups that join several of them."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Self

import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import _world

TEAM = "team"
"""Name of the axis along which a team of owners cuts a matrix."""


@dataclass(frozen=True)
class Axis:
    """One axis of the device mesh, as seen from this rank.

    Attributes:
        name: ``tp``, ``dp``, ``pp``, …
        ranks: Global ranks along the axis, in axis order.
        index: This rank's position on the axis.
        group: Process group of the axis; None stands for a single rank.
        joins: The mesh axes that it joins, when a dim is cut over several; empty for an axis of the mesh itself.
    """

    name: str
    ranks: tuple[int, ...] = (0,)
    index: int = 0
    group: ProcessGroup | None = field(default=None, compare=False)
    joins: "tuple[Axis, ...]" = ()

    @property
    def of_mesh(self) -> "tuple[Axis, ...]":
        """The mesh axes that it joins; the axis itself when it is an axis of the mesh."""
        return self.joins or (self,)

    @property
    def size(self) -> int:
        """Number of ranks along the axis."""
        return len(self.ranks)

    @classmethod
    def of(cls, name: str, group: ProcessGroup | None) -> Self:
        """The axis that ``group`` spans; a single rank for None."""
        if group is None:
            return cls(name)
        return cls(name, tuple(dist.get_process_group_ranks(group)), dist.get_rank(group), group)


def by_name(axes: Iterable[Axis]) -> tuple[Axis, ...]:
    """``axes`` in the order in which domains are made of them."""
    return tuple(sorted(axes, key=lambda axis: axis.name))


@dataclass(frozen=True)
class Domain:
    """The ranks that together hold every shard and every copy of a tensor.

    Attributes:
        axes: Names of the axes that it joins.
        ranks: Global ranks of ``group``, in group order.
        coords: For each rank of ``group``, in group order, its index on each axis.
        index: This rank's position in ``group``.
        team: This rank's team, an axis of consecutive ranks that work on a matrix together; None when each works alone.
        group: Joint process group; None stands for a single rank.
    """

    axes: tuple[str, ...]
    ranks: tuple[int, ...]
    coords: tuple[tuple[int, ...], ...]
    index: int
    team: Axis | None = None
    group: ProcessGroup | None = field(default=None, compare=False)

    @property
    def size(self) -> int:
        """Number of ranks."""
        return len(self.coords)

    def gather[T](self, value: T) -> list[T]:
        """``value`` of every rank, in group order; all of them must call. It is pickled: use it for set-up and errors."""
        return [value] if self.group is None else gather(value, self.group)

    @property
    def team_size(self) -> int:
        """Ranks that work on one matrix together."""
        return 1 if self.team is None else self.team.size

    @property
    def teams(self) -> int:
        """Number of teams, or of ranks when each works alone."""
        return self.size // self.team_size


@dataclass
class ProcessGroupCollection:
    """Process groups by Megatron's names. A field that is None is an axis of size one.

    Attributes:
        tp: Tensor-parallel group: the ranks that split a parameter.
        pp: Pipeline-parallel group.
        dp: Data-parallel group: the ranks that hold the same shard.
        expt_tp: Tensor-parallel group of expert parameters.
        expt_dp: Data-parallel group of expert parameters.
    """

    tp: ProcessGroup | None = None
    pp: ProcessGroup | None = None
    dp: ProcessGroup | None = None
    expt_tp: ProcessGroup | None = None
    expt_dp: ProcessGroup | None = None
    _domains: dict[tuple[Axis, ...], Domain] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def from_mesh(cls, mesh: DeviceMesh) -> Self:
        """The groups of a mesh whose axes are called ``tp``, ``pp``, ``dp``, ``expt_tp`` or ``expt_dp``.

        Raises:
            ValueError: for an axis of another name.
        """
        names = tuple(mesh.mesh_dim_names or ())
        known = {"tp", "pp", "dp", "expt_tp", "expt_dp"}
        if unknown := set(names) - known:
            raise ValueError(f"device mesh axes {sorted(unknown)} are unknown; name the axes among {sorted(known)}.")
        groups: dict[str, Any] = {name: mesh.get_group(name) for name in names}
        return cls(**groups)

    @classmethod
    def from_any(cls, groups: Any) -> "ProcessGroupCollection":
        """``groups`` itself, or the groups in another object with these attributes, such as Megatron-Core's collection.

        Raises:
            TypeError: for a process group or a dict, which have no such attributes and would stand for no groups at all.
            ValueError: for Megatron-Core's generalized tensor parallelism, whose shards of weights are padded.
        """
        if isinstance(groups, ProcessGroupCollection):
            return groups
        if isinstance(groups, ProcessGroup | Mapping):
            raise TypeError(
                f"pg_collection is a {type(groups).__name__}, but must be a collection of process groups; write "
                f"ProcessGroupCollection(tp=…, dp=…)."
            )
        for axis in ("gtp_remat", "expt_gtp_remat"):
            group = getattr(groups, axis, None)
            if group is not None and group.size() > 1:
                raise ValueError(
                    f"{group.size()} ranks of {axis} hold rows of each weight, and would step them as if they were whole "
                    f"matrices. Leave generalized tensor parallelism out."
                )
        names = [f.name for f in fields(cls) if not f.name.startswith("_")]
        taken: dict[str, Any] = {name: getattr(groups, name, None) for name in names}
        return cls(**taken)

    def axis(self, name: str) -> Axis:
        """This rank's view of the axis called ``name``."""
        return Axis.of(name, getattr(self, name))

    def domain(self, axes: tuple[Axis, ...]) -> Domain:
        """The ranks that ``axes`` span together.

        A process group is made, once, when more than one axis has several ranks. All ranks of the domain must call in the same
        order, as they do when they build the same optimizer.
        """
        axes = tuple(axis for axis in axes if axis.size > 1)
        if axes not in self._domains:
            self._domains[axes] = _join(axes)
        return self._domains[axes]

    def teamed(self, domain: Domain, size: int) -> Domain:
        """``domain`` in teams of ``size`` ranks; ``size`` divides their number. All ranks must call in the same order."""
        assert size > 1 and domain.size % size == 0
        first = domain.index // size * size
        ranks = domain.ranks[first : first + size]
        return replace(domain, team=Axis(TEAM, ranks, domain.index - first, group=_group_of(ranks, [domain.group])))


def gather[T](value: T, group: ProcessGroup | None = None) -> list[T]:
    """``value`` of every rank of ``group``, or of the whole job for None, in rank order; it is pickled.

    Without torch.distributed there is one rank.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return [value]
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def world_size() -> int:
    """Number of processes; 1 without torch.distributed."""
    return dist.get_world_size() if dist.is_initialized() else 1


def _join(axes: tuple[Axis, ...]) -> Domain:
    names = tuple(axis.name for axis in axes)
    if not axes:
        return Domain(names, (0,), ((),), 0)
    if len(axes) == 1:
        (axis,) = axes
        return Domain(names, axis.ranks, tuple((i,) for i in range(axis.size)), axis.index, group=axis.group)
    first, last = _join(axes[:-1]), axes[-1]
    # A rank knows only its own line along the last axis; its neighbours on the other axes know the parallel ones.
    lines: list[Any] = [None] * first.size
    dist.all_gather_object(lines, last.ranks, group=first.group)
    ranks = sorted({rank for line in lines for rank in line})
    group = _group_of(tuple(ranks), [axis.group for axis in axes])
    coords: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(coords, tuple(axis.index for axis in axes), group=group)
    return Domain(names, tuple(ranks), tuple(coords), dist.get_rank(group), group=group)


_GROUPS: dict[tuple[int, ...], ProcessGroup] = {}
"""Joint groups by their ranks. Each costs connections, so two optimizers, or a thousand tests, share them."""


def _group_of(ranks: tuple[int, ...], lines: Sequence[ProcessGroup | None]) -> ProcessGroup:
    """The process group of ``ranks``, all of which call. A value gathered over each of ``lines`` in turn reaches them all."""
    known = _GROUPS.get(ranks)
    try:
        alive = known is not None and dist.get_process_group_ranks(known) == list(ranks)
    except KeyError:  # the group belongs to a job that has ended in this process
        alive = False
    if not alive:
        _agree_on_a_name(lines)
        _GROUPS[ranks] = dist.new_group(list(ranks), use_local_synchronization=True)
    return _GROUPS[ranks]


def _agree_on_a_name(lines: Sequence[ProcessGroup | None]) -> None:
    """Make sure that the ranks that ``lines`` connect give a new group the same name.

    torch names a group by the number of groups that the rank is in already, and ranks with different names wait for ever. A rank
    that is in fewer groups (on a later pipeline stage, which has no embeddings) makes more groups of itself alone.
    """
    most = len(_world.pg_names)
    for line in lines:
        counts: list[Any] = [None] * dist.get_world_size(line)
        dist.all_gather_object(counts, most, group=line)
        most = max(counts)
    for _ in range(most - len(_world.pg_names)):
        dist.new_group([dist.get_rank()], use_local_synchronization=True)
