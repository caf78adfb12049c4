"""On paper: what each rank gets of matrices that are dealt out, and in how many waves they travel; see :mod:`.engine`."""

from collections.abc import Sequence
from heapq import heappop, heappush
from math import ceil
from typing import NamedTuple


class Load(NamedTuple):
    """What each of some ``ranks`` has been dealt."""

    seconds: float
    payload: float
    ranks: int


def deal(jobs: Sequence[tuple[int, float, float]], ranks: int) -> list[Load]:
    """Longest processing time first: each matrix to the rank with the least to do. As quick for many matrices as for one.

    Args:
        jobs: Count, seconds and payload of equal matrices.
        ranks: Ranks, or teams.
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
            some = min(count, least.ranks)
            heappush(loads, Load(least.seconds + seconds, least.payload + payload, some))
            if some < least.ranks:
                heappush(loads, least._replace(ranks=least.ranks - some))
            count -= some
    return loads


def waves_of(kinds: Sequence[tuple[int, float]], limit: float, workers: int) -> int:
    """How many waves are filled, one after the other.

    Args:
        kinds: Count of equal matrices, and entries that one of them brings to a rank; in the order in which they are dealt.
        limit: Entries of a wave; no matrix brings more.
        workers: Ranks, or teams, that take one matrix each before one takes another; 1 where all get each.
    """
    waves, room, start = 0, 0.0, 0
    for count, entries in kinds:
        # Every so many matrices the next round of workers begins, and it takes in what its first matrix brings.
        left = ceil((start + count) / workers) - ceil(start / workers)
        start += count
        fitting = min(left, int(room // entries))
        left, room = left - fitting, room - fitting * entries
        if left:
            each = int(limit // entries)
            waves += ceil(left / each)
            room = limit - ((left - 1) % each + 1) * entries
    return waves
