"""Optimizers that know only whole tensors: the same bits on every cut, in both modes, for tensors of any number of dims."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from core.checkpoint import load, save
from core.optimizer.emerging_optimizers import _EMERGING_OPTIMIZERS, EmergingOptimizerEntry
from core.optimizer.steps.whole_tensor import WholeState, WholeStep
from core.process_groups_config import ProcessGroupCollection
from core.sharding.parameter_layout import local
from tests.support.sharding import (
    CUTS,
    Cut,
    build,
    cutter,
    parameters,
    sharded,
    unsharded,
    whole_gradient,
    whole_parameters,
)

STEPS = 4


class Whitened(WholeStep):
    """Needs all of a tensor: its Gram matrix's eigenvectors and its norm."""

    def __init__(self, params, lr=0.1, weight_decay=0.0, tp_mode="owner", pg_collection=None):
        self.tp_mode = tp_mode
        super().__init__(params, pg_collection, lr=lr, weight_decay=weight_decay)

    def whole_specs(self, shape: tuple[int, ...], group: Mapping[str, Any]) -> Mapping[str, WholeState]:
        rows = shape[0] if shape else 1
        return {
            "momentum": WholeState(shape),
            "gram": WholeState((rows, rows), init="eye"),
            "step": WholeState((), dtype=torch.float64, host=True),
        }

    def update_whole_(self, p: Tensor, g: Tensor, s: Any, group: Mapping[str, Any], name: str) -> None:
        s.step += 1
        m = s.momentum.view_as(p).lerp_(g, 0.1)
        flat = m.reshape(len(s.gram), -1)
        s.gram.addmm_(flat, flat.mT)
        root, basis = torch.linalg.eigh(s.gram)
        update = (basis / root.sqrt()) @ (basis.mT @ flat)
        p.mul_(1 - group["lr"] * group["weight_decay"])
        p.add_(update.view_as(p) / p.norm().clamp_min(1), alpha=-group["lr"] * (1 + 1 / float(s.step)))


@pytest.fixture
def whitened(monkeypatch):
    monkeypatch.setitem(_EMERGING_OPTIMIZERS, "whitened", EmergingOptimizerEntry(Whitened))


def check(world: Any, cut: Cut, mode: str) -> None:
    got, shard = sharded("whitened", cut, STEPS, world, tp_mode=mode)
    for mine, whole in zip(got, unsharded("whitened", cut, STEPS), strict=True):
        assert torch.equal(mine, shard(whole))


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("mode", ["owner", "duplicated"])
@pytest.mark.parametrize("cut", CUTS[2])
def test_same_bits_on_2_ranks(world, whitened, cut, mode):
    check(world, CUTS[2][cut], mode)


@pytest.mark.mpi(min_size=4)
@pytest.mark.parametrize("mode", ["owner", "duplicated"])
@pytest.mark.parametrize("cut", CUTS[4])
def test_same_bits_on_4_ranks(world, whitened, cut, mode):
    check(world, CUTS[4][cut], mode)


def run(world: Any, name: str, cut: Cut, mode: str) -> tuple[nn.Module, Any, Any]:
    """A model of the weights that ``cut`` makes here, its optimizer, and what gives them their gradients of a step."""
    parameter, shard, groups = cutter(cut, world)
    params = parameters(whole_parameters(cut.shapes), parameter, cut)
    model = nn.Module()
    for i, p in enumerate(params):
        model.register_parameter(f"weight{i}", p)
    optimizer = build(name, params, cut, tp_mode=mode, pg_collection=groups)

    def take_steps(start: int, stop: int) -> None:
        for step in range(start, stop):
            for i, p in enumerate(params):
                g = whole_gradient(i, step, cut.shapes[i])
                p.grad = None if g is None else parameter(g.to(cut.dtype))
            optimizer.step()
        wholes = unsharded(name, cut, stop)
        for p, whole in zip(params, wholes, strict=True):
            assert torch.equal(local(p), shard(whole))

    return model, optimizer, take_steps


