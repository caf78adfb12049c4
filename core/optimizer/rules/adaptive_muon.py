"""Muon with a second moment, for tensor-parallel parameters, with Megatron-Core's names and arguments."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, get_args

from emerging_optimizers.orthogonalized_optimizers import AdaptiveMuon
from torch import Tensor
from torch.optim.optimizer import ParamsT

from ...cost.auto import Rates
from ...process_groups_config import ProcessGroupCollection
from ...sharding.layout import Layout
from ...sharding.state import StateSpec
from ..steps.argument_checks import choice, fraction, non_negative
from ..steps.stacked import RuleFunction
from .muon import Moment2, adaptive_muon, moment2_spec
from .parts.ns_coefficients import NsCoeffs
from .tensor_parallel_muon import TensorParallelMode, TensorParallelMuon


class TensorParallelAdaptiveMuon(TensorParallelMuon, AdaptiveMuon):
    """Muon with a second moment of the orthogonalized direction, whose statistics are those of the whole matrix.

    As :class:`TensorParallelMuon`, and:

    Args:
        moment2_method: ``adamuon`` (elementwise), ``normuon`` (per index of the longer side) or ``namo`` (one number).
        beta2: Decay of the second moment, in [0, 1).
        eps: Added to the denominator, or its smallest value.
        align_rms: Scale the update of ``adamuon`` to the size of Muon's, so that Muon's learning rates fit. Without it, as in
            emerging-optimizers and Megatron-Core, the update is larger by about the square root of the longer side.

    The second moment is taken of the unscaled direction; the scale is applied once, afterwards.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 3e-4,
        momentum: float = 0.95,
        nesterov: bool = True,
        weight_decay: float = 0.01,
        use_decoupled_weight_decay: bool = True,
        split_qkv: bool = False,
        is_qkv_fn: Callable[[Tensor], bool] | None = None,
        qkv_split_shapes: Sequence[int] | None = None,
        fp32_matmul_prec: str = "medium",
        coefficient_type: str = "quintic",
        num_ns_steps: int = 5,
        scale_mode: str = "spectral",
        extra_scale_factor: float = 1.0,
        pg_collection: ProcessGroupCollection | None = None,
        tp_mode: TensorParallelMode = "duplicated",
        moment2_method: Moment2 = "adamuon",
        beta2: float = 0.95,
        eps: float = 1e-8,
        *,
        align_rms: bool = False,
        ns_coeffs: NsCoeffs | None = None,
        ns_plan: str = "static",
        auto_rates: Rates | None = None,
        use_syrk: Literal[False] = False,
    ) -> None:
        choice("moment2_method", moment2_method, get_args(Moment2))
        fraction("beta2", beta2)
        non_negative("eps", eps)
        if moment2_method == "namo" and not use_decoupled_weight_decay:
            raise ValueError("moment2_method 'namo' needs the raw gradient; use decoupled weight decay with it.")
        if align_rms and moment2_method != "adamuon":
            raise ValueError(
                f"align_rms is for moment2_method 'adamuon'; {moment2_method!r} has Muon's size by itself. Leave it out."
            )
        self.moment2_method, self._align_rms = moment2_method, align_rms
        self._adaptive = {"beta2": beta2, "eps": eps}
        super().__init__(
            params,
            lr,
            momentum,
            nesterov,
            weight_decay,
            use_decoupled_weight_decay,
            split_qkv,
            is_qkv_fn,
            qkv_split_shapes,
            fp32_matmul_prec,
            coefficient_type,
            num_ns_steps,
            scale_mode,
            extra_scale_factor,
            pg_collection,
            tp_mode,
            ns_coeffs=ns_coeffs,
            ns_plan=ns_plan,
            auto_rates=auto_rates,
            use_syrk=use_syrk,
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch; ``beta2`` and ``eps`` may differ by group."""
        self.defaults.update(self._adaptive)
        super().add_param_group(param_group)

    def state_specs(self, group: Mapping[str, Any], layout: Layout) -> Mapping[str, StateSpec]:
        """``momentum_buffer`` like the parameter; ``moment2_buffer`` by method."""
        return {
            **super().state_specs(group, layout),
            "moment2_buffer": moment2_spec(self.moment2_method, layout),
        }

    def rule(self, group: Mapping[str, Any]) -> RuleFunction:
        """Muon's with a second moment (:func:`~.muon.adaptive_muon`)."""
        return partial(adaptive_muon, how=self._how, method=self.moment2_method, align_rms=self._align_rms)
