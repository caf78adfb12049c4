"""Every optimizer, saved on one layout and resumed on another, goes on as if nothing had happened."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from core.checkpoint import load, save
from core.optimizer.emerging_optimizers import list_optimizers
from core.optimizer.registry import entry_of
from tests.support.sharding import (
    ANY_SHAPE,
    CUTS,
    build,
    cutter,
    parameters,
    unsharded,
    whole_gradient,
    whole_parameters,
)
from tests.support.variants import VARIANTS

HALF = 4
BEFORE, AFTER = "tp rows, dp columns", "columns"


DAILY = set(
    "adamw adafactor lamb lion schedule_free_adamw sophia adamw_sr apollo micro_adam came soap shampoo quad eo_soap muon "
    "adaptive_muon".split()
)
"""One of each way to keep state; the others take long to go through."""


def model_of(params: list[nn.Parameter]) -> nn.Module:
    model = nn.Module()
    for i, p in enumerate(params):
        model.register_parameter(f"weight{i}", p)
    return model


def go_on(name: str, cut: Any, world: Any, path: Path, steps: range, kwargs: dict[str, Any]) -> list[torch.Tensor]:
    """Steps of the optimizer on ``cut``, from the checkpoint unless they begin at 0; saves at the end. Returns shards."""
    parameter, _, groups = cutter(cut, world)
    # A run that resumes has other weights at first.
    wholes = [w if steps.start == 0 else torch.ones_like(w) for w in whole_parameters(cut.shapes)]
    params = parameters(wholes, parameter, cut)
    optimizer, model = build(name, params, cut, pg_collection=groups, **kwargs), model_of(params)
    if steps.start:
        load(path, model_chunks=[model], optimizer=optimizer)
    for step in steps:
        for i, p in enumerate(params):
            g = whole_gradient(i, step, cut.shapes[i])
            p.grad = None if g is None else parameter(g.to(cut.dtype))
        optimizer.step()
    save(path, step=steps.stop, model_chunks=[model], optimizer=optimizer)
    return [p.to_local().detach() if isinstance(p, DTensor) else p.detach() for p in params]


@pytest.mark.mpi(min_size=4)
@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        pytest.param(name, VARIANTS.get(name, [{}])[-1], id=name, marks=() if name in DAILY else pytest.mark.soak)
        for name in list_optimizers()
    ],
)
def test_another_layout_goes_on(world, tmp_path, name, kwargs):
    folder: list[Any] = [str(tmp_path)]
    dist.broadcast_object_list(folder)
    only_float32 = getattr(entry_of(name).optimizer_cls, "float32_only", False)
    any_shape = not entry_of(name).default_param_overrides
    dtype = torch.float32 if only_float32 else torch.float64
    cuts = [replace(CUTS[4][cut], dtype=dtype) for cut in (BEFORE, AFTER)]
    if any_shape:
        cuts = [replace(cut, shapes=(*cut.shapes, *ANY_SHAPE["shapes"])) for cut in cuts]
    modes = entry_of(name).optimizer_cls.modes
    settings = [kwargs | ({"tp_mode": mode} if modes else {}) for mode in (modes or ("",) * 2)[-2:]]
    go_on(name, cuts[0], world, Path(folder[0]), range(HALF), settings[0])
    got = go_on(name, cuts[1], world, Path(folder[0]), range(HALF, 2 * HALF), settings[1])
    _, shard, _ = cutter(cuts[1], world)
    tolerance = 1e-5 if only_float32 else 1e-9
    for mine, whole in zip(got, unsharded(name, cuts[1], 2 * HALF, **kwargs), strict=True):
        torch.testing.assert_close(mine, shard(whole), rtol=tolerance, atol=tolerance * float(whole.abs().mean()))
