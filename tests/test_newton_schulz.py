"""Every way to evaluate the Newton-Schulz iteration, against the same polynomial in float64 and against emerging-optimizers."""

import statistics
from typing import get_args

import emerging_optimizers.orthogonalized_optimizers as library
import pytest
import torch
from emerging_optimizers.utils import fp32_matmul_precision
from torch import Tensor

from core import engine
from core.linalg import products
from core.linalg.coefficients import coefficients
from core.linalg.iteration import iterate
from core.linalg.newton_schulz import newton_schulz
from core.linalg.variants import Variant, fine_restarts, variant_for, variants_for
from core.process_groups_config import Axis
from core.sharding.layout import Layout, Split

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SETS = [
    ("simple", 5),
    ("quintic", 5),
    ("polar_express", 5),
    ("polar_express", 8),
    ("cans", 5),
    ("aol", 4),
    ("deepseekv4", 10),
    ("cubic5", 5),
]
LIBRARYS_SETS = [(kind, steps) for kind, steps in SETS if kind in get_args(library.muon_utils.NSCoeffT)]
QUINTIC = coefficients("quintic", 5)
# With the dtype of the matrices and the precision.
VARIANTS = [
    (BF16, "medium", Variant("classic", BF16)),
    (BF16, "medium", Variant("classic", FP16)),
    (BF16, "medium", Variant("gram", FP16, (2,))),
    (BF16, "medium", Variant("gram", FP32, (2,))),
    (FP32, "highest", Variant("classic", FP32)),
    (FP32, "highest", Variant("gram", FP32, (1, 3))),
    (FP64, "highest", Variant("classic", FP64)),
    (FP64, "highest", Variant("gram", FP64, (1, 3))),
]
SHAPES = [(12, 40), (190, 200), (260, 256)]
"""Small ones that are worked on together; with :func:`unbatched` the last goes the way of large ones, one at a time."""

SPECTRA = ["gauss", "low rank", "log 3", "1/i", "1/i²", "spike"]


@pytest.fixture
def unbatched(monkeypatch):
    """Matrices of 256 rows go the way that those of 512 go, in an eighth of the time."""
    monkeypatch.setattr(products, "MIN_UNBATCHED_ROWS", 256)


def matrix(spectrum: str, m: int, n: int) -> Tensor:
    """(m, n) float32, m ≤ n."""
    generator = torch.Generator().manual_seed(m + n)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    if spectrum == "gauss":
        return normal(m, n)
    if spectrum == "low rank":
        return 0.1 * normal(m, n) + normal(m, 8) @ normal(8, n)
    values = {
        "log 3": torch.logspace(0, -3, m),
        "1/i": 1 / torch.arange(1, m + 1.0),
        "1/i²": torch.arange(1, m + 1.0) ** -2,
        "spike": torch.cat([torch.ones(1), torch.full((m - 1,), 1e-2)]),
    }
    return (torch.linalg.qr(normal(m, m)).Q * values[spectrum]) @ torch.linalg.qr(normal(n, m)).Q.mT


def polynomial(x: Tensor, coefs, *, norm: Tensor | None = None) -> Tensor:
    """In float64."""
    x = x.double()
    tall = x.shape[-2] > x.shape[-1]
    x = (x.mT if tall else x) / (x.norm() if norm is None else norm)
    for a, b, c in coefs:
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


def run(x: Tensor, precision: str = "highest", *, coefs=QUINTIC, **kwargs) -> Tensor:
    """Of a stack (B, m, n)."""
    lay = Layout.whole(x.shape[-2:])
    return engine.run([("x", newton_schulz(x, lay, coefs=coefs, precision=precision, **kwargs))])[0]


def error(x: Tensor, wanted: Tensor) -> float:
    return float((x.double() - wanted).norm() / wanted.norm())


def emerging(x: Tensor, kind: str, steps: int, precision: str) -> Tensor:
    with fp32_matmul_precision(precision):
        return library.muon_utils.newton_schulz(x, steps, kind)


@pytest.mark.parametrize(
    ("kind", "steps"), [*LIBRARYS_SETS, *((kind, 11) for kind, _ in LIBRARYS_SETS if kind != "cubic5")]
)
def test_coefficients_are_the_librarys(kind, steps):
    x = matrix("gauss", 24, 40)
    assert error(run(x[None], coefs=coefficients(kind, steps))[0], emerging(x, kind, steps, "highest").double()) < 2e-5


def test_a_set_of_fixed_length_is_taken_whole():
    with pytest.raises(ValueError, match="exactly 5 iterations, got 6"):
        coefficients("cubic5", 6)
    with pytest.raises(ValueError, match=r"'custom' has no coefficients; possible: .*'cubic5'"):
        coefficients("custom", 5)


