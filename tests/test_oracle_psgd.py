"""Quad and Skew against the recursion of one block after the other in numpy."""

import math

import numpy as np
import pytest
import torch

from core.linalg.roots import norm_lower_bound
from core.optimizer.rules import psgd
from core.optimizer.rules.psgd import Quad, Skew

STEPS = 12
LR, DECAY, BLOCK = 0.1, 0.05, 8
SHAPES = [(8, 8), (5, 7), (24, 16), (16, 24), (21, 12), (12, 21), (8, 19), (19, 3)]
"""One block; one small block; a grid; grids with smaller blocks at the right, at the bottom, and at both."""


def draw(step: int, purpose: str, size: int) -> np.ndarray:
    return np.random.default_rng([step, ("noise", "probes").index(purpose)]).standard_normal(size)


@pytest.fixture
def injected(monkeypatch):
    def normal(key, shape, *, dtype, device):
        return torch.tensor(draw(key.step, key.purpose, math.prod(shape)), dtype=dtype, device=device).view(shape)

    monkeypatch.setattr(psgd, "normal", normal)


def deal_probes(step: int, sizes: dict[tuple[int, int], tuple[int, int]]) -> dict[tuple[int, int], list[np.ndarray]]:
    """Four probes for the rows and four for the columns of each block, by its corner.

    Blocks of one size come together, those at the right edge after the full ones, those at the bottom after these; first all
    their row probes, then all their column probes.
    """
    total = sum(4 * (d + e) for d, e in sizes.values())
    drawn, dealt = iter(draw(step, "probes", total)), {corner: [] for corner in sizes}
    for size in sorted(set(sizes.values()), reverse=True):
        for side in (0, 1):
            for corner in sorted(c for c in sizes if sizes[c] == size):
                numbers = [next(drawn) for _ in range(4 * size[side])]
                dealt[corner].append(np.reshape(numbers, (4, size[side])))
    return dealt


def gradients(shape: tuple[int, ...], steps: int) -> list[np.ndarray]:
    rng = np.random.default_rng(shape)
    scale = np.logspace(0, 1, shape[0])[:, None] * np.logspace(0, -1, shape[1])
    return [(1 + rng.standard_normal(shape)) * scale for _ in range(steps)]


