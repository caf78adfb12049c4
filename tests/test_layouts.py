"""The headline: on every layout and in every exact mode an optimizer takes the step of the unsharded model."""

from dataclasses import replace
from inspect import signature
from typing import Any

import pytest
import torch

from core.optimizer.emerging_optimizers import list_optimizers
from core.optimizer.registry import entry_of
from tests.support.sharding import CUTS, REQUIRED, sharded, unsharded
from tests.support.variants import VARIANTS

STEPS = 10
THOROUGH = ("muon", "adaptive_muon", "lamb", "shampoo")
"""One rule for each way to the whole, tried on every cut with the first of its settings: the first of them by day, the others
behind the marker ``soak``. All others are tried on :data:`REQUIRED`.
"""


def cases(size: int) -> list[Any]:
    """Cut, name and settings; whatever is registered."""
    found: list[tuple[str, str, dict[str, Any]]] = []
    long: list[tuple[str, str, dict[str, Any]]] = []
    for name in list_optimizers():
        entry = entry_of(name)
        cls: Any = entry.optimizer_cls
        any_shape = not entry.default_param_overrides
        matrices = [cut for cut in CUTS[size] if not cut.startswith("any shape")]
        required = REQUIRED[size] if cls.kind != "elementwise" else ("rows", "columns")
        shapes = [cut for cut in CUTS[size] if any_shape and cut.startswith("any shape")]
        modes = [{"tp_mode": mode} for mode in cls.modes] or [{}]
        for i, kwargs in enumerate(VARIANTS.get(name, [{}])):
            cuts = matrices if name == THOROUGH[0] and i == 0 else required
            found += [(cut, name, {**kwargs, **mode}) for cut in (*cuts, *shapes) for mode in modes]
            rest = [cut for cut in matrices if cut not in cuts] if name in THOROUGH and i == 0 else []
            long += [(cut, name, {**kwargs, **mode}) for cut in rest for mode in modes]
    found += [
        ("rows", "muon", {"tp_mode": mode, "use_decoupled_weight_decay": False, "nesterov": False})
        for mode in ("duplicated", "distributed", "owner")
    ]

    def param(case: tuple[str, str, dict[str, Any]], *marks: Any) -> Any:
        return pytest.param(*case, id="-".join([case[0], case[1], *map(str, case[2].values())]), marks=marks)

    return [*map(param, found), *(param(case, pytest.mark.soak) for case in long)]


cached: dict[Any, list[torch.Tensor]] = {}


def check(world: Any, cut_name: str, name: str, kwargs: dict[str, Any]) -> None:
    cut, cls = CUTS[world.size][cut_name], entry_of(name).optimizer_cls
    only_float32 = getattr(cls, "float32_only", False)
    if only_float32:
        cut = replace(cut, dtype=torch.float32)
    got, shard = sharded(name, cut, STEPS, world, **kwargs)
    key = (name, str(cut.shapes), str(cut.attributes), str({k: v for k, v in kwargs.items() if k != "tp_mode"}))
    if key not in cached:
        plain = {k: v for k, v in kwargs.items() if k != "tp_mode"}
        cached[key] = unsharded(name, cut, STEPS, **plain)
    tolerance = 1e-5 if only_float32 else 1e-9
    for mine, whole in zip(got, cached[key], strict=True):
        assert mine.isfinite().all()
        torch.testing.assert_close(mine, shard(whole), rtol=tolerance, atol=tolerance * float(whole.abs().mean()))


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize(("cut", "name", "kwargs"), cases(2))
def test_layout_does_not_change_training_on_2_ranks(world, cut, name, kwargs):
    check(world, cut, name, kwargs)


@pytest.mark.mpi(min_size=4)
@pytest.mark.parametrize(("cut", "name", "kwargs"), cases(4))
def test_layout_does_not_change_training_on_4_ranks(world, cut, name, kwargs):
    check(world, cut, name, kwargs)


@pytest.mark.parametrize("name", list_optimizers())
def test_an_optimizer_says_what_it_asks_of_other_ranks(name):
    cls: Any = entry_of(name).optimizer_cls
    assert cls.kind in ("elementwise", "reducing", "matrix")
    assert bool(cls.modes) == ("tp_mode" in signature(cls).parameters)