@pytest.mark.parametrize(("kind", "steps"), LIBRARYS_SETS)
def test_sixteen_bits_are_as_exact_as_the_librarys(kind, steps):
    coefs = coefficients(kind, steps)
    ratios: dict[torch.device, list[float]] = {CPU: [], CUDA: []}
    for spectrum in SPECTRA:
        for shape in ((96, 160), (160, 160), (192, 768)):
            x = matrix(spectrum, *shape)
            wanted = polynomial(x, coefs)
            bound = error(emerging(x, kind, steps, "medium"), wanted)
            for device, found in ratios.items():
                variant = variant_for(shape, BF16, "medium", device, coefs)
                found.append(error(run(x.bfloat16()[None], "medium", coefs=coefs, variant=variant)[0], wanted) / bound)
    # float16 rounds an eighth as much, and has the input's rounding left.
    assert max(ratios[CUDA]) <= 1
    # The scatter of equal roundings; cans maps 1 to 2 at first, and then back, which multiplies them.
    assert statistics.median(ratios[CPU]) <= 1.02
    assert max(ratios[CPU]) <= (1.5 if kind == "cans" else 1.1)


@pytest.mark.parametrize("variant", variants_for((512, 600), BF16, "medium", CPU, QUINTIC), ids=str)
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_large_matrices_are_as_exact_as_the_librarys(unbatched, spectrum, variant):
    """Their bfloat16 iterations go another way than those of small ones."""
    x = matrix(spectrum, 256, 300)
    wanted = polynomial(x, QUINTIC)
    bound = error(emerging(x, "quintic", 5, "medium"), wanted)
    for scale in (1.0, 0.003, 1300.0):
        # The norm is divided by at the end, which is one rounding more: it is seen where all singular values are equal.
        assert error(run((x * scale).bfloat16()[None], "medium", variant=variant)[0], wanted) <= 1.06 * bound


@pytest.mark.parametrize("shape", [(512, 512), (512, 768), (768, 512), (512, 1536)])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_highest_is_as_exact_as_the_library(spectrum, shape):
    """The bound is the library's, whose norm is less exact the larger the matrix, or an iteration on X with an exact norm."""
    x = matrix(spectrum, *sorted(shape))
    x = x.mT.contiguous() if shape[0] > shape[1] else x
    wanted = polynomial(x, QUINTIC)
    classic = error(run(x[None], variant=Variant("classic", FP32))[0], wanted)
    bound = max(error(emerging(x, "quintic", 5, "highest"), wanted), 1.4 * classic)
    assert error(run(x[None])[0], wanted) <= bound


@pytest.mark.parametrize("shape", [(7, 7), (20, 33), (33, 20), (520, 540), (540, 520)])
@pytest.mark.parametrize(("kind", "steps"), SETS)
def test_all_variants_are_the_same_polynomial(kind, steps, shape):
    coefs = coefficients(kind, steps)
    x = matrix("gauss", *sorted(shape)).double()
    x = x.mT.contiguous() if shape[0] > shape[1] else x
    wanted = polynomial(x, coefs)
    restarts = [(), (2,), (1, 3), fine_restarts(coefs), tuple(range(1, steps))]
    variants = [Variant("classic", FP64), *(Variant("gram", FP64, r) for r in restarts)]
    for variant in variants if shape[0] < 100 else variants[:3]:
        assert error(run(x[None], coefs=coefs, variant=variant, scale=0.3)[0], 0.3 * wanted) < 1e-9


@pytest.mark.parametrize(("dtype", "precision", "variant"), VARIANTS)
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_few_iterations(dtype, precision, variant, steps):
    coefs = QUINTIC[:steps]
    variant = Variant(variant.form, variant.dtype, tuple(r for r in variant.restarts if r < steps))
    for shape in ((24, 40), (200, 210), (512, 513)):
        x = matrix("gauss", *shape)
        out = run(x.to(dtype)[None], precision, coefs=coefs, variant=variant, scale=3.0)[0]
        assert error(out, 3 * polynomial(x, coefs)) < {BF16: 1.5e-2, FP32: 3e-6, FP64: 1e-13}[dtype]


