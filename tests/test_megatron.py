"""Our optimizers in Megatron-Core: its registry, its command line, what is refused, scripts that know nothing of us."""

import argparse
import inspect
import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("megatron.core", reason="Megatron-Core is not installed: bash scripts/bootstrap.sh megatron")

ROOT = Path(__file__).parents[1]


@pytest.fixture
def parser() -> argparse.ArgumentParser:
    """The part of Megatron's parser that we extend."""
    made = argparse.ArgumentParser()
    made.add_argument("--optimizer", choices=["adam", "muon"], default="adam")
    made.add_argument("--muon-momentum", type=float, default=0.9)
    return made


def test_every_setting_has_a_flag(parser, capsys):
    from core.megatron.flags import add_arguments
    from core.optimizer.registry import all_settings, list_optimizers

    add_arguments(parser)
    args = parser.parse_args(["--optimizer", "shardstep_soap", "--soap-eps", "0.01", "--lion-betas", "0.9", "0.98"])
    assert (args.shardstep_soap_eps, args.shardstep_lion_betas, args.muon_momentum) == (0.01, [0.9, 0.98], 0.9)
    flags = {option[2:].replace("-", "_") for option in parser._option_string_actions}
    assert flags >= set(all_settings())
    for name in list_optimizers():
        assert parser.parse_args(["--optimizer", f"shardstep_{name}"]).optimizer == f"shardstep_{name}"
    with pytest.raises(SystemExit):
        parser.parse_args(["--optimizer", "shardstep_muo"])
    assert "shardstep_muon" in capsys.readouterr().err
    assert "_empty" not in parser.format_help()  # of settings without a default


def test_muon_can_be_replaced(parser, monkeypatch):
    from megatron.core.optimizer.emerging_optimizers import _EMERGING_OPTIMIZERS

    from core.megatron.flags import add_arguments
    from core.optimizer.rules.tensor_parallel_muon import TensorParallelMuon

    for name in ("muon", "adaptive_muon"):
        monkeypatch.setitem(_EMERGING_OPTIMIZERS, name, _EMERGING_OPTIMIZERS[name])
    add_arguments(parser).parse_args(["--optimizer", "muon", "--shardstep-replace-muon"])
    made = _EMERGING_OPTIMIZERS["muon"].optimizer_cls([torch.nn.Parameter(torch.ones(2, 2))])
    assert type(made) is TensorParallelMuon


def config(**settings: Any) -> Any:
    from megatron.core.optimizer import OptimizerConfig

    return OptimizerConfig(**{"optimizer": "shardstep_muon", "lr": 0.1, **settings})


def test_the_mode_is_exact_unless_asked_for():
    from core.megatron.settings import Settings

    assert Settings(config(), "muon").muon_tp_mode == "owner"
    assert Settings(config(muon_tp_mode="distributed"), "muon").muon_tp_mode == "distributed"
    asked = config()
    asked.shardstep_tp_mode = "blockwise"
    assert Settings(asked, "muon").muon_tp_mode == "blockwise"


def test_a_flag_of_the_scripts_own_keeps_its_meaning(parser):
    from core.megatron.flags import add_arguments

    parser.add_argument("--soap-eps", choices=["small", "large"], default="small")
    add_arguments(parser)
    args = parser.parse_args(["--soap-eps", "large", "--shardstep-soap-eps", "0.01"])
    assert (args.soap_eps, args.shardstep_soap_eps) == ("large", 0.01)
    assert "--shardstep-muon-momentum" not in parser._option_string_actions  # Megatron's means the same


@pytest.fixture
def arguments(monkeypatch) -> Any:
    """Megatron's own module of arguments, extended."""
    from megatron.training import arguments

    from core.megatron.flags import extend_arguments

    for name in ("parse_args", "validate_args"):
        monkeypatch.setattr(arguments, name, getattr(arguments, name))
    extend_arguments()
    return arguments


