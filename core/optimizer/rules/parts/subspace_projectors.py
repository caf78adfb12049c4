"""Projectors as objects: each projects the gradients of one whole matrix, with the interface of Forgather's projectors."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor

from .... import engine
from ....philox import Key
from ....sharding.layout import Layout
from ...steps.argument_checks import choice, whole_number
from .projectors import FIRST_FIT, Orthonormalize, RandomKind, draw, fit, orthonormal

Side = Literal["left", "right"]


class ProjectorLike(Protocol):
    """What :class:`~..apollo.Apollo` asks of a projector. It sees whole gradients, the same on every rank of a matrix.

    Attributes:
        scale: Factor of what :meth:`down` returns.
    """

    scale: float

    def step(self, x: Tensor) -> object:
        """See the gradient ``x`` (m, n) of this step, before it is projected."""

    def down(self, x: Tensor) -> Tensor:
        """``x`` (m, n) projected: (rank, n) for ``proj_type="left"``, (rank, m) for ``"right"``."""
        ...


class ProjectorFactory(Protocol):
    """Makes the projector of one matrix: of its side of ``dim`` entries, rows for ``left`` and columns for ``right``."""

    def __call__(self, *, rank: int, dim: int, proj_type: Side) -> ProjectorLike:
        """A new projector."""
        ...


class SubspaceProjector(ABC):
    """Base of the projectors: P (dim, rank) for ``left``, which is ``A``, or for ``right`` with ``A = Pᵀ``.

    Args:
        rank: Directions that are kept, from 1 to ``dim``.
        dim: Size of the side that is projected.
        proj_type: ``left`` projects the rows of (dim, n) matrices, ``right`` the columns of (m, dim) matrices.
        update_steps: Steps between changes of P, at least 1.
        seed: Seed of the random numbers.
        name: Name of the parameter. Projectors of equal seed draw the same numbers unless their names differ.

    Raises:
        ValueError: for an argument out of range.
    """

    A: Tensor | None = None
    """The projection of now, (dim, rank) for ``left``, (rank, dim) for ``right``; None before the first step, and where it is
    drawn again whenever it is needed."""

    def __init__(
        self, rank: int, dim: int, proj_type: Side, update_steps: int = 10, *, seed: int = 0, name: str = ""
    ) -> None:
        whole_number("dim", dim, 1)
        whole_number("rank", rank, 1)
        whole_number("update_steps", update_steps, 1)
        choice("proj_type", proj_type, get_args(Side))
        if rank > dim:
            raise ValueError(f"rank={rank} must be at most dim={dim}, the size of the side that is projected.")
        self.rank, self.dim, self.proj_type, self.update_steps = rank, dim, proj_type, update_steps
        self.seed, self.name = seed, name
        self.scale = math.sqrt(dim / rank)
        self._step = 0

    def step(self, x: Tensor) -> None:
        """Count a step with the gradient ``x``, (dim, n) or (m, dim); every ``update_steps`` steps P changes.

        Raises:
            ValueError: for a gradient whose projected side has another size.
        """
        if x.ndim != 2 or x.shape[0 if self.proj_type == "left" else 1] != self.dim:
            raise ValueError(
                f"a {self.proj_type} projector of dim={self.dim} cannot project a gradient of shape {tuple(x.shape)}."
            )
        if self._step % self.update_steps == 0:
            self._renew(self._turned(x), self._step // self.update_steps)
        self._step += 1

    def down(self, x: Tensor) -> Tensor:
        """``x``, (dim, n) or (m, dim), in the subspace: PᵀX or (XP)ᵀ; (rank, n) or (rank, m)."""
        return self._p(x).mT @ self._turned(x)

    def up(self, x: Tensor) -> Tensor:
        """``x``, (rank, n) or (rank, m), back in the space of the gradient: PX, (dim, n), or (PX)ᵀ, (m, dim)."""
        return self._turned(self._p(x) @ x)

    def state_dict(self) -> dict[str, Any]:
        """Kind and sizes, ``seed``, ``name`` and the number of steps; for online PCA also ``A``."""
        return {**self._kind(), "seed": self.seed, "name": self.name, "step": self._step}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on where ``state_dict`` was saved; a copy is made.

        Raises:
            ValueError: before anything is changed, for the state of a projector of another kind or size.
        """
        given = state_dict if isinstance(state_dict, Mapping) else {}
        needed = self.state_dict()
        for key, value in self._kind().items():
            if given.get(key, value) != value:
                raise ValueError(
                    f"the state is of a projector with {key}={given[key]!r}, and this one has {key}={value!r}; make the same "
                    f"projector as the one that was saved."
                )
        if missing := sorted(needed.keys() - given.keys()):
            raise ValueError(
                f"the state of a {type(self).__name__} must be a dict with {sorted(needed)}; missing: {missing}."
            )
        self._take(given)

    def _take(self, given: Mapping[str, Any]) -> None:
        self.seed, self.name, self._step, self.A = given["seed"], given["name"], int(given["step"]), None

    def _kind(self) -> dict[str, Any]:
        names = ("rank", "dim", "proj_type", "update_steps")
        return {"kind": type(self).__name__, **{name: getattr(self, name) for name in names}}

    @property
    def _where(self) -> Layout:
        return Layout.whole((self.dim, self.rank))

    def _turned(self, x: Tensor) -> Tensor:
        return x if self.proj_type == "left" else x.mT

    @abstractmethod
    def _renew(self, x: Tensor, number: int) -> None:
        """Change P for the gradient ``x`` (dim, k); ``number`` counts the changes."""

    @abstractmethod
    def _p(self, like: Tensor) -> Tensor:
        """P (dim, rank), in the dtype and on the device of ``like``."""