@pytest.mark.parametrize(("dtype", "precision", "variant"), VARIANTS)
@pytest.mark.parametrize(
    "shape", [(9, 9), (12, 40), (16, 16), (17, 19), (48, 48), (50, 77), (250, 64), (129, 300), (233, 200), (300, 256)]
)
def test_bits_of_a_matrix_do_not_depend_on_the_stack(unbatched, shape, dtype, precision, variant):
    """A shard may be small enough to share a bucket while the whole matrix is not; sizes also move a matrix off alignment."""
    x = torch.stack([matrix("gauss", *sorted(shape)).reshape(shape) * 3.0**i for i in range(5)]).to(dtype)
    before = x.clone()
    alone = [run(one[None].clone(), precision, variant=variant)[0] for one in x]
    for stacks in ((x,), (x[:2], x[2:4], x[4:])):
        for one, out in zip(alone, torch.cat([run(s, precision, variant=variant) for s in stacks]), strict=True):
            assert torch.equal(one, out)
    assert torch.equal(x, before)


@pytest.mark.parametrize(("dtype", "precision", "variant"), VARIANTS)
@pytest.mark.parametrize("shape", [(9, 9), (16, 16), (17, 19), (64, 48)])
def test_bits_of_a_matrix_do_not_depend_on_where_it_is(shape, dtype, precision, variant):
    """A matrix that arrives in a wave lies anywhere in the buffer."""
    x = matrix("gauss", *sorted(shape)).reshape(shape).to(dtype)
    wanted = run(x[None].clone(), precision, variant=variant)
    for shift in range(1, 9):
        moved = torch.empty(x.numel() + shift, dtype=dtype)[shift:].view(1, *shape).copy_(x)
        assert torch.equal(run(moved, precision, variant=variant), wanted)


@pytest.mark.parametrize(("dtype", "precision", "variant"), VARIANTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_extreme_matrices(unbatched, shape, dtype, precision, variant):
    def of(x: Tensor) -> Tensor:
        return run(x.to(dtype)[None], precision, variant=variant)[0]

    x = matrix("gauss", *sorted(shape)).double()
    x = (x.mT if shape[0] > shape[1] else x) / x.norm()
    assert not of(x * 0).any()
    # From 1e-30 up the size does not matter; below it the result shrinks with X.
    for size in (1e-29, 1e-16, 1e12, 1e18):
        assert error(of(x * size), polynomial(x, QUINTIC)) < {BF16: 1e-2, FP32: 3e-6, FP64: 1e-13}[dtype]
    assert 0 <= of(x * 1e-36).norm() < 1e-2
    one_row = x[:, :1] @ x[:1]
    assert of(one_row).isfinite().all()
    one_entry = x / 100
    one_entry[2, 3] = 1e18
    out = of(one_entry)
    assert out.isfinite().all()
    assert abs(float(out[2, 3]) - float(polynomial(torch.ones(1, 1), QUINTIC))) < 2e-2
    assert out.norm() - out[2, 3].abs() < 1e-2


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 1e30])
@pytest.mark.parametrize(("dtype", "precision", "variant"), VARIANTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_not_a_number_stays_in_its_matrix(unbatched, shape, dtype, precision, variant, value):
    x = matrix("gauss", *sorted(shape)).reshape(shape).to(dtype)
    stack = torch.stack([x, x, x])
    stack[1, 3, 5] = value
    out = run(stack, precision, variant=variant)
    # Only float64 can square 1e30.
    assert out[1].isfinite().all() if value == 1e30 and dtype == FP64 else out[1].isnan().all()
    assert torch.equal(out[::2], run(torch.stack([x, x]), precision, variant=variant))


@pytest.mark.parametrize(("dtype", "precision", "variant"), VARIANTS)
@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (40, 1), (1, 40000), (40000, 1)])
def test_vectors(shape, dtype, precision, variant):
    x = torch.ones(2, *shape, dtype=dtype)
    wanted = polynomial(x[0], QUINTIC)
    assert all(error(one, wanted) < 1.5e-2 for one in run(x, precision, variant=variant))


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)])
def test_nothing_gives_nothing(shape):
    for count in (0, 2):
        assert run(torch.ones(count, *shape)).shape == (count, *shape)
    assert run(torch.ones(0, 600, 600)).shape == (0, 600, 600)


@pytest.mark.parametrize(("dtype", "precision", "variant"), VARIANTS)
def test_eps_is_added_to_the_norm(dtype, precision, variant):
    for shape in ((24, 40), (200, 210), (512, 513)):
        x = matrix("gauss", *shape)
        out = run(x.to(dtype)[None], precision, variant=variant, eps=float(x.double().norm()))[0]
        assert (
            error(out, polynomial(x, QUINTIC, norm=2 * x.double().norm()))
            < {BF16: 1.5e-2, FP32: 3e-6, FP64: 1e-13}[dtype]
        )


