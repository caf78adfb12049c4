"""Every file of ``configs/`` trains, on a small model in this process, by the optimizer and the schedule that it names."""

import math
from pathlib import Path

import pytest

from tools.pretrain.arguments import parse_arguments
from tools.pretrain.job import main
from tools.pretrain.report import read_log

CONFIGS = sorted(Path(__file__).parents[1].glob("configs/*.yaml"))
SMALL = (
    "--num-layers 1 --hidden-size 16 --num-attention-heads 4 --seq-length 16 --micro-batch-size 1 --global-batch-size 2 --seed 3 "
    "--eval-interval 6 --eval-iters 1 --tensor-model-parallel-size 1 --pipeline-model-parallel-size 1 --exit-interval 12"
).split()
OFFERED = {"adafactor", "adamw", "adaptive_muon", "apollo", "infinite", "muon", "schedule_free", "sgd", "sophia", "wsd"}


def test_there_is_a_template_for_each_of_these() -> None:
    assert {path.stem.partition("_tp")[0] for path in CONFIGS} >= OFFERED


@pytest.mark.filterwarnings("ignore:Unable to enable fault handler")  # torch's, where pytest holds the standard streams
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_template_trains(path: Path, tmp_path: Path, job_text: str) -> None:
    main(["--config", str(path), *SMALL, "--data-path", job_text, "--log-dir", str(tmp_path)])
    rows = read_log(tmp_path)
    args = parse_arguments(["--config", str(path)])
    assert [row.step for row in rows] == list(range(1, 13))
    assert all(math.isfinite(row.loss) for row in rows)
    assert rows[-1].val_loss < rows[5].val_loss < math.log(264) * 1.1
    # All warm up for ten steps, those without a schedule within the optimizer.
    assert rows[10].lr == pytest.approx(args.lr, rel=0.01)


def test_templates_say_how_to_start_them_and_where_they_log() -> None:
    for path in CONFIGS:
        args, text = parse_arguments(["--config", str(path)]), path.read_text()
        assert f"-m tools.pretrain --config configs/{path.name}" in text
        assert args.log_dir == f"runs/{path.stem}"