def start(shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(7).standard_normal(shape)


def lower_bound(a: np.ndarray, probes: np.ndarray) -> float:
    """‖A‖ from below: the largest of a few vectors' lengths after seven products with A, the last on unit vectors."""
    scale = max(np.abs(a).max(), np.finfo(float).tiny)
    a = a / scale
    energies = [np.mean(row**2) for row in a]
    best = int(np.argmax(energies))
    x = [(a[best] / np.sqrt(max(energies[best], np.finfo(float).tiny)) + probe) @ a for probe in probes]
    for _ in range(5):
        largest = max(np.abs(v).max() for v in x) or 1.0
        x = [(v / largest) @ a for v in x]
    return max(np.linalg.norm((v / (np.linalg.norm(v) or 1.0)) @ a) for v in x) * scale


def toward_symmetry(q: np.ndarray, probes: np.ndarray) -> np.ndarray:
    r = q.T - q
    size = lower_bound(r, probes)
    if size == 0:
        return q
    r = r / size
    first, second = np.trace(r @ q), np.trace(r @ r @ q)
    a = min(max(-first / second, 0), 1 / 8) if second < 0 else 1 / 8
    return (np.eye(len(q)) + a * r + a**2 / 2 * r @ r) @ q


class Factor:
    """One side of one block; a diagonal factor is a matrix whose other entries are put back to 0."""

    def __init__(self, size: int, rule: str, diagonal: bool, scale: float):
        self.q, self.bound, self.rule, self.diagonal = scale * np.eye(size), 0.0, rule, diagonal

    def update(self, x: np.ndarray, lr: float, probes: np.ndarray) -> None:
        gram, c = x @ x.T, x.shape[1]
        if self.diagonal:
            gram = np.diag(np.diag(gram))
        norm = gram.max() if self.diagonal else lower_bound(gram, probes)
        self.bound = max(0.95 * self.bound + 0.05 * (norm + c), norm + c)
        difference = gram - c * np.eye(len(gram))
        if self.rule == "quad":
            gain = np.eye(len(gram)) - lr / (2 * self.bound) * difference
            q = gain @ self.q @ gain
            self.q = (q + q.T) / 2
        else:
            q = (np.eye(len(gram)) - lr / self.bound * difference) @ self.q
            self.q = q if self.diagonal else toward_symmetry(q, probes)

    @property
    def p(self) -> np.ndarray:
        return self.q.T @ self.q


def block_at(corner: tuple[int, int], sizes: list[int]) -> tuple[slice, slice]:
    return slice(corner[0], corner[0] + sizes[0]), slice(corner[1], corner[1] + sizes[1])


def oracle(rule, shape, given, *, dense=16384, plr=0.7, init=1.0, noise=1e-9, beta=0.95, normalize=False, style="adam"):
    w, mean = start(shape), np.zeros(shape)
    sizes = [size if size > dense else BLOCK for size in shape]
    corners = [(i, j) for i in range(0, shape[0], sizes[0]) for j in range(0, shape[1], sizes[1])]
    factors = {}
    for t, g in enumerate(given, 1):
        mean = beta * mean + (1 - beta) * g
        m = mean / (1 - beta**t)
        if normalize:
            m = m / (np.linalg.norm(m) + 1e-6)
        noisy = m + noise * draw(t, "noise", math.prod(shape)).reshape(shape)
        lr = max(plr / np.sqrt(1 + t / 10000), min(0.4, plr))
        u, probes = np.zeros(shape), deal_probes(t, {c: w[block_at(c, sizes)].shape for c in corners})
        for i, j in corners:
            block = block_at((i, j), sizes)
            d, e = m[block].shape
            if t == 1:
                factors[i, j] = Factor(d, rule, shape[0] > dense, init), Factor(e, rule, shape[1] > dense, init)
            left, right = factors[i, j]
            if t % 100 == 0:
                a, b = np.abs(left.q).max(), np.abs(right.q).max()
                left.q, right.q = left.q * np.sqrt(a * b) / a, right.q * np.sqrt(a * b) / b
            x = left.p @ noisy[block] @ right.p
            left.update(x, lr, probes[i, j][0])
            right.update(x.T, lr, probes[i, j][1])
            u[block] = left.p @ m[block] @ right.p
        u = u * 1.1 / max(np.sqrt(np.mean(u**2)), 1.1)
        w = (1 - LR * DECAY) * w - LR * (u / 5 if style == "adam" else u)
    return w


RULES = {"quad": Quad, "skew": Skew}


def check(name, shape, steps=STEPS, tolerance=1e-12, **settings):
    given = gradients(shape, steps)
    p = torch.nn.Parameter(torch.tensor(start(shape)))
    optimizer = RULES[name]([p], LR, weight_decay=DECAY, block_size=BLOCK, **settings)
    for g in given:
        p.grad = torch.tensor(g)
        optimizer.step()
    names = {
        "max_size_dense": "dense",
        "preconditioner_lr": "plr",
        "preconditioner_init_scale": "init",
        "noise_scale": "noise",
        "momentum": "beta",
        "normalize_grads": "normalize",
        "lr_style": "style",
    }
    wanted = oracle(name, shape, given, **{names[k]: v for k, v in settings.items()})
    assert np.linalg.norm(p.detach().numpy() - wanted) <= tolerance * np.linalg.norm(wanted - start(shape))


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_recursion(injected, name, shape):
    check(name, shape)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize(
    "settings",
    [
        {"preconditioner_lr": 0.1, "preconditioner_init_scale": 3.0},
        {"momentum": 0.0, "noise_scale": 0.3},
        {"normalize_grads": True, "lr_style": None, "preconditioner_lr": 1.0},
    ],
)
def test_settings_mean_what_they_say(injected, name, settings):
    check(name, (21, 12), **settings)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("shape", [(21, 12), (12, 21), (21, 19)])
def test_long_sides_have_diagonal_factors(injected, name, shape):
    check(name, shape, max_size_dense=15)


@pytest.mark.parametrize("name", RULES)
def test_factors_are_balanced_at_step_100(injected, name):
    check(name, (5, 7), steps=101, tolerance=1e-10, preconditioner_init_scale=2.0)


@pytest.mark.parametrize("kind", ["spd", "low rank", "skew", "zero"])
def test_norm_lower_bound_is_below_and_close(kind):
    x = torch.tensor(np.random.default_rng(3).standard_normal((5, 30, 30)))
    low = x[..., :2]
    a = {"spd": x @ x.mT, "low rank": low @ low.mT, "skew": x - x.mT, "zero": torch.zeros_like(x)}[kind]
    probe = torch.tensor(np.random.default_rng(4).standard_normal((5, psgd.PROBES, 30)))
    bound, exact = norm_lower_bound(a, probe), torch.linalg.matrix_norm(a, 2)
    assert (bound <= exact * (1 + 1e-12)).all()
    assert (bound >= 0.8 * exact).all()


@pytest.mark.parametrize("name", RULES)
def test_it_whitens(name):
    """Momentum 0: a preconditioned gradient of a fixed covariance has unit variance in the end."""
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.zeros(8, 8, dtype=torch.float64))
    optimizer = RULES[name]([p], 1.0, momentum=0.0, weight_decay=0.0, lr_style=None)
    mixing = torch.diag(torch.logspace(-3, 1, 8, dtype=torch.float64))
    updates = []
    for step in range(400):
        before = p.detach().clone()
        p.grad = mixing @ torch.randn(8, 8, dtype=torch.float64)
        optimizer.step()
        if step >= 200:
            updates.append(before - p.detach())
    variance = torch.stack(updates).square().mean((0, 2))
    assert float(variance.max() / variance.min()) < 4  # of the gradient: 10⁸
    assert 0.25 < float(variance.mean()) < 2


