"""Which arithmetic matrix products use, chosen for a scope and put back afterwards."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch


def compute_dtype(dtype: torch.dtype, fp32_matmul_prec: str) -> torch.dtype:
    """The dtype in which Newton-Schulz runs on matrices of ``dtype``: bfloat16 at ``medium``, as in emerging-optimizers.

    float64 stays float64; 16-bit inputs are computed in float32 above ``medium``.
    """
    if dtype == torch.float64:
        return dtype
    return torch.bfloat16 if fp32_matmul_prec == "medium" else torch.float32


@contextmanager
def matmul_precision(fp32_matmul_prec: str, device: torch.device) -> Iterator[None]:
    """Set the arithmetic of float32 products for a scope; torch's setting is global, so it is restored afterwards.

    On CPU float32 products stay float32: the flag only picks the library that is faster (:func:`_fast_cpu_setting`).
    """
    try:
        before = torch.get_float32_matmul_precision()
    except RuntimeError as error:
        raise RuntimeError(
            "torch.backends.*.fp32_precision was set, which hides torch.get_float32_matmul_precision; set the precision by "
            "torch.set_float32_matmul_precision instead."
        ) from error
    # "medium" means bfloat16 matrices; the few float32 products beside them may use tf32, which is more exact.
    wanted = "high" if fp32_matmul_prec == "medium" else fp32_matmul_prec
    torch.set_float32_matmul_precision(_fast_cpu_setting() if device.type == "cpu" else wanted)
    try:
        # A step inside autocast must not be rounded by it.
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


@cache
def _fast_cpu_setting() -> str:
    # "medium" makes torch hand float32 products to oneDNN, about twice as fast as MKL on some processors. Where the
    # processor has bfloat16 matrix units oneDNN takes the hint and rounds to bfloat16, so look at a product once.
    before = torch.get_float32_matmul_precision()
    a = torch.linspace(-1, 1, 256 * 256).reshape(256, 256).sin()
    torch.set_float32_matmul_precision("medium")
    try:
        error = ((a @ a.mT).double() - a.double() @ a.double().mT).norm() / (a.double() @ a.double().mT).norm()
    finally:
        torch.set_float32_matmul_precision(before)
    return "medium" if error < 1e-5 else "highest"
