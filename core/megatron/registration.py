"""Entries of our registry in Megatron-Core's."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from torch import nn
from torch.optim import Optimizer

from ..optimizer import emerging_optimizers as ours
from ..optimizer.optimizer_config import ParamKey
from ..process_groups_config import ProcessGroupCollection
from .seam import CONFIG, REGISTRY, seam
from .settings import Settings
from .sharded_state import say_layouts, take_our_state
from .tags import keep_attributes, tag

PREFIX = "shardstep_"
REPLACED = ("muon", "adaptive_muon")


def register() -> None:
    """Add every optimizer of our registry to Megatron-Core's, as ``shardstep_<name>``. Again it does nothing new.

    Raises:
        ImportError: when Megatron-Core is missing, or has no registry.
    """
    (registry,) = seam(REGISTRY, "_EMERGING_OPTIMIZERS")
    keep_attributes()
    take_our_state()
    for name in ours.list_optimizers():
        registry[f"{PREFIX}{name}"] = _entry(name)


def replace_muon() -> None:
    """Make Megatron-Core's names ``muon`` and ``adaptive_muon`` ours too."""
    (registry,) = seam(REGISTRY, "_EMERGING_OPTIMIZERS")
    for name in REPLACED:
        registry[name] = _entry(name)


def _entry(name: str) -> Any:
    (entry_cls,) = seam(REGISTRY, "EmergingOptimizerEntry")
    entry = ours._entry(name)

    def build(param_groups: Any, **kwargs: Any) -> Optimizer:
        return say_layouts(entry.optimizer_cls(param_groups, **kwargs))

    return entry_cls(
        optimizer_cls=build,
        init_state_fn=entry.init_state_fn,
        config_to_kwargs=partial(_to_kwargs, name),
        default_param_overrides=_their_keys(entry.default_param_overrides),
    )


def _to_kwargs(name: str, config: Any, model_chunks: Sequence[nn.Module], pg_collection: Any) -> dict[str, Any]:
    """Constructor arguments; marks fused weights first, because Megatron-Core does it by the shape of a shard."""
    _check(name, config)
    tag(model_chunks)
    to_kwargs = ours._entry(name).config_to_kwargs or partial(ours._default_adam_based_eopt_config_to_kwargs, name)
    return to_kwargs(Settings(config, name), model_chunks, _groups(pg_collection, config))


def _groups(theirs: Any, config: Any) -> ProcessGroupCollection:
    """Which ranks share a matrix. In the layer-wise optimizer data-parallel ranks have different ones."""
    copies = not _is_layer_wise(config)
    return ProcessGroupCollection(
        tp=theirs.tp,
        pp=getattr(theirs, "pp", None),
        dp=getattr(theirs, "dp_cp", None) if copies else None,
        expt_tp=getattr(theirs, "expt_tp", None),
        expt_dp=getattr(theirs, "expt_dp", None) if copies else None,
    )


def _is_layer_wise(config: Any) -> bool:
    return bool(getattr(config, "use_layer_wise_distributed_optimizer", False))


def _check(name: str, config: Any) -> None:
    """Refuse what Megatron-Core would accept and step wrongly.

    Raises:
        ValueError: says what to set instead.
    """
    if config.use_distributed_optimizer and not _is_layer_wise(config):
        raise ValueError(
            f"optimizer={config.optimizer!r} with use_distributed_optimizer=True: its data-parallel ranks would step parts of a "
            f"gradient and drift apart. Set use_layer_wise_distributed_optimizer=True and use_distributed_optimizer=False in "
            f"OptimizerConfig (Megatron's --use-distributed-optimizer does that), or leave both out."
        )
    if name in _NEEDS_MORE:
        raise ValueError(f"optimizer={config.optimizer!r} does not run under Megatron-Core: {_NEEDS_MORE[name]}.")
    scalar = getattr(config, "muon_scalar_optimizer", "adam")
    if scalar != "adam" and config.optimizer not in REPLACED:
        raise ValueError(
            f"muon_scalar_optimizer={scalar!r} is Megatron's for its own names; with optimizer={config.optimizer!r} vectors and "
            f"embeddings are Adam's. Leave it out, or take --shardstep-replace-muon with --optimizer muon."
        )


_NEEDS_MORE = {
    "sophia": "nothing there estimates the Hessian's diagonal",
    **dict.fromkeys(
        ("schedule_free_adamw", "schedule_free_sgd"),
        "nothing there changes between the weights to train and to evaluate",
    ),
}


def _their_keys(overrides: Mapping[ParamKey, Mapping[str, Any]]) -> dict[Any, dict[str, Any]]:
    key_cls, predicate_cls = seam(CONFIG, "ParamKey", "ParamPredicate")

    def predicates(tests: Any) -> tuple[Any, ...]:
        return tuple(predicate_cls(f"{PREFIX}{test.name}", test.fn) for test in _several(tests))

    return {
        key_cls(name=key.name, attr=key.attr, predicate=predicates(key.predicate)): dict(settings)
        for key, settings in overrides.items()
    }


def _several(x: Any) -> tuple[Any, ...]:
    return x if isinstance(x, tuple) else (x,)
