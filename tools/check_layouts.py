"""Trains the main job on several layouts and compares the losses: ``python -m tools.check_layouts [--steps 50]``.

Every layout has the same weights, the same sequences in a step and, in an exact mode, the same update; only the order of
fp32 sums differs.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .pretrain.report import format_rows, read_log

TOLERANCE = 1e-5
"""Largest relative difference of losses that fp32 sums in another order explain."""


@dataclass(frozen=True)
class Layout:
    """Sizes of the three kinds of parallelism."""

    tp: int = 1
    pp: int = 1
    dp: int = 1

    @property
    def world(self) -> int:
        """Number of processes."""
        return self.tp * self.pp * self.dp

    def __str__(self) -> str:
        sizes = (("TP", self.tp), ("PP", self.pp), ("DP", self.dp))
        return " x ".join(f"{name}{size}" for name, size in sizes if size > 1) or "1 process"


LAYOUTS = (Layout(), Layout(tp=2), Layout(tp=4), Layout(pp=2), Layout(tp=2, pp=2), Layout(tp=2, dp=2))

# The model is small, but has all that a layout can get wrong: grouped QKV, a gated MLP, clipping that bites, a schedule. It has
# four query groups, so that TP4 holds whole groups. Training is stable at this learning rate; at ten times the rate a difference
# in the last bit grows until two runs that are both right diverge.
JOB = (
    *("--num-layers", "2", "--hidden-size", "64", "--num-attention-heads", "8", "--num-query-groups", "4", "--swiglu"),
    *("--seq-length", "64", "--micro-batch-size", "1", "--global-batch-size", "8", "--lr", "1e-2"),
    *("--muon-extra-scale-factor", "0.2", "--muon-nesterov"),
    *("--clip-grad", "0.5", "--muon-fp32-matmul-prec", "highest", "--eval-interval", "0"),
    *("--distributed-backend", "gloo"),
)


class JobError(RuntimeError):
    """A layout did not train to its end."""


def train(layout: Layout, steps: int, extra: Sequence[str], directory: Path) -> list[float]:
    """The loss of each step of the job on ``layout``, in processes of its own.

    Args:
        directory: Directory of the job's log; made if it does not exist.

    Raises:
        JobError: The job failed; contains the end of its output.
    """
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    command = [
        *(launcher if layout.world > 1 else [sys.executable]),
        *([f"--nproc-per-node={layout.world}"] if layout.world > 1 else []),
        *("-m", "tools.pretrain", *JOB, "--train-iters", str(steps), "--lr-warmup-iters", str(steps // 10)),
        *("--log-dir", str(directory)),
        *("--tensor-model-parallel-size", str(layout.tp), "--pipeline-model-parallel-size", str(layout.pp), *extra),
    ]
    environ = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "MASTER_PORT")}
    environ.setdefault("OMP_NUM_THREADS", "1")
    done = subprocess.run(
        command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    losses = [record.loss for record in read_log(directory)]
    if done.returncode or len(losses) != steps:
        tail = "\n".join(done.stdout.splitlines()[-30:])
        raise JobError(f"{layout}: ended with code {done.returncode} after {len(losses)} of {steps} steps\n{tail}")
    return losses


def largest_difference(losses: Sequence[float], reference: Sequence[float]) -> float:
    """The largest relative difference of two runs at the same step; infinite if a loss is nan."""
    differences = [abs(a - b) / abs(b) for a, b in zip(losses, reference, strict=True)]
    return max(d if d == d else float("inf") for d in differences)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line; exit with 1 if a layout differs by more than ``TOLERANCE`` or does not train."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.check_layouts",
        description=__doc__,
        epilog="Other flags are handed to tools.pretrain, for example --optimizer adaptive_muon.",
    )
    parser.add_argument("--steps", type=int, default=50, help="steps to train (default: 50)")
    options, extra = parser.parse_known_args(argv)
    if options.steps < 1:
        parser.error(f"--steps {options.steps}: is out of range; possible: a whole number >= 1")
    shown = sorted({0, *(options.steps * part // 5 - 1 for part in range(1, 6))} & set(range(options.steps)))
    rows = [["layout", "ranks", *(f"step {step + 1}" for step in shown), "largest relative difference"]]
    worst, reference = 0.0, None
    with tempfile.TemporaryDirectory() as directory:
        for index, layout in enumerate(LAYOUTS):
            print(f"training on {layout} ...", file=sys.stderr, flush=True)
            try:
                losses = train(layout, options.steps, extra, Path(directory, str(index)))
            except JobError as error:
                sys.exit(str(error))
            reference = reference or losses
            difference = largest_difference(losses, reference)
            worst = max(worst, difference)
            rows.append(
                [str(layout), str(layout.world), *(f"{losses[step]:.6f}" for step in shown), f"{difference:.1e}"]
            )
    print("\n".join(format_rows(rows)))
    print(f"largest difference {worst:.1e}, {'within' if worst <= TOLERANCE else 'ABOVE'} {TOLERANCE:.0e}")
    sys.exit(worst > TOLERANCE)


if __name__ == "__main__":
    main()
