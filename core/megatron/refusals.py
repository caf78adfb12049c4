"""Refuses, at construction, what Megatron-Core would accept with our optimizers and then step wrongly or not at all."""

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from ..optimizer import registry as ours

REPLACED = ("muon", "adaptive_muon")
"""Megatron-Core's own names that can be made ours."""

_NEEDS_MORE = {
    "sophia": "nothing there estimates the Hessian's diagonal",
    **dict.fromkeys(
        ("schedule_free_adamw", "schedule_free_sgd"),
        "nothing there changes between the weights to train and to evaluate",
    ),
}

_UNSERVED = {
    "fp16": "ours have no loss scale; train in bf16",
    "use_precision_aware_optimizer": "only Transformer Engine's Adam keeps main parameters itself; leave it out, main parameters "
    "and state are float32",
    "optimizer_cpu_offload": "state would stay where the parameters are; use_distributed_optimizer=True divides it instead",
    "overlap_param_gather_with_optimizer_step": "parameters would not be gathered; overlap_param_gather=True overlaps with the "
    "forward pass",
    "muon_use_syrk": "ours have no Triton kernel for the products of Newton-Schulz; leave --muon-use-syrk out",
    "optimizer_cuda_graph": "steps are counted on the host, and a graph would repeat the same one",
}
"""Settings of Megatron-Core's that ours do not follow, and what to do."""


def is_layer_wise(config: Any) -> bool:
    """Whether data-parallel ranks step different parameters, each of them whole."""
    return bool(getattr(config, "use_layer_wise_distributed_optimizer", False))


def is_flat(config: Any) -> bool:
    """Whether data-parallel ranks step ranges that cut parameters."""
    return bool(config.use_distributed_optimizer) and not is_layer_wise(config)


def runs_flat(name: str) -> bool:
    """Whether our optimizer called ``name`` steps all parameters entry by entry: they may be cut anywhere."""
    entry = ours.entry_of(name)
    return getattr(entry.optimizer_cls, "kind", None) == "elementwise" and not entry.default_param_overrides


def steps_whole(name: str, parameter: str, p: Tensor) -> bool:
    """Whether ``p``, called ``parameter`` in the model, is stepped by our optimizer ``name``, not by the Adam beside it."""
    return not any(key.matches(p, parameter) for key in ours.entry_of(name).default_param_overrides)  # type: ignore[arg-type]


def check(name: str, config: Any, model_chunks: Sequence[nn.Module], groups: Any) -> None:
    """Refuse what Megatron-Core would accept and step wrongly.

    Args:
        name: Name of the optimizer in our registry.
        config: Megatron-Core's ``OptimizerConfig``.
        model_chunks: Modules in their data-parallel wrapper.
        groups: Megatron-Core's process groups.

    Raises:
        ValueError: says what to set instead.
    """
    said = f"optimizer={config.optimizer!r}"
    if name in _NEEDS_MORE:
        raise ValueError(f"{said} does not run under Megatron-Core: {_NEEDS_MORE[name]}.")
    for setting, why in _UNSERVED.items():
        if getattr(config, setting, False):
            raise ValueError(f"{said} with {setting}=True: {why}.")
    if str(config.optimizer).startswith("dist_"):
        raise ValueError(
            f"{said} is Megatron-Core's old way to ask for the layer-wise optimizer, which ours would not notice; set "
            f"optimizer={str(config.optimizer).removeprefix('dist_')!r} and use_layer_wise_distributed_optimizer=True."
        )
    scalar = getattr(config, "muon_scalar_optimizer", "adam")
    if scalar != "adam" and config.optimizer not in REPLACED:
        raise ValueError(
            f"muon_scalar_optimizer={scalar!r} is Megatron's for its own names; with {said} vectors and embeddings are Adam's. "
            f"Leave it out, or take --shardstep-replace-muon with --optimizer muon."
        )
    if ours.needs_l2(name, config):
        raise ValueError(
            f"{said} with decoupled_weight_decay=False, which Megatron-Core does not hand on, and {name} decays decoupled. Leave "
            f"it True, or take shardstep_adam, _radam, _sgd or _muon."
        )
    _check_sharing(said, name, config, model_chunks)
    _check_gathered_weights(said, name, groups)
    _check_experts(said, name, model_chunks)


