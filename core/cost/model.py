"""What a Muon step costs in each tensor-parallel mode: seconds, bytes and collectives of the busiest rank.

Pure arithmetic on shapes: the same arguments give the same answer on every rank, so that a mode may be chosen by it.
A product takes the time of its operations at the machine's rate and the time in which its operands pass through memory. A
collective takes a latency, whatever the number of ranks, and the time of its bytes at the link's bandwidth. Rounds, waves,
packing and elementwise passes are those of :mod:`core.sharding.tp_modes` and :mod:`core.engine`. Nothing is fitted to a measured
step.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import ceil

from ..engine import wave_entries
from ..linalg.newton_schulz import relative_cost
from ..linalg.newton_schulz_cost import Work, newton_schulz_work
from ..sharding.tp_modes import TP_MODES
from .dealing import deal, waves_of

TEAM = "team"
"""Name in :data:`COSTS` of the mode ``owner`` with several ranks to a matrix."""


@dataclass(frozen=True)
class Link:
    """Latency and bandwidth between ranks.

    Attributes:
        latency: Seconds of a collective that moves nothing.
        bandwidth: Bytes a second that a rank receives while it sends as many.
    """

    latency: float
    bandwidth: float


@dataclass(frozen=True)
class Machine:
    """One rank's device and its links.

    Attributes:
        flops: Operations a second of products in the dtype that matrices travel in, beside the traffic of their operands.
        memory: Bytes a second of elementwise passes over parameters, gradients and state.
        link: Link between the ranks that split a matrix.
        gram_flops: Operations a second of float32 products, for the Gram matrices of narrower shards; None for ``flops``.
        far: Link between all ranks that hold shards or copies; None for ``link``.
        turned: Bytes a second that are read and written by a copy that turns rows into columns; None for ``memory``.
        cached: Bytes a second of passes over a matrix while it is iterated; None for ``memory``.
        device: Type of the device, ``cpu`` or ``cuda``: the ways to iterate differ.
    """

    flops: float
    memory: float
    link: Link
    gram_flops: float | None = None
    far: Link | None = None
    turned: float | None = None
    cached: float | None = None
    device: str = "cuda"


@dataclass(frozen=True)
class Matrices:
    """A kind of matrix: a number of whole matrices that are sharded alike.

    Attributes:
        count: Number of matrices.
        rows: Rows of the whole matrix.
        cols: Columns of the whole matrix.
        tp: Number of ranks that a matrix is cut over.
        copies: Number of ranks that hold the same shard.
        splits_short: Whether the shorter dim is the one that is cut.
        itemsize: Bytes of an entry as it travels: 2 at ``medium``, else 4, or 8 for float64.
    """

    count: int
    rows: int
    cols: int
    tp: int = 1
    copies: int = 1
    splits_short: bool = False
    itemsize: int = 4

    @property
    def entries(self) -> int:
        """Entries of one whole matrix."""
        return self.rows * self.cols

    @property
    def payload(self) -> int:
        """Bytes of one whole matrix as it travels."""
        return self.entries * self.itemsize

    @property
    def block(self) -> tuple[int, int]:
        """Rows and columns of the largest shard."""
        cut_rows = (self.rows > self.cols) != self.splits_short
        return (ceil(self.rows / self.tp), self.cols) if cut_rows else (self.rows, ceil(self.cols / self.tp))


@dataclass(frozen=True)
class Cost:
    """Predicted cost of one step on the busiest rank.

    Attributes:
        compute: Seconds of products and memory traffic.
        communication: Seconds of collectives.
        bytes: Bytes that the rank receives.
        collectives: Number of collectives.
        memory: Bytes of temporary memory.
        hidden: Seconds of ``communication`` that pass while the rank computes.
    """

    compute: float = 0.0
    communication: float = 0.0
    bytes: float = 0.0
    collectives: int = 0
    memory: float = 0.0
    hidden: float = 0.0

    @property
    def seconds(self) -> float:
        """Seconds of the whole step."""
        return self.compute + self.communication - self.hidden

    def __add__(self, other: "Cost") -> "Cost":
        """The cost of one after the other; of the memory, the larger."""
        return Cost(
            self.compute + other.compute,
            self.communication + other.communication,
            self.bytes + other.bytes,
            self.collectives + other.collectives,
            max(self.memory, other.memory),
            self.hidden + other.hidden,
        )

    def part(self, share: float) -> "Cost":
        """``share`` of the seconds and bytes. Collectives and memory serve all matrices, and stay as they are."""
        return replace(
            self,
            compute=self.compute * share,
            communication=self.communication * share,
            bytes=self.bytes * share,
            hidden=self.hidden * share,
        )


def predict(
    mode: str,
    matrices: Sequence[Matrices],
    machine: Machine,
    *,
    iterations: int = 5,
    wave: int | None = None,
    state: float = 0.0,
) -> Cost:
    """The cost of a step of all ``matrices`` in ``mode``.

    Matrices with equal ``tp`` and ``copies`` are taken to live on the same ranks; those that differ are stepped one after the
    other.

    Args:
        mode: A name in :data:`COSTS`. ``team`` recuts each matrix over a group of ranks: of all sizes that are powers of two,
            the one with which the step takes the least time.
        matrices: Kinds of matrices that one rank has shards of.
        machine: The rates of that rank.
        iterations: Number of Newton-Schulz iterations.
        wave: Entries that a rank takes in per wave; None for what the engine takes on such a device.
        state: Further bytes of memory traffic for each entry of a shard, such as those of a second moment.

    Raises:
        ValueError: for a mode that has no cost.
    """
    if mode not in COSTS:
        raise ValueError(
            f"mode {mode!r} has no predicted cost; possible: {', '.join(COSTS)}. Add its cost to core.cost.model.COSTS."
        )
    domains: dict[tuple[int, int], list[Matrices]] = {}
    for kind in matrices:
        if kind.count:
            domains.setdefault((kind.tp, kind.copies), []).append(kind)
    total = Cost()
    wave = wave or wave_entries(machine.device)
    for kinds in domains.values():
        step = COSTS[mode](kinds, machine, iterations, wave)
        total += replace(step, compute=step.compute + sum(elementwise(kind, machine, state) for kind in kinds))
    return total


def step_traffic(itemsize: int) -> int:
    """Bytes that momentum, decay and update of a float32 entry read and write, when it travels in ``itemsize`` bytes."""
    # Gradient and momentum are read, momentum and direction are written; parameter and update are read, one is written.
    return 20 + 2 * itemsize


def elementwise(kind: Matrices, machine: Machine, state: float = 0.0) -> float:
    """Seconds of the passes over all shards of ``kind``, with ``state`` further bytes for each entry."""
    return kind.count * kind.entries / kind.tp * (step_traffic(kind.itemsize) + state) / machine.memory


def seconds(work: Work, machine: Machine) -> float:
    """Seconds that ``machine`` takes for ``work``."""
    products = work.flops / machine.flops + work.gram_flops / (machine.gram_flops or machine.flops)
    cached = machine.cached or machine.memory
    return products + work.traffic / cached + work.turned / (machine.turned or cached)


def alone(kind: Matrices, machine: Machine, iterations: int) -> float:
    """Seconds of one whole matrix on one rank."""
    return seconds(_work(kind, machine, iterations, 1), machine)


def joint_link(kind: Matrices, machine: Machine) -> Link:
    """The link between all ranks that hold a shard or a copy of ``kind``."""
    return machine.far if kind.copies > 1 and machine.far else machine.link


def _transfer(link: Link, size: float, collectives: int) -> float:
    return collectives * link.latency + size / link.bandwidth


def _blockwise(kinds: Sequence[Matrices], machine: Machine, iterations: int, wave: int) -> Cost:
    works = [
        (kind, newton_schulz_work(*kind.block, kind.itemsize, iterations=iterations, device=machine.device))
        for kind in kinds
    ]
    compute = sum(kind.count * seconds(work, machine) for kind, work in works)
    return Cost(compute, memory=max(work.memory for _, work in works))


def _duplicated(kinds: Sequence[Matrices], machine: Machine, iterations: int, wave: int) -> Cost:
    tp = kinds[0].tp
    compute = sum(kind.count * alone(kind, machine, iterations) for kind in kinds)
    memory = max(_work(kind, machine, iterations, 1).memory for kind in kinds)
    if tp == 1:
        return Cost(compute, memory=memory)
    whole = float(sum(kind.count * kind.payload for kind in kinds))
    waves = _number_of_waves(kinds, [float(kind.entries) for kind in kinds], wave)
    received = (tp - 1) / tp * whole
    moved = _transfer(machine.link, received, waves)
    # Shards are packed, and wholes are put together out of what arrived.
    compute += 2 * (whole / tp + whole) / machine.memory
    memory += 2 * whole * min(_depth(kinds), waves) / waves
    return Cost(compute, moved, received, waves, memory, hidden=min(compute, moved * (1 - 1 / waves)))


def _distributed(kinds: Sequence[Matrices], machine: Machine, iterations: int, wave: int) -> Cost:
    tp = kinds[0].tp
    if tp == 1:
        return _duplicated(kinds, machine, iterations, wave)
    works = [_work(kind, machine, iterations, tp) for kind in kinds]
    brought = [kind.entries / tp + (0 if kind.splits_short else min(kind.rows, kind.cols) ** 2) for kind in kinds]
    waves = _number_of_waves(kinds, brought, wave)
    compute = sum(kind.count * seconds(work, machine) for kind, work in zip(kinds, works, strict=True))
    memory = sum(kind.count * work.memory for kind, work in zip(kinds, works, strict=True))
    step = Cost(compute, memory=memory) + _reductions(kinds, machine, works, machine.link, tp, 1, waves)
    short = [kind for kind in kinds if kind.splits_short]
    if short:
        recut = sum(kind.count * kind.payload / tp for kind in short)
        received = 2 * (tp - 1) / tp * recut
        times = 2 * min(waves, sum(kind.count for kind in short))
        # Shards are packed and unpacked on the way there, and again on the way back.
        step += Cost(8 * recut / machine.memory, _transfer(machine.link, received, times), received, times)
    return replace(
        step,
        memory=step.memory * min(_depth(kinds), waves) / waves,
        hidden=min(step.compute, step.communication * (1 - 1 / waves)),
    )


def _number_of_waves(kinds: Sequence[Matrices], brought: Sequence[float], wave: int, workers: int = 1) -> int:
    dearest_first = sorted(
        zip(kinds, brought, strict=True), key=lambda pair: -relative_cost(pair[0].rows, pair[0].cols)
    )
    return waves_of([(kind.count, entries) for kind, entries in dearest_first], max(float(wave), *brought), workers)


def _depth(kinds: Sequence[Matrices]) -> int:
    """Number of waves with tensors in memory: one travels in, one is worked on and, of 16-bit entries, one travels back."""
    return 3 if all(kind.itemsize == 2 for kind in kinds) else 2


def _owner(kinds: Sequence[Matrices], machine: Machine, iterations: int, wave: int) -> Cost:
    return _waves(kinds, machine, iterations, wave, 1)


def _team(kinds: Sequence[Matrices], machine: Machine, iterations: int, wave: int) -> Cost:
    return _waves(kinds, machine, iterations, wave, team_size(kinds, machine, iterations=iterations, wave=wave))


def team_size(matrices: Sequence[Matrices], machine: Machine, *, iterations: int = 5, wave: int | None = None) -> int:
    """Number of ranks that work on a matrix together in ``team``: the power of two with which a step takes the least time.

    Args:
        matrices: Kinds of matrices that live on the same ranks; at least one.
        machine: The rates of one rank.
        iterations: Number of Newton-Schulz iterations.
        wave: Entries of a wave, as :func:`predict` takes them.

    Returns:
        At least 2. All ranks where their number is odd; 1 where there is only one.
    """
    ranks = matrices[0].tp * matrices[0].copies
    entries = wave or wave_entries(machine.device)
    sizes: list[int] = [2**k for k in range(1, ranks.bit_length()) if ranks % 2**k == 0] or [ranks]
    return min(sizes, key=lambda size: _waves(matrices, machine, iterations, entries, size).seconds)


def _waves(kinds: Sequence[Matrices], machine: Machine, iterations: int, wave: int, size: int) -> Cost:
    """Cost of whole matrices that travel to teams of ``size`` ranks and back, wave by wave."""
    tp, copies = kinds[0].tp, kinds[0].copies
    ranks = tp * copies
    if ranks == 1:
        return _duplicated(kinds, machine, iterations, wave)
    link = joint_link(kinds[0], machine)
    works = [_work(kind, machine, iterations, size) for kind in kinds]
    loads = deal(
        [(kind.count, seconds(work, machine), kind.payload / size) for kind, work in zip(kinds, works, strict=True)],
        ranks // size,
    )
    total = float(sum(kind.count * kind.payload for kind in kinds))
    owned = max(load.payload for load in loads)
    waves = _number_of_waves(kinds, [kind.entries / size for kind in kinds], wave, ranks // size)
    # A worker takes in one replica's shards of its own matrices, and every rank takes in its shards of the others' results.
    away = (tp - 1) / tp if size == 1 else 1.0
    received = max(away * load.payload + (total - load.payload) / tp for load in loads)
    back = (total - min(load.payload for load in loads)) / tp
    # A worker sends its results to all replicas.
    sent = owned * (copies - 1 / tp)
    moved = _transfer(link, away * owned + max(back, sent), 2 * waves)
    # Workers put matrices together and cut them up again.
    compute = max(load.seconds for load in loads) + 2 * owned * (1 + copies) / machine.memory
    # The first wave comes in and the last one leaves while nothing is computed.
    hidden = min(compute, moved * (1 - 1 / waves))
    # Shards are sent, received and put together; results are sent and received.
    memory = max(work.memory for work in works) + (3 * owned + sent + back) * min(_depth(kinds), waves) / waves
    step = Cost(compute, moved, received, 2 * waves, memory, hidden)
    return step if size == 1 else step + _reductions(kinds, machine, works, link, size, ranks // size, waves)


def _reductions(
    kinds: Sequence[Matrices],
    machine: Machine,
    works: Sequence[Work],
    link: Link,
    size: int,
    teams: int,
    waves: int,
) -> Cost:
    """Cost of reducing Gram matrices over ``size`` ranks: those of one round and wave share a buffer."""
    grams = [max(kind.itemsize, 4) * float(min(kind.rows, kind.cols)) ** 2 for kind in kinds]
    rounds = works[0].rounds
    loads = deal([(kind.count, gram, gram) for kind, gram in zip(kinds, grams, strict=True)], teams)
    load = max(load.payload for load in loads)
    moved = rounds * 2 * (size - 1) / size * load
    packed = rounds * 2 * load / machine.memory
    return Cost(packed, _transfer(link, moved, rounds * waves), moved, rounds * waves, 2 * load / waves)


def _work(kind: Matrices, machine: Machine, iterations: int, ranks: int) -> Work:
    return newton_schulz_work(
        kind.rows, kind.cols, kind.itemsize, iterations=iterations, ranks=ranks, device=machine.device
    )


ModeCost = Callable[[Sequence[Matrices], Machine, int, int], Cost]
"""``cost(kinds, machine, iterations, wave)``: a step of matrices that live on the same ranks, without the passes over shards
that every mode makes. ``kinds`` is not empty; ``wave`` is the number of entries that a rank takes in per wave."""

COSTS: dict[str, ModeCost] = {
    "owner": _owner,
    TEAM: _team,
    "distributed": _distributed,
    "duplicated": _duplicated,
    "blockwise": _blockwise,
}
"""Cost of a step in each tensor-parallel mode, by the mode's name; where two cost the same, the first is chosen."""


def mode_of(cost: str) -> str:
    """The tensor-parallel mode that a name in :data:`COSTS` is the cost of."""
    return "owner" if cost == TEAM else cost


def exact_costs() -> tuple[str, ...]:
    """The names in :data:`COSTS` whose step is that of the whole matrices: what ``auto`` may choose from."""
    return tuple(name for name in COSTS if (mode := TP_MODES.get(mode_of(name))) and mode.exact)


def unpriced_modes() -> tuple[str, ...]:
    """The tensor-parallel modes that have no cost; ``auto`` never chooses them."""
    return tuple(name for name in TP_MODES if name not in COSTS)