def test_no_factor_is_compiled_for_a_norm(unbatched, monkeypatch):
    """oneDNN compiles a bfloat16 product for each value of beta, which takes longer than a small product."""
    betas = set()
    addmm = torch.addmm

    def spy(*args, beta=1, **kwargs):
        betas.add(beta)
        return addmm(*args, beta=beta, **kwargs)

    monkeypatch.setattr(torch, "addmm", spy)
    x = matrix("gauss", 256, 264)
    for i in range(32):
        run((x * (1 + i / 32)).bfloat16()[None], "medium", variant=Variant("classic", BF16))
    assert betas <= {0, *(factor for a, b, _ in QUINTIC for factor in (a, b))}


@pytest.mark.parametrize(("dtype", "precision", "variant"), VARIANTS)
@pytest.mark.parametrize("shape", [(24, 40), (600, 512)])
@pytest.mark.parametrize("whole", [True, False])
def test_accelerators_are_never_waited_for(shape, dtype, precision, variant, whole):
    """A tensor without memory has no value to read."""
    x, wide = torch.empty(2, *shape, dtype=dtype, device="meta"), shape[0] <= shape[1]
    steps = iterate(x, variant.groups(QUINTIC), variant.dtype, wide=wide, is_whole=whole, scale=2.0, eps=1e-9)
    gram = next(steps)
    with pytest.raises(StopIteration) as end:
        while True:
            gram = steps.send(gram)
    assert end.value.value.shape == x.shape
    assert end.value.value.dtype == dtype


@pytest.mark.parametrize(
    ("kind", "steps", "restarts"),
    [
        ("quintic", 5, (2,)),
        ("simple", 2, ()),
        ("aol", 4, (2,)),
        ("polar_express", 5, (2,)),
        ("cans", 5, (2, 4)),
        ("polar_express", 8, (2, 5)),
        ("deepseekv4", 10, (2, 5, 8)),
    ],
)
def test_float16_restarts(kind, steps, restarts):
    coefs = coefficients(kind, steps)
    assert variant_for((1024, 4096), BF16, "medium", CUDA, coefs) == Variant("gram", FP16, restarts)


def test_static_rule():
    for shape in ((64, 64), (64, 256), (512, 512), (512, 2048), (4096, 1024)):
        for precision, dtype in (("highest", FP32), ("high", FP32), ("medium", BF16), ("highest", FP64)):
            for device in (CPU, CUDA):
                possible = variants_for(shape, dtype, precision, device, QUINTIC)
                assert possible[0] == variant_for(shape, dtype, precision, device, QUINTIC)
                assert len(set(possible)) == len(possible)
                # float16 is slow on CPU; at the other precisions nothing is rounded to 16 bits.
                assert possible[0].dtype != FP16 or device == CUDA
                assert dtype == BF16 or all(v.dtype == dtype for v in possible)
                shards = variant_for(shape, dtype, precision, device, QUINTIC, whole=False)
                assert shards.dtype == torch.promote_types(dtype, FP32)


def test_shards_are_not_summed_in_sixteen_bits():
    axis = Axis("tp", (0, 1), 0, None)
    lay = Layout((8, 16), (None, Split.even(axis, 16)))
    with pytest.raises(ValueError, match=r"shards .* need a float32 or float64 variant"):
        next(newton_schulz(torch.ones(1, 8, 8), lay, coefs=QUINTIC, precision="medium", variant=Variant("gram", FP16)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("gram", BF16, (3,)), "overflows"),
        (("classic", FP32, (3,)), "no Gram matrix to restart"),
        (("gram", FP32, (3, 1)), "must rise"),
        (("gram", FP32, (0,)), "at least 1"),
        (("cubic", FP32), "possible: 'classic', 'gram'"),
        (("classic", torch.int8), "is not possible"),
    ],
)
def test_variants_without_meaning_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Variant(*arguments)


@pytest.mark.parametrize("dtype", [FP32, FP64])
def test_matrices_are_not_rounded_to_fewer_bits(dtype):
    with pytest.raises(ValueError, match="matrices need a variant in that dtype"):
        run(torch.ones(1, 4, 4, dtype=dtype), variant=Variant("classic", BF16))


def test_restarts_must_fit():
    with pytest.raises(ValueError, match="do not fit 5 iterations"):
        run(torch.ones(1, 4, 4), variant=Variant("gram", FP32, (5,)))


def test_variants_go_through_json():
    for _, _, variant in VARIANTS:
        assert Variant.from_json(variant.to_json()) == variant
    for value in (
        None,
        [],
        {},
        {"form": "gram", "dtype": "int8", "restarts": []},
        {"form": "gram", "dtype": "float16"},
    ):
        with pytest.raises(ValueError, match="is no variant"):
            Variant.from_json(value)
