"""Optimizers as functions, and the builders that make them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard

from core.optimizer import registry
from core.optimizer.emerging_optimizers import get_optimizer, list_optimizers
from core.optimizer.functional.as_functions import FunctionalOptimizer, OptimizerState
from core.optimizer.functional.builders import (
    OptimizerBuilder,
    RegistryBuilder,
    make_transformation,
    register_optimizer,
)
from core.optimizer.optimizer_config import OptimizerConfig, ParamKey
from core.optimizer.rules.lion import Lion
from core.process_groups_config import ProcessGroupCollection
from tests.support.stepped import LR, SHAPES, Stepped, check_equal, configured, gradients, schedule, weights


@pytest.mark.parametrize("name", ["adamw", "muon", "soap", "lamb"])
def test_donated_tensors_are_updated_in_place(name):
    stepped, params = Stepped(configured(name), weights()), weights()
    tx = make_transformation(configured(name), schedule, donate=True)
    state = tx.init(params)
    at = {name: p.data_ptr() for name, p in params.items()}
    for step in range(3):
        stepped.step(gradients(step), schedule(step))
        new, state = tx.apply_gradients_stage_local(params=params, grads=gradients(step), opt_state=state)
        assert {name: p.data_ptr() for name, p in new.items()} == at
        check_equal(params, stepped.params)


def test_a_state_can_be_taken_up_again_by_another():
    params, kept = weights(), []
    first = make_transformation(configured("muon"), schedule)
    state = first.init(params)
    for step in range(4):
        kept.append((params, state))
        params, state = first.apply_gradients_stage_local(params=params, grads=gradients(step), opt_state=state)
    again, state = kept[2]
    second = make_transformation(configured("muon"), schedule)
    for step in (2, 3):
        again, state = second.apply_gradients_stage_local(params=again, grads=gradients(step), opt_state=state)
    check_equal(again, params)


def test_groups_keep_the_ratio_of_their_learning_rates():
    overrides = {ParamKey(name="b.*"): {"lr": 0.3}, ParamKey(name="c.weight"): {"wd_mult": 0.0}}
    params = weights()
    stepped = Stepped(configured("adamw"), params, param_overrides=overrides)
    tx = make_transformation(configured("adamw"), schedule, param_overrides=overrides)
    state = tx.init(params)
    for step in range(3):
        stepped.step(gradients(step), schedule(step))
        params, state = tx.apply_gradients_stage_local(params=params, grads=gradients(step), opt_state=state)
    for name, p in params.items():
        torch.testing.assert_close(p, stepped.params[name].detach(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    "tree", [{"a.weight": True, "b.weight": False}, {"a": {"weight": True}, "b": {"weight": False}}]
)
def test_a_tree_of_booleans_masks_weight_decay_on_both_paths(tree):
    params = {name: p for name, p in weights().items() if name in ("a.weight", "b.weight")}
    zeros = {name: torch.zeros_like(p) for name, p in params.items()}
    tx = make_transformation(configured("adamw", weight_decay=0.5), schedule, weight_decay_mask=tree)
    wanted = {"a.weight": params["a.weight"] * (1 - LR * 0.5), "b.weight": params["b.weight"]}
    new, _ = tx.update(zeros, tx.init(params), params)
    local, _ = tx.apply_gradients_stage_local(params=params, grads=zeros, opt_state=tx.init(params))
    for name, p in wanted.items():
        torch.testing.assert_close(new[name], p)
        torch.testing.assert_close(local[name], p)
    with pytest.raises(ValueError, match=r"no entry for \['b\.weight'\]"):
        make_transformation(configured("adamw"), schedule, weight_decay_mask={"a.weight": True}).init(params)


@pytest.mark.parametrize("donate", [False, True])
def test_updates_are_the_difference(donate):
    params = weights()
    tx = make_transformation(configured("muon"), schedule, donate=donate)
    wanted, _ = make_transformation(configured("muon"), schedule).update(gradients(0), tx.init(weights()), weights())
    found, state = tx.updates(gradients(0), tx.init(params), params)
    check_equal(params, weights())
    check_equal(found, {name: wanted[name] - p for name, p in params.items()})
    assert state.step == 1


def test_output_layers_are_found_by_the_names_of_their_modules():
    params = {"first.weight": torch.randn(8, 8), "output.weight": torch.randn(16, 8), "train.weight": torch.randn(8, 8)}
    tx = make_transformation(configured("muon"), schedule)
    state = tx.init({**params, "a..b": torch.randn(4)})
    kept = {name: set(slots) - {"step"} for name, slots in state.slots.items()}
    moments, momentum = {"exp_avg", "exp_avg_sq"}, {"momentum_buffer"}
    assert kept == {"first.weight": momentum, "output.weight": moments, "train.weight": momentum, "a..b": moments}


def test_the_normal_path_steps_with_the_mean_of_micro_steps():
    params = weights()
    stepped = Stepped(configured("adamw"), params)
    tx = make_transformation(configured("adamw"), schedule, clip_grad=0.5, gradient_accumulation_steps=4)
    state = tx.init(params)
    for step in range(2):
        micro: list[dict[str, Any]] = [gradients(4 * step + k) for k in range(4)]
        micro[1]["b.weight"] = None
        for k, grads in enumerate(micro):
            before = params
            params, state = tx.update(grads, state, params)
            check_equal(params, before) if k < 3 else None
        mean = {
            name: torch.stack([torch.zeros(shape) if m[name] is None else m[name] for m in micro])
            .double()
            .mean(0)
            .float()
            for name, shape in SHAPES.items()
        }
        stepped.step(mean, schedule(step), 0.5)
        for name, p in params.items():
            torch.testing.assert_close(p, stepped.params[name].detach(), rtol=1e-5, atol=1e-6)
    with pytest.raises(NotImplementedError, match="gradient_accumulation_steps=4: a stage-local step takes"):
        tx.apply_gradients_stage_local(params=params, grads=gradients(0), opt_state=state)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda state: {"mu": 1}, "not an OptimizerState"),
        (lambda state: OptimizerState(0, {}), r"a\.weight: the state has {}, but this optimizer keeps"),
    ],
)
def test_a_state_of_another_kind_is_refused(change: Callable[[Any], Any], text: str):
    params = weights()
    tx = make_transformation(configured("adamw"), schedule)
    with pytest.raises(NotImplementedError, match=text):
        tx.apply_gradients_stage_local(params=params, grads=gradients(0), opt_state=change(tx.init(params)))


@pytest.mark.parametrize(
    ("grads", "text"),
    [
        ({"d.weight": torch.ones(2)}, r"gradients of \['d\.weight'\], but no such parameters"),
        ({"c.bias": torch.ones(2)}, r"c\.bias: the gradient is \(2,\)"),
        ({"c.bias": torch.ones(16, dtype=torch.float64)}, r"c\.bias: the gradient is \(16,\) of torch\.float64"),
    ],
)
def test_gradients_that_fit_no_parameter_are_refused(grads: dict[str, Tensor], text: str):
    params = weights()
    tx = make_transformation(configured("sgd"), schedule)
    with pytest.raises(ValueError, match=text):
        tx.apply_gradients_stage_local(params=params, grads=grads, opt_state=tx.init(params))


def test_a_misspelt_argument_of_a_builder_is_refused():
    builder = RegistryBuilder(configured("sgd"))
    with pytest.raises(ValueError, match=r"build_mpmd does not read 'none_grad'; did you mean 'none_grads'\?"):
        builder.build_mpmd(schedule, optimizer=builder.build(schedule), none_grad="skip")
    with pytest.raises(ValueError, match="unknown optimizer 'sdg'; did you mean 'sgd'"):
        RegistryBuilder(configured("sdg")).validate()
    with pytest.raises(ValueError, match="momentum"):
        RegistryBuilder(configured("sgd", sgd_momentum=2.0)).validate()


def test_a_registered_builder_is_used_and_a_missing_stage_local_step_named(monkeypatch):
    monkeypatch.setattr(registry, "_EMERGING_OPTIMIZERS", dict(registry._EMERGING_OPTIMIZERS))

    @register_optimizer("MineToo")
    class MineBuilder(OptimizerBuilder):
        optimizer_cls = Lion

        def build(self, scheduler):
            return FunctionalOptimizer(lambda params: Lion(list(params.values()), lr=LR), scheduler, lr=LR)

    assert MineBuilder.__name__ == "MineBuilder"
    with pytest.raises(ValueError, match="'minetoo' is already registered"):
        register_optimizer("minetoo")(MineBuilder)
    config = OptimizerConfig(optimizer="minetoo", lr=LR)
    assert get_optimizer(config, [nn.Linear(4, 4)]).members.keys() == {"minetoo"}  # Lion takes any shape
    params = weights()
    tx = make_transformation(config, schedule)
    state = tx.init(params)
    new, _ = tx.update(gradients(0), state, params)
    check_equal({"a.weight": new["a.weight"]}, {"a.weight": _lion(params["a.weight"], gradients(0)["a.weight"])})
    with pytest.raises(NotImplementedError, match=r"'minetoo'.*MineBuilder does not implement build_mpmd\(\.\.\.\)"):
        tx.apply_gradients_stage_local(params=params, grads=gradients(0), opt_state=state)


def _lion(p: Tensor, g: Tensor) -> Tensor:
    made = nn.Parameter(p.clone())
    made.grad = g
    Lion([made], lr=LR).step()
    return made.detach()


def test_an_optimizer_of_torch_is_a_function_too():
    for donate in (False, True):
        tx = FunctionalOptimizer(lambda p: torch.optim.AdamW(list(p.values()), lr=LR), schedule, lr=LR, donate=donate)
        mine = weights()
        made = {name: nn.Parameter(p) for name, p in weights().items()}
        torchs = torch.optim.AdamW(list(made.values()), lr=LR)
        state = tx.init(mine)
        for step in range(3):
            torchs.param_groups[0]["lr"] = schedule(step)
            for name, g in gradients(step).items():
                made[name].grad = g
            torchs.step()
            mine, state = tx.apply(mine, gradients(step), state)
            check_equal(mine, made)


DTENSORS = ("adamw", "adafactor", "lamb", "muon", "soap", "spel")
"""One for each way that a step goes; the others take longer than they tell."""


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("name", DTENSORS)
def test_dtensors_step_as_they_do_in_place(world, name):
    check_dtensors(world, name)


@pytest.mark.soak
@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("name", [name for name in list_optimizers() if name not in DTENSORS])
def test_dtensors_of_every_optimizer_step_as_they_do_in_place(world, name):
    check_dtensors(world, name)


def check_dtensors(world, name):
    mesh = world.mesh((2,), ("tp",))
    groups = ProcessGroupCollection.from_mesh(mesh)

    def cut(x: Tensor) -> Tensor:
        placement = Shard(0) if x.ndim > 1 else Replicate()
        piece = x.chunk(2)[world.rank] if x.ndim > 1 else x
        return DTensor.from_local(piece.clone(), mesh, [placement], shape=x.shape, stride=x.stride())

    params = {key: cut(p) for key, p in weights().items()}
    stepped = Stepped(configured(name), params, pg_collection=groups)
    tx = make_transformation(configured(name), schedule, pg_collection=groups)
    state = tx.init(params)
    for step in range(2):
        grads = {key: cut(g) for key, g in gradients(step).items()}
        stepped.step(grads, schedule(step))
        params, state = tx.apply_gradients_stage_local(params=params, grads=grads, opt_state=state)
    for key, p in params.items():
        assert isinstance(p, DTensor)
        torch.testing.assert_close(p.to_local(), stepped.params[key].detach().to_local(), rtol=0, atol=0)
