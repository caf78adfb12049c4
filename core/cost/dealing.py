"""Dealing and waves on paper: the load of each rank and the number of waves, without the step (:mod:`core.engine`) itself."""

from collections.abc import Sequence
from heapq import heappop, heappush
from math import ceil
from typing import NamedTuple


class Load(NamedTuple):
    """What each of ``ranks`` ranks has been dealt: seconds of work, and payload."""

    seconds: float
    payload: float
    ranks: int


def deal(jobs: Sequence[tuple[int, float, float]], ranks: int) -> list[Load]:
    """Longest processing time first: each matrix goes to the rank with the least to do. As quick for many matrices as for one.

    The outcome is that of :func:`core.sharding.dealing.deal_to_least`, matrix by matrix.

    Args:
        jobs: For each kind of matrix, how many there are, and the seconds and the payload of one.
        ranks: Number of ranks, or of teams.

    Returns:
        Loads, in no particular order, that together count all ranks.
    """
    loads = [Load(0.0, 0.0, ranks)]
    for count, seconds, payload in sorted(jobs, key=lambda job: (-job[1], -job[2])):
        while count:
            rounds = count // ranks
            if rounds and (len(loads) == 1 or max(loads).seconds - loads[0].seconds < seconds):
                # Each rank gets one before any gets a second.
                loads = [Load(s + rounds * seconds, p + rounds * payload, r) for s, p, r in loads]
                count -= rounds * ranks
                continue
            least = heappop(loads)
            dealt = min(count, least.ranks)
            heappush(loads, Load(least.seconds + seconds, least.payload + payload, dealt))
            if dealt < least.ranks:
                heappush(loads, least._replace(ranks=least.ranks - dealt))
            count -= dealt
    return loads


def waves_of(kinds: Sequence[tuple[int, float]], limit: float, workers: int) -> int:
    """The number of waves that matrices fill, one wave after the other.

    Args:
        kinds: For each kind of matrix, in the order in which they are dealt, how many there are, and the entries that one
            brings to a rank.
        limit: Entries of a wave; no matrix brings more.
        workers: Ranks, or teams, that take one matrix each before one takes another; 1 where every rank gets each matrix.
    """
    waves, room, start = 0, 0.0, 0
    for count, entries in kinds:
        # A round gives each worker one matrix, and takes in what its first matrix brings.
        left = ceil((start + count) / workers) - ceil(start / workers)
        start += count
        fitting = min(left, int(room // entries))
        left, room = left - fitting, room - fitting * entries
        if left:
            each = int(limit // entries)
            waves += ceil(left / each)
            room = limit - ((left - 1) % each + 1) * entries
    return waves
