"""Measures the candidates of the benchmark: time, error of the update, collectives."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.tensor.debug import CommDebugMode

from . import bench_cases as cases
from .bench_cases import Candidate, Matrix

# Two layers hold both kinds of gradient for every shape.
CHECKED_LAYERS = 2


@dataclass
class Result:
    """What one candidate took.

    Attributes:
        name: Of the candidate.
        exact: Whether its step is meant to be that of the whole matrix.
        ours: Whether it is this project's.
        cpu: Seconds of CPU of the slowest rank, for each step.
        wall: Seconds from a barrier until the last rank was done, for each step.
        error: Largest relative error, over matrices, of the first update against the unsharded one in float64.
        collectives: Number in one step.
    """

    name: str
    exact: bool
    ours: bool
    cpu: list[float]
    wall: list[float]
    error: float
    collectives: int


def measure(
    candidates: Sequence[Candidate], matrices: Sequence[Matrix], reps: int, group: ProcessGroup | None
) -> list[Result]:
    """Step all candidates in turn, ``reps`` times after a first step that is checked.

    Args:
        matrices: Of the candidates' parameters.
        group: The ranks that share the matrices; None for one process.
    """
    single = group is None
    polynomial = (cases.SINGLE_SET, cases.SINGLE_SCALE) if single else (cases.TP_SET, cases.TP_SCALE)
    collectives = [count_collectives(candidate.optimizer) for candidate in candidates]
    errors = first_errors(candidates, matrices[: 4 * CHECKED_LAYERS], polynomial, group)
    results = [
        Result(c.name, c.exact, c.ours, [], [], error, count)
        for c, error, count in zip(candidates, errors, collectives, strict=True)
    ]
    for rep in range(reps):
        for i in range(len(candidates)):
            # Another one begins each time, and each follows each.
            at = (i + rep) % len(candidates)
            cpu, wall = timed_step(candidates[at].optimizer, group)
            results[at].cpu.append(cpu)
            results[at].wall.append(wall)
    return results


def count_collectives(optimizer: torch.optim.Optimizer) -> int:
    """Collectives that this rank takes part in during one step, which is taken."""
    with CommDebugMode() as communication:
        optimizer.step()
    return int(communication.get_total_counts())


def timed_step(optimizer: torch.optim.Optimizer, group: ProcessGroup | None) -> tuple[float, float]:
    """CPU seconds and wall seconds of one step, each of the rank where it is largest."""
    if group is not None:
        dist.barrier(group)
    wall, cpu = time.perf_counter(), time.process_time()
    optimizer.step()
    spent = torch.tensor([time.process_time() - cpu, time.perf_counter() - wall], dtype=torch.float64)
    if group is not None:
        dist.all_reduce(spent, dist.ReduceOp.MAX, group=group)
    return float(spent[0]), float(spent[1])


def first_errors(
    candidates: Sequence[Candidate], matrices: Sequence[Matrix], polynomial: tuple[str, str], group: ProcessGroup | None
) -> list[float]:
    """For each candidate, after exactly one step, the error of its update: see :class:`Result`."""
    size, rank = (1, 0) if group is None else (dist.get_world_size(group), dist.get_rank(group))
    errors = [0.0] * len(candidates)
    for i, matrix in enumerate(matrices):
        source = i % size
        whole = torch.empty(matrix.rows, matrix.cols, dtype=torch.float64)
        if rank == source:
            whole = cases.first_update(matrix, *polynomial)
        if group is not None:
            dist.broadcast(whole, group=group, group_src=source)
        expected = cases.shard(whole, matrix, group)
        before = cases.shard(matrix.weight(), matrix, group).double() * (1 - cases.LR * cases.DECAY)
        for k, candidate in enumerate(candidates):
            update = (before - candidate.params[i].detach().double()) / cases.LR
            squares = torch.stack([(update - expected).square().sum(), expected.square().sum()])
            if group is not None:
                dist.all_reduce(squares, group=group)
            errors[k] = max(errors[k], float((squares[0] / squares[1]).sqrt()))
    return errors
