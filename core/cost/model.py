"""What a Muon step costs in each tensor-parallel mode: seconds, bytes and collectives of the busiest rank.

Pure arithmetic on shapes: the same arguments give the same answer on every rank, so that a mode may be chosen by it.
A product takes its operations at the machine's rate and the time in which its operands pass through memory; a collective takes a
latency, whatever the number of ranks, and its bytes at the link's bandwidth. Rounds, waves, packing and elementwise passes
are those of :mod:`.on_matrix` and :mod:`.engine`. Nothing is fitted to a measured step.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import ceil

from ..engine import wave_entries
from ..linalg.newton_schulz import flops
from ..linalg.newton_schulz_cost import Work, newton_schulz_work
from ..sharding.tp_modes import TP_MODES
from .dealing import deal, waves_of

TEAM = "team"
"""Name in :data:`COSTS` of the mode ``owner`` with several ranks to a matrix."""


@dataclass(frozen=True)
class Link:
    """Between ranks.

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
        link: Between the ranks that split a matrix.
        gram_flops: Operations a second of float32 products, for the Gram matrices of narrower shards; None for ``flops``.
        far: Between all ranks that hold shards or copies; None for ``link``.
        turned: Bytes a second that are read and written by a copy that turns rows into columns; None for ``memory``.
        cached: Bytes a second of passes over a matrix while it is iterated; None for ``memory``.
        device: Its type, ``cpu`` or ``cuda``: the ways to iterate differ.
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
    """Equal whole matrices.

    Attributes:
        count: How many.
        rows: Of the whole matrix.
        cols: Of the whole matrix.
        tp: Ranks that it is cut over.
        copies: Ranks that hold the same shard.
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
        """Of one whole matrix."""
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
    """Of a step, on the rank where it is largest.

    Attributes:
        compute: Seconds of products and memory traffic.
        communication: Seconds of collectives.
        bytes: Received.
        collectives: Their number.
        memory: Temporary bytes.
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
        """From begin to end."""
        return self.compute + self.communication - self.hidden

    def __add__(self, other: "Cost") -> "Cost":
        """One after the other; of the memory, the larger."""
        return Cost(
            self.compute + other.compute,
            self.communication + other.communication,
            self.bytes + other.bytes,
            self.collectives + other.collectives,
            max(self.memory, other.memory),
            self.hidden + other.hidden,
        )

    def part(self, share: float) -> "Cost":
        """``share`` of the seconds and bytes. Collectives and memory serve all, and stay."""
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
    """A step of all ``matrices`` in ``mode``.

    Matrices with equal ``tp`` and ``copies`` are taken to live on the same ranks; those that differ come one after the other.

    Args:
        mode: A name in :data:`COSTS`. ``team`` recuts each matrix over the subgroup of ranks, of all sizes that are powers of
            two the one that takes least.
        matrices: What one rank has shards of.
        machine: That rank's.
        iterations: Of Newton-Schulz.
        wave: Entries that a rank takes in per wave; None for what the engine takes on such a device.
        state: Further bytes of memory traffic for each entry of a shard, as of a second moment.

    Raises:
        ValueError: for a mode that has no cost.
    """
    if mode not in COSTS:
        raise ValueError(
            f"mode {mode!r} has no predicted cost; possible: {', '.join(COSTS)}. Add its cost to core.cost.model.COSTS."
        )
    domains: dict[tuple[int, int], list[Matrices]] = {}
    for some in matrices:
        if some.count:
            domains.setdefault((some.tp, some.copies), []).append(some)
    total = Cost()
    wave = wave or wave_entries(machine.device)
    for here in domains.values():
        step = COSTS[mode](here, machine, iterations, wave)
        total += replace(step, compute=step.compute + sum(elementwise(some, machine, state) for some in here))
    return total


def step_traffic(itemsize: int) -> int:
    """Bytes that momentum, decay and update of a float32 entry read and write, which travels in ``itemsize`` bytes."""
    # Gradient and momentum are read, momentum and direction are written; parameter and update are read, one is written.
    return 20 + 2 * itemsize


def elementwise(some: Matrices, machine: Machine, state: float = 0.0) -> float:
    """Seconds of the passes over the shards of ``some``, all of them, and ``state`` bytes more for each entry."""
    return some.count * some.entries / some.tp * (step_traffic(some.itemsize) + state) / machine.memory