GIVEN = "--num-layers 2 --hidden-size 32 --num-attention-heads 4 --seq-length 8 --max-position-embeddings 8 --micro-batch-size 1"


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")  # Megatron's
def test_megatrons_own_parser_takes_our_flags_and_its_config_stays_as_it_is(arguments, monkeypatch):
    from dataclasses import fields

    from megatron.core.optimizer import OptimizerConfig
    from megatron.training import global_vars

    from core.megatron.settings import Settings

    def extra(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        parser.add_argument("--apollo-rank", type=str)  # would conflict, if ours were there already
        return parser

    line = "script.py --optimizer shardstep_soap --soap-eps 0.01 --soap-precondition-frequency 3 --apollo-rank seven"
    monkeypatch.setattr(sys, "argv", [*line.split(), *GIVEN.split()])
    args = arguments.parse_args(extra)
    monkeypatch.setattr(global_vars, "_GLOBAL_ARGS", args)
    # Megatron fills its config with what the command line has under the names of its fields, None too.
    given = {field.name: getattr(args, field.name) for field in fields(OptimizerConfig) if hasattr(args, field.name)}
    assert not [name for name in given if name.startswith(("soap", "adaptive"))]
    assert args.apollo_rank == "seven"
    soap = Settings(config(optimizer=args.optimizer), "soap")
    assert (soap.soap_eps, soap.soap_precondition_frequency, soap.soap_shampoo_beta) == (0.01, 3, 0.95)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")  # Megatron's
@pytest.mark.parametrize("optimizer", ["shardstep_muon", "muon", "adam"])
def test_a_flag_that_the_optimizer_does_not_have_is_refused(arguments, monkeypatch, optimizer):
    line = f"script.py --optimizer {optimizer} --soap-eps 0.01"
    monkeypatch.setattr(sys, "argv", [*line.split(), *GIVEN.split()])
    with pytest.raises(ValueError, match=rf"--optimizer {optimizer} does not take --soap-eps"):
        arguments.validate_args(arguments.parse_args())


MUP: dict[str, list[str]] = {
    "muon": ["muon", "adaptive_muon", "muon_hyperball", "mop", "scion", "spel", "sinkhorn_muon"],
    "soap": ["soap", "shampoo", "quad", "psgd_pro", "lion", "adafactor"],
    "adam": ["adamw", "radam", "oblique_adam"],
    "sgd": ["sgd"],
}
"""What a name means to Megatron's rules for width → ours that get the same."""


@pytest.mark.filterwarnings("ignore::UserWarning")  # no rank to log on
@pytest.mark.parametrize(("rule", "names"), MUP.items())
def test_learning_rates_follow_the_width_as_megatrons_do(rule, names):
    from megatron.core.optimizer import get_mup_config_overrides

    import core.megatron  # noqa: F401
    from core.optimizer.registry import list_optimizers

    matrix, vector, table = (torch.nn.Parameter(torch.zeros(shape)) for shape in ((4, 4), (4,), (8, 4)))
    table.is_embedding_or_output_parameter = table.is_embedding_parameter = True  # type: ignore[attr-defined]
    weights = {"layers.0.fc.weight": matrix, "layers.0.fc.bias": vector, "embedding.weight": table}

    def overrides(optimizer: str) -> list[tuple[str, Any]]:
        found = get_mup_config_overrides(config(min_lr=0.01, adam_eps=1e-6), 4.0, optimizer)
        return [(name, given) for name, p in weights.items() for key, given in found.items() if key.matches(p, name)]

    expected = overrides(rule)
    for name in set(names) & set(list_optimizers()):
        assert overrides(f"shardstep_{name}") == expected, name
    fourth = {"max_lr": 0.025, "min_lr": 0.0025}
    assert dict(expected).get("layers.0.fc.weight") == {
        "muon": None, "soap": fourth, "adam": {**fourth, "eps": 2.5e-7}, "sgd": None
    }[rule]  # fmt: skip


@pytest.mark.filterwarnings("ignore::UserWarning")  # Megatron's, as it is imported
def test_only_flags_of_ours_are_settings(monkeypatch):
    from megatron.training import global_vars

    from core.megatron.registration import _entry
    from core.process_groups_config import ProcessGroupCollection

    # Megatron's flags have names that are ours for something else: its rank is this process's.
    given = argparse.Namespace(rank=3, seed=5, lr=7.0, shardstep_apollo_scale=2.0, apollo_update_proj_gap=9)
    monkeypatch.setattr(global_vars, "_GLOBAL_ARGS", given)
    kwargs = _entry("apollo").config_to_kwargs(config(optimizer="shardstep_apollo"), [], ProcessGroupCollection())
    assert not {"rank", "seed"} & kwargs.keys()
    assert (kwargs["lr"], kwargs["scale"]) == (0.1, 2.0)
    assert kwargs.get("update_proj_gap") != 9
    monkeypatch.setattr(global_vars, "_GLOBAL_ARGS", argparse.Namespace(shardstep_skew_precond_dtype="bfloat16"))
    kwargs = _entry("skew").config_to_kwargs(config(optimizer="shardstep_skew"), [], ProcessGroupCollection())
    assert kwargs["precond_dtype"] is torch.bfloat16


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"use_distributed_optimizer": True}, "drift apart. Set use_layer_wise_distributed_optimizer=True"),
        ({"muon_scalar_optimizer": "lion"}, "take --shardstep-replace-muon with --optimizer muon"),
        ({"optimizer": "shardstep_sophia"}, "nothing there estimates the Hessian"),
        ({"optimizer": "shardstep_schedule_free_adamw"}, "the weights to train and to evaluate"),
    ],
)
def test_what_would_step_wrongly_is_refused(settings, words):
    from megatron.core.optimizer.emerging_optimizers import _EMERGING_OPTIMIZERS

    import core.megatron  # noqa: F401

    given = config(**settings)
    with pytest.raises(ValueError, match=words):
        _EMERGING_OPTIMIZERS[given.optimizer].config_to_kwargs(given, [], None)


