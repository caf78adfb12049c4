"""The step of one pipeline stage: that of every optimizer, clipping, missing or deleted gradients, and what crosses stages."""

from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.debug import CommDebugMode

from core.optimizer.clip import NonFiniteGradientError
from core.optimizer.emerging_optimizers import list_optimizers
from core.optimizer.functional.builders import RegistryBuilder, make_transformation
from core.optimizer.functional.stage_local import (
    StageLocalOptimizerMetadata,
    make_stage_local_gradient_transformation,
    make_unsupported_stage_local_gradient_transformation,
    stage_local_step,
)
from core.process_groups_config import ProcessGroupCollection
from core.sharding.parameter_layout import local
from tests.support.stepped import LR, SHAPES, Stepped, check_equal, configured, gradients, schedule, weights


@pytest.mark.parametrize("name", list_optimizers())
def test_the_stage_local_step_is_the_step(name):
    stepped, params = Stepped(configured(name), weights()), weights()
    tx = make_transformation(configured(name), schedule)
    state = tx.init(params)
    for step in range(3):
        grads = gradients(step)
        stepped.step(grads, schedule(step))
        kept = {name: p.clone() for name, p in params.items()}
        slots = {name: {k: v.clone() for k, v in s.items()} for name, s in state.slots.items()}
        new, after = tx.apply_gradients_stage_local(params=params, grads=grads, opt_state=state)
        check_equal(params, kept)
        check_equal(grads, gradients(step))
        for p in params:
            check_equal(state.slots[p], slots[p])
            assert after.slots[p].keys() == stepped.optimizer.state[stepped.params[p]].keys()
            check_equal(after.slots[p], stepped.optimizer.state[stepped.params[p]])
        params, state = new, after
        check_equal(params, stepped.params)
    assert state.step == 3


@pytest.mark.parametrize(("none_grads", "stands_for"), [("zero", 0.0), ("skip", None)])
def test_what_none_stands_for(none_grads, stands_for):
    params = weights()
    tx = make_transformation(configured("adamw"), schedule, none_grads=none_grads)
    stepped, state = Stepped(configured("adamw"), params), tx.init(params)
    for step in range(3):
        grads: dict[str, Any] = gradients(step)
        grads["a.weight"] = None if stands_for is None else torch.zeros(SHAPES["a.weight"])
        stepped.step(grads, schedule(step))
        grads["a.weight"] = None
        params, state = tx.apply_gradients_stage_local(params=params, grads=grads, opt_state=state)
        check_equal(params, stepped.params)
    # The normal path is torch's: what has no gradient is left alone.
    new, _ = tx.update({**gradients(3), "a.weight": None}, state, params)
    check_equal({"a.weight": new["a.weight"]}, {"a.weight": params["a.weight"]})


def test_deleted_gradients_give_their_memory_back():
    params = {name: nn.Parameter(p) for name, p in weights().items()}
    tx = make_transformation(configured("adamw"), schedule, clip_grad=0.5)
    state = tx.init(params)
    buffer = torch.randn(2, 16)
    grads = {**gradients(0), "c.bias": buffer[0]}
    params["a.weight"].grad = grads["a.weight"]
    storages = {name: g.untyped_storage() for name, g in grads.items()}
    wanted, _ = make_transformation(configured("adamw"), schedule, clip_grad=0.5).apply_gradients_stage_local(
        params=params, grads={name: g.clone() for name, g in grads.items()}, opt_state=state
    )
    new, _ = tx.apply_gradients_stage_local(params=params, grads=grads, opt_state=state, delete_grads=True)
    check_equal(new, wanted)
    assert {name: s.nbytes() for name, s in storages.items()} == {
        "a.weight": 0,
        "b.weight": 0,
        "c.weight": 0,
        "c.bias": 2 * 16 * 4,  # of a buffer that others live in
    }
    assert params["a.weight"].grad is None


