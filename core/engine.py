"""Drives the rules of all parameters in lockstep and answers each round of requests with one collective per group.

Rules that bring whole matrices together run in *waves* of bounded size: while the matrices of one wave are worked on, those of
the next travel in and the results of the last travel back.
"""

import os
from collections.abc import Callable, Hashable, Iterable, Sequence
from functools import partial
from inspect import isgenerator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from .agreement import compare
from .exchange import exchange
from .layout import Deal, Move, Reduce, Request, Rule

_OPS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}

WAVE = "SHARDSTEP_WAVE"
"""Environment variable: entries of whole matrices that a rank takes in per wave; bits do not depend on it."""

SMALLEST_WAVE = {"cpu": 2**20}
"""The same by device when :data:`WAVE` is not set and no matrix is larger; a wave must be worth its two collectives."""

DEPTH = 3
"""Waves of 16-bit entries that may be in memory: one travels in, one is worked on, one travels back. Of wider ones, one less."""

watch: Callable[[str], None] | None = None
"""Told what each collective is for as it starts, the label of its first work, by whoever looks for ranks that hang."""


class Work(NamedTuple):
    """A rule and what the engine must know to put it in a wave.

    Attributes:
        label: The parameter's name.
        rule: Not started yet.
        cost: Relative work; the dearest goes first.
        entries: Of the largest tensor that the rule brings to one rank; 0 keeps it out of waves.
    """

    label: str
    rule: Rule
    cost: float = 0.0
    entries: int = 0


Take = Callable[[list[Any]], None]
"""Takes an answer out of a list of one, so that nobody else holds on to a whole matrix while a rule works on it."""


class _Pending(NamedTuple):
    request: Any
    label: str
    answer: Take


def run(rules: Iterable[Work | tuple[str, Rule]], *, check: bool = False) -> list[Any]:
    """Run ``rules`` to their end and return their results.

    A round begins when every live rule waits. Shards are moved first, and reductions are answered only when nobody waits
    for a move: so the reductions of a rule that had to move its shards first fall into the same round as everybody
    else's. Requests of one kind go out together, one collective per process group and dtype. What needs no other rank is
    answered at once, outside of rounds, so ranks may differ in it.

    Rules with ``entries`` have rounds of their own, wave by wave. The others run while the first wave travels.

    Args:
        rules: :class:`Work`, or a label and a generator. The ranks of a process group must run the same ones in the same order.
        check: Compare what the ranks of each group ask for before every collective; slow, for debugging.

    Raises:
        RuntimeError: with ``check``, when ranks ask for different things; names the first label that differs.
        ValueError: when :data:`WAVE` is not a positive number.
    """
    return Run(check=check).finish(rules)


def begin(rules: Iterable[tuple[str, Rule]], *, check: bool = False) -> Callable[[], list[Any]]:
    """As :func:`run`, but only the first round is sent off; what is returned waits for it, goes on and returns the results."""
    works = [Work(*work) for work in rules]
    results: list[Any] = [None] * len(works)
    deal = Run()._deal
    wave = _Wave(check, [_Task(deal, work, partial(_keep, results, i)).start() for i, work in enumerate(works)])

    def finish() -> list[Any]:
        _finish(wave)
        return results

    return finish


