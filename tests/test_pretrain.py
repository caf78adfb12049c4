"""The main job from end to end on a tiny model, and what it says."""

import csv
import io
import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from core.optimizer.chained import Assignment
from tools.check_layouts import Layout, largest_difference, train
from tools.plot import losses as plot
from tools.pretrain.arguments import parse_arguments
from tools.pretrain.job import main
from tools.pretrain.report import Progress, Record, RunLog, read_log, startup_table
from tools.pretrain.resume import changed_flags

ROOT = Path(__file__).parents[1]
TINY = (
    "--num-layers 2 --hidden-size 32 --num-attention-heads 4 --num-query-groups 2 --seq-length 16 --swiglu --seed 3 "
    "--micro-batch-size 1 --global-batch-size 4 --eval-iters 1 --lr 1e-2 --muon-extra-scale-factor 0.2"
).split()


# torch's, where pytest holds the standard streams.
pytestmark = pytest.mark.filterwarnings("ignore:Unable to enable fault handler")


@pytest.fixture
def job(tmp_path, job_text):
    """Runs the main job in this process; gives the rows of its log."""

    def run(name: str, *flags: str) -> list[Record]:
        main([*TINY, "--data-path", job_text, "--log-dir", str(tmp_path / name), *flags])
        return read_log(tmp_path / name)

    return run


def same(rows: list[Record]) -> list[Record]:
    """The rows without what depends on the clock."""
    return [replace(row, tokens_per_s=0) for row in rows]


@pytest.mark.parametrize("optimizer", ["muon", "adaptive_muon", "adamw", "sgd"])
def test_training_lowers_training_and_validation_loss(job, optimizer, capsys):
    lr = {"sgd": "0.3"}.get(optimizer, "1e-2")
    rows = job("run", "--train-iters", "40", "--eval-interval", "20", "--optimizer", optimizer, "--lr", lr)
    assert [row.step for row in rows] == list(range(1, 41))
    assert rows[0].loss == pytest.approx(math.log(264), rel=0.05)
    assert rows[-1].loss < 0.7 * rows[0].loss
    assert [row.step for row in rows if row.val_loss is not None] == [20, 40]
    assert rows[-1].val_loss < 0.7 * rows[0].loss
    said = capsys.readouterr().out
    assert "decoder.layers.*.mlp.linear_fc1.weight" in said
    assert "step    40/40 | loss " in said


def test_rules_reach_the_optimizer_and_the_table(job, capsys):
    job("run", "--train-iters", "1", "--param-override", "decoder.layers.0.*.weight=adamw,lr:1e-4")
    table = [line.split() for line in capsys.readouterr().out.splitlines() if "linear_fc1" in line]
    assert [row[:3] for row in table] == [
        ["decoder.layers.*.mlp.linear_fc1.weight", "1", "adamw"],
        ["decoder.layers.*.mlp.linear_fc1.weight", "1", "muon"],
    ]


def test_resumed_run_is_bitwise_the_uninterrupted_one(job, tmp_path, capsys):
    ten = ["--train-iters", "10", "--lr-warmup-iters", "2", "--eval-interval", "5"]
    whole = job("whole", *ten)
    saved = ["--save", str(tmp_path / "checkpoints")]
    job("half", *ten, *saved, "--save-interval", "6", "--train-iters", "6", "--lr-decay-iters", "10")
    capsys.readouterr()
    rest = job("rest", *ten, "--lr-decay-iters", "10", "--load", str(tmp_path / "checkpoints"))
    assert same(rest) == same(whole)[6:]
    assert "at step 6" in capsys.readouterr().out


def test_resuming_with_other_settings_says_what_changed_and_who_wins(job, tmp_path, capsys):
    folder = str(tmp_path / "checkpoints")
    job("first", "--train-iters", "2", "--save", folder)
    capsys.readouterr()
    second = ["--load", folder, "--train-iters", "3", "--lr", "5e-3", "--adam-beta2", "0.9", "--clip-grad", "0.1"]
    rows = job("second", *second, "--lr-decay-style", "constant")
    said = capsys.readouterr().out
    assert rows[0].lr == 5e-3
    for line in (
        "TensorParallelMuon.lr was 0.01 and is now 0.005",
        "AdamW.betas was [0.9, 0.95] and is now [0.9, 0.9]",
        "--lr was 0.01 and is now 0.005",
        "--clip-grad was 1.0 and is now 0.1",
        "--lr-decay-style was cosine and is now constant",
        "the command line wins",
    ):
        assert line in said


def test_a_job_that_restarts_itself_may_begin_without_a_checkpoint(job, tmp_path, capsys):
    both = ["--train-iters", "2", "--save", str(tmp_path / "new"), "--load", str(tmp_path / "new")]
    assert len(job("run", *both)) == 2
    assert "starting at step 0" in capsys.readouterr().out
    assert len(job("run", *both)) == 2
    assert "nothing to train: step 2 of --train-iters 2 is done" in capsys.readouterr().out


