"""Projectors as objects, alone and in APOLLO; tests/test_oracle_low_rank.py has the numbers of the projections themselves."""

import copy
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from core import OnlinePCAProjector, RandProjector
from core.optimizer.rules.apollo import Apollo
from tests.support.sharding import CUTS, sharded, unsharded

SHAPES = ((5, 12), (12, 5), (6, 6))


class Rows:
    """Somebody's projector: it keeps the first ``rank`` rows or columns of every gradient, times 3."""

    def __init__(self, rank: int, dim: int, proj_type: str) -> None:
        self.rank, self.proj_type, self.scale, self.seen = rank, proj_type, 3.0, 0

    def step(self, x: Tensor) -> None:
        self.seen += 1

    def down(self, x: Tensor) -> Tensor:
        return (x if self.proj_type == "left" else x.mT)[: self.rank]


def gradient(shape: tuple[int, ...], step: int) -> Tensor:
    return torch.tensor(np.random.default_rng(step).standard_normal(shape)) * torch.linspace(1, 2, shape[-1])


def optimizer_of(shape: tuple[int, ...], **kwargs: Any) -> Apollo:
    return Apollo([("w", torch.nn.Parameter(gradient(shape, 99)))], lr=0.03, rank=2, **kwargs)


def train(optimizer: Apollo, steps: range) -> Tensor:
    (p,) = optimizer.param_groups[0]["params"]
    for t in steps:
        p.grad = gradient(tuple(p.shape), t)
        optimizer.step()
    return p.detach().clone()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("settings", "factory"),
    [
        ({"projector": "normal"}, partial(RandProjector, name="w", lazy=False)),
        ({"projector": "orthogonal", "lazy": False}, partial(RandProjector, name="w", init="orthogonal")),
        ({"projector": "online_pca"}, partial(OnlinePCAProjector, name="w", orthag="qr")),
        (
            {"projector": "online_pca", "pca_orthonormalize": "norm", "mini": True},
            partial(OnlinePCAProjector, name="w", orthag="norm"),
        ),
    ],
    ids=["normal", "orthogonal", "qr", "norm"],
)
def test_apollo_with_our_projectors_is_apollo_with_the_setting_of_that_name(shape, settings, factory) -> None:
    one = optimizer_of(shape, update_steps=3, **settings)
    other = optimizer_of(shape, mini=settings.get("mini", False), projector_factory=partial(factory, update_steps=3))
    torch.testing.assert_close(train(other, range(8)), train(one, range(8)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_apollo_takes_any_projector(shape) -> None:
    """One step by hand: with β1 = β2 = 0, R̃ is the sign of R, and the update is G times ‖R̃‖/‖R‖ of each channel."""
    optimizer = optimizer_of(shape, projector_factory=Rows, betas=(0.0, 0.0), eps=0.0)
    g = gradient(shape, 0)
    wide = shape[0] < shape[1]
    r = 3 * (g[:2] if wide else g[:, :2])
    channel = 0 if wide else 1
    expected = gradient(shape, 99) - 0.03 * g * (2**0.5 / r.norm(dim=channel, keepdim=True))
    torch.testing.assert_close(train(optimizer, range(1)), expected, rtol=1e-7, atol=1e-7)
    assert [projector.seen for projector in optimizer._projectors.values()] == [1]


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("cut", ["rows", "columns", "copies", "uneven rows", "uneven columns"])
@pytest.mark.parametrize("factory", [RandProjector, partial(OnlinePCAProjector, orthag="qr"), Rows])
def test_every_layout_gives_projectors_the_same_whole_gradients(world, cut, factory) -> None:
    kwargs = {"projector_factory": factory, "rank": 3}
    got, shard = sharded("apollo", CUTS[2][cut], 12, world, **kwargs)
    for mine, whole in zip(got, unsharded("apollo", CUTS[2][cut], 12, **kwargs), strict=True):
        torch.testing.assert_close(mine, shard(whole), rtol=1e-9, atol=1e-9)


FACTORIES = {
    "random": partial(RandProjector, seed=5, lazy=False, update_steps=4),
    "online PCA": partial(OnlinePCAProjector, orthag="qr", update_steps=4),
}


@pytest.mark.parametrize("name", FACTORIES)
def test_a_resumed_apollo_goes_on_with_its_projections(name) -> None:
    through = optimizer_of((5, 12), projector_factory=FACTORIES[name])
    halfway = train(through, range(6))
    saved = copy.deepcopy(through.state_dict())
    rest = optimizer_of((5, 12), projector_factory=FACTORIES[name])
    with torch.no_grad():
        rest.param_groups[0]["params"][0].copy_(halfway)
    rest.load_state_dict(saved)
    assert "projectors" in saved
    assert torch.equal(train(rest, range(6, 12)), train(through, range(6, 12)))


def test_projectors_that_were_not_saved_are_refused_before_the_step() -> None:
    through = optimizer_of((5, 12), projector_factory=RandProjector)
    train(through, range(3))
    saved = through.state_dict()
    rest = optimizer_of((5, 12), projector_factory=RandProjector)
    rest.load_state_dict({key: value for key, value in saved.items() if key != "projectors"})
    before = rest.param_groups[0]["params"][0].detach().clone()
    with pytest.raises(ValueError, match="w: its state has taken 3 steps, but its projector none"):
        train(rest, range(3, 4))
    assert torch.equal(rest.param_groups[0]["params"][0], before)
    rest.load_state_dict(saved)
    train(rest, range(3, 4))


def test_a_projector_that_cannot_be_saved_is_said_to_be_one() -> None:
    with pytest.raises(ValueError, match=r"w: its projector is a Rows without state_dict\(\)"):
        optimizer_of((5, 12), projector_factory=Rows).state_dict()


@pytest.mark.parametrize(
    ("saved", "loading", "said"),
    [
        ({"projector_factory": RandProjector}, {}, "build it with the projector_factory"),
        (
            {"projector_factory": RandProjector},
            {"projector_factory": OnlinePCAProjector},
            "w: its projector refuses .* kind='RandProjector', and this one has kind='OnlinePCAProjector'",
        ),
        (
            {"projector_factory": RandProjector},
            {"projector_factory": partial(RandProjector, init="orthogonal")},
            "init='normal', and this one has init='orthogonal'",
        ),
        (
            {"projector": "online_pca"},
            {"projector": "normal"},
            "saved with projector='online_pca', and this .*='normal'",
        ),
        (
            {"projector": "normal"},
            {"projector": "online_pca"},
            "saved with projector='normal', and this .*='online_pca'",
        ),
        ({"rank": 2}, {"rank": 3}, "saved with rank=2, and this optimizer has rank=3"),
    ],
)
def test_projector_state_of_another_kind_is_refused_and_nothing_changes(saved, loading, said) -> None:
    optimizers = [
        Apollo([("w", torch.nn.Parameter(gradient((5, 12), 99)))], **{"rank": 2, **k}) for k in (saved, loading)
    ]
    train(optimizers[0], range(3))
    train(optimizers[1], range(1))
    with pytest.raises(ValueError, match=said):
        optimizers[1].load_state_dict(optimizers[0].state_dict())
    (state,) = optimizers[1].state.values()
    assert int(state["step"]) == 1


def test_what_a_factory_makes_must_be_a_projector() -> None:
    with pytest.raises(TypeError, match=r"a dict without \['step', 'down', 'scale'\]"):
        optimizer_of((5, 12), projector_factory=dict)
    with pytest.raises(ValueError, match="projector='orthogonal' and a projector_factory are given"):
        optimizer_of((5, 12), projector_factory=Rows, projector="orthogonal")


@pytest.mark.parametrize("cls", [RandProjector, partial(OnlinePCAProjector, orthag="qr")])
@pytest.mark.parametrize(
    ("side", "shape"), [("left", (5, 12)), ("right", (12, 5)), ("left", (12, 5)), ("right", (6, 6))]
)
def test_a_projector_alone_goes_down_and_up(cls, side, shape) -> None:
    wide = side == "left"
    projector = cls(rank=3, dim=shape[0 if wide else 1], proj_type=side)
    x = gradient(shape, 0)
    projector.step(x)
    low = projector.down(x)
    assert low.shape == (3, shape[1 if wide else 0])
    # up() is the transpose of down(): ⟨down(x), y⟩ = ⟨x, up(y)⟩.
    y = torch.randn(low.shape, dtype=torch.float64)
    torch.testing.assert_close((low * y).sum(), (x * projector.up(y)).sum())
    assert projector.up(y).shape == shape


def test_a_random_projection_is_drawn_anew_and_kept_or_not_alike() -> None:
    lazy, kept = (RandProjector(rank=3, dim=40, proj_type="left", update_steps=2, lazy=lazy) for lazy in (True, False))
    seen = []
    for t in range(4):
        x = gradient((40, 7), t)
        for projector in (lazy, kept):
            projector.step(x)
        assert torch.equal(lazy.down(x), kept.down(x))
        seen.append(lazy.down(torch.eye(40, dtype=torch.float64)))
    assert torch.equal(seen[0], seen[1]) and not torch.equal(seen[1], seen[2]) and torch.equal(seen[2], seen[3])
    assert lazy.A is None and kept.A is not None and kept.A.shape == (40, 3)
    assert "A" not in kept.state_dict()


def test_orthogonal_projections_and_online_pca_have_orthonormal_columns() -> None:
    x = gradient((8, 30), 0)
    for projector in (
        RandProjector(rank=3, dim=8, proj_type="left", init="orthogonal", lazy=False),
        OnlinePCAProjector(rank=3, dim=8, proj_type="left", orthag="qr"),
    ):
        projector.step(x)
        assert projector.A is not None
        torch.testing.assert_close(projector.A.mT @ projector.A, torch.eye(3, dtype=torch.float64))
        assert projector.scale == (8 / 3) ** 0.5


@pytest.mark.parametrize(
    ("cls", "kwargs", "said"),
    [
        (RandProjector, {"rank": 9}, "rank=9 must be at most dim=8"),
        (RandProjector, {"proj_type": "up"}, "proj_type='up' is unknown; possible: left, right"),
        (RandProjector, {"init": "sparse"}, "init='sparse' is unknown; possible: normal, orthogonal"),
        (RandProjector, {"update_steps": 0}, "update_steps=0 must be a whole number of at least 1"),
        (OnlinePCAProjector, {"orthag": "svd"}, "orthag='svd' is unknown; possible: none, qr, norm"),
    ],
)
def test_bad_arguments_of_a_projector(cls, kwargs, said) -> None:
    with pytest.raises(ValueError, match=said):
        cls(**{"rank": 2, "dim": 8, "proj_type": "left", **kwargs})


def test_a_projector_refuses_gradients_and_states_that_do_not_fit() -> None:
    projector = OnlinePCAProjector(rank=2, dim=8, proj_type="left")
    with pytest.raises(ValueError, match=r"a left projector of dim=8 cannot project a gradient of shape \(5, 8\)"):
        projector.step(torch.ones(5, 8))
    with pytest.raises(ValueError, match="no projection before its first step"):
        projector.down(torch.ones(8, 5))
    projector.step(gradient((8, 5), 0))
    before = projector.state_dict()
    for state, said in (
        (None, "must be a dict"),
        ({}, "missing"),
        ({**before, "dim": 9}, "dim=9, and this one has dim=8"),
        ({**before, "kind": "RandProjector"}, "kind='RandProjector'"),
        ({**before, "A": torch.ones(2, 8)}, r"has an A that is \(2, 8\); give a tensor of shape \(8, 2\)"),
    ):
        with pytest.raises(ValueError, match=said):
            projector.load_state_dict(state)
    assert projector.state_dict() == before
