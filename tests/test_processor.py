"""What the static rule of Newton-Schulz makes of a processor that is slow in bfloat16, and of a job that mixes processors."""

import pytest
import torch
from torch import nn

from core.linalg.coefficients import coefficients
from core.linalg.newton_schulz import newton_schulz
from core.linalg.variants import is_fast_in_bfloat16, variant_for
from core.optimizer.rules import tensor_parallel_muon
from core.optimizer.rules.tensor_parallel_muon import TensorParallelMuon
from core.process_groups_config import ProcessGroupCollection
from core.sharding.layout import Layout

COEFS = coefficients("quintic", 5)
CPU = torch.device("cpu")
SHAPES = [(8, 24), (160, 200), (96, 640), (512, 768), (600, 600)]


@pytest.mark.parametrize("shape", SHAPES)
def test_a_processor_without_matrix_units_computes_medium_in_float32(shape):
    slow, fast = (variant_for(shape, torch.bfloat16, "medium", CPU, COEFS, fast_in_bfloat16=x) for x in (False, True))
    assert slow.dtype == torch.float32
    assert fast.dtype == (torch.float32 if max(shape) < 32 else torch.bfloat16)
    here = variant_for(shape, torch.bfloat16, "medium", CPU, COEFS)
    assert here == (fast if is_fast_in_bfloat16() else slow)
    # Accelerators and wider matrices do not ask the processor.
    for dtype, device in ((torch.float32, CPU), (torch.bfloat16, torch.device("cuda"))):
        one, other = (variant_for(shape, dtype, "medium", device, COEFS, fast_in_bfloat16=x) for x in (False, True))
        assert one == other


@pytest.mark.parametrize("shape", SHAPES[:3])
def test_float32_is_at_least_as_exact(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    u, s, vt = torch.linalg.svd(x, full_matrices=False)
    s = s / s.norm()
    for a, b, c in COEFS:
        s = a * s + b * s**3 + c * s**5
    wanted = u @ s.diag() @ vt

    def error(fast: bool) -> float:
        variant = variant_for(shape, torch.bfloat16, "medium", CPU, COEFS, fast_in_bfloat16=fast)
        rule = newton_schulz(x.bfloat16()[None], Layout.whole(shape), coefs=COEFS, precision="medium", variant=variant)
        with pytest.raises(StopIteration) as end:
            next(rule)
        return float((end.value.value[0].double() - wanted).norm() / wanted.norm())

    assert error(False) <= 1.02 * error(True)


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("axis", ["tp", "dp"])
def test_ranks_on_different_processors_compute_alike(world, monkeypatch, axis):
    monkeypatch.setattr(tensor_parallel_muon, "is_fast_in_bfloat16", lambda: world.rank == 0)
    groups = ProcessGroupCollection.from_mesh(world.mesh((2,), (axis,)))
    p = nn.Parameter(torch.zeros(64, 160))
    if axis == "tp":
        p.tensor_model_parallel, p.partition_dim = True, 0
    optimizer = TensorParallelMuon(
        [("w", p)], lr=0.1, fp32_matmul_prec="medium", tp_mode="duplicated", pg_collection=groups
    )
    whole = torch.randn(128, 160, generator=torch.Generator().manual_seed(1))
    p.grad = whole.chunk(2)[world.rank if axis == "tp" else 0].clone()
    optimizer.step()
    reference = nn.Parameter(torch.zeros(128 if axis == "tp" else 64, 160))
    monkeypatch.setattr(tensor_parallel_muon, "is_fast_in_bfloat16", lambda: False)
    alone = TensorParallelMuon([("w", reference)], lr=0.1, fp32_matmul_prec="medium")
    reference.grad = whole if axis == "tp" else whole.chunk(2)[0].clone()
    alone.step()
    assert torch.equal(p, reference.chunk(2)[world.rank] if axis == "tp" else reference)
