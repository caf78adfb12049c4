"""Builders of eFormer's configs: settings, masks, what is refused, and the metadata and transformations that they make."""

from typing import Any

import pytest
import torch

from core.optimizer.functional.as_functions import FunctionalOptimizer
from core.optimizer.functional.builders import (
    OptimizerBuilder,
    RegistryBuilder,
    _build_metadata_mpmd_optimizer,
    make_transformation,
)
from core.optimizer.functional.config_builders import (
    AdafactorOptimizer,
    AdamWOptimizer,
    ConfigBuilder,
    LionOptimizer,
    MarsOptimizer,
    MuonOptimizer,
    QuadOptimizer,
    RMSPropOptimizer,
    SkewOptimizer,
)
from core.optimizer.functional.configs import (
    AdafactorConfig,
    AdamWConfig,
    Config,
    LionConfig,
    MarsConfig,
    MuonConfig,
    RMSPropConfig,
    WhiteKronConfig,
)
from core.optimizer.functional.stage_local import StageLocalGradientTransformation
from core.optimizer.rules.lion import Lion
from core.process_groups_config import ProcessGroupCollection
from core.schedule import LinearSchedulerBuilder, SchedulerConfig
from tests.support.stepped import configured, schedule
from tests.support.trees import SHAPES, Tree, lr, tree

BUILDERS: dict[type[ConfigBuilder], type[Config]] = {
    AdamWOptimizer: AdamWConfig,
    AdafactorOptimizer: AdafactorConfig,
    LionOptimizer: LionConfig,
    RMSPropOptimizer: RMSPropConfig,
    MuonOptimizer: MuonConfig,
    QuadOptimizer: WhiteKronConfig,
    SkewOptimizer: WhiteKronConfig,
    MarsOptimizer: MarsConfig,
}


def groups_of(builder: RegistryBuilder, params: Tree | None = None) -> dict[str, dict[str, Any]]:
    """Name of a parameter → the settings of its group."""
    made = {name: torch.nn.Parameter(p) for name, p in (params or tree(0)).items()}
    return {
        name: {**group, "optimizer": member}
        for member, optimizer in builder.optimizer_for(made).members.items()  # type: ignore[attr-defined]
        for group in optimizer.param_groups
        for name in group["param_names"]
    }


@pytest.mark.parametrize(("cls", "name"), [(QuadOptimizer, "quad"), (SkewOptimizer, "skew")])
def test_white_kron_becomes_quad_and_skew(cls, name):
    made = groups_of(cls(WhiteKronConfig()))
    assert {n: (g["optimizer"], g["weight_decay"]) for n, g in made.items()} == {"w": (name, 0.1), "b": ("adamw", 0.1)}
    wanted = {"momentum": 0.95, "lr_style": "adam", "preconditioner_lr": 0.7, "noise_scale": 1e-9}
    assert {key: made["w"][key] for key in wanted} == wanted
    assert groups_of(cls(WhiteKronConfig(preconditioner_lr=0.1)))["w"]["preconditioner_lr"] == 0.4
    optimizer = cls(WhiteKronConfig(block_size=2)).optimizer_for({"w": torch.nn.Parameter(torch.randn(3, 4))})
    factors = {k: v.dtype for k, v in next(iter(optimizer.state.values())).items() if k.startswith("Q")}
    assert factors
    assert set(factors.values()) == {torch.bfloat16}


def test_muon_becomes_optax_s():
    made = groups_of(MuonOptimizer(MuonConfig(weight_decay=0.2, adam_weight_decay=0.1, adam_b1=0.8, adam_b2=0.9)))
    assert {n: (g["optimizer"], g["weight_decay"]) for n, g in made.items()} == {
        "w": ("muon_optax", 0.2),
        "b": ("adamw", 0.1),
    }
    assert (made["b"]["betas"], made["b"]["eps"]) == ((0.8, 0.9), 1e-8)
    settings = MuonConfig(ns_coeffs=[2, -1.5, 0.5], mu_dtype="bfloat16").settings("muon_optax")  # type: ignore[arg-type]
    wanted = {"coefficient_type": "custom", "ns_coeffs": (2, -1.5, 0.5), "mu_dtype": "bfloat16", "num_ns_steps": 5}
    assert {key: settings[f"muon_optax_{key}"] for key in wanted} == wanted


def decays(builder: OptimizerBuilder) -> dict[str, float]:
    assert isinstance(builder, RegistryBuilder)
    return {name: pytest.approx(group["weight_decay"]) for name, group in groups_of(builder).items()}


def test_masks_inside_and_outside_of_a_config_add_up():
    kron = QuadOptimizer(WhiteKronConfig(weight_decay_mask={"w": True, "b": False}))
    assert decays(kron) == {"w": 0.1, "b": 0.0}
    assert decays(kron.with_weight_decay(0.5, None)) == {"w": 0.6, "b": 0.5}
    assert decays(kron.with_weight_decay(0.5, "b")) == {"w": 0.1, "b": 0.5}
    assert decays(kron.with_weight_decay(0.5, lambda params: {name: p.ndim > 1 for name, p in params.items()})) == {
        "w": 0.6,
        "b": 0.0,
    }
    with pytest.raises(
        ValueError, match=r"weight_decay_mask is given without weight_decay; .* that WhiteKronConfig has"
    ):
        make_transformation(kron, lr, weight_decay_mask="b")
    assert decays(LionOptimizer(LionConfig()).with_weight_decay(0.5, "!b")) == {"w": 0.501, "b": 0.001}
    for mask, text in (("c", "'c' matches no parameter"), ({"w": True}, r"no entry for \['b'\]")):
        with pytest.raises(ValueError, match=text):
            decays(kron.with_weight_decay(0.5, mask))  # type: ignore[arg-type]


