"""Who works on which matrix: longest processing time first, the rule by which owners are dealt everywhere."""


def deal_to_least(loads: list[float], cost: float, *, team: int = 1) -> int:
    """Give a matrix to the rank, or the team, with the least to do; of equals, to the first.

    Whoever deals matrices out begins with the dearest. The engine does it anew in every step; optimizers whose state lives with
    the owner do it once (:mod:`~.steps.whole_tensor`); :func:`~.cost.dealing.deal` computes the outcome for many equal
    matrices at once.

    Args:
        loads: What each rank has to do so far; the owner's share is added.
        cost: Of the matrix; the ranks of a team share it.
        team: Consecutive ranks that work on a matrix together; divides the number of ranks.

    Returns:
        The index of the team; of the rank, where each works alone.
    """
    owner = min(range(len(loads) // team), key=lambda k: max(loads[k * team : (k + 1) * team]))
    for rank in range(owner * team, (owner + 1) * team):
        loads[rank] += cost / team
    return owner
