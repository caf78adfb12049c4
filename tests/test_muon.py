"""Muon against the library's own classes, its modes against each other, and its arguments."""

import hashlib
import inspect
import statistics
from dataclasses import replace
from typing import get_args

import emerging_optimizers.orthogonalized_optimizers as library
import pytest
import torch
from emerging_optimizers.utils import fp32_matmul_precision
from torch import Tensor

from core import engine
from core.linalg.coefficients import coefficients
from core.linalg.newton_schulz import newton_schulz
from core.linalg.products import product, symmetric_product
from core.optimizer.emerging_optimizers import (
    TensorParallelAdaptiveMuon,
    TensorParallelMuon,
    get_supported_coefficient_types,
)
from core.sharding.layout import Layout
from tests.support.sharding import CUTS, SHAPES, sharded, unsharded, whole_gradient, whole_parameters
from tests.support.sharding import train as train_cut

METHODS = ("adamuon", "normuon", "namo")
SETS = [
    name
    for name in get_supported_coefficient_types()
    if name != "custom" and name in get_args(library.muon_utils.NSCoeffT)
]


def parameters() -> list[Tensor]:
    return [torch.nn.Parameter(w.float()) for w in whole_parameters(SHAPES)]


def train(optimizer: torch.optim.Optimizer, steps: int = 5) -> list[Tensor]:
    params = optimizer.param_groups[0]["params"]
    for step in range(steps):
        for i, p in enumerate(params):
            p.grad = whole_gradient(i, step + 3, tuple(p.shape)).float()
        optimizer.step()
    return [p.detach() for p in params]


def close(got: list[Tensor], wanted: list[Tensor], rtol: float) -> None:
    for a, b in zip(got, wanted, strict=True):
        assert float((a - b).norm() / b.norm()) < rtol


@pytest.mark.parametrize("kind", SETS)
@pytest.mark.parametrize("scale_mode", ["spectral", "shape_scaling", "unit_rms_norm"])
def test_muon_equals_the_library(kind, scale_mode):
    common = {
        "coefficient_type": kind,
        "scale_mode": scale_mode,
        "fp32_matmul_prec": "highest",
        "extra_scale_factor": 0.3,
    }
    ours = train(TensorParallelMuon(parameters(), 0.1, nesterov=True, **common))
    close(ours, train(library.Muon(parameters(), 0.1, nesterov=True, **common)), 1e-5)


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 6, 7, 9])
def test_any_number_of_iterations(steps):
    ours = train(TensorParallelMuon(parameters(), 0.1, num_ns_steps=steps, fp32_matmul_prec="highest"))
    close(
        ours,
        train(library.Muon(parameters(), 0.1, nesterov=True, num_ns_steps=steps, fp32_matmul_prec="highest")),
        1e-4,
    )


