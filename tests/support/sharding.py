"""Whole parameters, how a layout cuts them, and training on the cuts: what the layout tests share."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from core.optimizer.registry import entry_of
from core.process_groups_config import ProcessGroupCollection

SHAPES = ((24, 64), (64, 24), (32, 32), (24, 64), (16, 8), (64, 24))
"""Wide, tall and square; some twice, so that they share a bucket."""


@dataclass(frozen=True)
class Cut:
    """A way to cut every whole parameter.

    Attributes:
        mesh: Sizes of the mesh axes, by name.
        dims: Per mesh axis, the dim of the parameter that it cuts; None for copies.
        dtensor: Whether parameters are DTensors or plain tensors with Megatron's attributes.
        shapes: Whole shapes.
        attributes: Set on every parameter.
        kwargs: For the optimizer.
        dtype: Of the parameters.
    """

    mesh: Mapping[str, int]
    dims: Mapping[str, int | None]
    dtensor: bool = False
    shapes: tuple[tuple[int, ...], ...] = SHAPES
    attributes: Mapping[str, Any] = field(default_factory=dict)
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float64

    def shard(self, whole: Tensor, coords: Mapping[str, int]) -> Tensor:
        """The piece of ``whole`` at these positions on the mesh axes."""
        for axis, dim in self.dims.items():
            if dim is not None and dim < whole.ndim:
                blocks = whole.chunk(self.attributes.get("partition_stride", 1), dim)
                pieces = [chunk(block, self.mesh[axis], coords[axis], dim) for block in blocks]
                whole = torch.cat(pieces, dim)
        return whole.contiguous()


def chunk(x: Tensor, parts: int, index: int, dim: int) -> Tensor:
    """As torch.chunk, but empty where that stops short."""
    chunks = x.chunk(parts, dim)
    return chunks[index] if index < len(chunks) else x.narrow(dim, 0, 0)


QKV = {
    "shapes": ((48, 20), (48, 64)),
    "attributes": {"is_qkv": True, "qkv_split_shapes": (8, 2, 2)},
    "kwargs": {"split_qkv": True},
}
ONE_GROUP = {
    "shapes": ((48, 20), (48, 64)),
    "attributes": {"is_qkv": True, "qkv_split_shapes": (32, 8, 8)},
    "kwargs": {"split_qkv": True},
}
GATE_UP = {"shapes": ((64, 24), (64, 64)), "attributes": {"matrix_parts": (32, 32), "partition_stride": 2}}
INTERLEAVED = {"shapes": ((64, 24), (64, 64)), "attributes": {"matrix_parts": (1, 1)}}
ANY_SHAPE = {"shapes": ((24,), (64,), (8, 4, 3, 3), (12, 8, 5), ())}
UNEVEN = {"shapes": ((30, 9), (9, 30), (7, 7), (3, 50))}

CUTS: dict[int, dict[str, Cut]] = {
    size: {
        "rows": Cut({"tp": size}, {"tp": 0}),
        "columns": Cut({"tp": size}, {"tp": 1}),
        "copies": Cut({"dp": size}, {"dp": None}),
        "dtensor rows": Cut({"tp": size}, {"tp": 0}, dtensor=True),
        "dtensor columns": Cut({"tp": size}, {"tp": 1}, dtensor=True),
        "uneven rows": Cut({"tp": size}, {"tp": 0}, dtensor=True, **UNEVEN),
        "uneven columns": Cut({"tp": size}, {"tp": 1}, dtensor=True, **UNEVEN),
        "qkv": Cut({"tp": size}, {"tp": 0}, **QKV),
        "qkv one group": Cut({"tp": size}, {"tp": 0}, **ONE_GROUP),
        "qkv columns": Cut({"tp": size}, {"tp": 1}, **QKV),
        "qkv dtensor": Cut({"tp": size}, {"tp": 0}, dtensor=True, **QKV),
        "gate/up stride": Cut({"tp": size}, {"tp": 0}, **GATE_UP),
        "gate/up interleaved": Cut({"tp": size}, {"tp": 0}, dtensor=True, **INTERLEAVED),
    }
    for size in (2, 4)
}
"""For matrices. By the number of ranks, then by name."""
CUTS[4] |= {
    "tp rows, dp copies": Cut({"dp": 2, "tp": 2}, {"tp": 0, "dp": None}),
    "tp columns, dp copies": Cut({"tp": 2, "dp": 2}, {"tp": 1, "dp": None}),
    "tp rows, dp columns": Cut({"dp": 2, "tp": 2}, {"tp": 0, "dp": 1}, dtensor=True),
    "tp columns, dp rows": Cut({"dp": 2, "tp": 2}, {"tp": 1, "dp": 0}, dtensor=True),
    "qkv tp, dp copies": Cut({"dp": 2, "tp": 2}, {"tp": 0, "dp": None}, **QKV),
    "qkv tp, dp columns": Cut({"dp": 2, "tp": 2}, {"tp": 0, "dp": 1}, dtensor=True, **QKV),
}

REQUIRED = {
    2: ("rows", "columns", "dtensor rows", "uneven columns", "qkv", "gate/up stride"),
    4: ("rows", "columns", "tp rows, dp columns", "tp columns, dp rows", "qkv tp, dp copies"),
}
"""Cuts that suffice for a rule whose way to the whole is tried on all of them with another rule."""

for size in (2, 4):
    CUTS[size] |= {
        "any shape, dim 0": Cut({"tp": size}, {"tp": 0}, **ANY_SHAPE),
        "any shape, dim 1": Cut({"tp": size}, {"tp": 1}, dtensor=True, **ANY_SHAPE),
    }


def whole_parameters(shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
    """Whole weights in float64, the same on every rank."""
    return [_random(("weight", i), shape) for i, shape in enumerate(shapes)]


def whole_gradient(i: int, step: int, shape: tuple[int, ...]) -> Tensor | None:
    """Whole gradient of parameter ``i`` at ``step``; rows and columns differ in size, so a local statistic is a wrong one."""
    if (i, step) == (1, 2):
        return None
    scale = torch.ones(shape, dtype=torch.float64)
    for dim, size in enumerate(shape):
        ends = (0, 1) if dim % 2 == 0 else (1, 0)
        scale *= torch.logspace(*ends, size, dtype=torch.float64).view(-1, *[1] * (len(shape) - dim - 1))
    return _random(("gradient", i, step), shape) * scale


def _random(key: tuple[Any, ...], shape: tuple[int, ...]) -> Tensor:
    generator = torch.Generator().manual_seed(hash(key[1:]) % 2**31 + len(key[0]))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def unsharded(name: str, cut: Cut, steps: int, **kwargs: Any) -> list[Tensor]:
    """Whole weights after ``steps`` on one process."""
    return train(name, whole_parameters(cut.shapes), lambda w: w, cut, steps, **kwargs)


def sharded(
    name: str, cut: Cut, steps: int, world: Any, **kwargs: Any
) -> tuple[list[Tensor], Callable[[Tensor], Tensor]]:
    """This rank's weights after ``steps``, and what cuts a whole tensor as they are cut."""
    parameter, shard, groups = cutter(cut, world)
    wholes = whole_parameters(cut.shapes)
    return train(name, wholes, parameter, cut, steps, pg_collection=groups, **kwargs), shard


