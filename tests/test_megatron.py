"""Our optimizers in the real Megatron-Core: one loss on every layout, its own checkpoints, its command line."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("megatron.core", reason="Megatron-Core is not installed: bash scripts/bootstrap.sh megatron")

from tests.megatron_gpt import CASES, RANKS

ROOT = Path(__file__).parents[1]


def train(folder: Path, names: list[str]) -> dict[str, list[float]]:
    """Losses of each case, trained by one program of several ranks."""
    logs = [folder / f"rank {rank}" for rank in range(RANKS)]
    ranks = []
    for rank, log in enumerate(logs):
        command = [sys.executable, "-W", "ignore", "-m", "tests.megatron_gpt", str(rank), str(folder / "store")]
        with log.open("w") as out:
            started = subprocess.Popen(
                [*command, json.dumps(names)],
                cwd=ROOT,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                stdout=out,
                stderr=subprocess.STDOUT,
            )
        ranks.append(started)
    try:
        codes = [rank.wait(timeout=150) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    said = [log.read_text() for log in logs]
    assert codes == [0] * RANKS, "\n".join(said)
    rows = [json.loads(line) for line in said[0].splitlines() if line.startswith("{")]
    return {row["name"]: row["losses"] for row in rows}


@pytest.fixture(scope="module")
def losses(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[float]]:
    return train(tmp_path_factory.mktemp("megatron"), [name for name in CASES if "soap" not in name])


SAME: list[tuple[str, str]] = [
    ("theirs", "1"),
    ("tp2", "1"),
    ("tp4, 2 query groups", "1"),
    ("tp2 pp2", "pp2"),  # a stage draws its own first weights
    ("on from tp2, pp2", "on from tp2"),
    ("swiglu tp2", "swiglu 1"),
    ("normuon tp2", "normuon 1"),
    ("on from 1, tp2", "on from tp2"),
    ("theirs, on from tp2", "on from tp2"),
    ("normuon on from tp2, pp2", "normuon on from tp2"),
]


@pytest.mark.timeout(200)
@pytest.mark.parametrize(("case", "like"), SAME)
def test_every_layout_has_the_loss_of_one_rank(losses, case, like):
    assert losses[case] == pytest.approx(losses[like], rel=1e-5)


def test_sixteen_bits_differ_by_their_rounding(losses):
    assert losses["bf16 tp2 layer-wise"] == pytest.approx(losses["bf16 1"], rel=2e-3)


def test_every_run_learns(losses):
    assert all(first > last for first, *_, last in losses.values())


@pytest.mark.soak
@pytest.mark.timeout(200)
def test_state_of_owners_goes_to_other_layouts(tmp_path):
    found = train(tmp_path, [name for name in CASES if "soap" in name])
    assert found["soap on from tp2, tp2"] == pytest.approx(found["soap on from tp2"], rel=1e-5)
    assert found["soap on from tp2"][0] < found["soap tp2"][-1]


@pytest.fixture
def parser() -> argparse.ArgumentParser:
    """The part of Megatron's parser that we extend."""
    made = argparse.ArgumentParser()
    made.add_argument("--optimizer", choices=["adam", "muon"], default="adam")
    made.add_argument("--muon-momentum", type=float, default=0.9)
    return made


def test_every_setting_has_a_flag(parser, capsys):
    from core.megatron.flags import add_arguments
    from core.optimizer.emerging_optimizers import all_settings, list_optimizers

    add_arguments(parser)
    args = parser.parse_args(["--optimizer", "shardstep_soap", "--soap-eps", "0.01", "--lion-betas", "0.9", "0.98"])
    assert (args.soap_eps, args.lion_betas, args.muon_momentum) == (0.01, [0.9, 0.98], 0.9)
    assert all(hasattr(args, name) for name in all_settings())
    for name in list_optimizers():
        assert parser.parse_args(["--optimizer", f"shardstep_{name}"]).optimizer == f"shardstep_{name}"
    with pytest.raises(SystemExit):
        parser.parse_args(["--optimizer", "shardstep_muo"])
    assert "shardstep_muon" in capsys.readouterr().err


def test_muon_can_be_replaced(parser, monkeypatch):
    from megatron.core.optimizer.emerging_optimizers import _EMERGING_OPTIMIZERS

    from core.megatron.flags import add_arguments
    from core.optimizer.muon import TensorParallelMuon

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

    assert config().muon_tp_mode == "blockwise"
    assert Settings(config(), "muon").muon_tp_mode == "owner"
    assert Settings(config(muon_tp_mode="distributed"), "muon").muon_tp_mode == "distributed"
    asked = config()
    asked.shardstep_tp_mode = "blockwise"
    assert Settings(asked, "muon").muon_tp_mode == "blockwise"


@pytest.mark.filterwarnings("ignore::UserWarning")  # Megatron's, as it is imported
def test_only_flags_of_ours_are_settings(monkeypatch):
    from megatron.training import global_vars

    from core.megatron.registration import _entry
    from core.process_groups_config import ProcessGroupCollection

    # Megatron's flags have names that are ours for something else: its rank is this process's.
    given = argparse.Namespace(rank=3, seed=5, lr=7.0, apollo_scale=2.0, soap_eps=None)
    monkeypatch.setattr(global_vars, "_GLOBAL_ARGS", given)
    kwargs = _entry("apollo").config_to_kwargs(config(optimizer="shardstep_apollo"), [], ProcessGroupCollection())
    assert not {"rank", "seed"} & kwargs.keys()
    assert (kwargs["lr"], kwargs["scale"]) == (0.1, 2.0)
    monkeypatch.setattr(global_vars, "_GLOBAL_ARGS", argparse.Namespace(skew_precond_dtype="bfloat16"))
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


def test_a_version_without_the_registry_is_refused():
    from core.megatron.seam import REGISTRY, seam

    with pytest.raises(ImportError, match=r"Megatron-Core 0\.19\.2 has no .*emerging_optimizers with _NO_SUCH_NAME"):
        seam(REGISTRY, "_NO_SUCH_NAME")
    with pytest.raises(ImportError, match=r"has no megatron\.core\.no_such_module with anything"):
        seam("megatron.core.no_such_module", "anything")


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
