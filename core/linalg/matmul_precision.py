"""The arithmetic of matrix products, set for a scope and restored afterwards."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from threading import RLock

import torch

# If two threads overlapped, the second would take the first one's setting for the user's, and restore that.
_LOCK = RLock()


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

    On CPU float32 products stay float32: the setting only picks the faster library (:func:`_fast_cpu_setting`). One thread is
    in such a scope at a time; products that other threads compute meanwhile outside of a scope follow the same setting.

    Args:
        fp32_matmul_prec: ``highest``: float32. ``high``: tf32 where the device has it. ``medium``: as ``high``, for the float32
            products beside bfloat16 matrices.
        device: Device of the products.

    Raises:
        RuntimeError: when torch's newer settings by backend are in use, which cannot be restored.
    """
    # Autocast around a step must not round its products.
    with _LOCK, torch.autocast(device.type, enabled=False):
        before = _setting()
        wanted = "high" if fp32_matmul_prec == "medium" else fp32_matmul_prec
        torch.set_float32_matmul_precision(_fast_cpu_setting() if device.type == "cpu" else wanted)
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)


def _setting() -> str:
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError as error:
        raise RuntimeError(
            "torch.backends.*.fp32_precision was set, which hides torch.get_float32_matmul_precision; set the precision by "
            "torch.set_float32_matmul_precision instead."
        ) from error


@cache
def _fast_cpu_setting() -> str:
    # "medium" makes torch hand float32 products to oneDNN, about twice as fast as MKL on some processors. Where the
    # processor has bfloat16 matrix units oneDNN takes the hint and rounds to bfloat16, so look at a product once.
    before = torch.get_float32_matmul_precision()
    a = torch.linspace(-1, 1, 256 * 256, dtype=torch.float32, device="cpu").reshape(256, 256).sin()
    torch.set_float32_matmul_precision("medium")
    try:
        error = ((a @ a.mT).double() - a.double() @ a.double().mT).norm() / (a.double() @ a.double().mT).norm()
    finally:
        torch.set_float32_matmul_precision(before)
    return "medium" if error < 1e-5 else "highest"
