"""The predicted cost of Megatron-Core's Muon, for comparison: one matrix after the other, dense iterations, no overlap."""

from collections.abc import Sequence

from core.cost.model import Cost, Machine, Matrices

# Megatron-Core 0.19.2 with emerging-optimizers 0.3.0. Momentum, decay, casts and update are single eager passes: 90 bytes a
# parameter. Temporary bytes for each entry of the largest matrix, measured.
STEP_TRAFFIC = 90.0
MEMORY = {"duplicated": 18.0, "distributed": 30.0}
PEERS = tuple(f"Megatron-Core {mode}" for mode in MEMORY)


def predict_peer(name: str, matrices: Sequence[Matrices], machine: Machine, *, iterations: int = 5) -> Cost:
    """The cost of a step of ``matrices``, as :func:`core.cost.model.predict` gives it.

    Args:
        name: One of :data:`PEERS`. ``duplicated`` gathers every matrix in float32. ``distributed`` reduces a Gram matrix per
            iteration; where the shorter side is cut, that of the longer side.
        matrices: Kinds of matrices that one rank has shards of. Ranks with copies all do the same work.
        machine: The rates of that rank.
        iterations: Number of Newton-Schulz iterations.
    """
    mode = name.split()[-1]
    total = Cost()
    for kind in matrices:
        m, n, t = min(kind.rows, kind.cols), max(kind.rows, kind.cols), kind.tp
        shared = (t - 1) / t
        if mode == "duplicated" or t == 1:
            flops = iterations * (4.0 * m * m * n + 2.0 * m**3)
            received, collectives = shared * m * n * 4, int(t > 1)
        else:
            # The Gram matrix contracts the side that is cut.
            side, contracted = (n, m) if kind.splits_short else (m, n)
            flops = iterations * (4.0 * side**2 * contracted / t + 2.0 * side**3)
            received, collectives = 2 * iterations * shared * side**2 * kind.itemsize, iterations + 1
        compute = flops / machine.flops + STEP_TRAFFIC * m * n / t / machine.memory
        moved = collectives * machine.link.latency + received / machine.link.bandwidth
        one = Cost(compute, moved, received, collectives)
        total += Cost(
            kind.count * one.compute,
            kind.count * one.communication,
            kind.count * one.bytes,
            kind.count * one.collectives,
            MEMORY[mode] * m * n,
        )
    return total