class Run:
    """A step whose first waves may leave before all of its rules can start.

    Args:
        check: As in :func:`run`.
        entries: Of the largest whole tensor that will travel, when some works are added before the others are known.
    """

    def __init__(self, *, check: bool = False, entries: int = 0) -> None:
        self._check = check
        self._entries = entries
        self._loads: dict[tuple[int, ...], list[float]] = {}
        self._active: list[_Wave] = []
        self._forming: list[_Task] = []
        self._taken: dict[Hashable, int] = {}

    @property
    def begun(self) -> bool:
        """Whether anything was added."""
        return bool(self._loads)

    def add(self, work: Work) -> None:
        """Start a work with ``entries``; when it begins a new wave, the one before leaves. All ranks must add in one order."""
        self._join(_Task(self._deal, work, list.clear))

    def finish(self, rules: Iterable[Work | tuple[str, Rule]] = ()) -> list[Any]:
        """Run ``rules``, and what was added, to their end; returns the results of ``rules``."""
        # All of them before the first starts: they check their input as they are listed.
        works = [Work(*work) for work in rules]
        results: list[Any] = [None] * len(works)
        tasks = [_Task(self._deal, work, partial(_keep, results, i)) for i, work in enumerate(works)]
        travelling = sorted((task for task in tasks if task.work.entries), key=lambda task: -task.work.cost)
        self._entries = max([self._entries, *(task.work.entries for task in travelling)])
        staying = [task for task in tasks if not task.work.entries]
        for task in travelling:
            self._join(task)
            if self._active and staying:
                # They work while the first wave travels.
                self._stay(staying)
                staying = []
        self._leave()
        self._stay(staying)
        while self._active:
            self._turn(None)
        return results

    def _deal(self, request: Deal) -> list[int]:
        """Each matrix to the rank, or team, with the least to do. The dearest start first: longest processing time first."""
        domain = request.domain
        load = self._loads.setdefault(domain.ranks, [0.0] * domain.size)
        team = domain.team_size
        owners = []
        for _ in range(request.count):
            owner = min(range(domain.teams), key=lambda k: max(load[k * team : (k + 1) * team]))
            for rank in range(owner * team, (owner + 1) * team):
                load[rank] += request.cost / team
            owners.append(owner)
        return owners

    def _stay(self, tasks: list["_Task"]) -> None:
        _finish(_Wave(self._check, [task.start() for task in tasks]))

    def _join(self, task: "_Task") -> None:
        """Start ``task`` and put it in the wave that is being formed, or in the next when that would bring a rank too much."""
        limit = _wave_limit(self._entries, task.start())
        brings = _entries(task)
        if any(self._taken.get(rank, 0) + n > limit for rank, n in brings.items()):
            self._leave()
        self._forming.append(task)
        for rank, n in brings.items():
            self._taken[rank] = self._taken.get(rank, 0) + n

    def _leave(self) -> None:
        """Send off the wave that is being formed."""
        if self._forming:
            tasks, self._forming, self._taken = self._forming, [], {}
            moves = (p.request for task in tasks for p in task.pending if isinstance(p.request, Move))
            # Three waves of entries of four bytes or more would be too much memory.
            depth = DEPTH - 1 if any(move.dtype.itemsize > 2 for move in moves) else DEPTH
            while len(self._active) >= depth:
                _finish(self._active.pop(0))
            self._turn(_Wave(self._check, tasks))

    def _turn(self, fresh: "_Wave | None") -> None:
        """Work on the newest wave that has arrived while ``fresh`` and the older ones travel."""
        for wave in reversed(self._active):
            wave.receive()
        for wave in self._active:
            wave.send()
        self._active = [wave for wave in (*self._active, fresh) if wave and wave.travels]


class _Task:
    """A rule that is being run, and what it waits for."""

    def __init__(self, deal: Callable[[Deal], list[int]], work: Work, done: Take) -> None:
        self.work = work
        self.pending: list[_Pending] = []
        self._deal = deal
        self._done = done

    def start(self) -> "_Task":
        self._resume(self.work.rule, self._done, [None])
        return self

    def _resume(self, rule: Rule, done: Take, value: list[Any]) -> None:
        """Send ``value`` to ``rule`` and take up what it yields, until it waits; give ``done`` its result at the end."""
        while True:
            try:
                asked = rule.send(value.pop())
            except StopIteration as stop:
                done([stop.value])
                return
            many = isinstance(asked, tuple | list)
            answers = self._ask(list(asked) if many else [asked], many, partial(self._resume, rule, done))
            if answers is None:
                return
            value = [answers] if many else answers

    def _ask(self, wants: list[Any], many: bool, go_on: Take) -> list[Any] | None:
        """The answers, if none needs another rank; or None, and ``go_on`` is given them later."""
        answers: list[Any] = [None] * len(wants)
        missing = len(wants)
        waits = False

        def answer(k: int, value: list[Any]) -> None:
            nonlocal missing
            answers[k] = value.pop()
            missing -= 1
            if waits and not missing:
                go_on([answers] if many else answers)

        for k, want in enumerate(wants):
            if isgenerator(want):
                self._resume(want, partial(answer, k), [None])
            elif isinstance(want, Deal):
                answer(k, [self._deal(want)])
            elif isinstance(want, Reduce) and not want.groups:
                answer(k, [want.finish(want.x) if want.finish else want.x])
            else:
                self.pending.append(_Pending(want, self.work.label, partial(answer, k)))
        waits = missing > 0
        return None if waits else answers


