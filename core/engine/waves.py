"""Rules that are being run, and the rounds of requests that several of them send off together."""

from collections.abc import Callable, Hashable, Iterable, Sequence
from functools import partial
from inspect import isgenerator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from ..sharding.requests import Deal, Move, Reduce, Request, Rule
from .agreement import compare
from .exchange import exchange

_OPS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}

Take = Callable[[list[Any]], None]
"""Takes an answer out of a list of one, so that nobody else holds on to a whole matrix while a rule works on it."""

_listener: Callable[[str], None] | None = None


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


class Pending(NamedTuple):
    """A request that waits for an answer, the label of its work, and what takes the answer."""

    request: Any
    label: str
    answer: Take


def on_collective(listener: Callable[[str], None] | None) -> None:
    """Call ``listener`` with what a collective is for, the label of its first work, as each starts; None ends that.

    Whoever looks for ranks that hang wants to know. There is one listener; a new one takes the place of the one before.
    """
    global _listener
    _listener = listener


class Task:
    """A rule that is being run, and what it waits for."""

    def __init__(self, deal: Callable[[Deal], list[int]], work: Work, done: Take) -> None:
        self.work = work
        self.pending: list[Pending] = []
        self._deal = deal
        self._done = done

    def start(self) -> "Task":
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
                self.pending.append(Pending(want, self.work.label, partial(answer, k)))
        waits = missing > 0
        return None if waits else answers


class Wave:
    """Tasks whose requests go out together. :attr:`travels` until all have ended."""

    def __init__(self, check: bool, tasks: list[Task]) -> None:
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

    def _take(self, which: Callable[[Any], bool]) -> list[Pending]:
        batch = [p for task in self._tasks for p in task.pending if which(p.request)]
        for task in self._tasks:
            task.pending = [p for p in task.pending if not which(p.request)]
        return batch

    @staticmethod
    def _post(batch: list[Pending], start: Callable[[list[Pending]], Callable[[], list[Any]]]) -> Callable[[], None]:
        if _listener is not None:
            _listener(batch[0].label)
        arrive = start(batch)
        # Not the requests: what they hold is in the buffers now.
        answers = [pending.answer for pending in batch]

        def finish() -> None:
            values = arrive()
            values.reverse()
            for answer in answers:
                answer([values.pop()])

        return finish


def _move(check: bool, batch: list[Pending]) -> Callable[[], list[Any]]:
    moves = [pending.request for pending in batch]
    if check:
        compare(_asked(batch), moves[0].src.domain.group)
    return exchange(moves)


def _reduce(check: bool, batch: list[Pending]) -> Callable[[], list[Any]]:
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


def _asked(batch: list[Pending]) -> list[tuple[Any, ...]]:
    return [(p.label, *_signature(p.request)) for p in batch]


def _signature(request: Request) -> tuple[Any, ...]:
    if isinstance(request, Reduce):
        return "reduce", request.op, tuple(request.x.shape), request.x.dtype
    assert isinstance(request, Move)
    return "move", request.batch, request.dtype


def _move_key(pending: Pending) -> Hashable:
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
