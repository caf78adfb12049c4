"""Times one rank's work of a step at tensor-parallel sizes for which there are no processors.

    python -m tools.bench --virtual 8

One process is one rank of a group of 2, 4, … ranks of torch's fake process group, whose collectives send nothing and end at once.
The work of this rank's processor is measured: arithmetic, packing, Python. Communication and waiting for slower ranks
are left out. The rank is the one with the most work in ``owner`` mode, by counted floating-point
operations; in the other modes all ranks have the same work.

The buffers that a collective would have filled are filled with gaussian noise, since products of garbage (infinities, denormal
numbers) take another time; the filling is not counted. The updates are noise, so errors are measured on real ranks only.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor.debug import CommDebugMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.flop_counter import FlopCounterMode

from ..usage import UsageError
from . import cases
from .cases import MEGATRON_EXACT, OWNER, Candidate, Matrix


@dataclass
class Result:
    """Measurements of one candidate on one rank.

    Attributes:
        name: Name of the candidate.
        exact: Whether its step is meant to be the step of the whole matrix.
        ours: Whether the candidate is this project's.
        ranks: Size of the group.
        rank: Rank that was measured.
        cpu: CPU seconds of each step on this rank.
        flops: Floating-point operations of the rank's matrix products in one step.
    """

    name: str
    exact: bool
    ours: bool
    ranks: int
    rank: int
    cpu: list[float]
    flops: int


Groups = Callable[[int, int], ProcessGroup]
"""Function from ``(ranks, rank)`` to a fake group of ``ranks`` ranks in which this process is ``rank``."""


@contextmanager
def world(most: int) -> Iterator[Groups]:
    """A fake world with this process in its middle, so that it can be any rank of a group of up to ``most`` ranks.

    Raises:
        UsageError: This process already is a rank of a job.
    """
    if dist.is_initialized():
        raise UsageError("--virtual", most, "is for one process", hint="leave torchrun out")
    dist.init_process_group("fake", store=FakeStore(), rank=most, world_size=2 * most)
    try:
        yield lambda ranks, rank: dist.new_group(list(range(most - rank, most - rank + ranks)))
    finally:
        dist.destroy_process_group()


class Noise:
    """Fills the buffers that torch.distributed's collectives receive with gaussian noise, while it is entered as a context.

    Attributes:
        spent: CPU seconds that the filling has taken.
        filled: Number of collectives whose buffers were filled.
    """

    RECEIVING = (
        "all_gather all_gather_into_tensor all_gather_single all_to_all all_to_all_single "
        "irecv recv reduce_scatter reduce_scatter_single reduce_scatter_tensor"
    ).split()
    # The length is prime, so that no matrix repeats its rows.
    _LENGTH = 1_000_003

    def __init__(self) -> None:
        self.spent, self.filled = 0.0, 0
        self._pool = torch.randn(self._LENGTH, generator=torch.Generator().manual_seed(0))
        self._original: dict[str, Any] = {}

    def __enter__(self) -> Self:
        for name in self.RECEIVING:
            if function := getattr(dist, name, None):
                self._original[name] = function
                setattr(dist, name, self._filling(function))
        return self

    def __exit__(self, *_: object) -> None:
        for name, function in self._original.items():
            setattr(dist, name, function)

    def _filling(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            work = function(*args, **kwargs)
            start = time.process_time()
            received = next(iter((*args, *kwargs.values())))
            for x in (received,) if isinstance(received, Tensor) else received:
                self._fill(x)
            self.filled += 1
            self.spent += time.process_time() - start
            return work

        return call

    def _fill(self, x: Tensor) -> None:
        for piece in x.view(-1).split(self._LENGTH):
            piece.copy_(self._pool[: piece.numel()])


def run(most: int, matrices: Sequence[Matrix], precision: str, reps: int, only: Sequence[str] = ()) -> list[Result]:
    """Step the candidates at 1, 2, 4, … ``most`` ranks in turn, ``reps`` times after a first step whose operations are counted.

    Args:
        most: Number of ranks of the largest group, a power of two.
        matrices: Matrices of the whole model, which is the same for every number of ranks.
        precision: Precision of Newton-Schulz.
        reps: Number of timed steps.
        only: Parts of names; only candidates with one of them in their name run. Empty for all.

    Raises:
        RuntimeError: A candidate receives data that :class:`Noise` does not fill.
    """
    results: list[Result] = []
    steps: list[cases.Steps] = []
    with world(most) as groups, Noise() as noise:
        for ranks in (2**k for k in range(most.bit_length())):
            rank = _busiest(ranks, groups, matrices, precision, noise)
            group = groups(ranks, rank)
            for candidate in cases.candidates(_makers(ranks, precision, group, only), matrices, group):
                flops = _flops(candidate, noise)
                results.append(Result(candidate.name, candidate.exact, candidate.ours, ranks, rank, [], flops))
                steps.append(candidate.optimizer)
        for rep in range(reps):
            for i in range(len(steps)):
                at = (i + rep) % len(steps)
                results[at].cpu.append(_timed(steps[at], noise))
    return results


def scaling(result: Result, results: Sequence[Result]) -> tuple[float, float]:
    """CPU time and operations of one rank, times the number of ranks, over those of one process; 1 is perfect."""
    (alone,) = (r for r in results if r.ranks == 1 and r.ours == result.ours)
    time_share = statistics.median(result.cpu) / statistics.median(alone.cpu)
    return result.ranks * time_share, result.ranks * result.flops / alone.flops


def _makers(ranks: int, precision: str, group: ProcessGroup, only: Sequence[str]) -> dict[str, cases.Make]:
    makers = cases.tensor_parallel(precision, group)
    chosen = {name: make for name, make in makers.items() if not only or any(part in name for part in only)}
    if ranks > 1:
        return chosen
    # On one rank all modes take the same step, so one of each project is enough.
    projects = {name.split()[0] for name in chosen}
    return {name: makers[name] for name in (MEGATRON_EXACT[0], OWNER) if name.split()[0] in projects}


def _busiest(ranks: int, groups: Groups, matrices: Sequence[Matrix], precision: str, noise: Noise) -> int:
    work = []
    for rank in range(ranks):
        group = groups(ranks, rank)
        (owner,) = cases.candidates(cases.tensor_parallel(precision, group), matrices, group, [OWNER])
        work.append(_flops(owner, noise))
    return max(range(ranks), key=work.__getitem__)


def _in_place(_: Any, a: Sequence[int], b: Sequence[int], **__: Any) -> int:
    return 2 * prod(a) * b[-1]


# torch's counter knows all other products.
_PRODUCTS = {torch.ops.aten.addmm_: _in_place, torch.ops.aten.baddbmm_: _in_place}
_SENDING = {"allreduce_", "barrier", "broadcast_", "reduce_", "send"}


def _flops(candidate: Candidate, noise: Noise) -> int:
    """Take a step and count its floating-point operations; checks that all that it receives is filled."""
    before = noise.filled
    with CommDebugMode() as communication, FlopCounterMode(display=False, custom_mapping=_PRODUCTS) as counter:
        candidate.optimizer.step()
    counts = {getattr(op, "__name__", str(op)): n for op, n in communication.get_comm_counts().items()}
    receiving = sum(n for op, n in counts.items() if op not in _SENDING)
    if receiving != noise.filled - before:
        raise RuntimeError(
            f"{candidate.name} took {receiving} collectives that receive, and {noise.filled - before} of them were filled; it "
            f"communicates otherwise than by {', '.join(Noise.RECEIVING)} of torch.distributed. It took {counts}."
        )
    return int(counter.get_total_flops())


def _timed(optimizer: cases.Steps, noise: Noise) -> float:
    filling, start = noise.spent, time.process_time()
    optimizer.step()
    return time.process_time() - start - (noise.spent - filling)