def seconds(work: Work, machine: Machine) -> float:
    """How long ``machine`` takes for ``work``."""
    products = work.flops / machine.flops + work.gram_flops / (machine.gram_flops or machine.flops)
    cached = machine.cached or machine.memory
    return products + work.traffic / cached + work.turned / (machine.turned or cached)


def alone(some: Matrices, machine: Machine, iterations: int) -> float:
    """Seconds of one whole matrix on one rank."""
    return seconds(_work(some, machine, iterations, 1), machine)


def joint_link(some: Matrices, machine: Machine) -> Link:
    """Between all ranks that hold a shard or a copy of ``some``."""
    return machine.far if some.copies > 1 and machine.far else machine.link


def _transfer(link: Link, size: float, collectives: int) -> float:
    return collectives * link.latency + size / link.bandwidth


def _blockwise(here: Sequence[Matrices], machine: Machine, iterations: int, wave: int) -> Cost:
    works = [
        (some, newton_schulz_work(*some.block, some.itemsize, iterations=iterations, device=machine.device))
        for some in here
    ]
    compute = sum(some.count * seconds(work, machine) for some, work in works)
    return Cost(compute, memory=max(work.memory for _, work in works))


def _duplicated(here: Sequence[Matrices], machine: Machine, iterations: int, wave: int) -> Cost:
    tp = here[0].tp
    compute = sum(some.count * alone(some, machine, iterations) for some in here)
    memory = max(_work(some, machine, iterations, 1).memory for some in here)
    if tp == 1:
        return Cost(compute, memory=memory)
    whole = float(sum(some.count * some.payload for some in here))
    waves = _number_of_waves(here, [float(some.entries) for some in here], wave)
    received = (tp - 1) / tp * whole
    moved = _transfer(machine.link, received, waves)
    # Packed, and put together out of what arrived.
    compute += 2 * (whole / tp + whole) / machine.memory
    memory += 2 * whole * min(_depth(here), waves) / waves
    return Cost(compute, moved, received, waves, memory, hidden=min(compute, moved * (1 - 1 / waves)))


def _distributed(here: Sequence[Matrices], machine: Machine, iterations: int, wave: int) -> Cost:
    tp = here[0].tp
    if tp == 1:
        return _duplicated(here, machine, iterations, wave)
    works = [_work(some, machine, iterations, tp) for some in here]
    brought = [some.entries / tp + (0 if some.splits_short else min(some.rows, some.cols) ** 2) for some in here]
    waves = _number_of_waves(here, brought, wave)
    compute = sum(some.count * seconds(work, machine) for some, work in zip(here, works, strict=True))
    memory = sum(some.count * work.memory for some, work in zip(here, works, strict=True))
    step = Cost(compute, memory=memory) + _reductions(here, machine, works, machine.link, tp, 1, waves)
    short = [some for some in here if some.splits_short]
    if short:
        recut = sum(some.count * some.payload / tp for some in short)
        received = 2 * (tp - 1) / tp * recut
        times = 2 * min(waves, sum(some.count for some in short))
        # Packed and unpacked, there and back.
        step += Cost(8 * recut / machine.memory, _transfer(machine.link, received, times), received, times)
    return replace(
        step,
        memory=step.memory * min(_depth(here), waves) / waves,
        hidden=min(step.compute, step.communication * (1 - 1 / waves)),
    )


def _number_of_waves(here: Sequence[Matrices], brought: Sequence[float], wave: int, workers: int = 1) -> int:
    dearest_first = sorted(zip(here, brought, strict=True), key=lambda kind: -flops(kind[0].rows, kind[0].cols))
    return waves_of([(some.count, entries) for some, entries in dearest_first], max(float(wave), *brought), workers)


def _depth(here: Sequence[Matrices]) -> int:
    """Waves that have tensors in memory: one travels in, one is worked on and, of 16-bit entries, one travels back."""
    return 3 if all(some.itemsize == 2 for some in here) else 2


def _owner(here: Sequence[Matrices], machine: Machine, iterations: int, wave: int) -> Cost:
    return _waves(here, machine, iterations, wave, 1)


def _team(here: Sequence[Matrices], machine: Machine, iterations: int, wave: int) -> Cost:
    return _waves(here, machine, iterations, wave, team_size(here, machine, iterations=iterations, wave=wave))