def test_a_kernel_of_later_versions_is_refused():
    from megatron.core.optimizer.emerging_optimizers import _EMERGING_OPTIMIZERS

    import core.megatron  # noqa: F401

    given = config()
    given.muon_use_syrk = True  # a field from 0.20 on
    with pytest.raises(ValueError, match="leave --muon-use-syrk out"):
        _EMERGING_OPTIMIZERS[given.optimizer].config_to_kwargs(given, [], None)


def test_a_version_without_the_registry_is_refused(monkeypatch):
    from core.megatron import upstream

    here = re.escape(upstream.installed())
    with pytest.raises(ImportError, match=rf"Megatron-Core {here} has no .*emerging_optimizers with _NO_SUCH_NAME"):
        upstream.lookup(upstream.REGISTRY, "_NO_SUCH_NAME")
    monkeypatch.setattr(upstream, "installed", lambda: "0.17.1")
    monkeypatch.setitem(sys.modules, upstream.REGISTRY, None)
    with pytest.raises(ImportError, match=r"Core 0\.17\.1 has no .*pip install 'megatron-core>=0\.18,<0\.20'"):
        upstream.lookup(upstream.REGISTRY, "_EMERGING_OPTIMIZERS")


def test_groups_are_told_apart_where_their_identifiers_leave_out_the_optimizer(monkeypatch):
    from megatron.core.optimizer import optimizer as theirs

    from core.megatron.resume import _counterpart

    keys = ("wd_mult", "lr_mult", "is_expert_parallel", "is_decoupled_lr")  # all that 0.18 has
    monkeypatch.setattr(theirs, "param_group_identifier_keys", keys)
    same = {"wd_mult": 1.0, "lr_mult": 1.0, "is_expert_parallel": False, "is_decoupled_lr": False}
    muon, adam = {**same, "momentum": 0.9}, {**same, "optimizer": "adam", "eps": 1e-8}
    assert [_counterpart(group, [adam, muon]) for group in (muon, adam)] == [muon, adam]


