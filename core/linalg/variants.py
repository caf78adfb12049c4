"""Which way a Newton-Schulz iteration is evaluated: the same polynomial, other operations, other rounding."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

Coefficients = Sequence[tuple[float, float, float]]
Form = Literal["classic", "gram"]

DTYPES = {str(t).removeprefix("torch."): t for t in (torch.bfloat16, torch.float16, torch.float32, torch.float64)}
NARROW = (torch.bfloat16, torch.float16)

WIDE = 1.25
"""Ratio of the sides from which the Gram form takes fewer operations; of a square matrix it takes as many as the classic."""

TINY = 2**20
"""m² n of a bfloat16 matrix up to which CPU computes a float32 product while oneDNN prepares a bfloat16 one."""

EXACT = 512
"""Rows below which float32 Gram matrices gain little time, and lose a little against emerging-optimizers."""

STEEP = 35.0
"""Slope at 0 of the first two iterations above which Gram matrices are formed more often."""


@dataclass(frozen=True)
class Variant:
    """A way to evaluate the iteration.

    Attributes:
        form: ``classic`` iterates on X. ``gram`` iterates on R = X X^T, m x m, and multiplies X before each restart and at
            the end: 3 (r + 1) m² n + (4 k - 3 - 3 r) m³ operations for r restarts in k iterations, symmetric products
            counted half; classic takes 3 k m² n + k m³.
        dtype: Of the matrices in it. ``gram`` is never bfloat16.
        restarts: Of ``gram``: iterations, counted from 0, before which R is formed anew from X. R knows singular values only
            down to the root of the rounding unit; X knows them down to the unit.

    Raises:
        ValueError: for a combination that has no meaning.

    Source: https://github.com/Dao-AILab/gram-newton-schulz (the Gram form)
    """

    form: Form
    dtype: torch.dtype
    restarts: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.form not in ("classic", "gram"):
            raise ValueError(f"form {self.form!r} is unknown; possible: 'classic', 'gram'.")
        if self.dtype not in DTYPES.values():
            raise ValueError(f"dtype {self.dtype} is not possible; possible: {sorted(DTYPES)}.")
        if self.form == "gram" and self.dtype == torch.bfloat16:
            raise ValueError(
                "a bfloat16 Gram matrix overflows: each iteration multiplies its rounding by a²; use float16."
            )
        if self.form == "classic" and self.restarts:
            raise ValueError(f"classic has no Gram matrix to restart, got restarts {self.restarts}.")
        if list(self.restarts) != sorted({*self.restarts}) or any(at < 1 for at in self.restarts):
            raise ValueError(f"restarts must rise and be at least 1, got {self.restarts}.")

    def groups(self, coefs: Coefficients) -> list[Coefficients]:
        """``coefs`` cut where R is formed from X; one iteration each in the classic form.

        Raises:
            ValueError: for a restart after the last iteration.
        """
        if any(at >= len(coefs) for at in self.restarts):
            raise ValueError(f"restarts {self.restarts} do not fit {len(coefs)} iterations, which are counted from 0.")
        starts = range(len(coefs)) if self.form == "classic" else (0, *self.restarts)
        return [coefs[i:j] for i, j in zip(starts, [*starts[1:], len(coefs)], strict=True)]

    def to_json(self) -> dict[str, Any]:
        """What :meth:`from_json` reads."""
        return {"form": self.form, "dtype": str(self.dtype).removeprefix("torch."), "restarts": list(self.restarts)}

    @classmethod
    def from_json(cls, value: Any) -> "Variant":
        """Inverse of :meth:`to_json`.

        Raises:
            ValueError: for anything else.
        """
        keys = {"form", "dtype", "restarts"}
        if not isinstance(value, dict) or value.keys() != keys or value["dtype"] not in DTYPES:
            raise ValueError(f"{value!r} is no variant; needed: {sorted(keys)}, with a dtype of {sorted(DTYPES)}.")
        return cls(value["form"], DTYPES[value["dtype"]], tuple(int(at) for at in value["restarts"]))


def variant_for(
    shape: Sequence[int],
    dtype: torch.dtype,
    precision: str,
    device: torch.device,
    coefs: Coefficients,
    *,
    whole: bool = True,
) -> Variant:
    """The static rule: the cheapest variant whose error is not above that of emerging-optimizers in this arithmetic.

    A pure function of its arguments, so that all ranks choose alike.

    Args:
        shape: (m, n) of the whole matrix.
        dtype: Of the matrices that are given: bfloat16, float32 or float64.
        precision: ``highest``, ``high`` or ``medium``.
        device: Where they are.
        coefs: Polynomial of each iteration.
        whole: Whether this rank has the whole matrix; if not, Gram matrices are summed over ranks, in float32 at least.
    """
    m, n = sorted(shape)
    wide = n >= WIDE * m
    if dtype == torch.bfloat16:
        if not whole:
            return Variant("gram", torch.float32, coarse_restarts(coefs))
        if device.type == "cpu" and m * m * n <= TINY:
            return Variant("classic", torch.float32)
        # float16 products run at the speed of bfloat16 ones there, with an eighth of the rounding; CPUs have bfloat16 only.
        if device.type != "cuda":
            return Variant("classic", torch.bfloat16)
        return Variant("gram", torch.float16, coarse_restarts(coefs)) if wide else Variant("classic", torch.float16)
    # tf32 rounds a Gram matrix by more than it rounds X.
    tf32 = dtype == torch.float32 and device.type != "cpu" and precision != "highest"
    if tf32 or (whole and not (wide and m >= EXACT)):
        return Variant("classic", dtype)
    return Variant("gram", dtype, fine_restarts(coefs))


def variants_for(
    shape: Sequence[int], dtype: torch.dtype, precision: str, device: torch.device, coefs: Coefficients
) -> list[Variant]:
    """What whole matrices may be evaluated by at the accuracy of ``precision``; the first is that of :func:`variant_for`."""
    static = variant_for(shape, dtype, precision, device, coefs)
    others = [Variant("classic", static.dtype)]
    if dtype == torch.bfloat16:
        others += [
            Variant("classic", torch.bfloat16),
            Variant("classic", torch.float16),
            Variant("gram", torch.float16, coarse_restarts(coefs)),
            Variant("gram", torch.float32, coarse_restarts(coefs)),
        ]
    return list(dict.fromkeys([static, *others]))


def coarse_restarts(coefs: Coefficients) -> tuple[int, ...]:
    """After two iterations, then after three each, or two where they are steep: errors no larger than of bfloat16 iterations.

    Where one singular value dwarfs the others, R rounds them by as much as they weigh; a third iteration would multiply that once
    more, to many times their weight. After two they have grown.
    """
    steep = len(coefs) > 1 and coefs[0][0] * coefs[1][0] > STEEP
    return tuple(range(2, len(coefs), 2 if steep else 3))


def fine_restarts(coefs: Coefficients) -> tuple[int, ...]:
    """After one iteration, then after two each: float32 errors near those of the classic form."""
    return tuple(range(1, len(coefs), 2))
