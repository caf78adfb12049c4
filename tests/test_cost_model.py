"""The cost model against arithmetic by hand, against operations that are executed, and against common sense."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from core import engine
from core.auto_mode import choose
from core.cost_model import EXACT, MODES, Link, Machine, Matrices, predict
from core.layout import Layout
from core.linalg.newton_schulz import coefficients, newton_schulz
from core.linalg.precision import matmul_precision
from core.linalg.work import flops

# One operation, one byte of memory and one byte of the link a second, and nothing for a collective.
UNIT = Machine(1.0, 1.0, Link(0.0, 1.0))
QUINTIC = coefficients("quintic", 5)

shapes = st.builds(
    Matrices,
    count=st.integers(1, 20),
    rows=st.sampled_from([64, 256, 1024, 4096]),
    cols=st.sampled_from([64, 256, 1024, 4096]),
    tp=st.sampled_from([2, 4, 8]),
    copies=st.sampled_from([1, 2]),
    itemsize=st.sampled_from([2, 4]),
)
H200 = Machine(7.9e14, 4.3e12, Link(1e-5, 4.5e11))


def test_bytes_of_four_equal_matrices_on_four_ranks():
    """8 x 16 in float32 is 512 bytes; each rank owns one and holds a quarter of each."""
    four = Matrices(4, 8, 16, tp=4)
    # Three quarters of the one it owns, and of its quarters of the other three the results.
    assert predict("owner", [four], UNIT).bytes == 3 / 4 * 512 + 3 * 512 / 4
    # Three quarters of all four.
    assert predict("duplicated", [four], UNIT).bytes == 3 / 4 * 4 * 512
    assert predict("blockwise", [four], UNIT).bytes == 0
    assert [predict(mode, [four], UNIT).collectives for mode in ("owner", "duplicated", "blockwise")] == [2, 1, 0]


def test_latency_counts_once_a_collective():
    slow = replace(UNIT, link=Link(100.0, 1.0))
    four = [Matrices(4, 8, 16, tp=4)]
    for mode in MODES:
        cost = predict(mode, four, slow)
        assert cost.communication == pytest.approx(predict(mode, four, UNIT).communication + 100 * cost.collectives)


@pytest.mark.parametrize("shape", [(64, 64), (48, 192), (192, 48), (512, 2048), (520, 520)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_operations_are_those_that_are_executed(shape, dtype):
    x = torch.randn(1, *shape).to(dtype)
    precision = "medium" if dtype == torch.bfloat16 else "highest"
    with matmul_precision(precision, x.device):  # the first one looks at a product of its own
        pass
    with FlopCounterMode(display=False) as counted:
        engine.run([("x", newton_schulz(x, Layout.whole(shape), coefs=QUINTIC, precision=precision))])
    predicted = flops(*shape, dtype.itemsize, device="cpu")
    assert predicted == pytest.approx(counted.get_total_flops(), rel=0.02)


@given(some=shapes)
def test_more_ranks_never_give_an_owner_more_to_do(some):
    fewer = predict("owner", [some], H200)
    more = predict("owner", [replace(some, copies=2 * some.copies)], H200)
    assert more.compute <= 1.001 * fewer.compute + 2 * some.count * some.payload * some.copies / H200.memory


@given(some=st.lists(shapes, min_size=1, max_size=5))
def test_a_choice_is_exact_and_no_worse_than_any_one_mode(some):
    some = [replace(one, tp=4, copies=1) for one in some]
    chosen = choose(some, H200)
    assert len(chosen) == len(some) and all(mode in EXACT for mode, _ in chosen)
    assert choose(some, H200) == chosen
    total = sum(
        predict(mode, [one for one, (m, _) in zip(some, chosen, strict=True) if m == mode], H200).seconds
        for mode in {mode for mode, _ in chosen}
    )
    assert total <= 1.000001 * min(predict(mode, some, H200).seconds for mode in EXACT)


def test_choosing_for_a_large_model_takes_no_time_worth_speaking_of():
    some = [Matrices(1, 4096 + 8 * (i % 7), 4096, tp=8, copies=8, itemsize=2) for i in range(1000)]
    assert len(choose(some, H200)) == 1000
