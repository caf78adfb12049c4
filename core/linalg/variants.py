"""Variants of the Newton-Schulz iteration: they evaluate the same polynomial by different operations, which round differently."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch

Coefficients = Sequence[tuple[float, float, float]]
Form = Literal["classic", "gram"]

DTYPES = {str(t).removeprefix("torch."): t for t in (torch.bfloat16, torch.float16, torch.float32, torch.float64)}
SIXTEEN_BIT_DTYPES = (torch.bfloat16, torch.float16)

MIN_GRAM_RATIO = 1.25
"""Ratio of the longer to the shorter side from which the Gram form takes clearly fewer operations than the classic form; for a
square matrix both take the same number (see :class:`Variant`)."""

MAX_FLOAT32_MULTIPLICATIONS = 2**20
"""Multiplications (m² n) of one product up to which a CPU computes in float32 instead of bfloat16: such a float32
product takes less time than oneDNN needs to prepare the bfloat16 one."""

MIN_GRAM_ROWS = 512
"""Rows of a whole float32 or float64 matrix from which the Gram form is used: for smaller ones it saves little time, and
its error is a little above that of emerging-optimizers."""

MAX_SLOPE_OF_LONG_GROUPS = 35.0
"""Product of the coefficients ``a`` of the first two iterations (the polynomial's slope at 0) up to which three iterations
share a Gram matrix (:func:`coarse_restarts`). It lies between ``polar_express`` (33.4) and ``cans`` (35.4), alone above."""


@cache
def is_fast_in_bfloat16() -> bool:
    """Whether this processor multiplies bfloat16 matrices faster than float32 ones.

    On x86 it takes matrix units (AMX): without them oneDNN converts, at a half to a sixtieth of the float32 speed.
    """
    capabilities = torch.cpu.get_capabilities()
    return capabilities.get("architecture") != "x86_64" or bool(capabilities.get("amx_bf16"))


@dataclass(frozen=True)
class Variant:
    """A way to evaluate the iteration.

    Attributes:
        form: ``classic`` iterates on X. ``gram`` iterates on R = X X^T, m x m, and multiplies X before each restart and at
            the end: 3 (r + 1) m² n + (4 k - 3 - 3 r) m³ operations for r restarts in k iterations, symmetric products
            counted half; classic takes 3 k m² n + k m³.
        dtype: Arithmetic of the iterations. ``gram`` is never bfloat16.
        restarts: Iterations, counted from 0, before which ``gram`` forms R anew from X. R knows singular values only down to
            the square root of the rounding unit, X down to the unit itself.

    Raises:
        ValueError: for an unknown form or dtype, a bfloat16 ``gram``, or restarts that do not rise or belong to ``classic``.

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
        """``coefs`` in groups that share one Gram matrix R; in the classic form each iteration is a group.

        Raises:
            ValueError: for a restart after the last iteration.
        """
        if any(at >= len(coefs) for at in self.restarts):
            raise ValueError(f"restarts {self.restarts} do not fit {len(coefs)} iterations, which are counted from 0.")
        starts = range(len(coefs)) if self.form == "classic" else (0, *self.restarts)
        return [coefs[i:j] for i, j in zip(starts, [*starts[1:], len(coefs)], strict=True)]

    def to_json(self) -> dict[str, Any]:
        """The variant as a dict of JSON types, for :meth:`from_json`."""
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
    fast_in_bfloat16: bool | None = None,
) -> Variant:
    """The static rule: the cheapest variant whose error is not above that of emerging-optimizers in this arithmetic.

    A pure function of its arguments, so that ranks that give equal ones choose alike.

    Args:
        shape: (m, n) of the whole matrix.
        dtype: Dtype of the matrices: bfloat16, float32 or float64.
        precision: ``highest``, ``high`` or ``medium``.
        device: Device of the matrices.
        coefs: Coefficients of each iteration.
        whole: Whether this rank has the whole matrix; if not, Gram matrices are summed over ranks, in float32 at least.
        fast_in_bfloat16: What :func:`is_fast_in_bfloat16` says on all ranks that compute the matrix; None: on this one. Read
            for matrices on CPU only.
    """
    m, n = sorted(shape)
    gram_is_cheaper = n >= MIN_GRAM_RATIO * m
    if dtype == torch.bfloat16:
        if not whole:
            return Variant("gram", torch.float32, coarse_restarts(coefs))
        if device.type == "cpu" and m * m * n <= MAX_FLOAT32_MULTIPLICATIONS:
            return Variant("classic", torch.float32)
        if device.type == "cpu" and not (is_fast_in_bfloat16() if fast_in_bfloat16 is None else fast_in_bfloat16):
            in_gram = gram_is_cheaper and m >= MIN_GRAM_ROWS
            return (
                Variant("gram", torch.float32, coarse_restarts(coefs)) if in_gram else Variant("classic", torch.float32)
            )
        # On CUDA, float16 products are as fast as bfloat16 ones, with an eighth of the rounding; no CPU is fast in float16.
        if device.type != "cuda":
            return Variant("classic", torch.bfloat16)
        if gram_is_cheaper:
            return Variant("gram", torch.float16, coarse_restarts(coefs))
        return Variant("classic", torch.float16)
    # tf32 rounds a Gram matrix by more than it rounds X.
    tf32 = dtype == torch.float32 and device.type != "cpu" and precision != "highest"
    if tf32 or (whole and not (gram_is_cheaper and m >= MIN_GRAM_ROWS)):
        return Variant("classic", dtype)
    return Variant("gram", dtype, fine_restarts(coefs))


def variants_for(
    shape: Sequence[int], dtype: torch.dtype, precision: str, device: torch.device, coefs: Coefficients
) -> list[Variant]:
    """The variants that keep the accuracy of ``precision`` for whole matrices; the first one is :func:`variant_for`'s."""
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
    """Restarts for bfloat16 input: after two iterations, then after every three, or every two where the polynomial is steep.

    Errors are then no larger than those of bfloat16 iterations. Where one singular value dwarfs the others, the rounding
    of R is as large as their squares, and a third iteration would multiply it to many times that. After two iterations they
    have grown.
    """
    steep = len(coefs) > 1 and coefs[0][0] * coefs[1][0] > MAX_SLOPE_OF_LONG_GROUPS
    return tuple(range(2, len(coefs), 2 if steep else 3))


def fine_restarts(coefs: Coefficients) -> tuple[int, ...]:
    """Restarts after one iteration, then after every two: float32 errors stay near those of the classic form."""
    return tuple(range(1, len(coefs), 2))