def test_a_missing_checkpoint_is_refused(job, tmp_path, capsys):
    with pytest.raises(SystemExit) as left:
        job("run", "--load", str(tmp_path / "nowhere"))
    assert left.value.code == 2
    assert "nowhere" in capsys.readouterr().err


def test_changed_flags_are_those_of_the_training():
    args = parse_arguments(["--seed", "5", "--log-dir", "a", "--muon-num-ns-steps", "7"])
    saved = {"seed": 4, "log_dir": "b", "muon_num_ns_steps": 5, "data_path": [], "gone": 1}
    assert changed_flags(saved, args) == ["--muon-num-ns-steps was 5 and is now 7", "--seed was 4 and is now 5"]


@pytest.mark.timeout(400)
def test_four_ranks_train_as_one_process(tmp_path):
    one = train(Layout(), 4, [], tmp_path / "one")
    four = train(Layout(tp=2, pp=2), 4, [], tmp_path / "four")
    assert largest_difference(four, one) <= 1e-5


@pytest.mark.timeout(200)
def test_all_ranks_together_say_one_line():
    launcher = ["-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", "2"]
    command = [sys.executable, *launcher, "-m", "tools.pretrain", "--optimizer", "moun"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    said = [line for line in done.stderr.splitlines() if line.startswith("pretrain: error")]
    assert len(said) == 1
    assert "did you mean 'muon'" in said[0]
    assert done.returncode != 0


def test_largest_difference():
    assert largest_difference([1.0, 2.2], [1.0, 2.0]) == pytest.approx(0.1)
    assert largest_difference([1.0, math.nan], [1.0, 2.0]) == math.inf


def row(step: int, **more: float) -> Record:
    return Record(step=step, samples=4 * step, loss=1 / 3, lr=1e-3, grad_norm=2.0, tokens_per_s=1500.0, **more)


def test_csv_and_jsonl_hold_the_same_numbers_exactly(tmp_path):
    log = RunLog(tmp_path / "deep" / "run")
    rows = [row(1), row(2, val_loss=0.1 + 0.2)]
    for record in rows:
        log.write(record)
    assert read_log(tmp_path / "deep" / "run") == rows
    with (tmp_path / "deep" / "run" / "log.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [float(line["loss"]) for line in table] == [1 / 3, 1 / 3]
    assert [line["val_loss"] for line in table] == ["", repr(0.1 + 0.2)]


def test_a_resumed_log_drops_what_came_after_the_checkpoint(tmp_path):
    log = RunLog(tmp_path)
    for step in range(1, 6):
        log.write(row(step))
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write(json.dumps({"step": 6})[:-2])
    log = RunLog(tmp_path, resumed_at=3)
    log.write(row(4))
    assert [record.step for record in read_log(tmp_path)] == [1, 2, 3, 4]
    assert len((tmp_path / "log.csv").read_text().splitlines()) == 5
    RunLog(tmp_path)
    assert read_log(tmp_path) == []


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("terminal", [True, False])
def test_a_bar_on_a_terminal_and_lines_elsewhere(monkeypatch, terminal):
    out, err = (Terminal() if terminal else io.StringIO() for _ in range(2))
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    progress = Progress(total=4, done=0, tokens_per_step=100)
    progress.tick(1)
    progress.show(row(1, val_loss=2.5))
    progress.close()
    said = err.getvalue() if terminal else out.getvalue()
    assert all(part in said for part in ("loss 0.3333", "lr 1.00e-03", "grad norm 2.000", "1.5k tok/s"))
    assert ("\r" in said) == terminal
    assert "eta 0" in said
    assert "validation loss 2.5000" in out.getvalue()


def test_other_ranks_are_silent(capsys):
    progress = Progress(total=2, done=0, tokens_per_step=1, enabled=False)
    progress.tick(1)
    progress.show(row(1, val_loss=1.0))
    progress.say("saved")
    progress.close()
    assert capsys.readouterr() == ("", "")


def test_the_table_folds_layers_and_counts_a_parameter_once():
    where = (8, 4), "rows / tp 2", "owner", "a matrix"
    fc1 = [Assignment(f"decoder.layers.{i}.mlp.fc1", "muon", *where) for i in (0, 1, 1, 10)]
    lines = startup_table([*fc1, Assignment("norm", "adamw", (4,), "whole", "elementwise")]).splitlines()
    assert [line.split() for line in lines[2:]] == [
        "decoder.layers.*.mlp.fc1 3 muon 8 x 4 rows / tp 2 owner a matrix".split(),
        "norm 1 adamw 4 whole elementwise".split(),
        ["4", "parameters"],
    ]


@pytest.mark.filterwarnings("ignore")  # matplotlib's own, at its first import
def test_plot_writes_a_picture(tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    for name in ("a", "b"):
        log = RunLog(tmp_path / name)
        log.write(row(1))
        log.write(row(2, val_loss=1.0))
    plot.main([str(tmp_path / "a"), str(tmp_path / "b"), "-o", str(tmp_path / "loss.png")])
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit) as left:
        plot.main([str(tmp_path / "nothing")])
    assert left.value.code == 2
    assert "holds no log.jsonl" in capsys.readouterr().err