def cannot_be_cut(config: Any) -> ValueError:
    """An error for an optimizer, ours or Megatron-Core's own, that needs whole parameters."""
    return ValueError(
        f"optimizer={config.optimizer!r} with use_distributed_optimizer=True: its data-parallel ranks would step parts of a "
        f"gradient and drift apart. Set use_layer_wise_distributed_optimizer=True and use_distributed_optimizer=False in "
        f"OptimizerConfig (Megatron's --use-distributed-optimizer does that), or leave both out."
    )


def _check_sharing(said: str, name: str, config: Any, model_chunks: Sequence[nn.Module]) -> None:
    """Refuse a model whose wrapper leaves gradients on other ranks than those that the config makes step the parameters."""
    flat = is_flat(config)
    if flat and not runs_flat(name):
        raise cannot_be_cut(config)
    if is_layer_wise(config) and not config.bf16:
        raise ValueError(
            f"{said}: Megatron-Core's layer-wise optimizer steps in bf16 only; set bf16=True, or leave it out "
            f"(--use-distributed-optimizer)."
        )
    for chunk in model_chunks:
        ddp = getattr(chunk, "ddp_config", None)
        if getattr(ddp, "use_megatron_fsdp", False):
            raise ValueError(
                f"{said} with Megatron-FSDP, which cuts parameters by itself; leave use_megatron_fsdp out."
            )
        scatters = bool(getattr(ddp, "use_distributed_optimizer", False))
        if ddp is not None and flat and not scatters:
            raise ValueError(
                f"{said} with use_distributed_optimizer=True in OptimizerConfig, but not in the model's "
                f"DistributedDataParallelConfig; set it in both."
            )
        if scatters and not flat and not is_layer_wise(config):
            raise ValueError(
                f"{said}: use_distributed_optimizer=True in the model's DistributedDataParallelConfig leaves each rank a part of "
                f"the gradients, but OptimizerConfig says that every rank steps all parameters. Set it in both, or in neither."
            )
        if scatters and is_layer_wise(config):
            _check_layout(said, name, chunk)


def _check_layout(said: str, name: str, chunk: nn.Module) -> None:
    """Refuse a layout that leaves a rank with parts of gradients: it has whole ones only of parameters marked to stay whole."""
    for parameter, p in _trained(chunk):
        together = bool(getattr(p, "is_managed_by_layer_wise_optimizer", False))
        if together == steps_whole(name, parameter, p):
            continue
        remedy = (
            "set use_distributed_optimizer=True and use_layer_wise_distributed_optimizer=False"
            if runs_flat(name)
            else "wrap the model with use_distributed_optimizer=False (--no-use-layer-wise-param-layout), or mark its "
            "parameters with shardstep.core.megatron.tag_whole before"
        )
        raise ValueError(
            f"{said}: the layer-wise layout of gradients {'keeps' if together else 'does not keep'} {parameter} "
            f"{tuple(p.shape)} together, and {'an Adam on parts' if together else 'an optimizer of whole parameters'} is to "
            f"step it; {remedy}."
        )


def _check_gathered_weights(said: str, name: str, groups: Any) -> None:
    for axis in ("gtp_remat", "expt_gtp_remat"):
        group = getattr(groups, axis, None)
        if group is not None and group.size() > 1 and not runs_flat(name):
            raise ValueError(
                f"{said}: {group.size()} ranks of {axis} hold rows of each weight, and would step them as if they were matrices. "
                f"Leave generalized tensor parallelism out, or take an elementwise optimizer (shardstep_adamw)."
            )


def _check_experts(said: str, name: str, model_chunks: Sequence[nn.Module]) -> None:
    for parameter, p in (named for chunk in model_chunks for named in _trained(chunk)):
        if p.ndim > 2 and ".experts." in parameter and not steps_whole(name, parameter, p):
            raise ValueError(
                f"{said}: {parameter} {tuple(p.shape)} holds the matrices of several experts, and the Adam beside ours would "
                f"step it; set moe_single_grouped_weight=False in TransformerConfig."
            )


def _trained(chunk: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, p) for name, p in chunk.named_parameters() if p.requires_grad)
