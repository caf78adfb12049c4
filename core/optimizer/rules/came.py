"""CAME: a running mean of Adafactor's update, scaled by how little the update varies."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT

from ...process_groups_config import ProcessGroupCollection
from ...sharding.layout import Layout
from ...sharding.requests import Rule
from ...sharding.state import StateSpec
from ..steps.argument_checks import fraction, non_negative, positive
from ..steps.stacked import RuleFunction, StackedStep
from .parts.factored import Scaling, SquareSums, inverse_root, inverse_roots, last_two, square_sums


class Came(StackedStep):
    """Confidence-guided Adafactor.

    Matrices are the last two dims; dims before them are a batch of matrices that share the clipping. Below two dims no
    moment is factored and nothing is rescaled by confidence.

    State: ``row``, ``col`` (or ``v``) of g²; ``m``, the running mean of the update; ``res_row``, ``res_col`` of (u - m)².

    Args:
        params: Parameters or parameter groups, any shapes, DTensors or plain tensors.
        lr: Learning rate.
        betas: Decays of ``m``, of the mean of g², and of the mean of (u - m)², in [0, 1).
        eps: Added to g² and to (u - m)², > 0.
        clip_threshold: Largest RMS of u, > 0.
        weight_decay: Coefficient, ≥ 0, decoupled.
        pg_collection: Process groups of the parameters.

    Raises:
        ValueError: for an argument out of range.

    Source: Luo et al. 2023, algorithm 2, https://arxiv.org/abs/2307.02047
    """

    returns = "parameter"

    def __init__(
        self,
        params: ParamsT,
        lr: float = 2e-4,
        betas: tuple[float, float, float] = (0.9, 0.999, 0.9999),
        eps: tuple[float, float] = (1e-30, 1e-16),
        clip_threshold: float = 1.0,
        weight_decay: float = 0.0,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        non_negative("lr", float(lr))
        if len(betas) != 3:
            raise ValueError(
                f"betas={betas} must be three numbers, the decays of the update, of g² and of the residual."
            )
        if len(eps) != 2:
            raise ValueError(f"eps={eps} must be two numbers: one added to g², one to the squared residual.")
        for i, beta in enumerate(betas):
            fraction(f"betas[{i}]", beta)
        for i, e in enumerate(eps):
            positive(f"eps[{i}]", e)
        positive("clip_threshold", clip_threshold)
        non_negative("weight_decay", weight_decay)
        super().__init__(
            params,
            pg_collection,
            lr=lr,
            betas=betas,
            eps=eps,
            clip_threshold=clip_threshold,
            weight_decay=weight_decay,
        )

    def state_specs(self, group: Mapping[str, Any], layout: Layout) -> Mapping[str, StateSpec]:
        """``m``, and the factors of both moments or ``v``."""
        dims = last_two(layout.shape)
        if dims is None:
            return {"m": StateSpec("*"), "v": StateSpec("*")}
        factors = dims.specs(layout.ndim, "row", "col") | dims.specs(layout.ndim, "res_row", "res_col")
        return {"m": StateSpec("*"), **factors}

    def rule(self, group: Mapping[str, Any]) -> RuleFunction:
        """Algorithm 2."""
        return self._step

    def _step(self, p: Tensor, g: Tensor, s: Any, lay: Layout, group: Mapping[str, Any]) -> Rule:
        """The new parameters, in the memory of ``p``."""
        lr, (beta1, beta2, beta3), (eps1, eps2) = float(group["lr"]), group["betas"], group["eps"]
        one = p.new_ones([1] * p.ndim)
        dims = last_two(lay.shape)
        if dims is None:
            s.v.lerp_(g.square().add_(eps1), 1 - beta2)
            r, c = inverse_root(s.v), one
        else:
            r, c = yield inverse_roots(s.row, s.col, square_sums(g, dims), lay, fresh=1 - beta2, eps=eps1)
        scaling = Scaling(r, c, dims)
        size = yield scaling.rms(g, lay)
        scaling = scaling.times((size / group["clip_threshold"]).clamp_min(1).reciprocal())

        residual = None if dims is None else SquareSums(g, dims)
        for at, u in scaling.blocks(g):
            change = u.sub_(s.m[at])
            s.m[at].add_(change, alpha=1 - beta1)
            if residual is not None:
                residual.add(change.square_(), at)
        confidence = Scaling(one, one, None)
        if residual is not None:
            # With the new m, u - m is β1 times its value for the old m.
            residual.row.mul_(beta1**2)
            residual.col.mul_(beta1**2)
            r, c = yield inverse_roots(s.res_row, s.res_col, residual, lay, fresh=1 - beta3, eps=eps2)
            confidence = Scaling(r, c, dims)
        confidence.times(lr).subtract_(p, s.m, 1 - lr * group["weight_decay"] if group["weight_decay"] else None)
        return p
