"""The Newton-Schulz coefficients of a Muon: a named set, or numbers that the user gives."""

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from ....linalg.coefficients import coefficients
from ....linalg.variants import Coefficients

CUSTOM = "custom"
"""The ``coefficient_type`` whose numbers are the argument ``ns_coeffs``."""

if TYPE_CHECKING:
    NsCoeffs = Sequence[float] | Sequence[Sequence[float]]
else:
    # Configs and flags hold the numbers in one list.
    NsCoeffs = tuple[float, ...]


def ns_coefficients(coefficient_type: str, steps: int, ns_coeffs: NsCoeffs | None) -> Coefficients:
    """(a, b, c) of each of ``steps`` iterations ``X ← aX + (bA + cA²)X``, A = XXᵀ.

    Args:
        coefficient_type: Name of a set of emerging-optimizers, or ``custom``.
        steps: Number of iterations.
        ns_coeffs: For ``custom``: three numbers, which all iterations use, or three for each iteration, in one list or in
            lists of three. None otherwise.

    Raises:
        ValueError: for a name without coefficients, for ``custom`` without ``ns_coeffs`` or the reverse, and for numbers that
            are not finite or do not come in one triple or in one for each iteration.
    """
    if coefficient_type != CUSTOM:
        if ns_coeffs is not None:
            raise ValueError(
                f"ns_coeffs is given, but coefficient_type={coefficient_type!r} has coefficients of its own; give "
                f"coefficient_type={CUSTOM!r} with ns_coeffs, or leave ns_coeffs out."
            )
        return coefficients(coefficient_type, steps)
    if ns_coeffs is None:
        raise ValueError(
            f"coefficient_type={CUSTOM!r} needs its numbers: give ns_coeffs=(a, b, c), or three numbers for each of the "
            f"{steps} iterations."
        )
    numbers = [float(x) for entry in ns_coeffs for x in (_triple(entry) if isinstance(entry, Iterable) else (entry,))]
    if len(numbers) not in (3, 3 * steps) or not all(map(math.isfinite, numbers)):
        raise ValueError(
            f"ns_coeffs={ns_coeffs!r} must be three finite numbers, or three for each of the {steps} iterations of "
            f"num_ns_steps, which are {3 * steps}."
        )
    triples = tuple((numbers[i], numbers[i + 1], numbers[i + 2]) for i in range(0, len(numbers), 3))
    return triples if len(triples) == steps else triples * steps


def _triple(entry: Iterable[float]) -> tuple[float, ...]:
    triple = tuple(entry)
    if len(triple) != 3:
        raise ValueError(f"ns_coeffs has the entry {triple!r}; each list in it must have three numbers (a, b, c).")
    return triple
