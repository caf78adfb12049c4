"""The main job in this process, as small as it can be."""

from dataclasses import replace
from pathlib import Path

from tools.pretrain.job import main
from tools.pretrain.report import Record, read_log

TINY = (
    "--num-layers 1 --hidden-size 32 --num-attention-heads 4 --seq-length 16 --seed 3 --micro-batch-size 1 --global-batch-size 4 "
    "--eval-interval 0 --lr 1e-2 --train-iters 6"
).split()


def run(log: Path, text: str, *flags: str) -> list[Record]:
    """The rows that the main job, on ``text``, writes into the folder ``log``."""
    main([*TINY, "--data-path", text, "--log-dir", str(log), *flags])
    return [replace(row, tokens_per_s=0) for row in read_log(log)]


def both(path: Path) -> tuple[str, ...]:
    """Flags to save to ``path`` and to go on from there."""
    return "--save", str(path), "--load", str(path)