@pytest.mark.mpi(min_size=2)
def test_masks_of_a_config_on_pipeline_stages(world):
    groups = ProcessGroupCollection.from_mesh(world.mesh((2,), ("pp",)))
    name = ("w", "b")[world.rank]
    builder = QuadOptimizer(WhiteKronConfig(weight_decay_mask={"w": True, "b": False}), pg_collection=groups)
    assert {n: group["weight_decay"] for n, group in groups_of(builder, {name: tree(0)[name]}).items()} == (
        {"w": 0.1},
        {"b": 0.0},
    )[world.rank]


@pytest.mark.parametrize("cls", BUILDERS)
def test_a_builder_wants_its_config_and_a_schedule(cls):
    config = BUILDERS[cls]()
    builder = cls(config=config)
    builder.validate()
    assert builder.config is config
    tx = make_transformation(builder, LinearSchedulerBuilder(SchedulerConfig("linear", 0.1, 0.0, 2, 8)).build())
    assert tx.metadata is not None
    assert tx.metadata.optimizer_config is config
    assert (tx.metadata.weight_decay, tx.metadata.adamw_b1) == (0.0, getattr(config, "b1", None))
    with pytest.raises(
        TypeError, match=rf"{cls.__name__} is given a OptimizerConfig; give it a {type(config).__name__}"
    ):
        cls(configured("adamw"))
    with pytest.raises(TypeError, match=rf"belong to the builder; give them to {cls.__name__}"):
        make_transformation(builder, lr, donate=True)


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: AdamWConfig(mu_dtype="bf16"), ValueError, "mu_dtype='bf16' is unknown; possible: .*bfloat16"),
        (lambda: AdamWOptimizer(AdamWConfig(mu_dtype="float16")), ValueError, "mu_dtype='float16' is unknown"),
        (lambda: WhiteKronConfig(dtype="float16"), ValueError, r"dtype=torch\.float16 is unknown; possible: bfloat16"),
        (lambda: AdamWOptimizer(AdamWConfig(b1=1.0)).validate(), ValueError, "betas"),
        (lambda: QuadOptimizer(WhiteKronConfig(scanned_layers={"w": True})), NotImplementedError, "scanned_layers"),
        (
            lambda: MuonConfig(weight_decay_mask=lambda name, p: True).to_json(),
            TypeError,
            "MuonConfig.weight_decay_mask",
        ),
    ],
)
def test_what_no_optimizer_of_ours_follows_is_refused(make, error, text):
    with pytest.raises(error, match=text):
        make()


def test_a_file_of_another_version_is_read_with_a_warning():
    with pytest.warns(UserWarning, match=r"LionConfig has no b3, which is left out; it has b1, b2, mu_dtype\."):
        assert LionConfig.from_dict({"b1": 0.8, "b3": 1, "mu_dtype": "bfloat16"}) == LionConfig(
            0.8, 0.99, torch.bfloat16
        )


def test_arguments_that_are_no_fields_become_extra_kwargs():
    base = AdamWOptimizer(AdamWConfig()).build(lr)
    seen: dict[str, Any] = {}

    def apply_fn(**kwargs: Any) -> tuple[Any, Any]:
        seen.update(kwargs)
        return kwargs["params"], kwargs["opt_state"]

    tx = _build_metadata_mpmd_optimizer(
        AdamWConfig(b1=0.7), lr, optimizer=base, stage_local_apply=apply_fn, weight_decay=1, clip_grad=0.5, colour="red"
    )
    metadata = tx.metadata
    assert metadata is not None
    assert (metadata.weight_decay, metadata.clip_grad, metadata.gradient_accumulation_steps) == (1.0, 0.5, 1)
    assert (metadata.adamw_b1, metadata.extra_kwargs, metadata.optimizer_config) == (
        0.7,
        {"colour": "red"},
        AdamWConfig(b1=0.7),
    )
    tx.apply_gradients_stage_local(params=tree(0), grads=tree(1), opt_state=None)
    assert seen["metadata"] is metadata
    made = make_transformation(AdamWOptimizer(AdamWConfig()), lr, colour="red")
    assert made.metadata is not None
    assert made.metadata.extra_kwargs["colour"] == "red"


def test_a_transformation_is_a_named_tuple():
    base: FunctionalOptimizer = AdamWOptimizer(AdamWConfig()).build(lr)
    tx = StageLocalGradientTransformation(base.init, base.update)
    init, update = tx
    assert (tx.init, tx.update, tx._fields) == (init, update, ("init", "update"))
    with pytest.raises(NotImplementedError, match="without a stage-local step"):
        tx.apply_gradients_stage_local(params=tree(0), grads=tree(1), opt_state=init(tree(0)))
    init, update = make_transformation(AdamWOptimizer(AdamWConfig()), lr)
    params, _ = update(tree(1), init(tree(0)), tree(0))
    assert params.keys() == SHAPES.keys()


def test_a_builder_of_one_s_own_says_that_it_has_no_weight_decay():
    class Mine(OptimizerBuilder):
        def build(self, scheduler):
            return FunctionalOptimizer(lambda p: Lion(list(p.values()), lr=1.0), scheduler)

    tx = make_transformation(Mine(None), schedule)
    with pytest.raises(NotImplementedError, match=r"'Mine'.*Mine does not implement build_mpmd"):
        tx.apply_gradients_stage_local(params=tree(0), grads=tree(1), opt_state=tx.init(tree(0)))
    with pytest.raises(ValueError, match="Mine takes no weight decay from outside"):
        make_transformation(Mine(None), schedule, weight_decay=0.1)
