"""Which tensor-parallel mode each matrix shall take: the one in which :mod:`.cost_model` predicts the shortest step."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate

from .model import Cost, Machine, Matrices, alone, elementwise, exact_costs, joint_link, predict


def choose(
    matrices: Sequence[Matrices], machine: Machine, *, iterations: int = 5, wave: int | None = None
) -> list[tuple[str, Cost]]:
    """The exact mode of each of ``matrices`` for which the step of all takes the least; ``owner`` where another is no better.

    A function of its arguments alone, so that all ranks choose alike. Those that live on the same ranks are weighed together:
    owners share the work of all matrices that are left to them, but none can be done sooner than its largest matrix.

    Returns:
        For each entry, the mode and its part, by work, of that mode's :func:`predict`; collectives and memory are not divided.
    """
    domains: dict[tuple[int, int], list[Matrices]] = {}
    for some in matrices:
        domains.setdefault((some.tp, some.copies), []).append(some)
    chosen: dict[Matrices, tuple[str, Cost]] = {}
    for here in domains.values():
        modes = _modes(here, machine, iterations, wave)
        for mode in exact_costs():
            mine = [some for some in here if modes[_kind(some)] == mode]
            together = predict(mode, mine, machine, iterations=iterations, wave=wave)
            whole = sum(some.count * alone(some, machine, iterations) for some in mine)
            for some in mine:
                share = some.count * alone(some, machine, iterations) / whole if whole else 0.0
                chosen[some] = mode, together.part(share)
    return [chosen[some] for some in matrices]


def _kind(some: Matrices) -> Matrices:
    return replace(some, count=1)


def _modes(here: Sequence[Matrices], machine: Machine, iterations: int, wave: int | None) -> dict[Matrices, str]:
    """By kind, for matrices that live on the same ranks."""
    counts: dict[Matrices, int] = {}
    for some in here:
        counts[_kind(some)] = counts.get(_kind(some), 0) + some.count
    kinds = [replace(kind, count=count) for kind, count in counts.items()]
    # The first of equals is taken, and owner is first.
    plans = [dict.fromkeys(counts, mode) for mode in exact_costs()]
    if len(kinds) > 1 and here[0].tp * here[0].copies > 1:
        plans += _mixed(kinds, machine, iterations, wave)

    def total(plan: dict[Matrices, str]) -> float:
        return sum(
            predict(
                mode, [some for some in kinds if plan[_kind(some)] == mode], machine, iterations=iterations, wave=wave
            ).seconds
            for mode in exact_costs()
        )

    return min(plans, key=total)


def _mixed(kinds: Sequence[Matrices], machine: Machine, iterations: int, wave: int | None) -> list[dict[Matrices, str]]:
    """Each kind as if there were no other; and owners for all but the largest, which leave while the step gets shorter."""
    largest_first = sorted(kinds, key=lambda some: -alone(some, machine, iterations))
    modes = exact_costs()
    costs = [
        {mode: predict(mode, [some], machine, iterations=iterations, wave=wave).seconds for mode in modes}
        for some in largest_first
    ]
    apart = {_kind(some): min(modes, key=cost.__getitem__) for some, cost in zip(largest_first, costs, strict=True)}
    others = [min((mode for mode in modes if mode != "owner"), key=cost.__getitem__) for cost in costs]
    # What owners take for those that stay, up to how evenly they are dealt.
    ranks = kinds[0].tp * kinds[0].copies
    link = joint_link(kinds[0], machine)
    stay, shared = [0.0], 0.0
    for some in reversed(largest_first):
        single = alone(some, machine, iterations)
        moved = some.payload * (2 - 1 / kinds[0].tp) / link.bandwidth
        shared += some.count * (max(single, moved) / ranks + elementwise(some, machine))
        stay.append(max(shared, max(single, some.payload * kinds[0].copies / link.bandwidth)))
    leaving = list(accumulate((cost[other] for cost, other in zip(costs, others, strict=True)), initial=0.0))
    totals = [there + here for there, here in zip(leaving, reversed(stay), strict=True)]
    gone = totals.index(min(totals))
    staged: dict[Matrices, str] = {
        _kind(some): other if k < gone else "owner"
        for k, (some, other) in enumerate(zip(largest_first, others, strict=True))
    }
    return [apart, staged]