def test_the_learning_rate_is_asked_for_with_the_number_of_finished_steps():
    params, asked = weights(), []

    def rate(step: int) -> Tensor:
        asked.append(step)
        return torch.tensor(0.0)

    tx = make_transformation(configured("adamw"), schedule)
    state, start = tx.init(params), params
    for step in range(3):
        params, state = tx.apply_gradients_stage_local(
            params=params, grads=gradients(step), opt_state=state, learning_rate_fn=rate
        )
    assert asked == [0, 1, 2]
    check_equal(params, start)


@pytest.mark.parametrize("clip", [0.5, 1e9])
def test_gradients_are_clipped_first_on_both_paths(clip):
    params = weights()
    stepped = Stepped(configured("lion"), params)
    tx = make_transformation(configured("lion"), schedule, clip_grad=clip)
    state = tx.init(params)
    other, other_state = params, state
    for step in range(3):
        stepped.step(gradients(step), schedule(step), clip)
        params, state = tx.apply_gradients_stage_local(params=params, grads=gradients(step), opt_state=state)
        other, other_state = tx.update(gradients(step), other_state, other)
        check_equal(params, stepped.params)
        check_equal(other, stepped.params)


def test_a_norm_that_is_not_finite_stops_the_step():
    params = weights()
    tx = make_transformation(configured("adamw"), schedule, clip_grad=1.0)
    grads = gradients(0)
    grads["b.weight"][0, 0] = torch.inf
    with pytest.raises(NonFiniteGradientError, match=r"b\.weight"):
        tx.apply_gradients_stage_local(params=params, grads=grads, opt_state=tx.init(params), delete_grads=True)
    check_equal(params, weights())
    assert float(grads["a.weight"].sum()) == float(gradients(0)["a.weight"].sum())


def test_a_mask_and_a_weight_decay_of_the_stage_local_path():
    params, mask = weights(), "a.*"
    builder = RegistryBuilder(configured("adamw"))
    base = builder.build(schedule)
    tx = builder.build_mpmd(schedule, optimizer=base, weight_decay=0.5, weight_decay_mask=mask)
    stepped = Stepped(configured("adamw", weight_decay=0.5), params, weight_decay_mask=mask)
    stepped.step(gradients(0), LR)
    new, _ = tx.apply_gradients_stage_local(params=params, grads=gradients(0), opt_state=tx.init(params))
    check_equal(new, stepped.params)
    assert tx.metadata is not None
    assert (tx.metadata.weight_decay, tx.metadata.weight_decay_mask, tx.metadata.adamw_b2) == (0.5, mask, 0.999)
    own = RegistryBuilder(configured("adamw", weight_decay=0.5), weight_decay_mask=mask)
    kept = own.build_mpmd(schedule, optimizer=own.build(schedule), weight_decay=None, weight_decay_mask=None)
    assert kept.metadata is not None
    assert (kept.metadata.weight_decay, kept.metadata.weight_decay_mask) == (0.5, mask)
    new, _ = kept.apply_gradients_stage_local(params=params, grads=gradients(0), opt_state=kept.init(params))
    check_equal(new, stepped.params)


def test_the_metadata_is_injected_and_the_rest_is_forwarded():
    seen: dict[str, Any] = {}

    def apply_fn(**kwargs: Any) -> tuple[Any, Any]:
        seen.update(kwargs)
        return kwargs["params"], kwargs["opt_state"]

    base = RegistryBuilder(configured("sgd")).build(schedule)
    metadata = StageLocalOptimizerMetadata(schedule, clip_grad=1.0)
    tx = make_stage_local_gradient_transformation(base, metadata, apply_fn)
    assert (tx.init, tx.update) == (base.init, base.update)
    grads = {"a.weight": torch.full((2, 2), 3.0)}
    tx.apply_gradients_stage_local(
        params={"a.weight": torch.ones(2, 2)}, grads=grads, opt_state="mine", learning_rate_fn=schedule
    )
    assert seen["metadata"] is metadata
    assert seen["learning_rate_fn"] is schedule
    assert float(seen["grads"]["a.weight"].norm()) == pytest.approx(1.0)
    assert float(grads["a.weight"].norm()) == 6.0
    assert len(fields(metadata)) == 12
    with pytest.raises(AttributeError):
        metadata.clip_grad = 2.0  # type: ignore[misc]


