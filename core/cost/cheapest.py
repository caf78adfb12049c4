"""The tensor-parallel mode of each matrix with which :mod:`.model` predicts the shortest step."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate

from .model import Cost, Machine, Matrices, alone, elementwise, exact_costs, joint_link, predict

Plan = dict[Matrices, str]
"""Kind of matrix, with a count of 1 → its mode, a name in :data:`.model.COSTS`."""


def choose(
    matrices: Sequence[Matrices], machine: Machine, *, iterations: int = 5, wave: int | None = None
) -> list[tuple[str, Cost]]:
    """The exact mode of each of ``matrices`` with which a step of all takes the least time; ``owner`` where no other is better.

    A function of its arguments alone, so that all ranks choose alike. Matrices that live on the same ranks are weighed together:
    owners share the work of all matrices that are left to them, but no step is shorter than the work for its largest matrix.

    Args:
        matrices: Kinds of matrices.
        machine: The rates of one rank.
        iterations: Number of Newton-Schulz iterations.
        wave: Entries of a wave, as :func:`.model.predict` takes them.

    Returns:
        For each entry, a name in :data:`.model.COSTS` and the entry's share, by work, of that mode's :func:`.model.predict`;
        collectives and memory are not divided.
    """
    domains: dict[tuple[int, int], list[Matrices]] = {}
    for kind in matrices:
        domains.setdefault((kind.tp, kind.copies), []).append(kind)
    chosen: dict[Matrices, tuple[str, Cost]] = {}
    for kinds in domains.values():
        plan = _best_plan(kinds, machine, iterations, wave)
        for mode in exact_costs():
            members = [kind for kind in kinds if plan[_one(kind)] == mode]
            together = predict(mode, members, machine, iterations=iterations, wave=wave)
            work = sum(kind.count * alone(kind, machine, iterations) for kind in members)
            for kind in members:
                share = kind.count * alone(kind, machine, iterations) / work if work else 0.0
                chosen[kind] = mode, together.part(share)
    return [chosen[kind] for kind in matrices]


def _one(kind: Matrices) -> Matrices:
    return replace(kind, count=1)


def _best_plan(matrices: Sequence[Matrices], machine: Machine, iterations: int, wave: int | None) -> Plan:
    """The modes of matrices that live on the same ranks."""
    counts: dict[Matrices, int] = {}
    for kind in matrices:
        counts[_one(kind)] = counts.get(_one(kind), 0) + kind.count
    kinds = [replace(kind, count=count) for kind, count in counts.items()]
    # Of equals the first is taken, and owner is first.
    plans = [dict.fromkeys(counts, mode) for mode in exact_costs()]
    if len(kinds) > 1 and matrices[0].tp * matrices[0].copies > 1:
        plans += _mixed_plans(kinds, machine, iterations, wave)

    def seconds(plan: Plan) -> float:
        total = 0.0
        for mode in exact_costs():
            members = [kind for kind in kinds if plan[_one(kind)] == mode]
            total += predict(mode, members, machine, iterations=iterations, wave=wave).seconds
        return total

    return min(plans, key=seconds)


def _mixed_plans(kinds: Sequence[Matrices], machine: Machine, iterations: int, wave: int | None) -> list[Plan]:
    """Two plans: each kind in the mode that is best for it alone; and owners for all but the largest kinds.

    In the second one kinds leave the owners, the largest first, as long as that makes the step shorter.
    """
    largest_first = sorted(kinds, key=lambda kind: -alone(kind, machine, iterations))
    modes = exact_costs()
    costs = [
        {mode: predict(mode, [kind], machine, iterations=iterations, wave=wave).seconds for mode in modes}
        for kind in largest_first
    ]
    apart = {_one(kind): min(modes, key=cost.__getitem__) for kind, cost in zip(largest_first, costs, strict=True)}
    others = [min((mode for mode in modes if mode != "owner"), key=cost.__getitem__) for cost in costs]
    # What owners take for the kinds that stay, up to how evenly they are dealt.
    ranks = kinds[0].tp * kinds[0].copies
    link = joint_link(kinds[0], machine)
    stay, shared = [0.0], 0.0
    for kind in reversed(largest_first):
        single = alone(kind, machine, iterations)
        moved = kind.payload * (2 - 1 / kinds[0].tp) / link.bandwidth
        shared += kind.count * (max(single, moved) / ranks + elementwise(kind, machine))
        stay.append(max(shared, max(single, kind.payload * kinds[0].copies / link.bandwidth)))
    leave = list(accumulate((cost[other] for cost, other in zip(costs, others, strict=True)), initial=0.0))
    totals = [left + stayed for left, stayed in zip(leave, reversed(stay), strict=True)]
    leaving = totals.index(min(totals))
    staged = {
        _one(kind): other if k < leaving else "owner"
        for k, (kind, other) in enumerate(zip(largest_first, others, strict=True))
    }
    return [apart, staged]
