"""Drives the rules of all parameters in lockstep and answers each round of requests with one collective per group."""

from collections.abc import Callable, Hashable, Iterable, Sequence
from functools import partial
from inspect import isgenerator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from .exchange import exchange
from .layout import Deal, Move, Reduce, Request, Rule

_OPS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}


class _Pending(NamedTuple):
    request: Any
    label: str
    answer: Callable[[Any], None]


def run(rules: Iterable[tuple[str, Rule]], *, check: bool = False) -> list[Any]:
    """Run ``rules`` to their end and return their results.

    A round begins when every live rule waits. Deals are made first, then shards are moved, and reductions are answered
    only when nobody waits for a move: so the reductions of a rule that had to move its shards first fall into the same
    round as everybody else's. Requests of one kind go out together, one collective per process group and dtype. What
    needs no other rank is answered at once, outside of rounds, so ranks may differ in it.

    Args:
        rules: A label (the parameter's name) and a generator for each. The ranks of a process group must run the same
            ones in the same order.
        check: Compare what the ranks of each group ask for before every collective; slow, for debugging.

    Raises:
        RuntimeError: with ``check``, when ranks ask for different things; names the first label that differs.
    """
    loop = _Loop(check)
    labelled = list(rules)
    results: list[Any] = [None] * len(labelled)
    for i, (label, rule) in enumerate(labelled):
        loop.resume(rule, label, partial(results.__setitem__, i), None)
    loop.finish()
    return results


class _Loop:
    def __init__(self, check: bool) -> None:
        self._check = check
        self._pending: list[_Pending] = []

    def resume(self, rule: Rule, label: str, done: Callable[[Any], None], value: Any) -> None:
        """Send ``value`` to ``rule`` and take up what it yields, until it waits; call ``done`` with its result at the end."""
        while True:
            try:
                asked = rule.send(value)
            except StopIteration as stop:
                done(stop.value)
                return
            answers = self._ask(asked, label, partial(self.resume, rule, label, done))
            if answers is None:
                return
            value = answers if isinstance(asked, tuple | list) else answers[0]

    def _ask(self, asked: Any, label: str, go_on: Callable[[Any], None]) -> list[Any] | None:
        """The answers, if none needs another rank; or None, and ``go_on`` is called with them later."""
        wants = list(asked) if isinstance(asked, tuple | list) else [asked]
        answers: list[Any] = [None] * len(wants)
        missing = len(wants)
        waits = False

        def answer(k: int, value: Any) -> None:
            nonlocal missing
            answers[k] = value
            missing -= 1
            if waits and not missing:
                go_on(answers if isinstance(asked, tuple | list) else answers[0])

        for k, want in enumerate(wants):
            if isgenerator(want):
                self.resume(want, label, partial(answer, k), None)
            elif isinstance(want, Reduce) and not want.groups:
                answer(k, want.finish(want.x) if want.finish else want.x)
            else:
                self._pending.append(_Pending(want, label, partial(answer, k)))
        waits = missing > 0
        return None if waits else answers

    def finish(self) -> None:
        """Answer rounds until no rule waits."""
        while self._pending:
            kind = next(k for k in (Deal, Move, Reduce) if any(isinstance(p.request, k) for p in self._pending))
            batch = [p for p in self._pending if isinstance(p.request, kind)]
            self._pending = [p for p in self._pending if not isinstance(p.request, kind)]
            if kind is Reduce:
                answers = self._reduce(batch)
            else:
                answers = self._grouped(batch, *((_deal, _deal_key) if kind is Deal else (exchange, _move_key)))
            for pending, value in zip(batch, answers, strict=True):
                pending.answer(value)

    def _grouped(
        self, batch: list[_Pending], serve: Callable[[list[Any]], list[Any]], key: Callable[[Any], Hashable]
    ) -> list[Any]:
        answers: list[Any] = [None] * len(batch)
        for where in _group_by(range(len(batch)), lambda i: key(batch[i].request)):
            if self._check and serve is exchange:
                self._compare([batch[i] for i in where], batch[where[0]].request.src.domain.group)
            for i, value in zip(where, serve([batch[i].request for i in where]), strict=True):
                answers[i] = value
        return answers

    def _reduce(self, batch: list[_Pending]) -> list[Tensor]:
        values = [p.request.x for p in batch]
        # A tensor that is split over two axes is reduced over one after the other.
        for depth in range(max(len(p.request.groups) for p in batch)):
            keys = [
                (p.request.groups[depth : depth + 1], p.request.op, v.dtype) for p, v in zip(batch, values, strict=True)
            ]
            for where in _group_by((i for i, (groups, _, _) in enumerate(keys) if groups), keys.__getitem__):
                (group,), op, _ = keys[where[0]]
                if self._check:
                    self._compare([batch[i] for i in where], group)
                for i, value in zip(where, _all_reduce([values[i] for i in where], op, group), strict=True):
                    values[i] = value
        return [p.request.finish(v) if p.request.finish else v for p, v in zip(batch, values, strict=True)]

    @staticmethod
    def _compare(batch: list[_Pending], group: ProcessGroup | None) -> None:
        mine = [(p.label, *_signature(p.request)) for p in batch]
        everyone: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(everyone, mine, group=group)
        for rank, other in enumerate(everyone):
            if other != mine:
                at = next(
                    (i for i, (a, b) in enumerate(zip(mine, other, strict=False)) if a != b), min(len(mine), len(other))
                )
                here, there = (str(asks[at]) if at < len(asks) else "nothing" for asks in (mine, other))
                raise RuntimeError(
                    f"the ranks of a group ask for different things: here {here}, on rank {rank} of the group {there}. "
                    f"Every rank must hold the same parameters, with gradients on all ranks or on none."
                )


def _signature(request: Request) -> tuple[Any, ...]:
    if isinstance(request, Reduce):
        return "reduce", request.op, tuple(request.x.shape), request.x.dtype
    assert isinstance(request, Move)
    return "move", request.batch, request.dtype


def _deal_key(request: Deal) -> Hashable:
    return request.domain


def _move_key(request: Move) -> Hashable:
    return request.src.domain.group, request.dtype, request.device


def _group_by(items: Iterable[int], key: Callable[[int], Hashable]) -> list[list[int]]:
    groups: dict[Hashable, list[int]] = {}
    for i in items:
        groups.setdefault(key(i), []).append(i)
    return list(groups.values())


def _all_reduce(xs: Sequence[Tensor], op: str, group: ProcessGroup) -> list[Tensor]:
    if len(xs) == 1:
        x = xs[0].contiguous()
        dist.all_reduce(x, _OPS[op], group=group)
        return [x]
    flat = torch.cat([x.reshape(-1) for x in xs])
    dist.all_reduce(flat, _OPS[op], group=group)
    pieces = flat.split([x.numel() for x in xs])
    return [piece.view(x.shape) for piece, x in zip(pieces, xs, strict=True)]


def _deal(requests: Sequence[Deal]) -> list[list[int]]:
    """Longest processing time first: the dearest matrix that is left goes to the rank with the least to do."""
    load = [0.0] * requests[0].domain.size
    owners = [[0] * r.count for r in requests]
    matrices = [(r.cost, i, k) for i, r in enumerate(requests) for k in range(r.count)]
    for cost, i, k in sorted(matrices, key=lambda entry: -entry[0]):
        owner = min(range(len(load)), key=load.__getitem__)
        owners[i][k] = owner
        load[owner] += cost
    return owners