def test_without_apply_fn_there_is_no_transformation():
    with pytest.raises(ValueError, match="apply_fn is None"):
        make_stage_local_gradient_transformation(RegistryBuilder(configured("sgd")).build(schedule))


def test_an_unsupported_optimizer_says_so_and_updates():
    base = RegistryBuilder(configured("sgd")).build(schedule)
    tx = make_unsupported_stage_local_gradient_transformation(base, optimizer_type="sgd", reason="it is a test")
    params = weights()
    state = tx.init(params)
    tx.update(gradients(0), state, params)
    with pytest.raises(NotImplementedError, match=r"'sgd'.*Override build_mpmd .*Reason: it is a test"):
        tx.apply_gradients_stage_local(params=params, grads=gradients(0), opt_state=state)


def test_settings_are_needed():
    base = RegistryBuilder(configured("adamw")).build(schedule)
    tx = RegistryBuilder(configured("adamw")).build_mpmd(schedule, optimizer=base)
    assert tx.metadata is not None
    bare = make_stage_local_gradient_transformation(
        base, replace(tx.metadata, optimizer_config=None), stage_local_step(base)
    )
    with pytest.raises(NotImplementedError, match="no optimizer_config"):
        bare.apply_gradients_stage_local(params=weights(), grads=gradients(0), opt_state=base.init(weights()))


STAGES = {"embedding.weight": (16, 8), "first.weight": (8, 8), "last.weight": (8, 8), "output.weight": (16, 8)}
"""Two on each stage; the last is a copy of the first."""


def cutter(mesh, dtensor):
    """What cuts the rows of a whole tensor over ``mesh``."""

    def cut(x: Tensor) -> Tensor:
        if mesh is None:
            return x.clone()
        piece = x.chunk(mesh.size())[mesh.get_local_rank()].clone()
        return DTensor.from_local(piece, mesh, [Shard(0)], shape=x.shape, stride=x.stride()) if dtensor else piece

    return cut


def check_stages(world, axes, dtensor, name):
    mesh = world.mesh(tuple(axes.values()), tuple(axes))
    groups, at = ProcessGroupCollection.from_mesh(mesh), mesh.get_local_rank("pp")
    cut = cutter(mesh["tp"] if "tp" in axes else None, dtensor)
    whole, start = gradients(7, STAGES), weights(STAGES)
    for tensors in (whole, start):
        tensors["output.weight"] = tensors["embedding.weight"].clone()
    norm = sum(g.double().square().sum() for key, g in whole.items() if key != "output.weight") ** 0.5

    names = list(STAGES)[2 * at : 2 * at + 2]
    params: dict[str, Any] = {key: cut(start[key]) for key in names}
    for key, p in params.items():
        p.shared_embedding = key in ("embedding.weight", "output.weight")
        if "tp" in axes and not dtensor:
            p.tensor_model_parallel, p.partition_dim = True, 0
    grads = {key: cut(whole[key]) for key in names}
    alone = Stepped(configured(name), {key: start[key] for key in names})
    for clip, collectives in ((0.5, 1), (None, 0)):
        tx = make_transformation(configured(name), schedule, clip_grad=clip, pg_collection=groups)
        state = tx.init(params)
        with CommDebugMode() as communication:
            new, _ = tx.apply_gradients_stage_local(params=params, grads=grads, opt_state=state)
        assert communication.get_total_counts() == collectives, communication.get_comm_counts()
        if clip:
            factor = float(clip / (norm + 1e-6))
            alone.step({key: whole[key] * factor for key in names}, LR)
            for key, p in new.items():
                mine, wanted = (local(x) for x in (p, cut(alone.params[key].detach())))
                torch.testing.assert_close(mine, wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("name", ["sgd", "muon"])
def test_only_the_clip_norm_crosses_stages_on_2_ranks(world, name):
    check_stages(world, {"pp": 2}, False, name)


@pytest.mark.mpi(min_size=4)
@pytest.mark.parametrize("dtensor", [False, True])
def test_only_the_clip_norm_crosses_stages_on_4_ranks(world, dtensor):
    check_stages(world, {"pp": 2, "tp": 2}, dtensor, "sgd")
