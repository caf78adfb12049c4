"""The headline: on every layout and in every exact mode an optimizer takes the step of the unsharded model."""

from inspect import signature
from typing import Any

import pytest
import torch

from core.optimizer.emerging_optimizers import _entry, list_optimizers
from tests.sharding import CUTS, cached_unsharded, sharded

STEPS = 10
EXACT = ("duplicated", "distributed", "owner")
VARIANTS = {
    "adaptive_muon": [{"moment2_method": method} for method in ("adamuon", "normuon", "namo")],
    "sgd": [{"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}],
}
"""Settings to try of optimizers that have several rules; the others run as they are, by being registered."""

ALL = [(name, kwargs) for name in list_optimizers() for kwargs in VARIANTS.get(name, [{}])]
MATRIX = [(name, kwargs) for name, kwargs in ALL if "tp_mode" in signature(_entry(name).optimizer_cls).parameters]
ELEMENTWISE = [case for case in ALL if case not in MATRIX]


def cases(size: int) -> list[Any]:
    matrix = [
        (cut, name, {**kwargs, "tp_mode": mode}) for cut in CUTS[size] for name, kwargs in MATRIX for mode in EXACT
    ]
    elementwise = [(cut, name, kwargs) for cut in ("rows", "columns", "dtensor rows") for name, kwargs in ELEMENTWISE]
    extra = [
        ("rows", "muon", {"tp_mode": mode, "use_decoupled_weight_decay": False, "nesterov": False}) for mode in EXACT
    ]
    return [
        pytest.param(*case, id="-".join([case[0], case[1], *map(str, case[2].values())]))
        for case in matrix + elementwise + extra
    ]


def check(world: Any, cut: str, name: str, kwargs: dict[str, Any]) -> None:
    got, shard = sharded(name, CUTS[world.size][cut], STEPS, world, **kwargs)
    plain = tuple((k, v) for k, v in kwargs.items() if k != "tp_mode")
    for mine, whole in zip(got, cached_unsharded(name, world.size, cut, STEPS, plain), strict=True):
        torch.testing.assert_close(mine, shard(whole), rtol=1e-9, atol=1e-9 * float(whole.abs().mean()))


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize(("cut", "name", "kwargs"), cases(2))
def test_layout_does_not_change_training_on_2_ranks(world, cut, name, kwargs):
    check(world, cut, name, kwargs)


@pytest.mark.mpi(min_size=4)
@pytest.mark.parametrize(("cut", "name", "kwargs"), cases(4))
def test_layout_does_not_change_training_on_4_ranks(world, cut, name, kwargs):
    check(world, cut, name, kwargs)
