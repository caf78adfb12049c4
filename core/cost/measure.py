"""Measures what :mod:`.model` must know of this machine: the rates of products, of memory and of the link between ranks."""

import time
from collections.abc import Callable
from functools import cache
from itertools import cycle
from statistics import median

import torch
import torch.distributed as dist

from ..cache_blocks import BLOCK_BYTES
from ..linalg.matmul_precision import matmul_precision
from ..linalg.newton_schulz_cost import iteration_work
from ..linalg.products import product, symmetric_product
from ..process_groups_config import Domain
from .model import Link, Machine, step_traffic

# By type of device; other devices need larger sizes, or starting a kernel is all that is measured.
SIDE = {"cpu": 1024}
"""Rows and columns of the matrix whose products are timed; elsewhere 4096."""

ENTRIES = {"cpu": 2**20}
"""Entries of each matrix in the timed update, and of what a rank sends; elsewhere 2^24."""

MATRICES = 8
"""Number of matrices in the timed update; together they exceed the cache."""

REPS = 8
"""Number of timed runs. Their median counts, not the shortest: ranks on one host disturb each other in a step, too."""

Timed = Callable[[Callable[[], object]], float]
"""Runs a function several times and returns the median of its seconds."""


@cache
def measure(
    domain: Domain,
    device: torch.device,
    dtype: torch.dtype,
    *,
    precision: str = "medium",
    shape: tuple[int, int] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Machine:
    """The rates of the slowest rank, equal on all ranks. They are measured once in a process for each set of arguments.

    Args:
        domain: Ranks whose link is measured; all of them must call. The link of a single rank takes no time.
        device: Device of the matrices.
        dtype: Dtype in which matrices travel.
        precision: Arithmetic of float32 products: ``highest``, ``high`` or ``medium``.
        shape: Shape of the matrix whose products are timed; None for :data:`SIDE` squared.
        clock: Returns seconds. ``time.process_time`` counts what the processor does, also for more ranks than it has cores.
    """

    def timed(run: Callable[[], object]) -> float:
        return _median(run, device, clock)

    shape = shape or (SIDE.get(device.type, 4096),) * 2
    memory = _memory(timed, dtype, device)
    a = torch.zeros(ENTRIES.get(device.type, 2**24), dtype=torch.float32, device=device)
    cached = timed(lambda: a.add_(a, alpha=0.5)) / (2 * a.nbytes)
    x = torch.zeros(shape, dtype=dtype, device=device)
    turned = timed(lambda: x.mT.contiguous()) / (2 * x.nbytes)
    rates = []
    for product_dtype in (dtype, torch.promote_types(dtype, torch.float32)):
        with matmul_precision(precision, device):
            rates.append(_products(timed, product_dtype, device, shape, cached, turned))
    times = torch.tensor(
        [memory, cached, turned, *rates, *_link(timed, domain, device)], dtype=torch.float64, device=device
    )
    if domain.group is not None:
        dist.all_reduce(times, dist.ReduceOp.MAX, group=domain.group)
    memory, cached, turned, flop, gram_flop, latency, byte = times.tolist()
    return Machine(
        flops=1 / flop,
        memory=1 / memory,
        link=Link(latency, 1 / byte if byte else float("inf")),
        gram_flops=1 / gram_flop,
        turned=1 / turned,
        cached=1 / cached,
        device=device.type,
    )


def _memory(timed: Timed, dtype: torch.dtype, device: torch.device) -> float:
    """Seconds for each byte of the elementwise passes of a step, with updates in ``dtype``."""
    entries = ENTRIES.get(device.type, 2**24)
    # Float32 entries that pass through all operations of a step before the next ones do.
    block = BLOCK_BYTES[device.type] // 4 if device.type in BLOCK_BYTES else entries
    p, g, m = (torch.zeros(MATRICES, entries, dtype=torch.float32, device=device) for _ in range(3))

    def step() -> None:
        for matrix in zip(p, g, m, strict=True):
            # An optimizer allocates its update in every step, too.
            u = torch.empty(entries, dtype=dtype, device=device)
            for a, b, c, d in zip(*(x.split(block) for x in (*matrix, u)), strict=True):
                d.copy_(b.lerp(c.lerp_(b, 0.5), 0.5))
                a.add_(a, alpha=-0.1).add_(d, alpha=-0.1)

    return timed(step) / (step_traffic(dtype.itemsize) * MATRICES * entries)


def _products(
    timed: Timed, dtype: torch.dtype, device: torch.device, shape: tuple[int, int], cached: float, turned: float
) -> float:
    """Seconds of one operation in an iteration's products, without the passes over operands and the mirrored halves."""
    m, n = min(shape), max(shape)
    # There are four, so that none is still in the cache when its turn comes, as in a step.
    xs = cycle(
        torch.linspace(-1, 1, 4 * m * n, dtype=torch.float32, device=device).sin().div(n).to(dtype).view(4, m, n)
    )

    def iterate() -> None:
        x = next(xs)
        gram = symmetric_product(x, x.mT)
        poly = symmetric_product(gram, gram, gram)
        product(poly, x, x)

    operations, passed, mirrored = iteration_work(m, n, dtype, device.type)
    spent = timed(iterate)
    return max(spent - passed * cached - mirrored * turned, spent / 2) / operations


def _link(timed: Timed, domain: Domain, device: torch.device) -> tuple[float, float]:
    """Seconds of a collective that moves nothing, and seconds for each byte that a rank receives."""
    if domain.group is None:
        return 0.0, 0.0
    each = ENTRIES.get(device.type, 2**24) // domain.size
    large = torch.zeros(domain.size * each, dtype=torch.float32, device=device)
    received = torch.empty_like(large)

    def swap(n: int) -> float:
        return timed(lambda: dist.all_to_all_single(received[:n], large[:n], group=domain.group))

    latency = swap(domain.size)
    return latency, max(swap(len(large)) - latency, 0.0) / (4 * each * (domain.size - 1))


def _median(run: Callable[[], object], device: torch.device, clock: Callable[[], float]) -> float:
    """Median of the seconds of :data:`REPS` runs, after one that is not timed."""
    spent = []
    for _ in range(REPS + 1):
        began = clock()
        run()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        spent.append(clock() - began)
    # A clock may be too coarse for what is quick.
    return max(median(spent[1:]), 1e-9)
