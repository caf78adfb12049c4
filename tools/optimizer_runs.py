"""Trains the main job with every registered optimizer, on a layout and in one process: ``python -m tools.optimizer_runs``.

Both have the same weights and sequences, so the losses differ only by the order of fp32 sums. All optimizers share one set of
processes, since starting these takes longer than training.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from core.optimizer.registry import list_optimizers, settings_of

from .check_layouts import JOB, Layout, largest_difference
from .pretrain.arguments import flag_of
from .pretrain.job import Job, prepare, process_group
from .pretrain.launch import Launch
from .pretrain.report import Record, format_rows, read_log
from .usage import nearest

TOLERANCE = 1e-4
"""Largest relative difference of losses that fp32 sums in another order explain."""

# Optimizers that do not train in a few steps at the job's learning rate or with their default settings, or that are so unstable
# then that a difference in the last bit grows until two runs that are both right diverge: in one process another
# --micro-batch-size makes as large a difference.
FLAGS = {
    "adafactor": "--lr 0.1",
    "adafactor_sr": "--lr 2e-3",
    "apollo": "--lr 5e-3 --apollo-rank 16",  # with rank 1 its scale divides by single numbers near 0
    "came": "--lr 5e-4",
    "eo_adaptive_muon": "--lr 2e-3",
    "eo_soap": "--lr 5e-3 --eo-soap-eps 1e-2",
    "lamb": "--lr 0.1",
    "lars": "--lr 10",
    "rekls": "--lr 5e-3 --rekls-eps 1e-2",
    "schedule_free_adamw": "--lr 3e-3",
    "schedule_free_sgd": "--lr 3",
    "sgd": "--lr 0.3 --sgd-momentum 0.9",
    "soap": "--lr 5e-3 --soap-eps 3e-2",  # below it, directions of no gradient but rounding get a whole step of Adam
    "sophia": "--lr 2e-3",
}


def flags_of(name: str, steps: int, layout: Layout, directory: Path) -> list[str]:
    """The command line of the run of one optimizer, with exact products if it has a setting for them."""
    exact = [setting for setting in settings_of(name) if setting.endswith("fp32_matmul_prec")]
    return [
        *JOB,
        *(word for setting in exact for word in (flag_of(setting), "highest")),
        *("--optimizer", name, *FLAGS.get(name, "").split()),
        *("--train-iters", str(steps), "--lr-warmup-iters", str(steps // 10), "--log-dir", str(directory / name)),
        *("--tensor-model-parallel-size", str(layout.tp), "--pipeline-model-parallel-size", str(layout.pp)),
    ]


def work(names: Sequence[str], steps: int, layout: Layout, directory: Path) -> None:
    """One rank's part: the main job with each optimizer, within one process group; logs go to ``directory/NAME``."""
    launch = Launch.from_environ(os.environ)
    args, plan, _ = prepare(flags_of(names[0], steps, layout, directory), launch)
    with process_group(args, launch, plan) as (mesh, heartbeat):
        for name in names:
            args, plan, corpus = prepare(flags_of(name, steps, layout, directory), launch)
            Job(args, plan, corpus, mesh, launch, heartbeat).run()


def train(
    names: Sequence[str], steps: int, layout: Layout, directory: Path
) -> tuple[dict[str, list[Record]], list[str]]:
    """The logs of all optimizers on ``layout``, and the last output of those that failed.

    A failure ends the processes; new processes go on with the next optimizer.
    """
    logs: dict[str, list[Record]] = {}
    failures: list[str] = []
    left = list(names)
    while left:
        print(f"training on {layout}: {' '.join(left)}", file=sys.stderr, flush=True)
        output = _start(left, steps, layout, directory)
        while left and len(log := read_log(directory / left[0])) == steps:
            logs[left.pop(0)] = log
        if left:
            failures.append(f"{left.pop(0)} on {layout}:\n{_end(output)}")
    return logs, failures


def _start(names: Sequence[str], steps: int, layout: Layout, directory: Path) -> str:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    torchrun.append(f"--nproc-per-node={layout.world}")
    sizes = f"{layout.tp}x{layout.pp}x{layout.dp}"
    command = [sys.executable, *(torchrun if layout.world > 1 else []), "-m", "tools.optimizer_runs"]
    command += ["--work", str(directory), "--steps", str(steps), "--layout", sizes, "--names", *names]
    environ = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "MASTER_PORT")}
    environ.setdefault("OMP_NUM_THREADS", "1")
    done = subprocess.run(
        command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    return done.stdout


def _end(output: str) -> str:
    """The relevant part of the output: the traceback of the first rank that has one, or the last lines."""
    lines = [line for line in output.splitlines() if not re.match(r"step +\d", line)]
    first = next((i for i, line in enumerate(lines) if "Traceback (most recent call last)" in line), None)
    if first is None:
        return "\n".join(lines[-15:])
    rank = lines[first].partition("Traceback")[0]
    return "\n".join([line.removeprefix(rank) for line in lines[first:] if line.startswith(rank)][:60])


def report(names: Sequence[str], sharded: dict[str, list[Record]], alone: dict[str, list[Record]]) -> tuple[str, bool]:
    """The table, and whether every optimizer trained and reached the same losses."""
    rows = [["optimizer", "start loss", "end loss", "one process", "largest relative difference", ""]]
    good = True
    for name in names:
        if name not in sharded or name not in alone:
            rows.append([name, "", "", "", "", "FAILED"])
            good = False
            continue
        losses, reference = ([record.loss for record in logs[name]] for logs in (sharded, alone))
        difference = largest_difference(losses, reference)
        problem = "DIFFERS" if difference > TOLERANCE else "" if losses[-1] < losses[0] else "DOES NOT TRAIN"
        good = good and not problem
        rows.append(
            [name, f"{losses[0]:.6f}", f"{losses[-1]:.6f}", f"{reference[-1]:.6f}", f"{difference:.1e}", problem]
        )
    return "\n".join(format_rows(rows)), good


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line; exit with 1 if an optimizer does not train or differs by more than ``TOLERANCE`` at a step."""
    parser = argparse.ArgumentParser(prog="python -m tools.optimizer_runs", description=__doc__)
    parser.add_argument("--names", nargs="+", default=list(list_optimizers()), help="optimizers (default: all)")
    parser.add_argument("--steps", type=int, default=30, help="steps to train (default: 30)")
    parser.add_argument("--layout", type=_layout, default=Layout(tp=2, pp=2), help="TPxPP or TPxPPxDP (default: 2x2)")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.steps < 1:
        parser.error(f"--steps {options.steps}: is out of range; possible: a whole number >= 1")
    for name in options.names:
        if name not in list_optimizers():
            parser.error(f"--names {name}: is no registered optimizer; {nearest(name, list_optimizers())}")
    if options.work:
        work(options.names, options.steps, options.layout, options.work)
        return
    with tempfile.TemporaryDirectory() as directory:
        sharded, failures = train(options.names, options.steps, options.layout, Path(directory, "sharded"))
        alone, more_failures = train(options.names, options.steps, Layout(), Path(directory, "alone"))
    table, good = report(options.names, sharded, alone)
    print("\n\n".join([*failures, *more_failures, table]))
    sys.exit(not good)


def _layout(word: str) -> Layout:
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){1,2}", word):
        raise argparse.ArgumentTypeError(f"{word!r} is no layout; possible: TPxPP or TPxPPxDP, such as 2x2 or 2x1x2")
    return Layout(*map(int, word.split("x")))


if __name__ == "__main__":
    main()
