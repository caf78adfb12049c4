"""Elementwise optimizers on the ranges of Megatron-Core's distributed optimizer, the others in its layer-wise one; refusals."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("megatron.core", reason="Megatron-Core is not installed: bash scripts/bootstrap.sh megatron")

from tests.megatron.flat import FlatCase, as_json
from tests.support.programs import rows_of

ADAMW, LAMB, MUON = "shardstep_adamw", "shardstep_lamb", "shardstep_muon"


def run(folder: Path, cases: Mapping[str, FlatCase], ranks: int, *, saves: bool = False) -> dict[str, dict[str, Any]]:
    """What came of each case in one program of several ranks."""
    given = [str(ranks), str(folder), as_json(cases)]
    each = [[*given, str(rank)] for rank in range(ranks)] if saves else [given]
    return {row["name"]: row for row in rows_of("tests.megatron.flat", folder, each, 250)}


def flat(case: FlatCase, like: str, **changes: Any) -> FlatCase:
    """The same run on flat ranges."""
    return FlatCase(**{**vars(case), "how": "flat", "layer_wise": True, "like": like, **changes})


def pairs(plain: Mapping[str, FlatCase], **changes: Any) -> dict[str, FlatCase]:
    """Each run, and the same one on flat ranges."""
    return {
        name: case
        for first, given in plain.items()
        for name, case in ((first, given), (f"{first} flat", flat(given, first, **changes)))
    }


@pytest.fixture
def flat_ranges() -> None:
    """For tests that need a Megatron-Core whose distributed optimizer takes other optimizers than Adam."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    if not hasattr(DistributedOptimizer, "optimizer_state_keys"):
        pytest.skip("Megatron-Core 0.18's distributed optimizer takes only Adam, and ours are refused there")


def test_a_distributed_optimizer_that_takes_only_adam_is_refused(monkeypatch):
    from core.megatron import flat_ranges as module

    monkeypatch.delattr(module.DistributedOptimizer, "optimizer_state_keys", raising=False)
    config = SimpleNamespace(optimizer=ADAMW)
    with pytest.raises(ValueError, match=r"shardstep_adamw.*needs Megatron-Core 0\.19 or later; .*_layer_wise_"):
        module.flat_optimizer(torch.optim.AdamW, {}, config, [], None, None)


@pytest.mark.timeout(250)
def test_ranges_are_stepped_as_parameters_are(tmp_path, flat_ranges):
    plain = {"16 bits": FlatCase(ADAMW, bf16=True, clip=0), "32 bits": FlatCase(ADAMW, clip=0.5)}
    found = run(tmp_path, pairs(plain), 2)
    assert found["16 bits flat"]["unlike"] == 0  # without clipping nothing is added up in another order
    assert found["32 bits flat"]["unlike"] < 1e-6
    assert found["32 bits flat"]["norms"] == pytest.approx(found["32 bits"]["norms"], rel=1e-5)
    assert not any(row["ranks differ"] for row in found.values())
    assert found["32 bits flat"]["losses"][-1] < found["32 bits flat"]["losses"][0]


@pytest.mark.timeout(250)
def test_ranges_begin_anew_when_a_trainer_clears_their_state(tmp_path, flat_ranges):
    again = FlatCase(ADAMW, clip=0, on=True, resets=True)
    found = run(tmp_path, {**pairs({"reset": again}), "kept": FlatCase(ADAMW, clip=0, on=True, like="reset")}, 2)
    assert found["reset flat"]["unlike"] < 1e-6
    assert found["kept"]["unlike"] > 1e-3, "the state that is cleared makes a difference"


ELEMENTWISE = {
    "shardstep_adam": {"adam_mu_dtype": "bfloat16"},
    "shardstep_adamw_sr": {"adamw_sr_bf16_stochastic_round": True},
    "shardstep_ademamix": {"ademamix_alpha_warmup": 10},
    "shardstep_lion": {"lion_mu_dtype": "bfloat16"},
    "shardstep_radam": {},
    "shardstep_rmsprop": {"rmsprop_momentum": 0.9},
    "shardstep_sgd": {"sgd_dampening": 0.1},
}


@pytest.mark.soak
@pytest.mark.timeout(300)
def test_every_elementwise_optimizer_runs_on_ranges(tmp_path, flat_ranges):
    plain = {name: FlatCase(name, bf16=True, clip=0, settings=said) for name, said in ELEMENTWISE.items()}
    found = run(tmp_path, pairs(plain, overlap=True), 2)
    assert {name: found[f"{name} flat"]["unlike"] for name in plain} == dict.fromkeys(plain, 0)


