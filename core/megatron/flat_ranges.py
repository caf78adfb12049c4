"""Elementwise optimizers on the flat ranges of Megatron-Core's ``DistributedOptimizer``.

That optimizer lays all parameters of a data-parallel group end to end and gives each rank an equal range, so a parameter is cut
wherever a range ends. An elementwise rule steps such pieces as it steps parameters.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..sharding.layout import Layout
from .resume import resumes
from .upstream import DISTRIBUTED, FACTORY, PARALLEL, installed, lookup

DistributedOptimizer: Any
(DistributedOptimizer,) = lookup(DISTRIBUTED, "DistributedOptimizer")


class FlatOptimizer(DistributedOptimizer):
    """Megatron-Core's distributed optimizer around one of ours, with checkpoints that hold whatever state that one has.

    Args:
        cls: Class of ours, of kind ``elementwise``.
        kwargs: Constructor arguments of the class.
        param_groups: Groups of the model's parameters; mutated: in the end they are groups of pieces. Empty on a rank
            without any.
        config: Megatron-Core's ``OptimizerConfig``.
        rest: Further arguments of Megatron-Core's distributed optimizer.

    Raises:
        ValueError: for a class with scalars other than a count of steps, which the checkpoints have no place for.
    """

    def __init__(
        self, cls: type, kwargs: Mapping[str, Any], param_groups: list[dict[str, Any]], config: Any, **rest: Any
    ) -> None:
        # Ours makes its state at once; of whole parameters it would take as much memory as is to be saved.
        groups = Optimizer(param_groups, {}) if param_groups else None
        super().__init__(groups, config, None, _state_is_there, **rest)
        self.optimizer: Any = None
        if groups is not None:
            self.optimizer = _on_ranges(cls, kwargs, groups.param_groups)
            _check_state(self.optimizer)

    @property
    def optimizer_state_keys(self) -> tuple[str, ...]:
        """Names of the state tensors that are cut like the parameters."""
        group = self.optimizer.param_groups[0]
        return tuple(name for name, spec in self.optimizer.specs(group).items() if spec.dims == "*")

    def state_dict(self) -> dict[str, Any]:
        """Settings of the groups, and the count of steps in each, where Megatron-Core's own Adam has it too."""
        self.optimizer.take_state()
        steps = {int(state["step"]) for state in self.optimizer.state.values() if "step" in state}
        assert len(steps) <= 1, "every piece has a gradient in every step"
        kept = {"step": max(steps)} if steps else {}
        found = self.optimizer.state_dict()
        del found["state"]
        found["param_groups"] = [
            {**{name: value for name, value in group.items() if name != "params"}, **kept}
            for group in found["param_groups"]
        ]
        return {"optimizer": found}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Inverse of :meth:`state_dict`, with the state itself, where there is some."""
        groups = state_dict["optimizer"]["param_groups"]
        step = max((int(group.get("step") or 0) for group in groups), default=0)
        saved = {**state_dict["optimizer"], "param_groups": [{**group, "step": step} for group in groups]}
        super().load_state_dict({**state_dict, "optimizer": saved})
        for group in self.optimizer.param_groups:
            group.pop("step", None)
            counts = "step" in self.optimizer.specs(group)
            for p in group["params"]:
                # Without TransformerEngine a count is put into every state, one tensor for all.
                held = self.optimizer.state[p].pop("step", None)
                if counts:
                    self.optimizer.state[p]["step"] = torch.full_like(held, step)

    def _get_main_param_and_optimizer_states(self, model_param: Any) -> dict[str, Tensor]:
        self.optimizer.take_state()  # somebody may have cleared it
        group, place = self.model_param_group_index_map[model_param]
        main = self.optimizer.param_groups[group]["params"][place]
        return {"param": main, **{name: self.optimizer.state[main][name] for name in self.optimizer_state_keys}}

    @torch.no_grad()
    def _set_main_param_and_optimizer_states(self, model_param: Any, tensors: Mapping[str, Tensor]) -> None:
        for name, held in self._get_main_param_and_optimizer_states(model_param).items():
            if name in tensors:  # a weight in float32 has no other copy
                held.copy_(tensors[name])


def flat_optimizer(
    cls: type,
    kwargs: Mapping[str, Any],
    config: Any,
    model_chunks: Sequence[nn.Module],
    config_overrides: Any,
    pg_collection: Any,
) -> Any:
    """Build of a class of ours what Megatron-Core's ``get_megatron_optimizer`` builds of Adam.

    Args:
        cls: The class, of kind ``elementwise``.
        kwargs: Constructor arguments of the class.
        config: Megatron-Core's ``OptimizerConfig``.
        model_chunks: Modules in their data-parallel wrapper, which reduces and scatters gradients.
        config_overrides: Megatron-Core's overrides, by ``ParamKey``.
        pg_collection: Megatron-Core's process groups; None: those of ``parallel_state``.

    Returns:
        A ``ChainedOptimizer``: of dense parameters, and of experts where there are any.

    Raises:
        ValueError: when this Megatron-Core's distributed optimizer takes no optimizer but Adam.
    """
    if not hasattr(DistributedOptimizer, "optimizer_state_keys"):
        raise ValueError(
            f"optimizer={config.optimizer!r} with use_distributed_optimizer=True needs Megatron-Core 0.19 or later; the "
            f"distributed optimizer of {installed()} takes only Adam. Set use_layer_wise_distributed_optimizer=True and "
            f"use_distributed_optimizer=False in OptimizerConfig, or leave both out."
        )
    chain, collection, groups_and_buffers = lookup(
        FACTORY, "ChainedOptimizer", "ProcessGroupCollection", "_get_param_groups_and_buffers"
    )
    (gloo,) = lookup(PARALLEL, "_DATA_PARALLEL_GROUP_WITH_CP_GLOO")
    groups = collection.setup_process_groups_for_optimizer(
        pg_collection, model_chunks, use_gloo_process_groups=pg_collection is None and gloo is not None
    )
    several = groups["dp_cp_group"].size() > groups["intra_dp_cp_group"].size()
    tp = collection.use_mpu_process_groups() if pg_collection is None else pg_collection
    members = []
    for is_expert, buffers, model_parallel, data_parallel in _KINDS:
        param_groups, per_model_buffers = groups_and_buffers(
            model_chunks,
            model_chunk_offset=0,
            config=config,
            config_overrides=config_overrides,
            filter_fn=lambda group, is_expert=is_expert: group["is_expert_parallel"] == is_expert,
            buffer_name=buffers,
        )
        if is_expert and not param_groups:
            continue
        member = FlatOptimizer(
            cls,
            kwargs,
            param_groups,
            config,
            model_chunks=model_chunks,
            per_model_buffers=per_model_buffers,
            data_parallel_group=groups[data_parallel],
            data_parallel_group_gloo=groups[f"{data_parallel}_gloo"],
            data_parallel_group_idx=groups[model_parallel].rank(),
            distributed_optimizer_instance_id=groups["inter_dist_opt_group"].rank() if several else 0,
        )
        member.grad_stats_parallel_group = groups["intra_dist_opt_group"]
        member.tp_group, member.expert_tp_group = tp.tp, getattr(tp, "expt_tp", tp.tp)
        members.append(member)
    return chain(members)


_KINDS = (
    (False, "buffers", "mp_group", "intra_dp_cp_group"),
    (True, "expert_parallel_buffers", "expt_tp_pp_with_egtp_remat_group", "intra_expt_dp_group"),
)
"""Dense parameters and experts: the attribute with their buffers, and their process groups."""


class _Pieces:
    """Mixin that takes a piece for a whole tensor, whatever the attributes of its parameter say."""

    def layout(self, p: Tensor) -> Layout:
        assert p.dtype == torch.float32, "only 16 bits are rounded by numbers that depend on the place in the whole"
        return Layout.whole(p.shape)


@cache
def _of_pieces(cls: type) -> Callable[..., Any]:
    return type(cls.__name__, (_Pieces, cls), {})


def _on_ranges(cls: type, kwargs: Mapping[str, Any], param_groups: list[dict[str, Any]]) -> Any:
    # Pieces of float32 parameters are views, which torch takes for no parameters; Megatron-Core puts them in afterwards too.
    made = _of_pieces(cls)([{**group, "params": []} for group in param_groups], **kwargs)
    for mine, group in zip(made.param_groups, param_groups, strict=True):
        mine["params"] = group["params"]
    made.take_state()
    return resumes(made)


def _check_state(optimizer: Any) -> None:
    every = [optimizer.specs(group) for group in optimizer.param_groups]
    scalars = {name for specs in every for name, spec in specs.items() if spec.dims != "*"}
    if scalars - {"step"} or any(specs.keys() != every[0].keys() for specs in every):
        raise ValueError(
            f"{type(optimizer).__name__} keeps {sorted({name for specs in every for name in specs})}; the checkpoints of "
            f"use_distributed_optimizer=True have one count of steps and the same tensors for all parameters. Set "
            f"use_layer_wise_distributed_optimizer=True instead."
        )


def _state_is_there(optimizer: Any, config: Any = None) -> None:
    """Megatron-Core calls this to make state; ours exists from the start."""