def team_size(matrices: Sequence[Matrices], machine: Machine, *, iterations: int = 5, wave: int | None = None) -> int:
    """Ranks that work on a matrix together in ``team``: the power of two, from 2, with which a step takes the least.

    Args:
        matrices: That live on the same ranks; at least one.

    Returns:
        All of the ranks where they are an odd number; 1 where there is only one.
    """
    ranks = matrices[0].tp * matrices[0].copies
    entries = wave or wave_entries(machine.device)
    sizes: list[int] = [2**k for k in range(1, ranks.bit_length()) if ranks % 2**k == 0] or [ranks]
    return min(sizes, key=lambda size: _waves(matrices, machine, iterations, entries, size).seconds)


def _waves(here: Sequence[Matrices], machine: Machine, iterations: int, wave: int, size: int) -> Cost:
    """Whole matrices that travel to teams of ``size`` ranks and back, wave by wave."""
    tp, copies = here[0].tp, here[0].copies
    ranks = tp * copies
    if ranks == 1:
        return _duplicated(here, machine, iterations, wave)
    link = joint_link(here[0], machine)
    works = [_work(some, machine, iterations, size) for some in here]
    loads = deal(
        [(some.count, seconds(work, machine), some.payload / size) for some, work in zip(here, works, strict=True)],
        ranks // size,
    )
    total = float(sum(some.count * some.payload for some in here))
    owned = max(load.payload for load in loads)
    waves = _number_of_waves(here, [some.entries / size for some in here], wave, ranks // size)
    # A worker takes in one replica's shards, of its own matrices, and every rank its shards of the others'.
    away = (tp - 1) / tp if size == 1 else 1.0
    received = max(away * load.payload + (total - load.payload) / tp for load in loads)
    back = (total - min(load.payload for load in loads)) / tp
    # It sends to all replicas.
    sent = owned * (copies - 1 / tp)
    moved = _transfer(link, away * owned + max(back, sent), 2 * waves)
    # Workers put matrices together and cut them up again.
    compute = max(load.seconds for load in loads) + 2 * owned * (1 + copies) / machine.memory
    # The first wave comes in and the last one leaves while nothing is computed.
    hidden = min(compute, moved * (1 - 1 / waves))
    # Sent, received and put together; the results sent and received.
    memory = max(work.memory for work in works) + (3 * owned + sent + back) * min(_depth(here), waves) / waves
    step = Cost(compute, moved, received, 2 * waves, memory, hidden)
    return step if size == 1 else step + _reductions(here, machine, works, link, size, ranks // size, waves)


def _reductions(
    here: Sequence[Matrices],
    machine: Machine,
    works: Sequence[Work],
    link: Link,
    size: int,
    teams: int,
    waves: int,
) -> Cost:
    """Of the Gram matrices of matrices that are cut over ``size`` ranks: those of a round and wave in one buffer."""
    grams = [max(some.itemsize, 4) * float(min(some.rows, some.cols)) ** 2 for some in here]
    rounds = works[0].rounds
    load = max(
        load.payload for load in deal([(some.count, gram, gram) for some, gram in zip(here, grams, strict=True)], teams)
    )
    moved = rounds * 2 * (size - 1) / size * load
    packed = rounds * 2 * load / machine.memory
    return Cost(packed, _transfer(link, moved, rounds * waves), moved, rounds * waves, 2 * load / waves)


def _work(some: Matrices, machine: Machine, iterations: int, ranks: int) -> Work:
    return newton_schulz_work(
        some.rows, some.cols, some.itemsize, iterations=iterations, ranks=ranks, device=machine.device
    )


ModeCost = Callable[[Sequence[Matrices], Machine, int, int], Cost]
"""``cost(matrices, machine, iterations, wave)``: a step of matrices that live on the same ranks, without the passes over shards
that all modes have. ``wave``: entries that a rank takes in per wave."""

COSTS: dict[str, ModeCost] = {
    "owner": _owner,
    TEAM: _team,
    "distributed": _distributed,
    "duplicated": _duplicated,
    "blockwise": _blockwise,
}
"""What a step costs in each tensor-parallel mode, by its name; where two cost the same, the first is chosen."""


def mode_of(cost: str) -> str:
    """The tensor-parallel mode that a name in :data:`COSTS` is the cost of."""
    return "owner" if cost == TEAM else cost


def exact_costs() -> tuple[str, ...]:
    """The names in :data:`COSTS` whose step is that of the whole matrices: what ``auto`` may choose from."""
    return tuple(name for name in COSTS if (mode := TP_MODES.get(mode_of(name))) and mode.exact)


def unpriced_modes() -> tuple[str, ...]:
    """The tensor-parallel modes that have no cost; ``auto`` never chooses them."""
    return tuple(name for name in TP_MODES if name not in COSTS)