def test_no_elementwise_optimizer_is_forgotten():
    from core.megatron.refusals import _NEEDS_MORE, runs_flat
    from core.optimizer.emerging_optimizers import list_optimizers

    found = {f"shardstep_{name}" for name in list_optimizers() if name not in _NEEDS_MORE and runs_flat(name)}
    assert found == {ADAMW, *ELEMENTWISE}


@pytest.mark.soak
@pytest.mark.timeout(600)
def test_ranges_on_every_layout_have_the_loss_of_one_rank(tmp_path, flat_ranges):
    whole = {"dense": FlatCase(ADAMW), "experts": FlatCase(ADAMW, experts=4)}
    layouts = {
        "dense": {"dp4": {}, "tp2 dp2": {"tp": 2}, "pp2 dp2": {"pp": 2}},
        "experts": {"ep2 dp4": {"ep": 2}},
    }
    (tmp_path / "1").mkdir()
    (tmp_path / "4").mkdir()
    alone = run(tmp_path / "1", whole, 1)
    cases = {name: flat(whole[kind], "", **sizes) for kind in layouts for name, sizes in layouts[kind].items()}
    found = run(tmp_path / "4", cases, 4)
    for kind, names in layouts.items():
        for name in names:
            assert found[name]["losses"] == pytest.approx(alone[kind]["losses"], rel=1e-5), name
            assert found[name]["norms"] == pytest.approx(alone[kind]["norms"], rel=1e-5), name


@pytest.mark.soak
@pytest.mark.timeout(300)
def test_a_large_gradient_skips_a_step_on_ranges(tmp_path, flat_ranges):
    case = FlatCase(ADAMW, how="flat", layer_wise=True, skip=1e-3)
    found = run(tmp_path, {"skips": case, "frozen": flat(case, "skips", settings={"lr": 0.0}, skip=0.0)}, 2)
    assert found["frozen"]["unlike"] == 0


@pytest.mark.soak
@pytest.mark.timeout(300)
def test_the_layer_wise_optimizer_steps_whole_parameters(tmp_path):
    plain = {
        "lamb": FlatCase(LAMB, bf16=True, clip=0, tied=True),
        "muon": FlatCase(MUON, bf16=True, clip=0, learned=True, experts=4),  # Adam's: a router, position embeddings
    }
    cases = pairs(plain, how="layout") | {
        "adamw": FlatCase(ADAMW, bf16=True, clip=0),
        "adamw dealt": FlatCase(ADAMW, bf16=True, clip=0, how="dealt", layer_wise=True, like="adamw"),
    }
    found = run(tmp_path, cases, 2)
    assert [found[name]["unlike"] for name in ("lamb flat", "muon flat", "adamw dealt")] == [0, 0, 0]


@pytest.mark.soak
@pytest.mark.timeout(600)
@pytest.mark.parametrize("optimizer", [ADAMW, "shardstep_ademamix", "shardstep_rmsprop", "shardstep_lion"])
def test_a_run_on_ranges_goes_on_from_its_checkpoint(tmp_path, flat_ranges, optimizer):
    through = FlatCase(optimizer, how="flat", layer_wise=True, bf16=True, saves="fully", on=True)
    buckets = flat(through, "", saves="buckets", on=False, sharding="dp_reshardable")
    cases = {
        "through": through,
        "on": flat(through, "through", saves="", on=False, loads="fully"),
        "on, tp2": flat(through, "", saves="", on=False, loads="fully", tp=2),
        "buckets": buckets,
        "on from buckets": flat(buckets, "through", saves="", loads="buckets"),
        "on, plain": flat(through, "through", saves="", on=False, loads="fully", how="plain"),
    }
    found = run(tmp_path, cases, 2, saves=True)
    assert found["on"]["unlike"] == found["on from buckets"]["unlike"] == 0
    assert found["on"]["losses"] == found["through"]["losses on"]
    assert found["on, tp2"]["losses"] == pytest.approx(found["through"]["losses on"], rel=2e-3)  # 16 bits
    assert found["on, plain"]["losses"] == pytest.approx(found["through"]["losses on"], rel=2e-3)


