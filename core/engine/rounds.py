"""Runs the rules of all parameters in lockstep and answers each round of their requests with one collective per process group.

Rules that bring whole matrices together run in *waves* of bounded size: while the matrices of one wave are worked on, those of
the next travel in and the results of the last travel back.
"""

from collections.abc import Callable, Hashable, Iterable
from functools import partial
from typing import Any

from torch import Tensor
from torch.distributed import ProcessGroup

from ..sharding.dealing import deal_to_least
from ..sharding.requests import Deal, Move, Op, Reduce, Rule
from .environment import checks_ranks, wave_limit
from .waves import Task, Wave, Work

DEPTH = 3
"""Number of waves of 16-bit entries that may be in memory: one travels in, one is worked on, one travels back. Waves of wider
entries: one less."""


def run(rules: Iterable[Work | tuple[str, Rule]]) -> list[Any]:
    """Run ``rules`` to their end and return their results.

    A round begins when every rule that has not ended waits for an answer. Moves are answered first, and reductions only when
    no rule waits for a move: so a rule that must move its shards before it reduces has its reductions in the same round as the
    other rules. Requests of one kind go out together, in one collective per process group and dtype. Requests that need no
    other rank are answered at once, outside of rounds, so ranks may differ in them.

    Rules with ``entries`` have rounds of their own, wave by wave. The other rules run while the first wave travels.

    Args:
        rules: :class:`Work`, or a label and a generator. All ranks of a process group must run the same rules in the same order.

    Raises:
        RuntimeError: with :data:`CHECK`, when ranks ask for different things; names the first label that differs.
        ValueError: when :data:`WAVE` is not a positive number, or :data:`CHECK` neither 0 nor 1.
    """
    return Run().finish(rules)


def reduced(label: str, x: Tensor, op: Op, group: ProcessGroup | None) -> Callable[[], Tensor]:
    """Start the reduction of ``x`` over ``group``. ``x`` may be overwritten.

    Args:
        label: Name of the reduction in errors.
        x: This rank's tensor, of the same shape on all ranks.
        op: ``sum`` or ``max``.
        group: The ranks, all of which must call; None for a single rank.

    Returns:
        A function that waits for the reduction and returns its result.
    """

    def rule() -> Rule:
        return (yield Reduce(x, op, () if group is None else (group,)))

    result: list[Any] = [None]
    run = Run()
    wave = Wave(run.checks, [Task(run._deal, Work(label, rule()), partial(_keep, result, 0)).start()])

    def finish() -> Tensor:
        _finish(wave)
        answer: Tensor = result[0]
        return answer

    return finish


class Run:
    """A step whose first waves may leave before all of its rules can start.

    Args:
        entries: Entries of the largest whole tensor that will travel, for works that are added before the others are known.
    """

    def __init__(self, *, entries: int = 0) -> None:
        self.checks = checks_ranks()
        self._entries = entries
        self._loads: dict[tuple[int, ...], list[float]] = {}
        self._active: list[Wave] = []
        self._forming: list[Task] = []
        self._taken: dict[Hashable, int] = {}

    @property
    def begun(self) -> bool:
        """Whether anything was added."""
        return bool(self._loads)

    def add(self, work: Work) -> None:
        """Start a work with ``entries``. If it begins a new wave, the one before leaves. All ranks must add in one order."""
        self._join(Task(self._deal, work, list.clear))

    def finish(self, rules: Iterable[Work | tuple[str, Rule]] = ()) -> list[Any]:
        """Run ``rules``, and the works that were added, to their end; returns the results of ``rules``."""
        # All rules are listed before the first one starts: they check their input when they are listed.
        works = [Work(*work) for work in rules]
        results: list[Any] = [None] * len(works)
        tasks = [Task(self._deal, work, partial(_keep, results, i)) for i, work in enumerate(works)]
        travelling = sorted((task for task in tasks if task.work.entries), key=lambda task: -task.work.cost)
        self._entries = max([self._entries, *(task.work.entries for task in travelling)])
        local = [task for task in tasks if not task.work.entries]
        for task in travelling:
            self._join(task)
            if self._active and local:
                # These run while the first wave travels.
                self._run_outside_waves(local)
                local = []
        self._leave()
        self._run_outside_waves(local)
        while self._active:
            self._turn(None)
        return results

    def _deal(self, request: Deal) -> list[int]:
        """The owner of each matrix: the rank, or team, with the least to do. Works start in the order of their cost."""
        domain = request.domain
        load = self._loads.setdefault(domain.ranks, [0.0] * domain.size)
        return [deal_to_least(load, request.cost, team=domain.team_size) for _ in range(request.count)]

    def _run_outside_waves(self, tasks: list[Task]) -> None:
        _finish(Wave(self.checks, [task.start() for task in tasks]))

    def _join(self, task: "Task") -> None:
        """Start ``task`` and put it in the wave that is being formed, or in the next one if it would bring a rank too much."""
        limit = _wave_limit(self._entries, task.start())
        brings = _entries(task)
        if any(self._taken.get(rank, 0) + n > limit for rank, n in brings.items()):
            self._leave()
        self._forming.append(task)
        for rank, n in brings.items():
            self._taken[rank] = self._taken.get(rank, 0) + n

    def _leave(self) -> None:
        """Start the collectives of the wave that is being formed."""
        if self._forming:
            tasks, self._forming, self._taken = self._forming, [], {}
            moves = (p.request for task in tasks for p in task.pending if isinstance(p.request, Move))
            # Three waves of entries of four bytes or more would be too much memory.
            depth = DEPTH - 1 if any(move.dtype.itemsize > 2 for move in moves) else DEPTH
            while len(self._active) >= depth:
                _finish(self._active.pop(0))
            self._turn(Wave(self.checks, tasks))

    def _turn(self, fresh: Wave | None) -> None:
        """Let each wave go on by one round: what arrived is worked on while ``fresh`` and the older waves travel."""
        for wave in reversed(self._active):
            wave.receive()
        for wave in self._active:
            wave.send()
        self._active = [wave for wave in (*self._active, fresh) if wave and wave.travels]


def _keep(results: list[Any], i: int, result: list[Any]) -> None:
    results[i] = result.pop()


def _finish(wave: Wave) -> None:
    while wave.travels:
        wave.receive()
        wave.send()


def _entries(task: Task) -> dict[Hashable, int]:
    """Entries that ``task`` brings to each rank in the round that it waits for; those of its work, when nothing moves."""
    brings: dict[Hashable, int] = {}
    for request in (pending.request for pending in task.pending):
        if isinstance(request, Move):
            for rank, n in enumerate(request.dst.entries):
                key = request.dst.domain, rank
                brings[key] = brings.get(key, 0) + n * request.batch
    return brings or {None: task.work.entries}


def _wave_limit(largest: int, started: Task) -> int:
    device = next((p.request.device.type for p in started.pending if isinstance(p.request, Move)), "cpu")
    return wave_limit(largest, device)
