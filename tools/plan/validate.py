"""Compares the cost model with the benchmark's steps on this machine, in CPU seconds of the slowest rank.

Ranks on one host share its processors. Wall-clock time depends on how they share, which a model of one rank cannot know; so CPU
time is compared. Nothing overlaps in it: compute and communication are added.
"""

import os
import statistics
import time
from collections.abc import Sequence

import torch
import torch.distributed as dist

from core.cost.measure import measure as measure_machine
from core.cost.model import COSTS, Machine, Matrices, predict
from core.process_groups_config import ProcessGroupCollection
from core.sharding.tp_modes import TP_MODES

from ..bench import cases
from ..bench.measure import measure
from ..pretrain.launch import Launch
from ..pretrain.report import format_rows
from ..usage import UsageError
from .arguments import ITEMSIZE

CPU = torch.device("cpu")


def place() -> tuple[int, int]:
    """This rank and the number of ranks, as torch.distributed or the launcher has them."""
    if dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    launch = Launch.from_environ(os.environ)
    return launch.rank, launch.world_size


def validate(hidden: int, layers: int, precision: str, reps: int, ranks: int) -> list[str]:
    """The comparison as lines to print, on the first rank; no lines on the others. Starts gloo unless torch.distributed runs.

    Args:
        hidden: Hidden size of the benchmark's GPT.
        layers: Number of its layers.
        precision: Arithmetic of Newton-Schulz.
        reps: Number of timed steps of each mode.
        ranks: Number of ranks that run this.

    Raises:
        UsageError: when there is one rank only, or the hidden size cannot be cut.
    """
    starts = not dist.is_initialized()
    if ranks == 1:
        raise UsageError("--validate", None, "needs ranks", hint="torchrun --nproc-per-node 4 -m tools.plan --validate")
    if hidden % ranks:
        raise UsageError("--hidden", hidden, f"cannot be cut over {ranks} ranks", possible=f"multiples of {ranks}")
    torch.set_num_threads(1)
    if starts:
        dist.init_process_group("gloo")
    try:
        return _compare(hidden, layers, precision, reps)
    finally:
        if starts:
            dist.destroy_process_group()


def _compare(hidden: int, layers: int, precision: str, reps: int) -> list[str]:
    group = dist.group.WORLD
    assert group is not None
    benchmark = cases.gpt_matrices(hidden, layers)
    groups = ProcessGroupCollection(tp=group)
    dtype = torch.bfloat16 if precision == "medium" else torch.float32
    machine = measure_machine(
        groups.domain((groups.axis("tp"),)),
        CPU,
        dtype,
        precision=precision,
        shape=(hidden, 4 * hidden),
        clock=time.process_time,
    )
    makers = cases.tensor_parallel(precision, group)
    ours = cases.candidates(makers, benchmark, group, [f"{cases.OURS} {mode}" for mode in _compared()])
    for candidate in ours:
        assert isinstance(candidate.optimizer, torch.optim.Optimizer)
        for p in candidate.params:
            # As after many steps: while the momentum's norm still grows, CPU compiles bfloat16 products for each new scale.
            candidate.optimizer.state[p]["momentum_buffer"].copy_(p.grad)
    measured = {
        result.name.split()[-1]: statistics.median(result.cpu) for result in measure(ours, benchmark, reps, group)
    }
    # No rank leaves while another one still waits for its messages.
    dist.barrier(group)
    if dist.get_rank():
        return []
    matrices = [
        Matrices(1, m.rows, m.cols, dist.get_world_size(), 1, cuts_short(m), ITEMSIZE[precision]) for m in benchmark
    ]
    return [_describe(machine), *format_rows(_rows(matrices, machine, measured))]


def _compared() -> list[str]:
    """The tensor-parallel modes that have a cost."""
    return [name for name in COSTS if name in TP_MODES]


def cuts_short(matrix: cases.Matrix) -> bool:
    """Whether the side that is cut is the shorter one."""
    return matrix.rows != matrix.cols and (matrix.cut == 0) == (matrix.rows < matrix.cols)


def _rows(matrices: Sequence[Matrices], machine: Machine, measured: dict[str, float]) -> list[tuple[str, ...]]:
    predicted = {}
    for mode in _compared():
        cost = predict(mode, matrices, machine)
        predicted[mode] = cost.compute + cost.communication
    head = ("mode", "predicted CPU s", "measured", "off by", "predicted / owner", "measured / owner", "off by")
    rows: list[tuple[str, ...]] = [head]
    for mode in _compared():
        expected, took = predicted[mode], measured[mode]
        ratios = expected / predicted["owner"], took / measured["owner"]
        rows.append(
            (
                mode,
                f"{expected:.3f}",
                f"{took:.3f}",
                f"{expected / took - 1:+.0%}",
                *(f"{ratio:.2f}" for ratio in ratios),
                f"{ratios[0] / ratios[1] - 1:+.0%}",
            )
        )
    return rows


def _describe(machine: Machine) -> str:
    gram = machine.gram_flops or machine.flops
    return (
        f"measured here, in CPU seconds: {machine.flops / 1e9:.0f} GFLOP/s ({gram / 1e9:.0f} for Gram matrices), memory "
        f"{machine.memory / 1e9:.1f} GB/s, link {machine.link.bandwidth / 1e9:.2f} GB/s and {machine.link.latency * 1e6:.0f} us"
    )