def sharded_optimizer(name: str, cut: Cut, world: Any, **kwargs: Any) -> Any:
    """The optimizer of this rank's parameters, before its first step."""
    parameter, _, groups = cutter(cut, world)
    return build(name, parameters(whole_parameters(cut.shapes), parameter, cut), cut, pg_collection=groups, **kwargs)


def cutter(
    cut: Cut, world: Any
) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor], ProcessGroupCollection]:
    """What makes a parameter of a whole tensor, what cuts a whole tensor, and the process groups."""
    mesh = world.mesh(tuple(cut.mesh.values()), tuple(cut.mesh))
    coords = {axis: mesh.get_local_rank(axis) for axis in cut.mesh}

    def shard(whole: Tensor) -> Tensor:
        return cut.shard(whole, coords)

    def parameter(whole: Tensor) -> Tensor:
        piece = shard(whole).clone()
        if cut.dtensor:
            placements: list[Placement] = [
                Replicate() if (d := cut.dims[axis]) is None or d >= whole.ndim else Shard(d) for axis in cut.mesh
            ]
            return DTensor.from_local(piece, mesh, placements, shape=whole.shape, stride=whole.stride())
        dim = cut.dims.get("tp")
        piece.tensor_model_parallel = dim is not None and dim < whole.ndim
        piece.partition_dim = dim if piece.tensor_model_parallel else -1
        return piece

    return parameter, shard, ProcessGroupCollection.from_mesh(mesh)


def train(
    name: str, wholes: list[Tensor], parameter: Callable[[Tensor], Tensor], cut: Cut, steps: int, **kwargs: Any
) -> list[Tensor]:
    """Shards after ``steps`` of the optimizer ``name`` on what ``parameter`` makes of each whole weight and gradient."""
    params = parameters(wholes, parameter, cut)
    optimizer = build(name, params, cut, **kwargs)
    for step in range(steps):
        for i, p in enumerate(params):
            g = whole_gradient(i, step, cut.shapes[i])
            p.grad = None if g is None else parameter(g.to(cut.dtype))
        optimizer.step()
    return [p.to_local().detach() if isinstance(p, DTensor) else p.detach() for p in params]


def parameters(wholes: list[Tensor], parameter: Callable[[Tensor], Tensor], cut: Cut) -> list[torch.nn.Parameter]:
    """This rank's part of each whole weight, with the attributes of ``cut``."""
    params = []
    for whole in wholes:
        p = parameter(whole.to(cut.dtype, copy=True))
        attributes = {**vars(p), **cut.attributes} if not isinstance(p, DTensor) else dict(cut.attributes)
        params.append(torch.nn.Parameter(p))
        for attribute, value in attributes.items():
            setattr(params[-1], attribute, value)
    return params


def build(name: str, params: list[torch.nn.Parameter], cut: Cut, **kwargs: Any) -> Any:
    """The optimizer called ``name``, with the settings of its entry, of ``cut`` and these."""
    cls = entry_of(name).optimizer_cls
    taken = signature(cls).parameters
    accepted = cut.kwargs if "split_qkv" in taken else {}
    decay = {"weight_decay": 0.05} if "weight_decay" in taken else {}
    named = [(f"weight{i}", p) for i, p in enumerate(params)]
    return cls(named, lr=0.1, **{**decay, **accepted, **kwargs})


class Weights(nn.Module):
    """Parameters under dotted names, without a forward."""

    def __init__(self, params: Mapping[str, nn.Parameter]) -> None:
        super().__init__()
        for name, p in params.items():
            module, attribute = name.split(".")
            self.add_module(module, nn.Module()) if module not in self._modules else None
            getattr(self, module).register_parameter(attribute, p)
