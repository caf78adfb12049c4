"""State tensors as users and torch's checkpoint code see them: DTensors where the parameter is one."""

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from ...sharding.layout import Layout
from ...sharding.state import StateSpec


def as_state(view: Tensor, p: Tensor, spec: StateSpec, layout: Layout) -> Tensor:
    """A DTensor that shares the memory of ``view`` if ``p`` is a DTensor, so that torch can reshard it; otherwise ``view``.

    A statistic of this rank's block alone (``blockwise`` mode) is no part of a whole tensor and stays a plain tensor.
    """
    if not isinstance(p, DTensor) or (spec.dims != "*" and layout.shape != p.shape):
        return view
    placements: list[Placement] = []
    for placement in p.placements:
        at = _dim_of(spec, placement.dim - p.ndim, p.ndim) if isinstance(placement, Shard | _StridedShard) else None
        if at is None:
            placements.append(Replicate())
        elif isinstance(placement, _StridedShard):
            placements.append(_StridedShard(at, split_factor=placement.split_factor))
        else:
            placements.append(Shard(at))
    shape = torch.Size(spec.layout(Layout.whole(p.shape)).shape)
    stride = torch.empty(shape, dtype=view.dtype, device="meta").stride()
    return DTensor.from_local(view, p.device_mesh, placements, run_check=False, shape=shape, stride=stride)


def _dim_of(spec: StateSpec, parameter_dim: int, ndim: int) -> int | None:
    """The dim of the state that is sharded with ``parameter_dim``, or None."""
    if spec.dims == "*":
        return parameter_dim + ndim
    sharded = [d if c.islower() else None for c, d in zip(spec.dims, spec.follows, strict=True)]
    return sharded.index(parameter_dim) if parameter_dim in sharded else None
