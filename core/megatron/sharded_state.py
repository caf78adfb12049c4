"""Optimizer state in Megatron-Core's ``torch_dist`` checkpoints, also state that is not shaped like its parameter.

Megatron-Core assumes that each state tensor is cut like its parameter. Row statistics and Kronecker factors are not, and some are
on one rank only. They are shown to it as boxes of a whole tensor of their own, under the parameter's key.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..checkpoint.boxes import cut
from ..optimizer.steps.bookkeeping import as_tensor
from ..sharding.layout import Layout
from .upstream import CHECKPOINT, MAPPING, lookup, patch

_LAYOUTS = "shardstep_layouts"
"""Attribute of a tensor in a ``state_dict``: where it lives, and where its parameter does."""

_STEP, OWNERS_STEP = "step", "owners_step"
"""Megatron-Core takes ``step`` for one number that all parameters have; an owner's is on no other rank."""


def say_layouts(optimizer: Optimizer) -> Optimizer:
    """Let ``optimizer.state_dict()`` say where state lives that is not cut like its parameter."""
    if hasattr(optimizer, "state_layouts"):
        optimizer.register_state_dict_post_hook(_mark)
        optimizer.register_load_state_dict_pre_hook(_rename_back)
    return optimizer


def _rename_back(optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
    for packed in state_dict["param_groups"]:
        packed.pop(_STEP, None)
    params = [p for group in optimizer.param_groups for p in group["params"]]
    ids = [index for packed in state_dict["param_groups"] for index in packed["params"]]
    for p, index in zip(params, ids, strict=False):  # where these differ, torch says so
        state = state_dict["state"].get(index, {})
        if OWNERS_STEP in state:
            state[_STEP] = state.pop(OWNERS_STEP)
        elif _STEP in state:  # which may be another optimizer's
            state[_STEP] = as_tensor(_STEP, _STEP, state[_STEP]).view(optimizer.state[p][_STEP].shape)


def _mark(optimizer: Any, state_dict: dict[str, Any]) -> None:
    for group, packed in zip(optimizer.param_groups, state_dict["param_groups"], strict=True):
        for p, index in zip(group["params"], packed["params"], strict=True):
            home = optimizer.layout(p)
            # torch hands out the optimizer's own dict.
            state = state_dict["state"][index] = dict(state_dict["state"].get(index, {}))
            for slot, layout in optimizer.state_layouts(p, group).items():
                if layout is None:
                    raise ValueError(
                        f"{slot} of a parameter of shape {tuple(p.shape)} belongs to this rank's block (mode blockwise), which "
                        f"no other layout could load; save with tp_mode owner, duplicated or distributed."
                    )
                if slot == _STEP and not layout.shape:
                    if _STEP not in packed:
                        packed[_STEP] = int(state[slot])
                    continue
                if (layout.shape, layout.splits) == (home.shape, home.splits):
                    continue
                marked = state[slot].view_as(state.pop(slot))
                setattr(marked, _LAYOUTS, (layout, home))
                # What is on another rank is not in this one's checkpoint; loading makes it anew, without entries.
                if marked.numel():
                    state[OWNERS_STEP if slot == _STEP else slot] = marked
            if not state:
                state_dict["state"].pop(index, None)


def take_our_state() -> None:
    """Let Megatron-Core's checkpoints hold state of any shape. A second call changes nothing."""
    patch(CHECKPOINT, "make_sharded_optimizer_tensor", _sharded)


def _sharded(theirs: Callable[..., Any], model_param: Any, optim_param: Tensor, prefix: str) -> Any:
    """Megatron-Core's ``make_sharded_optimizer_tensor``, which also serves tensors that say where they live."""
    layouts = getattr(optim_param, _LAYOUTS, None)
    if layouts is None:
        return theirs(model_param, optim_param, prefix)
    (factory,) = lookup(MAPPING, "ShardedTensorFactory")
    layout, home = layouts
    stacked = _first_shard(model_param)
    build = partial(_boxes, layout=layout, stacked=stacked)
    return factory(
        key=f"{prefix}.{model_param.key}",
        data=optim_param,
        build_fn=build,
        merge_fn=partial(_join, layout=layout, like=optim_param),
        replica_id=_replica(layout, home),
    )


def _first_shard(model_param: Any) -> Any:
    """A ``ShardedTensor`` of the parameter, which may be a factory of several."""
    while hasattr(model_param, "build"):
        built = model_param.build()
        model_param = next(iter(built.values() if isinstance(built, dict) else built))
    return model_param


def _replica(layout: Layout, home: Layout) -> tuple[int, int, int]:
    """Replica number: zeros on the one rank that writes, in Megatron-Core's order of pipeline, tensor and data."""
    cut_over = {name for axis in layout.axes for name in axis.name.split("+")}
    copies = {axis.name: axis.index for axis in (*home.copies, *home.axes) if axis.name not in cut_over}
    tp = next((i for name, i in copies.items() if name.endswith("tp")), 0)
    dp = next((i for name, i in copies.items() if name.endswith("dp")), 0)
    return 0, tp, dp


def _boxes(key: str, x: Tensor, replica_id: Any, _: Any, *, layout: Layout, stacked: Any) -> dict[str, Any]:
    """A shard for each box that this rank holds, behind the axes in which Megatron-Core stacks layers."""
    (sharded,) = lookup(MAPPING, "ShardedTensor")
    ahead = stacked.prepend_axis_num
    return {
        ",".join(map(str, offset)): sharded(
            key=key,
            # Where the grid is not regular, the axes ahead must be the data's own.
            data=box.contiguous()[(None,) * ahead],
            dtype=box.dtype,
            local_shape=(1,) * ahead + tuple(box.shape),
            global_shape=(*stacked.global_shape[:ahead], *layout.shape),
            global_offset=(*stacked.global_offset[:ahead], *offset),
            axis_fragmentations=None,
            replica_id=replica_id,
        )
        for offset, box in cut(x, layout).items()
        if box.numel()
    }


def _join(boxes: dict[str, Tensor], *, layout: Layout, like: Tensor) -> Tensor:
    """Inverse of :func:`_boxes`."""
    out = torch.empty_like(like)
    for offset, box in cut(out, layout).items():
        if box.numel():
            box.copy_(boxes[",".join(map(str, offset))].view(box.shape))
    return out
