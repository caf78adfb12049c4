"""APOLLO: the size of Adam's step per channel, estimated in a low-rank projection of the gradient."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast, get_args

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from ...process_groups_config import ProcessGroupCollection
from ...sharding.layout import Layout
from ...sharding.requests import Move, Rule
from ...sharding.state import StateSpec
from ...sharding.tp_modes import shard_of, working_axes
from ..steps.argument_checks import check_adam, choice, non_negative, whole_number
from ..steps.stacked import RuleFunction, StackedStep
from .parts.adam_parts import bias_correction
from .parts.projectors import Drawn, Orthonormalize, Projector, Sides, projection, projection_specs
from .parts.subspace_projectors import ProjectorFactory, ProjectorLike

GROWTH = 1.01
"""Largest growth of the update's norm from step to step."""

PROJECTORS = "projectors"
"""Entry of a state dict with the states of the projectors that a factory made, by parameter."""


class Apollo(StackedStep):
    """SGD whose gradient is scaled, channel by channel, as Adam would scale it in a random subspace.

    With P (d, rank) for the shorter side d of the whole matrix, and G turned so that d comes first (algorithm 1):
    ``R = PᵀG``; ``M ← β1·M + (1-β1)·R``; ``V ← β2·V + (1-β2)·R²``; ``R̃ = M / (√V + ε)``;
    ``U = √scale · G · ‖R̃[:, j]‖ / ‖R[:, j]‖``, its norm limited to 1.01 times that of the step before;
    ``W ← (1 - lr·wd)·W - lr · √(1-β2ᵗ)/(1-β1ᵗ) · U``.

    Args:
        params: 2-D parameters, or parameter groups; DTensors or plain tensors.
        lr: Learning rate.
        betas: β1, β2, in [0, 1).
        eps: ε ≥ 0.
        weight_decay: wd ≥ 0, decoupled.
        rank: Directions that the state keeps, from 1 to the shorter side of every parameter.
        scale: Factor of the update, under a root.
        scale_front: Limit the norm after the scale instead of before it.
        update_steps: Steps between projections, at least 1.
        mini: Whether one factor is used for the whole matrix, and not one for each channel.
        projector: ``normal`` or ``orthogonal``: random; no state. ``online_pca``: fitted to the gradient; kept as state.
        pca_orthonormalize: What online PCA does to P after each of its steps: ``qr``, ``norm`` of the columns, or ``none``.
            ``none`` oscillates where one direction holds more than half of the gradient's energy, and then amplifies
            round-off, so that layouts drift apart.
        lazy: Draw a random projection again in every step instead of keeping it in memory until the next one is due.
        seed: Seed of the projections, which depend on it, the parameter's name and the step alone.
        decay_after: Decay the new weights, as the authors' code does, instead of the old ones.
        pg_collection: Process groups; needed when plain tensors are sharded.
        projector_factory: ``projector_factory(rank=, dim=, proj_type=)`` makes the projector of each matrix
            (:class:`~.parts.subspace_projectors.ProjectorFactory`); None for ``projector``. The settings of that, and
            ``update_steps``, are then without effect. Every rank gathers whole gradients and gives them to its own projectors.

    ``state_dict()["projectors"]`` holds what projectors of a ``projector_factory`` keep, by their own ``state_dict()``. Neither
    ``shardstep.save`` nor a chain of optimizers saves that: a resumed optimizer whose projectors begin anew refuses to step.

    A norm of exactly 0, as after a first gradient of zeros, does not limit the next norm.

    Raises:
        ValueError: for an argument out of range, a parameter that is not 2-D, or one shorter than ``rank``.
        TypeError: for a ``projector_factory`` whose projector lacks ``step``, ``down`` or ``scale``.

    Source: Zhu et al. 2024, https://arxiv.org/abs/2412.05270; the limiter: Chen et al. 2024, https://arxiv.org/abs/2410.01623
    """

    matrices_only = True

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        rank: int = 1,
        scale: float = 1.0,
        scale_front: bool = False,
        update_steps: int = 10,
        mini: bool = False,
        projector: Projector = "normal",
        pca_orthonormalize: Orthonormalize = "qr",
        lazy: bool = True,
        seed: int = 0,
        decay_after: bool = False,
        pg_collection: ProcessGroupCollection | None = None,
        *,
        projector_factory: ProjectorFactory | None = None,
    ) -> None:
        check_adam(lr, betas, eps, weight_decay)
        non_negative("scale", scale)
        whole_number("update_steps", update_steps, 1)
        whole_number("rank", rank, 1)
        choice("projector", projector, get_args(Projector))
        choice("pca_orthonormalize", pca_orthonormalize, get_args(Orthonormalize))
        if projector_factory is not None and projector != "normal":
            raise ValueError(f"projector={projector!r} and a projector_factory are given; give one of the two.")
        self._drawn: Drawn = {}
        self.projector_factory = projector_factory
        self._projectors: dict[str, ProjectorLike] = {}
        self._fresh: set[str] = set()
        super().__init__(
            params,
            pg_collection,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            rank=rank,
            scale=scale,
            scale_front=scale_front,
            update_steps=update_steps,
            mini=mini,
            projector=projector,
            pca_orthonormalize=pca_orthonormalize,
            lazy=lazy,
            seed=seed,
            decay_after=decay_after,
        )

    @classmethod
    def mini(cls, params: ParamsT, **kwargs: Any) -> "ApolloMini":
        """APOLLO-Mini; arguments of :class:`ApolloMini`."""
        return ApolloMini(params, **kwargs)

    def check(self, p: Tensor, group: Mapping[str, Any]) -> None:
        """As in the base class; refuses a parameter whose shorter side is smaller than ``rank``."""
        super().check(p, group)
        shape = self.layout(p).shape
        if not 1 <= group["rank"] <= min(shape):
            raise ValueError(
                f"{self._name(p)}: rank={group['rank']} must be from 1 to {min(shape)}, the shorter side of the whole matrix "
                f"{shape}; lower it, or give this parameter to an elementwise optimizer (adamw)."
            )
        if self.projector_factory is not None and (key := self._key(p)) not in self._projectors:
            self._projectors[key] = self._projector(shape, group["rank"])
            self._fresh.add(key)

    def _projector(self, shape: tuple[int, ...], rank: int) -> ProjectorLike:
        assert self.projector_factory is not None
        made = self.projector_factory(rank=rank, dim=min(shape), proj_type="left" if shape[0] < shape[1] else "right")
        if missing := [name for name in ("step", "down", "scale") if not hasattr(made, name)]:
            raise TypeError(
                f"projector_factory made a {type(made).__name__} without {missing}; a projector has step(gradient), "
                f"down(gradient) and the number scale (ProjectorLike)."
            )
        return made

    def layout(self, p: Tensor) -> Layout:
        """As in the base class; with a ``projector_factory`` also the ranks that gather the matrix."""
        lay = super().layout(p)
        if self.projector_factory is None or lay.is_whole:
            return lay
        return replace(lay, domain=self._groups.domain(working_axes(lay, "duplicated")))

    def traffic(self, layout: Layout) -> tuple[float, int]:
        """As in the base class: projectors of a ``projector_factory`` need the whole gradient."""
        return 0.0, 0 if layout.domain is None else math.prod(layout.shape)

    def state_specs(self, group: Mapping[str, Any], layout: Layout) -> Mapping[str, StateSpec]:
        """``exp_avg``, ``exp_avg_sq`` (rank, longer side); ``update_norm``, ``step`` scalars; ``projection`` of online PCA."""
        sides = Sides.of(layout)
        moment = StateSpec("r" + sides.letter(sides.kept), rank=group["rank"])
        return {
            "step": StateSpec("", dtype=torch.float32, host=True),
            "exp_avg": moment,
            "exp_avg_sq": moment,
            "update_norm": StateSpec(""),
            **projection_specs(group, layout),
        }

    def rule(self, group: Mapping[str, Any]) -> RuleFunction:
        """Algorithm 1."""
        return self._apollo

    def _apollo(self, p: Tensor, g: Tensor, s: Any, lay: Layout, group: Mapping[str, Any]) -> Rule:
        (beta1, beta2), sides = group["betas"], Sides.of(lay)
        x = sides.turned(g)  # (B, d, k)
        s.step.add_(1)
        if self.projector_factory is None:
            basis = yield projection(x, s, lay, group, self._drawn)
            r = yield lay.across(basis.mT @ x, sides.projected)  # (B, rank, k)
        else:
            r = yield self._by_projectors(g, s.names, lay)
        s.exp_avg.lerp_(r, 1 - beta1)
        s.exp_avg_sq.lerp_(r.square(), 1 - beta2)
        normed = s.exp_avg / (s.exp_avg_sq.sqrt() + group["eps"])
        squares = torch.stack([normed, r], -1).square().sum(-3, keepdim=True)  # (B, 1, k, 2)
        if group["mini"]:
            squares = yield lay.across(squares.sum(-2, keepdim=True), sides.kept)
        after, before = squares.sqrt().unbind(-1)
        u = x * (after / (before + 1e-8))
        front, back = (math.sqrt(group["scale"]), 1.0) if group["scale_front"] else (1.0, math.sqrt(group["scale"]))
        u = front * u
        u = (yield _limit_growth(u, s.update_norm, lay)) * back
        u = sides.turned(u * (bias_correction(beta2, s.step, u).sqrt() / bias_correction(beta1, s.step, u)))
        return u + group["weight_decay"] * (p - float(group["lr"]) * u if group["decay_after"] else p)

    def _by_projectors(self, g: Tensor, names: list[str], lay: Layout) -> Rule:
        """The gradients ``g`` (B, *shard) projected by the objects of ``projector_factory``, (B, rank, k); these take a step."""
        wholes = g
        if not lay.is_whole:
            wholes = yield Move(g, len(g), lay.placement, lay.everywhere, g.dtype, g.device)
        projected = []
        for name, whole in zip(names, wholes, strict=True):
            self._projectors[name].step(whole)
            projected.append(self._projectors[name].down(whole) * self._projectors[name].scale)
        r = torch.stack(projected).to(g)
        kept = Sides.of(lay).kept
        return shard_of(r, Layout((r.shape[-2], lay.shape[kept]), (None, lay.splits[kept])))

    def check_step(self) -> None:
        """As in the base class; refuses projectors that begin anew where the moments do not."""
        super().check_step()
        if not self._fresh:
            return
        stepping = [(self._key(p), p) for group in self.param_groups for p in group["params"] if p.grad is not None]
        for key, p in stepping:
            if key in self._fresh and (steps := int(self.state[p]["step"])):
                raise ValueError(
                    f"{key}: its state has taken {steps} steps, but its projector none; load a state_dict() of this optimizer, "
                    f"which has {PROJECTORS!r}, or replace projector_factory= by projector=, which every checkpoint holds."
                )
        self._fresh.difference_update(key for key, _ in stepping)

    def state_dict(self) -> dict[str, Any]:
        """As in the base class; with a ``projector_factory`` also ``projectors``, the states of the projectors by parameter.

        Raises:
            ValueError: for a projector without a ``state_dict()``.
        """
        saved = super().state_dict()
        for key, projector in self._projectors.items():
            if not (hasattr(projector, "state_dict") and hasattr(projector, "load_state_dict")):
                raise ValueError(
                    f"{key}: its projector is a {type(projector).__name__} without state_dict() and load_state_dict(), and a "
                    f"resumed run would go on with another projection; give the class both."
                )
        states = {key: cast(Any, projector).state_dict() for key, projector in self._projectors.items()}
        return {**saved, PROJECTORS: states} if states else saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in the base class; ``state_dict`` is not changed.

        Raises:
            ValueError: as in the base class, and for projectors of another kind than this optimizer's; nothing is changed then.
        """
        for saved, group in zip(state_dict.get("param_groups", ()), self.param_groups, strict=False):
            for name in ("projector", "rank"):
                if saved.get(name, group[name]) != group[name]:
                    raise ValueError(
                        f"the state was saved with {name}={saved[name]!r}, and this optimizer has {name}={group[name]!r}; "
                        f"build it with {name}={saved[name]!r}."
                    )
        projectors = self._loaded(state_dict.get(PROJECTORS))
        super().load_state_dict({key: value for key, value in state_dict.items() if key != PROJECTORS})
        self._fresh = set() if PROJECTORS in state_dict else {*projectors}
        self._projectors = projectors

    def _loaded(self, states: Any) -> dict[str, ProjectorLike]:
        """New projectors with these states, by parameter; without states as they are made."""
        made = {}
        for group in self.param_groups if self.projector_factory is not None else ():
            for p in group["params"]:
                made[self._key(p)] = self._projector(self.layout(p).shape, group["rank"])
        if states is None:
            return made
        if not isinstance(states, Mapping) or states.keys() != made.keys():
            given = sorted(states) if isinstance(states, Mapping) else type(states).__name__
            raise ValueError(
                f"the state dict has {PROJECTORS!r} of {given}, and this optimizer has projectors of {sorted(made)}; build it "
                f"with the projector_factory and the parameter names that it was saved with."
            )
        for key, projector in made.items():
            try:
                cast(Any, projector).load_state_dict(states[key])
            except Exception as error:
                raise ValueError(f"{key}: its projector refuses the state that was saved: {error}") from error
        return made


def _limit_growth(u: Tensor, last: Tensor, lay: Layout) -> Rule:
    """``u``, scaled down if its norm exceeds 1.01·``last``; ``last`` (B,) becomes the norm of the result.

    Source: Chen et al. 2024, section 3.3, https://arxiv.org/abs/2410.01623
    """
    norm = yield lay.norm(u)
    before = last.view_as(norm)
    limiter = torch.where(before > 0, (norm / (before + 1e-8)).clamp_min(GROWTH) / GROWTH, 1.0)
    last.copy_((norm / limiter).view_as(last))
    return u / limiter


class ApolloMini(Apollo):
    """APOLLO with rank 1, one factor a matrix and ``scale`` 128: about the memory of SGD. Arguments as :class:`Apollo`.

    Source: Zhu et al. 2024, section 4.2, https://arxiv.org/abs/2412.05270
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        scale: float = 128.0,
        update_steps: int = 10,
        projector: Projector = "normal",
        seed: int = 0,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            rank=1,
            scale=scale,
            update_steps=update_steps,
            mini=True,
            projector=projector,
            seed=seed,
            pg_collection=pg_collection,
        )
