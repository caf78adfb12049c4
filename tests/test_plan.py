"""The planner as its users call it."""

import json

import pytest

from tools.plan import main
from tools.plan_models import PRESETS


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_has_a_plan(preset, capsys):
    layout = ["--world-size", "256", "--tp", "8", "--pp", "4"]
    layout += ["--ep", "8", "--etp", "1"] if "moe" in preset else []
    main(["--preset", preset, *layout])
    out = capsys.readouterr().out
    for mode in ("owner", "team", "distributed", "duplicated", "blockwise (inexact)", "Megatron-Core distributed"):
        assert f"\n{mode} " in out
    assert "recommended: " in out and "recommended: blockwise" not in out


@pytest.mark.parametrize("optimizer", ["muon", "adaptive_muon", "adamw"])
def test_json_has_every_row(optimizer, capsys):
    main(["--preset", "8B", "--world-size", "64", "--tp", "8", "--optimizer", optimizer, "--json"])
    plan = json.loads(capsys.readouterr().out)
    assert plan["rows"] and all(row["ms"] > 0 and row["state_mb"] > 0 for row in plan["rows"])
    # A parameter of 8.03 billion over 8 ranks: four bytes for a matrix's momentum, eight for AdamW.
    assert 8.03e9 / 8 * 4e-6 < plan["rows"][0]["state_mb"] < 8.03e9 / 8 * 8.2e-6


def test_a_plot_goes_up_to_sixteen_thousand_ranks(tmp_path, capsys):
    main(["--preset", "1B", "--world-size", "64", "--tp", "8", "--plot", str(tmp_path / "cost.png")])
    assert (tmp_path / "cost.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--preset 8B --world-size 64 --tp 7", "--tp 7"),
        ("--preset 8B --world-size 60 --tp 8", "--world-size 60"),
        ("--preset 8B --world-size 64 --tp 8 --pp 5", "--pp 5"),
        ("--preset 1T-moe --world-size 8192 --tp 8 --ep 4096", "--ep 4096"),
        ("--preset 8B --tflops 0", "--tflops 0"),
        ("--world-size 8", "--hidden-size"),
        ("--validate", "--validate.*needs ranks"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(line, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(line.split())
    assert stopped.value.code == 2
    import re

    assert re.search(message, capsys.readouterr().err)


@pytest.mark.mpi(min_size=2)
def test_the_model_is_compared_with_steps_of_this_machine(world, capsys):
    main(["--validate", "--hidden", "64", "--layers", "2", "--reps", "1", "--precision", "highest"])
    if world.rank == 0:
        out = capsys.readouterr().out
        assert all(mode in out for mode in ("owner", "distributed", "duplicated", "GFLOP/s"))
