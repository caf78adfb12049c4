"""Schedules of the main job: its flags, what is decided on resuming, and the picture."""

import pytest
import torch

from core.optimizer.emerging_optimizers import get_optimizer
from core.optimizer.optimizer_config import OptimizerConfig
from tests.support.usage import check
from tools.plot import schedule as plot_schedule
from tools.pretrain.arguments import parse_arguments
from tools.pretrain.job import main
from tools.pretrain.report import read_log
from tools.pretrain.schedule import decay_start, make_scheduler
from tools.usage import UsageError

TINY = (
    "--num-layers 1 --hidden-size 16 --num-attention-heads 2 --seq-length 8 --seed 3 --micro-batch-size 1 "
    "--global-batch-size 1 --eval-interval 0 --optimizer adamw --lr 1e-2 --min-lr 1e-4 --lr-warmup-iters 2"
).split()
STYLES = {
    "WSD": ("start-decay", "--lr-wsd-decay-style harmonic --lr-wsd-decay-iters 4", 1e-2),
    "infinite": (
        "start-annealing",
        "--lr-cooldown-iters 2 --constant-lr 4e-3 --lr-annealing-style rsqrt --lr-annealing-iters 4",
        4e-3,
    ),
}


@pytest.mark.filterwarnings("ignore:Unable to enable fault handler")  # torch's, where pytest holds the standard streams
@pytest.mark.parametrize("style", STYLES)
def test_one_flag_anneals_a_stable_checkpoint_from_the_command_line(tmp_path, job_text, capsys, style):
    flag, shape, stable = STYLES[style]

    def train(name: str, *flags: str) -> list[float]:
        log = ["--log-dir", str(tmp_path / name), "--data-path", job_text]
        main([*TINY, "--train-iters", "500", "--lr-decay-style", style, *shape.split(), *log, *flags])
        return [row.lr for row in read_log(tmp_path / name)]

    saved, annealed = str(tmp_path / "saved"), str(tmp_path / "annealed")
    assert train("stable", "--exit-interval", "6", "--save", saved)[-2:] == [stable] * 2
    lrs = train("first", "--exit-interval", "8", "--load", saved, "--save", annealed, f"--{flag}")
    assert "begins at step 6, and ends at 10" in capsys.readouterr().out
    # The same flags once more: the annealing goes on where it was.
    lrs += train("second", "--exit-interval", "12", "--load", annealed, f"--{flag}")
    torch.testing.assert_close(
        lrs, [1 / (share / 1e-4 + (1 - share) / stable) for share in (0, 0.25, 0.5, 0.75, 1, 1)], rtol=1e-9, atol=0
    )
    assert train("back", "--exit-interval", "9", "--load", annealed) == [stable]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (
            "--lr-decay-style linear --lr-cosine-exponent 2",
            "--lr-cosine-exponent 2.0: has no part in .* possible: with cosine",
        ),
        (
            "--lr-decay-style one-cycle --lr-warmup-iters 3",
            "--lr-warmup-iters 3: has no part in --lr-decay-style one-cycle",
        ),
        ("--lr-decay-style WSD --lr-wsd-decay-style harmonic", "--lr-decay-style WSD: floor is 0, and harmonic"),
        ("--lr-decay-style WSD --start-decay", "--start-decay: there is nothing to load from"),
        ("--start-decay --load x", "--start-decay: has no part in --lr-decay-style cosine; possible: with WSD"),
        ("--lr-decay-style infinite --min-lr 1e-4 --constant-lr 1e-3", "--constant-lr: .*needs --lr-cooldown-iters"),
        ("--lr-decay-style infinite --min-lr 1e-4 --lr-cooldown-iters 3", "--lr-cooldown-iters: .*needs --constant-lr"),
        ("--lr-warmup-init 1", "--lr-warmup-init 1.0: is above --lr 0.002"),
        (
            "--lr-decay-style one-cycle --optimizer sgd --sgd-momentum 0",
            "neither betas nor a momentum.*--no-lr-one-cycle-m",
        ),
    ],
)
def test_flags_that_do_not_fit(line, said):
    with pytest.raises(UsageError, match=said) as refused:
        check(line)
    assert "\n" not in str(refused.value)


def test_a_checkpoint_within_the_warmup_is_not_annealed():
    args = parse_arguments("--lr-decay-style WSD --lr-warmup-iters 9 --start-decay --load x".split())
    with pytest.raises(UsageError, match=r"--start-decay: the checkpoint is of step 5, and warm-up .* until 9"):
        decay_start(args, 5, {})
    with pytest.raises(UsageError, match="--start-decay: the run begins at step 0"):
        decay_start(args, 0, None)


def test_one_cycle_moves_the_momentum_of_every_optimizer_of_a_run():
    args = parse_arguments("--lr-decay-style one-cycle --train-iters 20 --lr 0.1".split())
    net = torch.nn.Linear(3, 2)
    optimizer = get_optimizer(OptimizerConfig(optimizer="muon", lr=0.1), [net])
    make_scheduler(args, optimizer, done=5, start=-1)
    found = {group["betas"][0] if "betas" in group else group["momentum"] for group in optimizer.param_groups}
    assert {type(member).__name__ for member in optimizer.optimizers} == {"TensorParallelMuon", "AdamW"}
    assert found == {0.85}
    assert {group["lr"] for group in optimizer.param_groups} == {0.1}


@pytest.mark.filterwarnings("ignore")  # matplotlib's own, at its first import
def test_the_picture_of_a_schedule(tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    config, out = tmp_path / "job.yaml", tmp_path / "schedule.png"
    config.write_text("lr_decay_style: WSD\ntrain_iters: 100\nlr_warmup_iters: 10\nmin_lr: 1e-4\nlr: 1e-3\n")
    plot_schedule.main(["--config", str(config), "--lr-wsd-decay-iters", "20", "--decay-from", "50", "-o", str(out)])
    assert out.read_bytes().startswith(b"\x89PNG")
    said = capsys.readouterr().out.splitlines()
    assert [line.split(",")[0] for line in said[:4]] == [
        "warm-up: steps 0 to 10",
        "stable: steps 10 to 50",
        "exponential decay: steps 50 to 70",
        "floor: steps 70 to 100",
    ]
    for line, problem in ((["--decay-from", "5"], "cannot begin to decay"), (["-o", "a.foo"], "possible: .png")):
        with pytest.raises(SystemExit) as left:
            plot_schedule.main(line)
        assert left.value.code == 2
        assert problem in capsys.readouterr().err
