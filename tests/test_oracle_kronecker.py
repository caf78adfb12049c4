"""Shampoo and SOAP against pytorch_optimizer and the papers' formulas in numpy."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import pytorch_optimizer
import torch
from torch import Tensor

from core.linalg.roots import matrix_inverse_root
from core.optimizer.rules.shampoo_soap import Shampoo, Soap

STEPS = 12
SHAPES = [(6, 9), (9, 6), (8, 8), (1, 5)]
LR, DECAY = 0.1, 0.05


def gradients(shape: tuple[int, ...], steps: int = STEPS) -> list[np.ndarray]:
    rng = np.random.default_rng(shape)
    return [rng.standard_normal(shape) * np.logspace(0, 1, shape[0])[:, None] for _ in range(steps)]


def start(shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(7).standard_normal(shape)


def run(make: Callable[[list[Tensor]], Any], shape: tuple[int, ...], given: Sequence[np.ndarray]) -> np.ndarray:
    p = torch.nn.Parameter(torch.tensor(start(shape)))
    optimizer = make([p])
    for g in given:
        p.grad = torch.tensor(g)
        optimizer.step()
    return p.detach().numpy()


def assert_close(got: np.ndarray, wanted: np.ndarray, shape: tuple[int, ...], tolerance: float = 1e-12) -> None:
    assert np.linalg.norm(got - wanted) <= tolerance * np.linalg.norm(wanted - start(shape))


@pytest.mark.parametrize("shape", SHAPES)
def test_shampoo_equals_pytorch_optimizer(shape):
    def theirs(params):
        return pytorch_optimizer.Shampoo(
            params, LR, weight_decay=DECAY, weight_decouple=True, preconditioning_compute_steps=1, matrix_eps=1e-6
        )

    def ours(params):
        return Shampoo(params, LR, eps=1e-6, weight_decay=DECAY, precondition_frequency=1)

    given = gradients(shape)
    assert_close(run(ours, shape, given), run(theirs, shape, given), shape)


def shampoo(shape, given, *, eps, beta, momentum, every, graft) -> np.ndarray:
    w, (m, n) = start(shape), shape
    left, right, diagonal, mean = np.zeros((m, m)), np.zeros((n, n)), np.zeros(shape), np.zeros(shape)
    for t, g in enumerate(given):
        fresh = 1.0 if beta == 1 else 1 - beta
        left, right = beta * left + fresh * g @ g.T, beta * right + fresh * g.T @ g
        diagonal = beta * diagonal + fresh * g**2
        if t % every == 0:
            roots = []
            for gram in (left, right):
                values, vectors = np.linalg.eigh(gram + eps * np.eye(len(gram)))
                roots.append(vectors @ np.diag(values**-0.25) @ vectors.T)
        u = roots[0] @ g @ roots[1]
        if graft is not None:
            u = u / np.linalg.norm(u) * np.linalg.norm(graft(g, diagonal + eps))
        mean = momentum * mean + u
        w = (1 - LR * DECAY) * w - LR * mean
    return w


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("beta", "momentum", "every"), [(1.0, 0.0, 1), (1.0, 0.9, 5), (0.9, 0.5, 3)])
@pytest.mark.parametrize("grafting", ["none", "sgd", "adagrad"])
def test_shampoo_equals_the_formula(shape, beta, momentum, every, grafting):
    # A large ε: rounding in the null space of a root that is kept for some steps is magnified by ε^(-1/4) on either side.
    settings = {"eps": 0.1, "beta": beta, "momentum": momentum}
    graft = {"none": None, "sgd": lambda g, v: g, "adagrad": lambda g, v: g / np.sqrt(v)}[grafting]

    def ours(params):
        return Shampoo(params, LR, weight_decay=DECAY, precondition_frequency=every, grafting=grafting, **settings)

    given = gradients(shape)
    assert_close(run(ours, shape, given), shampoo(shape, given, every=every, graft=graft, **settings), shape)


@pytest.mark.parametrize("order", [1, 2, 4])
def test_inverse_root(order):
    x = torch.tensor(gradients((7, 4))[0])
    a = x @ x.mT
    root = matrix_inverse_root(a, order, eps=0.1)
    wanted = torch.eye(7, dtype=a.dtype)
    torch.testing.assert_close(torch.linalg.matrix_power(root, order) @ (a + 0.1 * wanted), wanted, rtol=0, atol=1e-11)


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (8, 8)])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"betas": (0.9, 0.99), "shampoo_beta": 0.8},
        {"correct_bias": False, "normalize_grads": True},
        {"max_precond_dim": 7},
    ],
)
@pytest.mark.parametrize(("every", "tolerance"), [(STEPS, 1e-12), (3, 1e-5)])
def test_soap_equals_pytorch_optimizer(shape, settings, every, tolerance):
    """Which computes its QR decompositions, at every third step here, in float32."""
    other = {"normalize_grads": "normalize_gradient", "max_precond_dim": "max_precondition_dim"}

    def theirs(params):
        named = {other.get(k, k): v for k, v in settings.items()}
        return pytorch_optimizer.SOAP(params, LR, weight_decay=DECAY, precondition_frequency=every, **named)

    def ours(params):
        return Soap(params, LR, weight_decay=DECAY, precondition_frequency=every, **settings)

    given = gradients(shape)
    assert_close(run(ours, shape, given), run(theirs, shape, given), shape, tolerance)


def soap(shape, given, *, every, betas=(0.95, 0.95), eps=1e-8) -> np.ndarray:
    """Algorithms 3 and 4, with the eigenbasis of the first gradient; columns by falling eigenvalue, V along with them."""
    w, (b1, b2) = start(shape), betas
    left, right = ((1 - b2) * x for x in (given[0] @ given[0].T, given[0].T @ given[0]))
    ql, qr = (np.linalg.eigh(gram)[1] for gram in (left, right))
    mean, square = np.zeros(shape), np.zeros(shape)
    for t, g in enumerate(given[1:], 1):
        rotated = ql.T @ g @ qr
        mean = b1 * mean + (1 - b1) * g
        square = b2 * square + (1 - b2) * rotated**2
        scale = np.sqrt(1 - b2**t) / (1 - b1**t)
        w = w - LR * scale * ql @ ((ql.T @ mean @ qr) / (np.sqrt(square) + eps)) @ qr.T
        w = w - LR * DECAY * w
        left, right = b2 * left + (1 - b2) * g @ g.T, b2 * right + (1 - b2) * g.T @ g
        if t % every == 0:
            by_rows = np.argsort(-np.diag(ql.T @ left @ ql))
            by_cols = np.argsort(-np.diag(qr.T @ right @ qr))
            ql, _ = np.linalg.qr(left @ ql[:, by_rows])
            qr, _ = np.linalg.qr(right @ qr[:, by_cols])
            square = square[by_rows][:, by_cols]
    return w


@pytest.mark.parametrize("every", [1, 4])
def test_soap_equals_the_formula(every):
    # A square gradient: the eigenvectors of one that is not full rank are not unique.
    shape = (8, 8)
    given = gradients(shape)

    def ours(params):
        return Soap(params, LR, weight_decay=DECAY, precondition_frequency=every)

    assert_close(run(ours, shape, given), soap(shape, given, every=every), shape)


def test_soap_only_looks_at_the_first_gradient():
    assert np.array_equal(run(lambda p: Soap(p, LR, weight_decay=DECAY), (6, 9), gradients((6, 9), 1)), start((6, 9)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "make",
    [
        lambda p: Shampoo(p, LR, precondition_frequency=2),
        lambda p: Shampoo(p, LR, beta=0.9, grafting="sgd", momentum=0.9),
        lambda p: Shampoo(p, LR, grafting="adagrad"),
        lambda p: Soap(p, LR, precondition_frequency=2),
    ],
)
def test_zero_and_rank_one_gradients_give_finite_numbers(make, dtype):
    p = torch.nn.Parameter(torch.ones(40, 70, dtype=dtype))
    optimizer = make([p])
    column = torch.linspace(-1, 1, 70, dtype=dtype)
    for g in (torch.zeros(70), torch.zeros(70), column, column, torch.zeros(70), column):
        p.grad = g.to(dtype).expand(40, 70).contiguous()
        optimizer.step()
        assert p.isfinite().all()
    assert not torch.equal(p, torch.ones_like(p))


@pytest.mark.parametrize("cls", [Shampoo, Soap])
@pytest.mark.parametrize("shape", [(), (5,), (2, 3, 4)])
def test_other_than_matrices_are_refused(cls, shape):
    with pytest.raises(ValueError, match=f"bias: {cls.__name__} works on matrices.*adamw"):
        cls([("bias", torch.nn.Parameter(torch.zeros(shape)))])


@pytest.mark.parametrize(
    ("cls", "argument"),
    [
        (Shampoo, {"eps": 0.0}),
        (Shampoo, {"beta": 0.0}),
        (Shampoo, {"beta": 1.1}),
        (Shampoo, {"momentum": 1.0}),
        (Shampoo, {"precondition_frequency": 0}),
        (Shampoo, {"grafting": "adam"}),
        (Shampoo, {"tp_mode": "distributed"}),
        (Soap, {"betas": (0.9,)}),
        (Soap, {"betas": (0.9, 1.0)}),
        (Soap, {"shampoo_beta": -0.1}),
        (Soap, {"eps": 0.0}),
        (Soap, {"precondition_frequency": 0}),
        (Soap, {"max_precond_dim": 0}),
    ],
)
def test_wrong_arguments_are_refused_by_name(cls, argument):
    with pytest.raises(ValueError, match=next(iter(argument))):
        cls([torch.nn.Parameter(torch.zeros(2, 3))], **argument)