class RandProjector(SubspaceProjector):
    """A random projection, drawn anew every ``update_steps`` steps from (seed, name, number of the draw).

    Args:
        rank: As :class:`SubspaceProjector`.
        dim: As :class:`SubspaceProjector`.
        proj_type: As :class:`SubspaceProjector`.
        update_steps: Steps between draws, at least 1.
        init: ``normal``, independent entries of variance 1/dim, or ``orthogonal``, orthonormal columns of P.
        lazy: Draw P whenever it is needed, instead of keeping it; no projection is ever saved.
        seed: As :class:`SubspaceProjector`.
        name: As :class:`SubspaceProjector`.

    Raises:
        ValueError: for an argument out of range.

    Source: Zhu et al. 2024, https://arxiv.org/abs/2412.05270
    """

    def __init__(
        self,
        rank: int,
        dim: int,
        proj_type: Side,
        update_steps: int = 10,
        init: RandomKind = "normal",
        lazy: bool = True,
        seed: int = 0,
        name: str = "",
    ) -> None:
        choice("init", init, get_args(RandomKind))
        super().__init__(rank, dim, proj_type, update_steps, seed=seed, name=name)
        self.init, self.lazy = init, lazy

    def _kind(self) -> dict[str, Any]:
        return {**super()._kind(), "init": self.init}

    def _renew(self, x: Tensor, number: int) -> None:
        self.A = None if self.lazy else self._turned(self._drawn(number, x))

    def _p(self, like: Tensor) -> Tensor:
        if self.A is None:
            p = self._drawn(max(self._step - 1, 0) // self.update_steps, like)
            self.A = None if self.lazy else self._turned(p)
            return p
        return self._turned(self.A).to(like)

    def _drawn(self, number: int, like: Tensor) -> Tensor:
        return draw(self._where, self.init, self.seed, self.name, number, like) / self.scale


class OnlinePCAProjector(SubspaceProjector):
    """A projection that is fitted to the gradients by descent on ``mean((P Pᵀ X - X)²)``, with Pᵀ X held fixed.

    The first fit takes up to 100 steps from random orthonormal columns, and every later one a single step; the rate is
    1/(var(X) + 1e-6).

    Args:
        rank: As :class:`SubspaceProjector`.
        dim: As :class:`SubspaceProjector`.
        proj_type: As :class:`SubspaceProjector`.
        update_steps: Steps between fits, at least 1.
        orthag: What is done to P after each step of a fit: ``none``, ``qr``, or ``norm`` of its columns.
        seed: As :class:`SubspaceProjector`.
        name: As :class:`SubspaceProjector`.

    Raises:
        ValueError: for an argument out of range.

    Source: Liang et al. 2024, https://arxiv.org/abs/2408.12857
    """

    def __init__(
        self,
        rank: int,
        dim: int,
        proj_type: Side,
        update_steps: int = 10,
        orthag: Orthonormalize = "none",
        seed: int = 0,
        name: str = "",
    ) -> None:
        choice("orthag", orthag, get_args(Orthonormalize))
        super().__init__(rank, dim, proj_type, update_steps, seed=seed, name=name)
        self.orthag = orthag

    def state_dict(self) -> dict[str, Any]:
        """As in the base class, with ``A``; the tensor is the projector's own, or None before the first step."""
        return {**super().state_dict(), "A": self.A}

    def _take(self, given: Mapping[str, Any]) -> None:
        a, shape = given["A"], (self.dim, self.rank) if self.proj_type == "left" else (self.rank, self.dim)
        found = tuple(a.shape) if isinstance(a, Tensor) else type(a).__name__
        if a is not None and found != shape:
            raise ValueError(
                f"the state of an OnlinePCAProjector has an A that is {found}; give a tensor of shape {shape}."
            )
        super()._take(given)
        self.A = None if a is None else a.detach().clone()

    def _kind(self) -> dict[str, Any]:
        return {**super()._kind(), "orthag": self.orthag}

    @torch.no_grad()
    def _renew(self, x: Tensor, number: int) -> None:
        if self.A is None:
            p = orthonormal(Key(self.seed, self.name, 0, "projection"), self._where, x)
        else:
            p = self._turned(self.A).to(x)
        p = p.contiguous()
        steps = FIRST_FIT if self.A is None else 1
        engine.run([(self.name, fit(p[None], x[None], Layout.whole(tuple(x.shape)), steps, self.orthag))])
        self.A = self._turned(p).contiguous()

    def _p(self, like: Tensor) -> Tensor:
        if self.A is None:
            raise ValueError(
                "an OnlinePCAProjector has no projection before its first step; call step(gradient) first."
            )
        return self._turned(self.A).to(like)