@pytest.mark.mpi(min_size=4)
@pytest.mark.parametrize(
    ("name", "saver", "loader"),
    [
        ("whitened", ("rows", "owner"), ("tp rows, dp columns", "owner")),
        ("whitened", ("tp columns, dp copies", "duplicated"), ("rows", "owner")),
        ("psgd_pro", ("tp rows, dp columns", "owner"), ("copies", "duplicated")),
        ("psgd_pro", ("gate/up stride", "owner"), ("gate/up interleaved", "duplicated")),
    ],
)
def test_any_layout_and_mode_goes_on_where_another_stopped(world, whitened, tmp_path, name, saver, loader):
    folder = [tmp_path]
    dist.broadcast_object_list(folder, src=0)
    cuts = {cut: replace(CUTS[4][cut], dtype=torch.float32) for cut in (saver[0], loader[0])}
    if saver[0].startswith("gate"):  # the same parts
        cuts[loader[0]] = replace(cuts[loader[0]], attributes={"matrix_parts": (32, 32)})
    model, optimizer, take_steps = run(world, name, cuts[saver[0]], saver[1])
    take_steps(0, 3)
    save(folder[0], step=3, model_chunks=[model], optimizer=optimizer)
    model, optimizer, take_steps = run(world, name, cuts[loader[0]], loader[1])
    load(folder[0], model_chunks=[model], optimizer=optimizer)
    take_steps(3, 5)


def test_state_keeps_its_dtype_and_its_shape():
    params = [nn.Parameter(torch.randn(6, 4, dtype=torch.bfloat16))]
    first, again = Whitened(params), Whitened(params)
    params[0].grad = torch.randn(6, 4, dtype=torch.bfloat16)
    first.step()
    again.load_state_dict(first.state_dict())
    for slot, x in first.state[params[0]].items():
        loaded = again.state[params[0]][slot]
        assert loaded.dtype == x.dtype == (torch.float64 if slot == "step" else torch.float32)
        assert torch.equal(loaded, x)
        assert loaded.data_ptr() != x.data_ptr()
    assert again.state_sizes(params[0], again.param_groups[0])["gram"] == (6 * 6 * 4, 6 * 6 * 4)
    wrong = first.state_dict()
    wrong["state"][0]["gram"] = torch.eye(4)
    with pytest.raises(ValueError, match=r"gram.*\(4, 4\) but this rank keeps \(6, 6\)"):
        again.load_state_dict(wrong)


@pytest.mark.mpi(min_size=2)
def test_an_owner_alone_keeps_state_and_the_work_is_dealt(world, whitened):
    model, optimizer, _ = run(world, "whitened", CUTS[2]["rows"], "owner")
    entries = sum(x.numel() for p in model.parameters() for x in optimizer.state[p].values())
    everyone = [None] * 2
    dist.all_gather_object(everyone, entries)
    whole = Whitened([nn.Parameter(w) for w in whole_parameters(CUTS[2]["rows"].shapes)])
    assert sum(everyone) == sum(x.numel() for state in whole.state.values() for x in state.values())
    assert min(everyone) > 0.3 * sum(everyone)


@pytest.mark.mpi(min_size=2)
def test_owners_stay_when_copies_take_the_place_of_parameters(world):
    groups = ProcessGroupCollection.from_mesh(world.mesh((2,), ("dp",)))

    def trained(*, copied: bool) -> list[Tensor]:
        # Costs at which a second deal, on top of the first, would choose others.
        params: list[Any] = [nn.Parameter(torch.ones(8, n) / n) for n in (4, 12, 8)]
        made = _EMERGING_OPTIMIZERS["shampoo"].optimizer_cls(params, lr=0.1, pg_collection=groups)
        if copied:  # as Megatron-Core makes its main parameters
            group = made.param_groups[0]
            for i, p in enumerate(params):
                group["params"][i] = p.detach().clone()
                made.state[group["params"][i]] = made.state.pop(p)
            params = group["params"]
        for _ in range(2):
            for p in params:
                p.grad = torch.arange(1.0, 1 + p.numel()).view_as(p)
            made.step()
        return params

    for p, q in zip(trained(copied=True), trained(copied=False), strict=True):
        assert torch.equal(p, q)
