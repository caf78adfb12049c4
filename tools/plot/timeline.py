"""Draws one step of a pipeline, a row for each rank: ``python -m tools.plot.timeline trace.json -o timeline.png``.

Prints for each rank the time of its bubble at the end of the step and of its optimizer, and how much of the latter lay in the
bubble.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..pretrain.trace import CHUNKS
from ..usage import UsageError, refuse

COLOURS = {"forward": "#8fb8de", "backward": "#4a7fb5", "optimizer": "#d1495b", "gradients": "#edae49"}
WAITING = "#d9d9d9"


@dataclass(frozen=True)
class Span:
    """A span of time of one rank, in milliseconds since the step began."""

    name: str
    rank: int
    stage: int
    row: int
    begin: float
    end: float


def read_step(path: Path, step: int | None = None) -> list[Span]:
    """Spans of a step of a trace; of the last step with a backward if ``step`` is None.

    Raises:
        UsageError: The file is not a trace, or has no such step.
    """
    try:
        events: list[Any] = json.loads(path.read_text())["traceEvents"]
        steps = sorted({event["args"]["step"] for event in events if event["name"] == "backward"})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError("TRACE", str(path), f"is no trace: {error}", hint="train with --trace FILE") from None
    if not steps or step not in (None, *steps):
        possible = ", ".join(map(str, steps)) or "none: train with a pipeline"
        raise UsageError("--step", step, "is not in the trace", possible=possible)
    chosen = [event for event in events if event["args"]["step"] == (steps[-1] if step is None else step)]
    zero = min(event["ts"] for event in chosen)
    return [
        Span(
            e["name"],
            e["pid"],
            e["args"]["stage"],
            e["tid"],
            (e["ts"] - zero) / 1e3,
            (e["ts"] + e["dur"] - zero) / 1e3,
        )
        for e in chosen
    ]


@dataclass(frozen=True)
class Share:
    """Milliseconds of one rank.

    Attributes:
        stage: Pipeline stage of the rank.
        bubble: Time from the end of the rank's last backward to the end of the last rank's.
        optimizer: Time of the optimizer.
        inside: Part of ``optimizer`` that lay in the bubble.
    """

    stage: int
    bubble: float
    optimizer: float
    inside: float


def shares(spans: Sequence[Span]) -> dict[int, Share]:
    """The share of each rank, by rank."""
    last = {
        rank: max(s.end for s in spans if s.rank == rank and s.name == "backward" and s.row == CHUNKS)
        for rank in sorted({s.rank for s in spans})
    }
    end = max(last.values())
    by_rank = {}
    for rank, begin in last.items():
        work = [s for s in spans if s.rank == rank and s.name == "optimizer"]
        stage = next(s.stage for s in spans if s.rank == rank)
        inside = sum(max(0.0, min(s.end, end) - max(s.begin, begin)) for s in work)
        by_rank[rank] = Share(stage, end - begin, sum(s.end - s.begin for s in work), inside)
    return by_rank


def draw(steps: Mapping[str, Sequence[Span]], out: Path) -> None:
    """Draw the spans of each step under its title, on one time scale, and write ``out`` in the format of its suffix."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.patches import Patch

    ranks = sorted({s.rank for spans in steps.values() for s in spans})
    figure, rows = plt.subplots(
        len(steps), squeeze=False, sharex=True, figsize=(11, (0.55 * len(ranks) + 1) * len(steps) + 0.6)
    )
    for axes, (title, spans) in zip(rows[:, 0], steps.items(), strict=True):
        for s in sorted(spans, key=lambda s: s.row):
            # Time of a pipeline's run outside its chunks is spent waiting for other stages.
            colour = COLOURS[s.name] if s.row == CHUNKS or s.name in ("optimizer", "gradients") else WAITING
            axes.barh(
                ranks.index(s.rank), s.end - s.begin, left=s.begin, height=0.8, color=colour, edgecolor="white", lw=0.4
            )
        stages = {s.rank: s.stage for s in spans}
        axes.set_yticks(range(len(ranks)), [f"rank {rank}, stage {stages[rank]}" for rank in ranks])
        axes.invert_yaxis()
        axes.set_title(title, fontsize=10)
    rows[-1, 0].set_xlabel("milliseconds since the step began")
    patches = [Patch(color=colour, label=name) for name, colour in {**COLOURS, "waiting": WAITING}.items()]
    rows[0, 0].legend(handles=patches, ncols=len(patches), loc="lower right", bbox_to_anchor=(1, 1.12), fontsize=8)
    figure.tight_layout()
    figure.savefig(out, dpi=150)
    plt.close(figure)


def table(spans: Sequence[Span]) -> str:
    """A table with a line for each rank."""
    lines = [f"{'rank':>4} {'stage':>5} {'bubble ms':>10} {'optimizer ms':>13} {'inside ms':>10}"]
    for rank, s in shares(spans).items():
        lines.append(f"{rank:>4} {s.stage:>5} {s.bubble:>10.1f} {s.optimizer:>13.1f} {s.inside:>10.1f}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line; the module's docstring describes it."""
    parser = argparse.ArgumentParser(prog="python -m tools.plot.timeline", description=__doc__)
    parser.add_argument(
        "traces", nargs="+", type=Path, metavar="TRACE", help="what --trace wrote; several: below each other"
    )
    parser.add_argument("--step", type=int, help="step to draw (default: the last one)")
    parser.add_argument("-o", "--out", type=Path, default=Path("timeline.png"), help="picture (default: timeline.png)")
    options = parser.parse_args(argv)
    try:
        steps = {str(path): read_step(path, options.step) for path in options.traces}
        draw(steps, options.out)
    except ImportError:
        refuse(
            UsageError("--out", str(options.out), "drawing needs matplotlib", hint="pip install matplotlib"),
            rank=0,
            program="plot.timeline",
        )
    except UsageError as error:
        refuse(error, rank=0, program="plot.timeline")
    for title, spans in steps.items():
        print(f"{title}\n{table(spans)}")
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
