"""The arithmetic of matrix products, chosen for a scope and put back after it."""

import threading

import pytest
import torch

from core.linalg.matmul_precision import matmul_precision

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize("users", ["highest", "high", "medium"])
@pytest.mark.parametrize("ours", ["highest", "high", "medium"])
def test_precision_is_put_back(users, ours):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(users)
    try:
        a = torch.randn(300, 310)
        with matmul_precision(ours, CPU), matmul_precision(ours, CPU):
            # On CPU it never means less than float32.
            wanted = a.double() @ a.double().mT
            assert (a @ a.mT - wanted).norm() < 1e-6 * wanted.norm()
        with matmul_precision(ours, CUDA):
            assert torch.get_float32_matmul_precision() == {"medium": "high"}.get(ours, ours)
        with pytest.raises(KeyError), matmul_precision(ours, CPU):
            raise KeyError
        assert torch.get_float32_matmul_precision() == users
    finally:
        torch.set_float32_matmul_precision(before)


def test_precision_is_put_back_when_threads_overlap():
    before = torch.get_float32_matmul_precision()
    inside, waited = threading.Event(), threading.Event()

    def first() -> None:
        with matmul_precision("high", CUDA):
            inside.set()
            # The second comes in, unless it has to wait for the first.
            waited.wait(0.2)

    def second() -> None:
        inside.wait()
        with matmul_precision("medium", CUDA):
            waited.set()

    threads = [threading.Thread(target=work) for work in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.get_float32_matmul_precision() == before


def test_autocast_does_not_round_products():
    a = torch.randn(64, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16), matmul_precision("highest", CPU):
        assert (a @ a).dtype == torch.float32


def test_settings_by_backend_are_refused(monkeypatch):
    def mixed() -> str:
        raise RuntimeError("mix of the legacy and new APIs")

    monkeypatch.setattr(torch, "get_float32_matmul_precision", mixed)
    with pytest.raises(RuntimeError, match=r"fp32_precision was set.*instead"), matmul_precision("highest", CPU):
        pass