def test_the_hook_waits_only_where_it_is_asked_for(monkeypatch):
    from core import megatron_hook

    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    monkeypatch.delenv(megatron_hook.VARIABLE, raising=False)
    before = list(sys.meta_path)
    megatron_hook.install()
    assert sys.meta_path == before
    monkeypatch.setenv(megatron_hook.VARIABLE, "1")
    megatron_hook.install()
    megatron_hook.install()
    assert len(sys.meta_path) == len(before) + 1


@pytest.mark.parametrize("how", ["hook", "launcher"])
def test_a_script_that_knows_nothing_of_us_finds_our_optimizers(tmp_path, how):
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\n"
        "from megatron.core.optimizer.emerging_optimizers import _EMERGING_OPTIMIZERS\n"
        "print(sum(name.startswith('shardstep_') for name in _EMERGING_OPTIMIZERS), sys.argv[1:], __name__)\n"
    )
    hook = (
        "import runpy, sys; from core.megatron_hook import install; install(); "
        "del sys.argv[0]; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    start = ["-c", hook] if how == "hook" else ["-m", "core.megatron"]
    result = subprocess.run(
        [sys.executable, "-W", "ignore", *start, str(script), "--flag"],
        cwd=ROOT,
        env={**os.environ, "SHARDSTEP_MEGATRON": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    count, said = result.stdout.strip().splitlines()[-1].split(" ", 1)
    assert int(count) > 40
    assert said == "['--flag'] __main__"


def test_all_that_is_patched_is_listed():
    """A new patch is to be written down here; each keeps name and signature, and a second registration adds nothing."""
    import core.megatron
    from core.megatron import upstream

    before = dict(upstream.PATCHED)
    core.megatron.register()
    assert before == upstream.PATCHED
    in_core = [name for name in before if name.startswith("megatron.core.")]
    assert set(in_core) == {
        "megatron.core.dist_checkpointing.load",
        "megatron.core.dist_checkpointing.optimizer.make_sharded_optimizer_tensor",
        "megatron.core.optimizer._get_megatron_emerging_optimizer",
        "megatron.core.optimizer.get_mup_config_overrides",
        "megatron.core.optimizer.layer_wise_optimizer.LayerWiseDistributedOptimizer.load_state_dict",
        "megatron.core.optimizer.layer_wise_optimizer.LayerWiseDistributedOptimizer.sharded_state_dict",
        "megatron.core.optimizer.layer_wise_optimizer.tag_params_for_buffer_routing",
        "megatron.core.optimizer.optimizer.ChainedOptimizer.load_state_dict",
        "megatron.core.optimizer.optimizer.ChainedOptimizer.sharded_state_dict",
    }
    for name in in_core:
        function = pkgutil.resolve_name(name)
        assert function.shardstep
        assert not hasattr(function.__wrapped__, "shardstep")  # patched once
        assert function.__name__ == name.rpartition(".")[2]
        assert inspect.signature(function) == inspect.signature(function.__wrapped__)


def test_the_launcher_lists_every_patch_with_its_reason(capsys, monkeypatch):
    from core.megatron import __main__ as launcher
    from core.megatron import upstream

    monkeypatch.setattr(launcher, "extend_arguments", lambda: None)
    monkeypatch.setattr(sys, "argv", ["launcher", "--patches"])
    launcher.main()
    head, *lines = capsys.readouterr().out.splitlines()
    assert head == f"patched in Megatron-Core {upstream.installed()}:"
    assert lines[::2] == list(upstream.PATCHED)
    assert all(line.startswith("    Megatron") and line.endswith(".") for line in lines[1::2])
