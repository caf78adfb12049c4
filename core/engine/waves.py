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
"""Takes an answer out of a list of one, so that nothing else keeps a whole matrix in memory while a rule works on it."""

_listener: Callable[[str], None] | None = None


class Work(NamedTuple):
    """A rule and what the engine must know to put it in a wave.

    Attributes:
        label: Name of the parameter.
        rule: A generator that was not started yet.
        cost: Work of the largest matrix, in any unit; the dearest rule goes first.
        entries: Entries of the largest tensor that the rule brings to one rank; 0 keeps it out of waves.
    """

    label: str
    rule: Rule
    cost: float = 0.0
    entries: int = 0


class Pending(NamedTuple):
    """A request that waits for an answer, the label of its work, and the function that takes the answer."""

    request: Any
    label: str
    answer: Take


def on_collective(listener: Callable[[str], None] | None) -> None:
    """Call ``listener`` with the label of the first work of each collective that starts; None ends that.

    So a watchdog can say what a rank waits for. There is one listener; a new one takes the place of the one before.
    """
    global _listener
    _listener = listener


class Task:
    """A rule that is being run, and the requests that it waits for.

    Args:
        deal: Answers the rule's :class:`Deal` requests.
        work: The rule.
        done: Takes the rule's result.
    """

    def __init__(self, deal: Callable[[Deal], list[int]], work: Work, done: Take) -> None:
        self.work = work
        self.pending: list[Pending] = []
        self._deal = deal
        self._done = done

    def start(self) -> "Task":
        self._resume(self.work.rule, self._done, [None])
        return self

    def _resume(self, rule: Rule, done: Take, value: list[Any]) -> None:
        """Send ``value`` to ``rule`` and answer what it yields until it must wait; at its end give its result to ``done``."""
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

    def _ask(self, requests: list[Any], many: bool, go_on: Take) -> list[Any] | None:
        """The answers, when none of them needs another rank; otherwise None, and ``go_on`` gets the answers later."""
        answers: list[Any] = [None] * len(requests)
        missing = len(requests)
        waits = False

        def answer(k: int, value: list[Any]) -> None:
            nonlocal missing
            answers[k] = value.pop()
            missing -= 1
            if waits and not missing:
                go_on([answers] if many else answers)

        for k, request in enumerate(requests):
            if isgenerator(request):
                self._resume(request, partial(answer, k), [None])
            elif isinstance(request, Deal):
                answer(k, [self._deal(request)])
            elif isinstance(request, Reduce) and not request.groups:
                answer(k, [request.finish(request.x) if request.finish else request.x])
            else:
                self.pending.append(Pending(request, self.work.label, partial(answer, k)))
        waits = missing > 0
        return None if waits else answers


class Wave:
    """Tasks whose requests go out together. It :attr:`travels` until all of them have ended."""

    def __init__(self, check: bool, tasks: list[Task]) -> None:
        self._check = check
        self._tasks = tasks
        self._under_way: list[Callable[[], None]] = []
        self.send()

    @property
    def travels(self) -> bool:
        return bool(self._under_way)

    def send(self) -> None:
        """Start the collectives of a round, unless a round is under way."""
        if self._under_way:
            return
        moves = self._take(lambda request: isinstance(request, Move))
        if moves:
            self._under_way = [self._post(batch, partial(_move, self._check)) for batch in _group_by(moves, _move_key)]
        elif batch := self._take(lambda request: True):
            self._under_way = [self._post(batch, partial(_reduce, self._check))]

    def receive(self) -> None:
        """Wait for the round and let the rules go on; those of a team go on until they have nothing more to ask each other."""
        under_way, self._under_way = self._under_way, []
        for arrive in under_way:
            arrive()
        # Ranks outside a team know nothing of its reductions, which must not change the order of collectives that all join.
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
        # The requests are not kept: what they held is in the buffers now.
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
        compare(_described(batch), moves[0].src.domain.group)
    return exchange(moves)


def _reduce(check: bool, batch: list[Pending]) -> Callable[[], list[Any]]:
    values = [pending.request.x for pending in batch]

    def start(depth: int) -> list[tuple[list[int], Callable[[], list[Tensor]]]]:
        keys = [
            (p.request.groups[depth : depth + 1], p.request.op, v.dtype) for p, v in zip(batch, values, strict=True)
        ]
        started = []
        for members in _group_by((i for i, (groups, _, _) in enumerate(keys) if groups), keys.__getitem__):
            (group,), op, _ = keys[members[0]]
            if check:
                compare(_described([batch[i] for i in members]), group)
            started.append((members, _all_reduce([values[i] for i in members], op, group)))
        return started

    first = start(0)

    def arrive() -> list[Any]:
        # A tensor that is split over two axes is reduced over one after the other.
        for depth in range(max(len(p.request.groups) for p in batch)):
            for members, reduced in start(depth) if depth else first:
                for i, value in zip(members, reduced(), strict=True):
                    values[i] = value
        return [p.request.finish(v) if p.request.finish else v for p, v in zip(batch, values, strict=True)]

    return arrive


def _described(batch: list[Pending]) -> list[tuple[Any, ...]]:
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
