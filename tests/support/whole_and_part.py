"""Weights and gradients of a small model, and this rank's part of them on a layout of tp, pp and dp."""

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Shard

from core.process_groups_config import ProcessGroupCollection
from tests.support.sharding import whole_gradient

SHAPES = {"0.weight": (16, 8), "1.weight": (8, 16), "2.weight": (16, 16), "3.bias": (16,)}
LAYOUTS = [{"tp": 2}, {"pp": 2}, {"dp": 2}, {"pp": 2, "tp": 2}, {"dp": 2, "tp": 2}, {"tp": 4}, {"pp": 2, "dp": 2}]


def part(world, axes, dtensor, gradients):
    """This rank's module, groups, and what cuts a whole tensor: rows over tp, parameters alternately over pp; 1-D is copied."""
    mesh = world.mesh(tuple(axes.values()), tuple(axes)) if axes else None
    at = {axis: mesh.get_local_rank(axis) for axis in axes}
    groups = ProcessGroupCollection.from_mesh(mesh) if mesh else ProcessGroupCollection()

    def cut(whole):
        if "tp" not in axes or whole.ndim < 2:
            return whole.clone()
        piece = whole.chunk(axes["tp"], 0)[at["tp"]].clone()
        if dtensor:
            return DTensor.from_local(piece, mesh["tp"], [Shard(0)], shape=whole.shape, stride=whole.stride())
        return piece

    params = {}
    for i, (name, shape) in enumerate(SHAPES.items()):
        if "pp" in axes and i % 2 != at["pp"]:
            continue
        weight = torch.linspace(-1, 1, torch.Size(shape).numel(), dtype=torch.float64).reshape(shape)
        params[name] = nn.Parameter(cut(weight))
        if len(shape) == 2 and "tp" in axes and not dtensor:
            params[name].tensor_model_parallel, params[name].partition_dim = True, 0
        params[name].grad = cut(gradients[name])
    return params, groups, cut


def gradients(step=5):
    return {name: whole_gradient(i, step, shape) for i, (name, shape) in enumerate(SHAPES.items())}