@pytest.mark.parametrize("decoupled", [True, False])
def test_weight_decay_and_plain_momentum_equal_the_library(decoupled):
    method = "decoupled" if decoupled else "l2"
    ours = TensorParallelMuon(
        parameters(),
        0.1,
        0.8,
        nesterov=False,
        weight_decay=0.3,
        use_decoupled_weight_decay=decoupled,
        fp32_matmul_prec="highest",
    )
    theirs = library.Muon(parameters(), 0.1, 0.8, 0.3, weight_decay_method=method, fp32_matmul_prec="highest")
    close(train(ours), train(theirs), 1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_adaptive_muon_equals_the_library(method):
    common = {"moment2_method": method, "beta2": 0.9, "fp32_matmul_prec": "highest"}
    ours = train(TensorParallelAdaptiveMuon(parameters(), 0.1, 0.95, **common))
    close(ours, train(library.AdaptiveMuon(parameters(), 0.1, 0.95, 0.01, nesterov=True, **common)), 1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_state_has_the_names_and_shapes_of_the_library(method):
    ours = TensorParallelAdaptiveMuon(parameters(), moment2_method=method)
    theirs = library.AdaptiveMuon(parameters(), 0.1, 0.95, 0.01, moment2_method=method)
    train(theirs, steps=1)
    shapes = [
        [{k: v.shape for k, v in o.state[p].items()} for p in o.param_groups[0]["params"]] for o in (ours, theirs)
    ]
    assert shapes[0] == shapes[1]
    ours.load_state_dict(theirs.state_dict())
    train(ours, steps=1)


@pytest.mark.parametrize("precision", ["highest", "medium"])
@pytest.mark.parametrize("kind", SETS)
def test_newton_schulz_is_as_close_to_float64_as_the_library(kind, precision):
    """Same polynomial, same precision; half as much again is the scatter of rounding between two ways to write it."""
    coefs = coefficients(kind, 5)
    ours, theirs = [], []
    for i, shape in enumerate([(48, 192), (192, 48), (64, 64)] * 4):
        x = whole_gradient(i, 5, shape)
        exact = run(x, coefs, "highest")
        with fp32_matmul_precision(precision):
            reference = library.muon_utils.newton_schulz(x.float(), 5, kind)
        low = x.bfloat16() if precision == "medium" else x.float()
        ours.append(float((run(low, coefs, precision).double() - exact).norm() / exact.norm()))
        theirs.append(float((reference.double() - exact).norm() / exact.norm()))
    assert statistics.median(ours) <= 1.5 * statistics.median(theirs), (ours, theirs)


def run(x: Tensor, coefs, precision: str) -> Tensor:
    return engine.run([("x", newton_schulz(x[None], Layout.whole(x.shape), coefs=coefs, precision=precision))])[0][0]


@pytest.mark.parametrize("size", [0.0, 1e-36, 1e-26, 1e12])
def test_tiny_and_zero_matrices_stay_finite(size):
    x = (whole_gradient(0, 0, (24, 64)) * size).float()
    out = run(x, coefficients("quintic", 5), "highest")
    assert torch.isfinite(out).all()
    assert (float(out.norm()) > 1) == (size in (1e-26, 1e12))


def test_adamuon_can_have_the_size_of_muon():
    size, plain = (
        train(TensorParallelAdaptiveMuon(parameters(), 1.0, weight_decay=0.0, fp32_matmul_prec="highest", **kwargs), 1)
        for kwargs in ({"align_rms": True}, {})
    )
    muon = train(TensorParallelMuon(parameters(), 1.0, weight_decay=0.0, fp32_matmul_prec="highest"), 1)
    for start, p, q, r in zip(parameters(), size, plain, muon, strict=True):
        aligned, adapted, wanted = ((after - start.detach()).flatten() for after in (p, q, r))
        torch.testing.assert_close(aligned.norm(), wanted.norm(), rtol=1e-4, atol=0.0)
        assert float(torch.cosine_similarity(aligned, adapted, dim=0)) > 1 - 1e-5
    with pytest.raises(ValueError, match="'normuon' has Muon's size by itself"):
        TensorParallelAdaptiveMuon(parameters(), moment2_method="normuon", align_rms=True)


def test_user_precision_is_left_alone():
    before = torch.get_float32_matmul_precision()
    train(TensorParallelMuon(parameters(), fp32_matmul_prec="highest"), steps=1)
    assert torch.get_float32_matmul_precision() == before


def test_orthogonalize_is_the_scaled_direction():
    p = parameters()[0]
    optimizer = TensorParallelMuon([p], fp32_matmul_prec="highest", extra_scale_factor=0.5)
    g = whole_gradient(0, 0, tuple(p.shape)).float()
    wanted = library.muon_utils.newton_schulz(g, 5, "quintic") * 8.0 * 0.5
    torch.testing.assert_close(optimizer.orthogonalize(p, g), wanted, rtol=1e-4, atol=1e-4)


def test_closure_is_called_with_gradients_on():
    p = parameters()[0]
    optimizer = TensorParallelMuon([p])

    def closure():
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    before = p.detach().clone()
    assert optimizer.step(closure) is not None
    assert not torch.equal(before, p.detach())


def test_parameters_without_gradient_are_left_alone():
    a, b = (torch.nn.Parameter(torch.ones(8, 8)) for _ in range(2))
    optimizer = TensorParallelMuon([a, b])
    a.grad = torch.ones(8, 8)
    optimizer.step()
    assert not torch.equal(a, torch.ones(8, 8))
    assert torch.equal(b, torch.ones(8, 8))
    assert not optimizer.state[b]["momentum_buffer"].any()


def test_loaded_state_is_taken_over():
    first, second = TensorParallelMuon(parameters(), 0.1), TensorParallelMuon(parameters(), 0.1)
    train(first, steps=2)
    second.load_state_dict(first.state_dict())
    for p, q in zip(first.param_groups[0]["params"], second.param_groups[0]["params"], strict=True):
        q.data.copy_(p.data)
    for a, b in zip(train(first), train(second), strict=True):
        assert torch.equal(a, b)


def test_parameters_may_be_replaced_after_construction():
    """Megatron swaps the parameters of the groups for float32 copies, and moves the state over to them."""
    params = parameters()
    optimizer = TensorParallelMuon(params, 0.1)
    mains = [torch.nn.Parameter(p.detach().clone()) for p in params]
    optimizer.param_groups[0]["params"] = mains
    for p, main in zip(params, mains, strict=True):
        optimizer.state[main] = optimizer.state.pop(p)
    for got, wanted in zip(train(optimizer), train(TensorParallelMuon(parameters(), 0.1)), strict=True):
        assert torch.equal(got, wanted)


SIGNATURE = (
    "(self, params, lr=0.0003, momentum=0.95, nesterov=True, weight_decay=0.01, use_decoupled_weight_decay=True, "
    "split_qkv=False, "
    "is_qkv_fn=None, qkv_split_shapes=None, fp32_matmul_prec='medium', coefficient_type='quintic', num_ns_steps=5, "
    "scale_mode='spectral', extra_scale_factor=1.0, pg_collection=None, tp_mode='duplicated'"
)


@pytest.mark.parametrize(
    ("cls", "more"),
    [
        (TensorParallelMuon, ""),
        (TensorParallelAdaptiveMuon, ", moment2_method='adamuon', beta2=0.95, eps=1e-08"),
    ],
)
def test_signature_and_bases_are_megatrons(cls, more):
    signature = inspect.signature(cls.__init__)
    bare = signature.replace(
        parameters=[p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()],
        return_annotation=inspect.Signature.empty,
    )
    # What is ours comes after all that is Megatron's, by keyword only.
    assert str(bare).partition(", *, ")[0] == SIGNATURE + more
    assert issubclass(cls, library.OrthogonalizedOptimizer)
    assert issubclass(TensorParallelAdaptiveMuon, library.AdaptiveMuon)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"lr": -1.0}, "lr=-1.0"),
        ({"momentum": 1.0}, "momentum=1.0"),
        ({"weight_decay": float("nan")}, "weight_decay=nan"),
        ({"num_ns_steps": 0}, "num_ns_steps must be at least 1, got 0"),
        ({"coefficient_type": "quintik"}, "quintik"),
        ({"scale_mode": "sqrt"}, "possible: shape_scaling, spectral, unit_rms_norm"),
        ({"fp32_matmul_prec": "low"}, "possible: highest, high, medium"),
        ({"tp_mode": "automatic"}, "possible: duplicated, distributed, owner, blockwise, auto"),
        ({"split_qkv": True, "is_qkv_fn": lambda p: True}, "qkv_split_shapes"),
        ({"split_qkv": True, "is_qkv_fn": lambda p: True, "qkv_split_shapes": (5, 5, 1)}, "sum to 11"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_made(kwargs, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        TensorParallelMuon(parameters(), **kwargs)


def test_a_vector_is_refused():
    with pytest.raises(ValueError, match=r"shape \(7,\).*elementwise"):
        TensorParallelMuon([torch.nn.Parameter(torch.ones(7))])


@pytest.mark.parametrize("name", ["muon", "adaptive_muon", "adamw", "sgd"])
def test_16_bit_parameters_are_updated_in_float32(name):
    whole = CUTS[2]["rows"]
    low, single = (unsharded(name, replace(whole, dtype=dtype), 3) for dtype in (torch.bfloat16, torch.float32))
    for a, b in zip(low, single, strict=True):
        assert a.dtype == torch.bfloat16
        # The gradients are rounded too, which AdaMuon's division amplifies.
        assert float((a.float() - b).norm() / b.norm()) < 0.1


def digest(weights: list[Tensor]) -> str:
    return hashlib.sha256(b"".join(w.contiguous().numpy().tobytes() for w in weights)).hexdigest()


@pytest.mark.mpi(min_size=4)
@pytest.mark.parametrize("precision", ["highest", "medium"])
@pytest.mark.parametrize("mode", ["owner", "duplicated"])
@pytest.mark.parametrize("cut", ["rows", "columns", "tp rows, dp copies", "qkv"])
def test_weights_are_bit_identical_to_the_unsharded_run(world, cut, mode, precision):
    """Owners and gatherers compute on the same whole matrix with the same kernels: not a bit differs in float32."""
    whole = replace(CUTS[4][cut], dtype=torch.float32)
    got, shard = sharded("muon", whole, 5, world, tp_mode=mode, fp32_matmul_prec=precision)
    wanted = unsharded("muon", whole, 5, fp32_matmul_prec=precision)
    assert digest(got) == digest([shard(w) for w in wanted])


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("mode", ["owner", "duplicated"])
@pytest.mark.parametrize("cut", ["rows", "uneven columns", "copies"])
@pytest.mark.parametrize(
    ("name", "kwargs", "sums"),
    [
        ("adaptive_muon", {}, False),
        ("adaptive_muon", {"align_rms": True}, True),
        ("adaptive_muon", {"moment2_method": "normuon"}, True),
        ("adaptive_muon", {"moment2_method": "namo"}, True),
        ("muon_optax", {}, False),
        ("muon_optax", {"adaptive": True}, True),
    ],
)
def test_bits_differ_only_where_a_rule_sums_over_shards(world, name, kwargs, sums, cut, mode):
    """What docs/modes.md promises: the last bits of float32 depend on the layout for sums over a split matrix alone."""
    whole = replace(CUTS[2][cut], dtype=torch.float32)
    got, shard = sharded(name, whole, 5, world, tp_mode=mode, fp32_matmul_prec="highest", **kwargs)
    wanted = [shard(w) for w in unsharded(name, whole, 5, fp32_matmul_prec="highest", **kwargs)]
    if sums and cut != "copies":
        for a, b in zip(got, wanted, strict=True):
            assert float((a - b).norm()) <= 1e-6 * float(b.norm())
    else:
        assert digest(got) == digest(wanted)


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("cut", ["rows", "columns", "qkv", "gate/up stride"])
@pytest.mark.parametrize("name", ["muon", "adaptive_muon"])
def test_blockwise_is_the_rule_of_the_blocks(world, cut, name):
    whole = CUTS[2][cut]
    got, shard = sharded(name, whole, 5, world, tp_mode="blockwise")
    # Half of the gate and half of the up projection.
    attributes = {"matrix_parts": (16, 16)} if "matrix_parts" in whole.attributes else whole.attributes
    wanted = train_cut(name, whole_parameters(whole.shapes), shard, replace(whole, attributes=attributes), 5)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.mpi(min_size=2)
@pytest.mark.filterwarnings("ignore")
def test_megatron_cores_own_process_groups_serve(world):
    """Its collection, its attributes, its optimizer as the reference: one process, and two of them in ours."""
    module = pytest.importorskip("megatron.core.process_groups_config")
    theirs = pytest.importorskip("megatron.core.optimizer.emerging_optimizers")
    groups = module.ProcessGroupCollection()
    groups.tp = groups.expt_tp = world.mesh((2,), ("tp",)).get_group("tp")
    groups.gtp_remat = groups.expt_gtp_remat = None
    weights = []
    for optimizer in (TensorParallelMuon, theirs.TensorParallelMuon):
        p = torch.nn.Parameter(whole_gradient(0, 7, (32, 48)).float().chunk(2, 1)[world.rank].contiguous())
        p.tensor_model_parallel, p.partition_dim, p.partition_stride = True, 1, 1
        p.grad = whole_gradient(0, 8, (32, 48)).float().chunk(2, 1)[world.rank].contiguous()
        optimizer([p], lr=0.1, pg_collection=groups, tp_mode="duplicated", fp32_matmul_prec="highest").step()
        weights.append(p.detach())
    torch.testing.assert_close(*weights, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("m", [511, 512, 515, 1023])
def test_symmetric_products_are_products(m):
    x = torch.randn(1, m, 40, generator=torch.Generator().manual_seed(m))
    gram = x @ x.mT
    torch.testing.assert_close(symmetric_product(x, x.mT, alpha=0.5), 0.5 * gram, rtol=1e-4, atol=1e-4)
    wanted = 2.0 * gram - 0.5 * gram @ gram
    got = symmetric_product(gram, gram, gram, beta=2.0, alpha=-0.5)
    torch.testing.assert_close(product(gram, x, x, beta=2.0), 2.0 * x + gram @ x, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))


@pytest.mark.parametrize("precision", ["highest", "medium"])
@pytest.mark.parametrize("shape", [(40, 64), (520, 64), (64, 520), (520, 530)])
def test_a_stacked_matrix_gives_the_bits_of_a_single_one(shape, precision):
    """A shard may be small enough to share a bucket while the whole matrix is not."""
    x = torch.stack([whole_gradient(i, 6, shape) for i in range(3)])
    x = x.bfloat16() if precision == "medium" else x.float()
    rule = newton_schulz(x, Layout.whole(shape), coefs=coefficients("quintic", 5), precision=precision)
    (stack,) = engine.run([("x", rule)])
    for one, alone in zip(stack, x, strict=True):
        assert torch.equal(one, run(alone, coefficients("quintic", 5), precision))