def test_the_flag_cuts_what_may_be_cut(monkeypatch):
    import core.megatron  # noqa: F401
    from core.megatron.flags import _validated

    def theirs(args: argparse.Namespace) -> argparse.Namespace:
        """Megatron's rule."""
        if args.optimizer not in ("sgd", "adam") and args.use_distributed_optimizer:
            args.use_layer_wise_distributed_optimizer, args.use_distributed_optimizer = True, False
        return args

    for optimizer, cut in ((ADAMW, True), ("shardstep_lion", True), (LAMB, False), (MUON, False), ("muon", False)):
        args = argparse.Namespace(optimizer=optimizer, use_distributed_optimizer=True)
        _validated(theirs, args)
        assert (args.optimizer, args.use_distributed_optimizer) == (optimizer, cut)


def chunk(*, ddp: Mapping[str, bool], together: bool | None = None) -> torch.nn.Module:
    """A model in a wrapper that says how gradients are reduced."""
    made: Any = torch.nn.Linear(2, 2)
    made.ddp_config = SimpleNamespace(**ddp)
    for p in made.parameters():
        if together is not None:
            p.is_managed_by_layer_wise_optimizer = together
    return made


SCATTERED = {"use_distributed_optimizer": True}
LAYER_WISE = {"use_layer_wise_distributed_optimizer": True, "bf16": True}


@pytest.mark.parametrize(
    ("settings", "chunks", "words"),
    [
        ({"optimizer": MUON, "use_distributed_optimizer": True}, [], "drift apart. Set use_layer_wise_distributed"),
        ({"fp16": True}, [], "with fp16=True: ours have no loss scale; train in bf16"),
        ({"optimizer_cpu_offload": True}, [], "use_distributed_optimizer=True divides it instead"),
        ({"optimizer_cuda_graph": True}, [], "a graph would repeat the same one"),
        ({"overlap_param_gather_with_optimizer_step": True}, [], "overlap_param_gather=True overlaps with the"),
        ({"use_precision_aware_optimizer": True}, [], "leave it out, main parameters and state are float32"),
        ({"decoupled_weight_decay": False}, [], "adamw decays decoupled. Leave it True, or take shardstep_adam"),
        ({"optimizer": f"dist_{MUON}"}, [], f"set optimizer='{MUON}' and use_layer_wise_distributed_optimizer=True"),
        ({}, [chunk(ddp=SCATTERED)], "every rank steps all parameters. Set it in both, or in neither"),
        (SCATTERED, [chunk(ddp={"use_distributed_optimizer": False})], "but not in the model's"),
        ({}, [chunk(ddp={"use_megatron_fsdp": True})], "leave use_megatron_fsdp out"),
        ({"use_layer_wise_distributed_optimizer": True}, [], "steps in bf16 only; set bf16=True"),
        (
            LAYER_WISE,
            [chunk(ddp=SCATTERED)],
            r"does not keep weight \(2, 2\) together.*set use_distributed_optimizer=True",
        ),
        (
            {"optimizer": LAMB, **LAYER_WISE},
            [chunk(ddp=SCATTERED, together=False)],
            "parameters with shardstep.core.megatron.tag_whole before",
        ),
        (
            {"optimizer": MUON, **LAYER_WISE},
            [chunk(ddp=SCATTERED, together=True)],
            r"keeps bias \(2,\) together, and an Adam on parts is to step it",
        ),
    ],
)
def test_what_would_step_wrongly_is_refused(settings, chunks, words):
    from megatron.core.optimizer import OptimizerConfig

    from core.megatron.refusals import check

    given: Any = OptimizerConfig(optimizer=ADAMW, lr=0.1)
    for name, value in settings.items():  # as a script may set them, behind the back of Megatron-Core's own checks
        setattr(given, name, value)
    name = given.optimizer.removeprefix("dist_").removeprefix("shardstep_")
    with pytest.raises(ValueError, match=words):
        check(name, given, chunks, None)


def test_their_own_muon_may_not_be_cut_either():
    import megatron.core.optimizer as factory

    import core.megatron  # noqa: F401

    given = factory.OptimizerConfig(optimizer="muon", lr=0.1, use_distributed_optimizer=True)
    with pytest.raises(ValueError, match="'muon' with use_distributed_optimizer=True: its data-parallel ranks would"):
        factory._get_megatron_emerging_optimizer(given, [], {})


def test_rows_of_gathered_weights_are_no_matrices():
    from megatron.core.optimizer import OptimizerConfig

    from core.megatron.refusals import check

    groups = SimpleNamespace(gtp_remat=SimpleNamespace(size=lambda: 2))
    with pytest.raises(ValueError, match="2 ranks of gtp_remat hold rows of each weight"):
        check("muon", OptimizerConfig(optimizer=MUON, lr=0.1), [], groups)
    check("adamw", OptimizerConfig(optimizer=ADAMW, lr=0.1), [], groups)