class _Wave:
    """Tasks whose requests go out together. :attr:`travels` until all have ended."""

    def __init__(self, check: bool, tasks: list[_Task]) -> None:
        self._check = check
        self._tasks = tasks
        self._flying: list[Callable[[], None]] = []
        self.send()

    @property
    def travels(self) -> bool:
        return bool(self._flying)

    def send(self) -> None:
        """Start the collectives of a round, unless one is under way."""
        if self._flying:
            return
        moves = self._take(lambda request: isinstance(request, Move))
        if moves:
            self._flying = [self._post(some, partial(_move, self._check)) for some in _group_by(moves, _move_key)]
        elif batch := self._take(lambda request: True):
            self._flying = [self._post(batch, partial(_reduce, self._check))]

    def receive(self) -> None:
        """Wait for the round and let the rules go on, those of a team until they have nothing more to ask each other."""
        flying, self._flying = self._flying, []
        for arrive in flying:
            arrive()
        # The other ranks know nothing of a team's reductions: they must not change the order of what all take part in.
        while batch := self._take(lambda request: isinstance(request, Reduce) and request.team):
            self._post(batch, partial(_reduce, self._check))()

    def _take(self, which: Callable[[Any], bool]) -> list[_Pending]:
        batch = [p for task in self._tasks for p in task.pending if which(p.request)]
        for task in self._tasks:
            task.pending = [p for p in task.pending if not which(p.request)]
        return batch

    @staticmethod
    def _post(batch: list[_Pending], start: Callable[[list[_Pending]], Callable[[], list[Any]]]) -> Callable[[], None]:
        if watch is not None:
            watch(batch[0].label)
        arrive = start(batch)
        # Not the requests: what they hold is in the buffers now.
        answers = [pending.answer for pending in batch]

        def finish() -> None:
            values = arrive()
            values.reverse()
            for answer in answers:
                answer([values.pop()])

        return finish


def _keep(results: list[Any], i: int, result: list[Any]) -> None:
    results[i] = result.pop()


def _finish(wave: _Wave) -> None:
    while wave.travels:
        wave.receive()
        wave.send()


def _entries(task: _Task) -> dict[Hashable, int]:
    """What ``task`` brings to each rank of its domains in the round that it waits for; what it says, when nothing moves."""
    brings: dict[Hashable, int] = {}
    for request in (pending.request for pending in task.pending):
        if isinstance(request, Move):
            for rank, n in enumerate(request.dst.entries):
                key = request.dst.domain, rank
                brings[key] = brings.get(key, 0) + n * request.batch
    return brings or {None: task.work.entries}


def _wave_limit(largest: int, started: _Task) -> int:
    given = os.environ.get(WAVE)
    if given is None:
        device = next((p.request.device.type for p in started.pending if isinstance(p.request, Move)), "cpu")
        return max(SMALLEST_WAVE.get(device, 2**24), largest)
    if not given.isdecimal() or int(given) < 1:
        raise ValueError(
            f"{WAVE} is {given!r}, but must be a whole number of entries, at least 1; unset it for the default."
        )
    return int(given)


def _move(check: bool, batch: list[_Pending]) -> Callable[[], list[Any]]:
    moves = [pending.request for pending in batch]
    if check:
        compare(_asked(batch), moves[0].src.domain.group)
    return exchange(moves)


def _reduce(check: bool, batch: list[_Pending]) -> Callable[[], list[Any]]:
    values = [pending.request.x for pending in batch]

    def start(depth: int) -> list[tuple[list[int], Callable[[], list[Tensor]]]]:
        keys = [
            (p.request.groups[depth : depth + 1], p.request.op, v.dtype) for p, v in zip(batch, values, strict=True)
        ]
        started = []
        for where in _group_by((i for i, (groups, _, _) in enumerate(keys) if groups), keys.__getitem__):
            (group,), op, _ = keys[where[0]]
            if check:
                compare(_asked([batch[i] for i in where]), group)
            started.append((where, _all_reduce([values[i] for i in where], op, group)))
        return started

    first = start(0)

    def arrive() -> list[Any]:
        # A tensor that is split over two axes is reduced over one after the other.
        for depth in range(max(len(p.request.groups) for p in batch)):
            for where, reduced in start(depth) if depth else first:
                for i, value in zip(where, reduced(), strict=True):
                    values[i] = value
        return [p.request.finish(v) if p.request.finish else v for p, v in zip(batch, values, strict=True)]

    return arrive


def _asked(batch: list[_Pending]) -> list[tuple[Any, ...]]:
    return [(p.label, *_signature(p.request)) for p in batch]


def _signature(request: Request) -> tuple[Any, ...]:
    if isinstance(request, Reduce):
        return "reduce", request.op, tuple(request.x.shape), request.x.dtype
    assert isinstance(request, Move)
    return "move", request.batch, request.dtype


def _move_key(pending: _Pending) -> Hashable:
    request = pending.request
    return request.src.domain.group, request.dtype, request.device


def _group_by[T](items: Iterable[T], key: Callable[[T], Hashable]) -> list[list[T]]:
    groups: dict[Hashable, list[T]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return list(groups.values())


def _all_reduce(xs: Sequence[Tensor], op: str, group: ProcessGroup) -> Callable[[], list[Tensor]]:
    flat = xs[0].contiguous() if len(xs) == 1 else torch.cat([x.reshape(-1) for x in xs])
    shapes = [x.shape for x in xs]
    work = dist.all_reduce(flat, _OPS[op], group=group, async_op=True)

    def arrive() -> list[Tensor]:
        work.wait()
        pieces = flat.view(-1).split([shape.numel() for shape in shapes])
        return [piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)]

    return arrive
