"""Predicts what an optimizer step of a model costs on a cluster, in every tensor-parallel mode, and recommends one.

    python -m tools.plan --preset 8B --world-size 64 --tp 8
    python -m tools.plan --hidden-size 4096 --num-layers 32 --num-attention-heads 32 --world-size 64 --tp 8 --json
    python -m tools.plan --preset 1T-moe --world-size 1024 --tp 8 --pp 8 --ep 16 --etp 1 --plot cost.png
    torchrun --nproc-per-node 4 -m tools.plan --validate --hidden 512 --layers 8 --precision medium

Flags of the model override those of a preset. Times are predicted (core/cost/model.py) from the rates that are given, for
collectives that cost the same however many ranks take part. --validate measures this machine and compares prediction and step.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from core.cost.cheapest import choose
from core.cost.model import COSTS, Cost, exact_costs, predict, unpriced_modes

from ..pretrain.report import format_rows
from ..usage import UsageError, refuse
from .arguments import ITEMSIZE, check_range, cluster_of, model_of, parser
from .draw import draw
from .models import Cluster, Model, Part, check, other_parameters, parts
from .peers import PEERS, predict_peer
from .validate import place, validate

ADAPTIVE_TRAFFIC = 36.0
"""Bytes that the passes of a second moment read and write for each entry."""

ADAM_TRAFFIC = 28.0
"""Bytes that AdamW reads (parameter, gradient, two moments) and writes for each entry in one pass."""

STATE = {"muon": 4, "adaptive_muon": 8, "adamw": 8}
"""Bytes of float32 state for each entry of a matrix."""

LARGEST = 16384
"""Largest number of ranks in the plot."""


@dataclass(frozen=True)
class Row:
    """The busiest rank's cost of one way to take the step.

    Attributes:
        mode: Name of the mode or of the peer.
        exact: Whether it is the step of the whole matrices.
        ms: Milliseconds of the step.
        compute_ms: Milliseconds of products and memory traffic.
        communication_ms: Milliseconds of collectives, including those that pass while the rank computes.
        received_mb: Megabytes that the rank receives.
        collectives: Number of collectives.
        temporary_mb: Megabytes of memory during the step.
        state_mb: Megabytes of memory between steps.
        share: Percent of the time of a whole training step.
    """

    mode: str
    exact: bool
    ms: float
    compute_ms: float
    communication_ms: float
    received_mb: float
    collectives: int
    temporary_mb: float
    state_mb: float
    share: float


def plan(model: Model, cluster: Cluster, options: argparse.Namespace) -> tuple[list[Row], str]:
    """A row for each mode and peer, and the recommendation in words."""
    held = parts(model, cluster, ITEMSIZE[options.precision])
    in_matrices = sum(kind.count * kind.entries / kind.tp for _, matrices in held for kind in matrices)
    others = other_parameters(model, cluster)
    if options.optimizer == "adamw":
        ways, words = {"elementwise": Cost()}, "adamw has no modes: every rank updates its shards alone."
    else:
        ways = _ways(held, options)
        words = _recommendation(ways, held, options.ns_steps)
    adam = others + (in_matrices if options.optimizer == "adamw" else 0)
    adam_seconds = adam * ADAM_TRAFFIC / cluster.memory
    state = STATE[options.optimizer] * in_matrices + STATE["adamw"] * others
    tokens = options.global_batch_size * options.seq_length
    # Forward and backward take six operations for each token and parameter that it meets.
    training = 6.0 * model.active * tokens / (cluster.world_size * options.tflops * 1e12 * options.mfu)
    costs = {name: replace(cost, compute=cost.compute + adam_seconds) for name, cost in ways.items()}
    rows = [_row(name, cost, state, training) for name, cost in costs.items()]
    return rows, words


def _ways(held: Sequence[Part], options: argparse.Namespace) -> dict[str, Cost]:
    """The cost of the matrices' step in each mode and by each peer, by name."""
    adaptive = options.optimizer == "adaptive_muon"
    state = ADAPTIVE_TRAFFIC if adaptive else 0.0
    ways: dict[str, Cost] = {
        mode: sum((predict(mode, kinds, at, iterations=options.ns_steps, state=state) for at, kinds in held), Cost())
        for mode in COSTS
    }
    # Megatron-Core's adaptive Muon does not run on the release of emerging-optimizers that is compared.
    for peer in () if adaptive else PEERS:
        ways[peer] = sum((predict_peer(peer, kinds, at, iterations=options.ns_steps) for at, kinds in held), Cost())
    return ways


