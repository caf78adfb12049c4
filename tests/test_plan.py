"""The planner as its users call it."""

import json

import pytest
import torch.distributed as dist

from tools.plan.arguments import cluster_of, model_of, parser
from tools.plan.command import LARGEST, curves, main
from tools.plan.models import PRESETS, other_parameters, parts

DENSE = ["--world-size", "256", "--tp", "8", "--pp", "4"]
MOE = [*DENSE, "--ep", "8", "--etp", "1"]


def planned(*flags: str):
    """The model, the cluster and the options of a command line."""
    options = parser("").parse_args(flags)
    return model_of(options), cluster_of(options), options


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_has_a_plan(preset, capsys):
    main(["--preset", preset, *(MOE if "moe" in preset else DENSE)])
    out = capsys.readouterr().out
    for mode in ("owner", "team", "distributed", "duplicated", "blockwise (inexact)", "Megatron-Core distributed"):
        assert f"\n{mode} " in out
    assert "recommended: " in out and "recommended: blockwise" not in out


@pytest.mark.parametrize(
    ("preset", "billions"), [("1B", 1.5), ("8B", 8.03), ("70B", 70.6), ("405B", 405.8), ("1T-moe", 1040)]
)
def test_presets_have_as_many_parameters_as_they_say(preset, billions):
    assert PRESETS[preset].parameters / 1e9 == pytest.approx(billions, rel=0.01)


@pytest.mark.parametrize(("preset", "layout"), [("8B", ["--world-size", "64", "--tp", "8"]), ("1T-moe", MOE)])
def test_a_rank_of_each_stage_holds_its_part(preset, layout):
    """Added up over stages, and divided by what several ranks hold alike: the whole model."""
    model, cluster, _ = planned("--preset", preset, *layout)
    here = parts(model, cluster, 2)
    # The fullest stage of a number of layers that may not divide.
    layers = -(-model.num_layers // cluster.pp)
    held = sum(
        m.count * m.entries / m.tp * cluster.world_size / cluster.pp / m.copies for _, some in here for m in some
    )
    tables = 2 * model.vocab_size * model.hidden_size
    assert held / layers * model.num_layers + tables == model.parameters
    assert other_parameters(model, cluster) >= tables / 2 / cluster.tp


@pytest.mark.parametrize(("optimizer", "bytes_each"), [("muon", 4), ("adaptive_muon", 8), ("adamw", 8)])
def test_json_has_every_row_and_the_state(optimizer, bytes_each, capsys):
    main(["--preset", "8B", "--world-size", "64", "--tp", "8", "--optimizer", optimizer, "--json"])
    rows = json.loads(capsys.readouterr().out)["rows"]
    tables = 2 * 128256 * 4096
    state = (bytes_each * (PRESETS["8B"].parameters - tables) + 8 * tables) / 8 / 1e6
    assert rows and all(row["ms"] > 0 and row["state_mb"] == pytest.approx(state) for row in rows)


def test_sizes_that_are_not_given_are_usual_and_given_ones_win(capsys):
    model, _, _ = planned("--hidden-size", "64", "--num-layers", "2", "--num-attention-heads", "4", "--swiglu")
    assert (model.ffn_hidden_size, model.num_query_groups, model.kv_channels, model.swiglu) == (256, 4, 16, True)
    model, _, _ = planned("--preset", "8B", "--num-layers", "3", "--no-swiglu")
    assert (model.num_layers, model.hidden_size, model.swiglu) == (3, 4096, False)


@pytest.mark.parametrize(("preset", "layout", "first"), [("1B", ["--tp", "8"], 8), ("1T-moe", MOE, 32)])
def test_the_plot_goes_up_to_sixteen_thousand_ranks(preset, layout, first, tmp_path):
    found = curves(*planned("--preset", preset, *layout))
    assert {tuple(ranks for ranks, _ in points) for points in found.values()} == {
        tuple(first * 2**k for k in range((LARGEST // first).bit_length()))
    }
    main(["--preset", preset, *layout, "--plot", str(tmp_path / "cost.png")])
    assert (tmp_path / "cost.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--preset 8B --world-size 64 --tp 7", "--tp 7: does not divide --hidden-size 4096; possible: 1 2 4 8 16"),
        ("--preset 8B --world-size 60 --tp 8", "--world-size 60: is not divisible by --tp 8 times --pp 1; possible:"),
        ("--preset 8B --world-size 64 --tp 8 --pp 5", "is not divisible by --tp 8 times --pp 5"),
        ("--preset 1B --world-size 64 --pp 32", "--pp 32: stages need a layer each; possible: 1 to --num-layers 16"),
        ("--preset 1T-moe --world-size 8192 --tp 8 --ep 4096", "--ep 4096: cannot share out --num-experts 384"),
        ("--preset 1T-moe --world-size 48 --tp 8 --ep 32 --etp 1", "is not divisible by --etp 1 times --ep 32"),
        ("--preset 8B --ep 2", "--ep 2: needs experts"),
        ("--preset 8B --tflops 0", "--tflops 0.0: is out of range; possible: a number > 0"),
        ("--preset 8B --inter-gbytes inf", "--inter-gbytes inf: is out of range"),
        ("--preset 8B --world-size -8", "--world-size -8: is out of range; possible: a whole number >= 1"),
        ("--preset 8B --ns-steps 0", "--ns-steps 0: is out of range"),
        ("--preset 8B --num-experts 8", "--moe-ffn-hidden-size: is missing"),
        ("--preset 1T-moe --moe-router-topk 999", "--moe-router-topk 999: is out of range"),
        ("--world-size 8", "--hidden-size: is missing; hint: or --preset"),
        ("--hidden-size 64 --num-layers 2 --num-attention-heads 5", "--num-attention-heads 5: does not divide"),
        ("--preset 8B --plot no/such/folder/x.png", "--plot no/such/folder/x.png: cannot be written"),
        ("--preset 8B --plot x.nothing", "--plot x.nothing: cannot be written"),
        ("--validate", "--validate: needs ranks; hint: torchrun"),
        ("--validate --reps 0", "--reps 0: is out of range"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(line, message, capsys, monkeypatch):
    monkeypatch.setattr(dist, "is_initialized", lambda: False)
    with pytest.raises(SystemExit) as stopped:
        main(line.split())
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("precision", ["highest", "medium"])
def test_the_model_is_compared_with_steps_of_this_machine(world, precision, capsys):
    main(["--validate", "--hidden", "64", "--layers", "1", "--reps", "1", "--precision", precision])
    out = capsys.readouterr().out
    assert all((mode in out) == (world.rank == 0) for mode in ("owner", "distributed", "duplicated", "GFLOP/s"))
