"""Targets for the time of a step, and the table that shows which of them are met."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from . import virtual
from .cases import MEGATRON_EXACT
from .tables import Clock, Row, cpu, errors, results, table, wall

SIZES = ((512, 8), (1024, 4))
DUPLICATED, DISTRIBUTED = MEGATRON_EXACT
WHOLE_STEP = tuple(f"{name}, foreach AdamW" for name in MEGATRON_EXACT)


@dataclass(frozen=True)
class Figure:
    """A target for the ratio of our time to that of peers.

    Attributes:
        against: Name of the peers in the table.
        theirs: Names of the peers' candidates; the fastest of them counts.
        target: Largest ratio of the time of our fastest exact candidate to that of the fastest peer.
        case: Kind of run, ``step`` or ``whole step``.
        ranks: Number of ranks; 1 for one process.
        hidden: Hidden size of the model.
        layers: Number of layers of the model.
        precision: Precision of Newton-Schulz, ours and the peers'.
    """

    against: str
    theirs: tuple[str, ...]
    target: float
    case: str
    ranks: int
    hidden: int
    layers: int
    precision: str


def _both_sizes(
    against: str, theirs: tuple[str, ...], targets: tuple[float, float], case: str, ranks: int, precision: str
) -> list[Figure]:
    return [
        Figure(against, theirs, target, case, ranks, *size, precision)
        for size, target in zip(SIZES, targets, strict=True)
    ]


FIGURES = [
    *_both_sizes("Megatron-Core's best exact mode", MEGATRON_EXACT, (0.33, 0.45), "step", 4, "medium"),
    *_both_sizes("Megatron-Core's best exact mode", MEGATRON_EXACT, (0.55, 0.65), "step", 2, "medium"),
    *_both_sizes(DUPLICATED, (DUPLICATED,), (0.20, 0.20), "step", 4, "medium"),
    *_both_sizes(DISTRIBUTED, (DISTRIBUTED,), (0.25, 0.25), "step", 4, "highest"),
    *_both_sizes("torch.optim.Muon", ("torch.optim.Muon",), (0.90, 0.75), "step", 1, "medium"),
    *_both_sizes("emerging-optimizers", ("emerging-optimizers",), (0.30, 0.30), "step", 1, "highest"),
    *_both_sizes("Megatron-Core's Muon, torch's AdamW", WHOLE_STEP, (0.35, 0.35), "whole step", 4, "medium"),
]
SCALING, SCALING_RANKS = 1.15, (2, 4, 8)
"""Target for the time of one rank times the number of ranks, over the time of one process; numbers of ranks."""


def figures_table(reports: Sequence[dict[str, Any]]) -> str:
    """A Markdown table with a line for each figure. A figure is met if the ratio of CPU times is, with no larger error.

    Errors are compared as they are printed. A figure whose run is not among ``reports`` is shown as not measured.
    """
    lines: list[Row] = [
        ("against", "at", "CPU, ours / theirs", "wall, ours / theirs", "target", "error, ours / theirs", "met")
    ]
    lines += [_line(figure, reports) for figure in FIGURES]
    lines += [_scaling(report) for report in reports if report["case"] == "virtual"]
    return "\n".join(["\n### Figures\n", *table(lines)])


def _line(figure: Figure, reports: Sequence[dict[str, Any]]) -> Row:
    ranks = f"{figure.ranks} ranks" if figure.ranks > 1 else "one process"
    at = f"{figure.hidden} x {figure.layers}, {ranks}, {figure.precision}"
    target = f"{figure.target:.2f}"
    keys = ("case", "ranks", "hidden", "layers", "precision")
    run = [report for report in reports if all(report[key] == getattr(figure, key) for key in keys)]
    measured = results(run[-1]) if run else []
    ours = [r for r in measured if r.ours and r.exact]
    theirs = [r for r in measured if r.name in figure.theirs]
    if not ours or len(theirs) < len(figure.theirs):
        return figure.against, at, "not measured", "", target, "", ""
    our, their = (min(rs, key=cpu) for rs in (ours, theirs))
    missed = ["time"] if cpu(our) / cpu(their) > figure.target else []
    if any(float(e) > float(peer_e) for e, peer_e in zip(errors(our), errors(their), strict=True)):
        missed.append("error")
    met = f"no: {' and '.join(missed)}" if missed else "yes"
    return (
        figure.against,
        at,
        _ratio(our, theirs, cpu),
        _ratio(our, theirs, wall),
        target,
        " / ".join(" and ".join(errors(r)) for r in (our, their)),
        met,
    )


def _ratio(ours: Any, theirs: Sequence[Any], clock: Clock) -> str:
    return f"{clock(ours) / min(map(clock, theirs)):.2f}"


def _scaling(report: dict[str, Any]) -> Row:
    measured: list[virtual.Result] = results(report)
    at = f"{report['hidden']} x {report['layers']}, virtual, {report['precision']}"
    ours = {
        ranks: min((r for r in measured if r.ours and r.exact and r.ranks == ranks), key=cpu, default=None)
        for ranks in SCALING_RANKS
    }
    shares = {n: virtual.scaling(r, measured)[0] for n, r in ours.items() if r is not None}
    against = f"one process, 1/t, t = {', '.join(map(str, SCALING_RANKS))}"
    if len(shares) < len(SCALING_RANKS):
        return against, at, "not measured", "", f"{SCALING:.2f}", "", ""
    met = "yes" if max(shares.values()) <= SCALING else "no: time"
    return against, at, ", ".join(f"{share:.2f}" for share in shares.values()), "", f"{SCALING:.2f}", "", met