def _row(name: str, cost: Cost, state: float, training: float) -> Row:
    return Row(
        mode=name,
        exact=name not in COSTS or name in exact_costs(),
        ms=1e3 * cost.seconds,
        compute_ms=1e3 * cost.compute,
        communication_ms=1e3 * cost.communication,
        received_mb=cost.bytes / 1e6,
        collectives=cost.collectives,
        temporary_mb=cost.memory / 1e6,
        state_mb=state / 1e6,
        share=100 * cost.seconds / (training + cost.seconds),
    )


def _recommendation(ways: dict[str, Cost], held: Sequence[Part], iterations: int) -> str:
    best = min(exact_costs(), key=lambda mode: ways[mode].seconds)
    shapes: dict[str, dict[str, None]] = {}
    seconds = 0.0
    for machine, matrices in held:
        for kind, (mode, cost) in zip(matrices, choose(matrices, machine, iterations=iterations), strict=True):
            shapes.setdefault(mode, {})[f"{kind.rows} x {kind.cols}"] = None
            seconds += cost.seconds
    by_matrix = "; ".join(f"{mode} for {', '.join(names)}" for mode, names in shapes.items())
    words = f"recommended: {best}. Matrix by matrix (auto): {by_matrix}: {_number(1e3 * seconds)} ms for the matrices."
    if missing := unpriced_modes():
        words += f" Not planned, because core.cost.model.COSTS has no cost of them: {', '.join(missing)}."
    return words


def table(rows: Sequence[Row]) -> list[str]:
    """The table as lines for a terminal."""
    head = ("mode", "ms", "compute ms", "comm ms", "MB received", "collectives", "temp MB", "state MB", "% of step")
    lines: list[tuple[str, ...]] = [head]
    for row in rows:
        before = (row.ms, row.compute_ms, row.communication_ms, row.received_mb)
        after = (row.temporary_mb, row.state_mb, row.share)
        name = row.mode if row.exact else f"{row.mode} (inexact)"
        lines.append((name, *map(_number, before), str(row.collectives), *map(_number, after)))
    return format_rows(lines)


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def curves(model: Model, cluster: Cluster, options: argparse.Namespace) -> dict[str, list[tuple[int, float]]]:
    """For each mode, pairs of ranks and milliseconds: from one copy of the model, doubled up to :data:`LARGEST` ranks."""
    points: dict[str, list[tuple[int, float]]] = {}
    ranks = cluster.smallest(experts=model.num_experts > 0)
    while ranks <= LARGEST:
        for row in plan(model, replace(cluster, world_size=ranks), options)[0]:
            points.setdefault(row.mode, []).append((ranks, row.ms))
        ranks *= 2
    return points


def _title(model: Model, cluster: Cluster, options: argparse.Namespace) -> str:
    name = options.preset or f"{model.num_layers} layers of {model.hidden_size}"
    layout = f"TP {cluster.tp}, PP {cluster.pp}"
    if model.num_experts:
        layout += f", EP {cluster.ep}, ETP {cluster.etp}"
    return f"{name} ({model.parameters / 1e9:.3g}B parameters), {layout}: {options.optimizer}, {options.precision}"


def main(argv: Sequence[str] | None = None) -> None:
    """Command line; see the module."""
    options = parser(__doc__ or "").parse_args(argv)
    rank = 0
    try:
        if options.validate:
            rank, ranks = place()
            check_range(options, ["hidden", "layers", "reps"])
            for line in validate(options.hidden, options.layers, options.precision, options.reps, ranks):
                print(line)
            return
        model, cluster = model_of(options), cluster_of(options)
        check(model, cluster)
        rows, words = plan(model, cluster, options)
        title = _title(model, cluster, options)
        if options.json:
            print(
                json.dumps({"title": title, "rows": [asdict(row) for row in rows], "recommendation": words}, indent=1)
            )
        else:
            print("\n".join([f"{title}, on {cluster.world_size} ranks (DP {cluster.dp})", *table(rows), words]))
        if options.plot:
            draw(curves(model, cluster, options), title, options.plot)
    except UsageError as error:
        refuse(error, rank=rank, program="plan")
