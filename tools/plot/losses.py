"""Draws loss curves of runs as a PNG: ``python -m tools.plot RUN [RUN...] -o out.png``. A RUN is a --log-dir."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from ..pretrain.report import Record, read_log
from ..usage import UsageError, refuse


def plot_runs(runs: dict[str, list[Record]], out: Path) -> None:
    """Draw training loss (lines) and validation loss (dots) over steps; write ``out`` in the format of its suffix.

    Args:
        runs: Label → rows of the run's log.
        out: Picture to write.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5))
    for label, records in runs.items():
        (line,) = axes.plot(
            [r.step for r in records], [r.loss for r in records], label=f"{label}: training", linewidth=1
        )
        checked = [(r.step, r.val_loss) for r in records if r.val_loss is not None]
        if checked:
            steps, losses = zip(*checked, strict=True)
            axes.plot(steps, losses, "o--", color=line.get_color(), markersize=4, label=f"{label}: validation")
    axes.set_xlabel("step")
    axes.set_ylabel("loss, nats a token")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(out, dpi=150)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m tools.plot", description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a --log-dir, or a log.jsonl")
    parser.add_argument("-o", "--out", type=Path, default=Path("loss.png"), help="picture to write (default: loss.png)")
    options = parser.parse_args(argv)
    try:
        runs = {}
        for run in options.runs:
            runs[str(run)] = records = read_log(run)
            if not records:
                raise UsageError(
                    "RUN", str(run), "holds no log.jsonl with a finished step", hint="train with --log-dir"
                )
        try:
            plot_runs(runs, options.out)
        except ImportError:
            raise UsageError(
                "--out", str(options.out), "drawing needs matplotlib", hint="pip install matplotlib"
            ) from None
        except (OSError, ValueError) as error:
            raise UsageError(
                "--out", str(options.out), f"cannot be written: {error}", possible=".png, .pdf, .svg"
            ) from None
    except UsageError as error:
        refuse(error, rank=0, program="plot")
    print(f"{options.out}: {', '.join(runs)}")
