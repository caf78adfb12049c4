"""Tables of what the benchmark measured: a line for each candidate, with ratios to its peers."""

import statistics
from collections.abc import Callable, Sequence
from typing import Any

from . import virtual
from .cases import MEGATRON
from .measure import Result

Row = tuple[str, ...]
Clock = Callable[[Any], float]


def cpu(result: Any) -> float:
    """Median CPU seconds of a step."""
    return float(statistics.median(result.cpu))


def wall(result: Any) -> float:
    """Median wall seconds of a step."""
    return float(statistics.median(result.wall))


def seconds(times: Sequence[float]) -> str:
    """The median and the smallest time, as ``median (smallest)``."""
    return f"{statistics.median(times):.3f} ({min(times):.3f})"


def ratios(measured: Sequence[Any], clock: Clock, unit: str) -> tuple[Row, list[Row]]:
    """Columns with the ratio of each result's time to the fastest exact peer's and to every exact peer's, and their heads.

    Args:
        measured: Results of one run.
        clock: Function that returns the time of a result.
        unit: Name of this time in the heads.
    """
    peers = [r for r in measured if r.exact and not r.ours]
    columns = [(r.name.removeprefix(f"{MEGATRON} ").partition(",")[0], clock(r)) for r in peers]
    if len(peers) > 1:
        columns.insert(0, ("fastest exact peer", min(map(clock, peers))))
    head = tuple(f"{unit} / {name}" for name, _ in columns)
    return head, [tuple(f"{clock(r) / peer_time:.2f}" for _, peer_time in columns) for r in measured]


def errors(result: Result) -> Row:
    """Error of the matrices, and that of the parameters that AdamW updates, if there are any.

    The error of AdamW is shown with one digit: it is the last bit of float32, which every kernel rounds in its own way.
    """
    return (f"{result.error:.1e}",) + (() if result.adamw_error is None else (f"{result.adamw_error:.0e}",))


def rows(results: Sequence[Result]) -> list[Row]:
    """A head and a line for each candidate. Ratios are ratios of medians; below 1 the candidate is faster."""
    cpu_head, cpu_ratios = ratios(results, cpu, "CPU")
    wall_head, wall_ratios = ratios(results, wall, "wall")
    adamw = any(r.adamw_error is not None for r in results)
    adamw_head = ("error of AdamW",) if adamw else ()
    head = ("optimizer", "CPU s, median (min)", *cpu_head, "wall s, median (min)", *wall_head, "error", *adamw_head)
    lines = [(*head, "collectives")]
    for r, of_cpu, of_wall in zip(results, cpu_ratios, wall_ratios, strict=True):
        name = r.name if r.exact else f"{r.name} (inexact)"
        lines.append((name, seconds(r.cpu), *of_cpu, seconds(r.wall), *of_wall, *errors(r), str(r.collectives)))
    return lines


def virtual_rows(results: Sequence[virtual.Result]) -> list[Row]:
    """A head and a line for each number of ranks and candidate.

    Time and operations of the rank, times the number of ranks, are divided by those of one process: 1 is perfect scaling.
    """
    lines: list[Row] = []
    for ranks in sorted({r.ranks for r in results} - {1}):
        measured = [r for r in results if r.ranks == ranks]
        head, columns = ratios(measured, cpu, "CPU")
        if not lines:
            scaling = ("CPU x ranks / one process", "FLOPs x ranks / one process")
            lines.append(("ranks", "optimizer", "rank", "CPU s, median (min)", *scaling, *head))
        for r, of_cpu in zip(measured, columns, strict=True):
            name = r.name if r.exact else f"{r.name} (inexact)"
            share = (f"{x:.2f}" for x in virtual.scaling(r, results))
            lines.append((str(ranks), name, str(r.rank), seconds(r.cpu), *share, *of_cpu))
    return lines


def of_report(report: dict[str, Any]) -> list[Row]:
    """The table of one run."""
    return virtual_rows(results(report)) if report["case"] == "virtual" else rows(results(report))


def results(report: dict[str, Any]) -> list[Any]:
    """The results of one run."""
    cls: Any = virtual.Result if report["case"] == "virtual" else Result
    return [cls(**result) for result in report["results"]]


def markdown(report: dict[str, Any]) -> str:
    """A heading and a table for one run."""
    case = {"step": "", "whole step": ", whole step", "virtual": ", virtual"}[report["case"]]
    ranks = f"{report['ranks']} ranks" if report["ranks"] > 1 else "one process"
    heading = f"\n### Hidden {report['hidden']}, {report['layers']} layers, {ranks}{case}, {report['precision']}\n"
    return "\n".join([heading, *table(of_report(report))])


def table(lines: Sequence[Row]) -> list[str]:
    """A Markdown table of these lines; the first is the head."""
    head, *others = ("| " + " | ".join(line) + " |" for line in lines)
    return [head, "|" + " --- |" * len(lines[0]), *others]
