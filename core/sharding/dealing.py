"""Which rank works on which matrix: *longest processing time first*, the rule by which owners are dealt everywhere."""


def deal_to_least(loads: list[float], cost: float, *, team: int = 1) -> int:
    """Give a matrix to the rank, or the team, with the least to do; to the first of several.

    Callers deal the dearest matrix first. The engine deals anew in every step; optimizers whose state lives with the owner deal
    once (:mod:`core.optimizer.steps.whole_tensor`); :func:`core.cost.dealing.deal` computes the outcome for many equal matrices
    at once.

    Args:
        loads: Work that each rank has so far; the cost of the matrix is added to the owner's.
        cost: Work for the matrix; the ranks of a team share it.
        team: Number of consecutive ranks that work on a matrix together; it divides the number of ranks.

    Returns:
        The index of the team, or of the rank when each works alone.
    """
    owner = min(range(len(loads) // team), key=lambda k: max(loads[k * team : (k + 1) * team]))
    for rank in range(owner * team, (owner + 1) * team):
        loads[rank] += cost / team
    return owner