@pytest.mark.parametrize("precond_dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", RULES)
def test_zero_and_rank_one_gradients_give_finite_numbers(name, dtype, precond_dtype):
    p = torch.nn.Parameter(torch.ones(16, 35, dtype=dtype))
    optimizer = RULES[name]([p], LR, block_size=16, precond_dtype=precond_dtype)
    row = torch.linspace(-1, 1, 35)
    for g in (*[torch.zeros(35)] * 60, row, row, torch.zeros(35), row):
        p.grad = g.to(dtype).expand(16, 35).contiguous()
        optimizer.step()
    assert p.isfinite().all()
    assert all(x.isfinite().all() for x in optimizer.state[p].values())
    assert not torch.equal(p, torch.ones_like(p))


def test_a_block_is_its_own_problem_and_shapes_are_cut_at_the_edges():
    optimizer = Quad([("w", torch.nn.Parameter(torch.zeros(20, 40)))], block_size=16)
    shapes = {k: tuple(v.shape) for k, v in optimizer.state_dict()["state"][0].items()}
    assert shapes == {
        "step": (1,),
        "momentum": (20, 40),
        **{"Ql0": (2, 16, 16), "Qr0": (2, 16, 16), "Ll0": (2,), "Lr0": (2,)},
        **{"Ql1": (1, 16, 16), "Qr1": (1, 8, 8), "Ll1": (1,), "Lr1": (1,)},
        **{"Ql2": (2, 4, 4), "Qr2": (2, 16, 16), "Ll2": (2,), "Lr2": (2,)},
        **{"Ql3": (1, 4, 4), "Qr3": (1, 8, 8), "Ll3": (1,), "Lr3": (1,)},
    }


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("shape", [(), (5,), (2, 3, 4)])
def test_other_than_matrices_are_refused(name, shape):
    with pytest.raises(ValueError, match=f"bias: {RULES[name].__name__} works on matrices.*adamw"):
        RULES[name]([("bias", torch.nn.Parameter(torch.zeros(shape)))])


@pytest.mark.parametrize(
    "argument",
    [
        {"momentum": 1.0},
        {"weight_decay": -1.0},
        {"lr_style": "sgd"},
        {"block_size": 0},
        {"max_size_dense": 0},
        {"preconditioner_lr": 1.5},
        {"preconditioner_init_scale": 0.0},
        {"precond_dtype": torch.int8},
        {"noise_scale": 0.0},
        {"tp_mode": "distributed"},
    ],
)
def test_wrong_arguments_are_refused_by_name(argument):
    with pytest.raises(ValueError, match=next(iter(argument))):
        Quad([torch.nn.Parameter(torch.zeros(2, 3))], **argument)
