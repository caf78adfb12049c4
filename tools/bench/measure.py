"""Measures the candidates of the benchmark: time, error of the update, collectives."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor.debug import CommDebugMode

from . import cases
from .cases import Candidate, Matrix, Steps
from .whole_step import Other

CHECKED_LAYERS = 2
"""Layers whose errors are measured. Two layers hold both kinds of gradient for every shape."""


@dataclass
class Result:
    """Measurements of one candidate.

    Attributes:
        name: Name of the candidate.
        exact: Whether its step is meant to be the step of the whole matrix.
        ours: Whether the candidate is this project's.
        cpu: CPU seconds of each step, on the slowest rank.
        wall: Wall-clock seconds of each step, from a barrier until the last rank is done.
        error: Largest relative error over all matrices of the first update, against the unsharded update in float64.
        collectives: Number of collectives in one step.
        adamw_error: The same error for the parameters that AdamW updates; None if there are none.
    """

    name: str
    exact: bool
    ours: bool
    cpu: list[float]
    wall: list[float]
    error: float
    collectives: int
    adamw_error: float | None = None


def measure(
    candidates: Sequence[Candidate],
    matrices: Sequence[Matrix],
    reps: int,
    group: ProcessGroup | None,
    others: Sequence[Other] = (),
) -> list[Result]:
    """Step all candidates in turn, ``reps`` times after a first step that is checked.

    Args:
        candidates: Optimizers to measure.
        matrices: Matrices that the candidates update.
        reps: Number of timed steps of each candidate.
        group: Ranks over which the matrices are sharded; None for one process.
        others: Parameters that AdamW updates.
    """
    single = group is None
    polynomial = (cases.SINGLE_SET, cases.SINGLE_SCALE) if single else (cases.TP_SET, cases.TP_SCALE)
    collectives = [count_collectives(candidate.optimizer) for candidate in candidates]
    errors = first_errors(candidates, matrices[: 4 * CHECKED_LAYERS], polynomial, group)
    adamw: list[float] | list[None] = adamw_errors(candidates, others, group) if others else [None] * len(candidates)
    results = [
        Result(c.name, c.exact, c.ours, [], [], error, count, adamw_error)
        for c, error, count, adamw_error in zip(candidates, errors, collectives, adamw, strict=True)
    ]
    for rep in range(reps):
        for i in range(len(candidates)):
            # Every candidate is first in some repetition.
            at = (i + rep) % len(candidates)
            cpu, wall = timed_step(candidates[at].optimizer, group)
            results[at].cpu.append(cpu)
            results[at].wall.append(wall)
    return results


def count_collectives(optimizer: Steps) -> int:
    """Take one step, and count the collectives in which this rank takes part."""
    with CommDebugMode() as communication:
        optimizer.step()
    return int(communication.get_total_counts())


def timed_step(optimizer: Steps, group: ProcessGroup | None) -> tuple[float, float]:
    """CPU seconds and wall-clock seconds of one step, each on the rank where it is largest."""
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
    """Error of each candidate's update after exactly one step, as :class:`Result` defines it."""
    size, rank = (1, 0) if group is None else (dist.get_world_size(group), dist.get_rank(group))
    errors = [0.0] * len(candidates)
    for i, matrix in enumerate(matrices):
        source = i % size
        whole = torch.empty(matrix.rows, matrix.cols, dtype=torch.float64)
        if rank == source:
            whole = cases.first_update(matrix, *polynomial)
        if group is not None:
            dist.broadcast(whole, group=group, group_src=source)
        expected = cases.shard(whole, matrix.cut, group)
        before = cases.shard(matrix.weight(), matrix.cut, group).double() * (1 - cases.LR * cases.DECAY)
        for k, candidate in enumerate(candidates):
            errors[k] = max(errors[k], _error(before - candidate.params[i].detach(), expected, group))
    return errors


def adamw_errors(candidates: Sequence[Candidate], others: Sequence[Other], group: ProcessGroup | None) -> list[float]:
    """Error of each candidate's update of the parameters that AdamW updates, after exactly one step."""
    errors = [0.0] * len(candidates)
    for i, other in enumerate(others):
        expected = cases.shard(other.first_update(), other.cut, group)
        before = cases.shard(other.weight(), other.cut, group).double() * (1 - cases.LR * other.decay)
        for k, candidate in enumerate(candidates):
            errors[k] = max(errors[k], _error(before - candidate.adamw_params[i].detach(), expected, group))
    return errors


def _error(change: Tensor, expected: Tensor, group: ProcessGroup | None) -> float:
    squares = torch.stack([(change / cases.LR - expected).square().sum(), expected.square().sum()])
    if group is not None:
        dist.all_reduce(squares, group=group)
    return float((squares[0] / squares[1]).sqrt())
