"""Entries of our registry in Megatron-Core's."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import nn
from torch.optim import Optimizer

from ..optimizer import registry as ours
from ..optimizer.optimizer_config import ParamKey
from ..process_groups_config import ProcessGroupCollection
from .expected_matrices import check_expected_matrices
from .flat_ranges import flat_optimizer
from .layer_wise import keep_together
from .mup import follow_width
from .parameter_tags import keep_attributes, tag
from .refusals import REPLACED, cannot_be_cut, check, is_flat, is_layer_wise
from .resume import resume_across, resumes
from .saved_state import check_before_loading
from .settings import PREFIX, Settings
from .sharded_state import say_layouts, take_our_state
from .upstream import CONFIG, FACTORY, REGISTRY, lookup, patch


def register() -> None:
    """Add every optimizer of our registry to Megatron-Core's, as ``shardstep_<name>``. A second call changes nothing.

    Raises:
        ImportError: when Megatron-Core is missing, or has no registry.
    """
    (registry,) = lookup(REGISTRY, "_EMERGING_OPTIMIZERS")
    keep_attributes()
    take_our_state()
    resume_across()
    check_before_loading()
    keep_together(name_of)
    follow_width(name_of)
    patch(FACTORY, "_get_megatron_emerging_optimizer", _optimizer)
    for name in ours.list_optimizers():
        registry[f"{PREFIX}{name}"] = _entry(name)


def replace_muon() -> None:
    """Make Megatron-Core's names ``muon`` and ``adaptive_muon`` ours too."""
    (registry,) = lookup(REGISTRY, "_EMERGING_OPTIMIZERS")
    for name in REPLACED:
        registry[name] = _entry(name)


def name_of(optimizer: str) -> str | None:
    """The name in our registry of what Megatron-Core calls ``optimizer``; None for what is not ours."""
    (registry,) = lookup(REGISTRY, "_EMERGING_OPTIMIZERS")
    to_kwargs = getattr(registry.get(optimizer), "config_to_kwargs", None)
    return to_kwargs.args[0] if isinstance(to_kwargs, partial) and to_kwargs.func is _to_kwargs else None


def _optimizer(
    theirs: Callable[..., Any],
    config: Any,
    model_chunks: Sequence[nn.Module],
    config_overrides: Any = None,
    pg_collection: Any = None,
) -> Any:
    """Megatron-Core's ``_get_megatron_emerging_optimizer``, which also builds elementwise optimizers of ours on flat ranges.

    Raises:
        ValueError: for any other optimizer on flat ranges, also Megatron-Core's own: it would be built, and ranks would drift
            apart.
    """
    name = name_of(config.optimizer)
    if name is not None:
        check_expected_matrices(name, config, model_chunks, config_overrides, pg_collection)
    if not is_flat(config) or config.optimizer.startswith("dist_"):
        return theirs(config, model_chunks, config_overrides, pg_collection)
    if name is None:
        raise cannot_be_cut(config)
    check(name, config, model_chunks, pg_collection)
    kwargs = _constructor_kwargs(name, config, model_chunks, None)
    return flat_optimizer(
        ours.entry_of(name).optimizer_cls, kwargs, config, model_chunks, config_overrides, pg_collection
    )


def _entry(name: str) -> Any:
    (entry_cls,) = lookup(REGISTRY, "EmergingOptimizerEntry")
    entry = ours.entry_of(name)

    def build(param_groups: Any, **kwargs: Any) -> Optimizer:
        return resumes(say_layouts(entry.optimizer_cls(param_groups, **kwargs)))

    return entry_cls(
        optimizer_cls=build,
        init_state_fn=entry.init_state_fn,
        config_to_kwargs=partial(_to_kwargs, name),
        default_param_overrides=_their_keys(entry.default_param_overrides),
    )


def _to_kwargs(name: str, config: Any, model_chunks: Sequence[nn.Module], pg_collection: Any) -> dict[str, Any]:
    """Constructor arguments; marks fused weights first, because Megatron-Core does it by the shape of a shard."""
    check(name, config, model_chunks, pg_collection)
    groups = _groups(pg_collection, config)
    tag(model_chunks, groups, split_heads=Settings(config, name).splits_heads)
    return _constructor_kwargs(name, config, model_chunks, groups)


def _constructor_kwargs(name: str, config: Any, model_chunks: Sequence[nn.Module], groups: Any) -> dict[str, Any]:
    to_kwargs = ours.entry_of(name).config_to_kwargs or partial(ours._default_adam_based_eopt_config_to_kwargs, name)
    return to_kwargs(Settings(config, name), model_chunks, groups)


def _groups(theirs: Any, config: Any) -> ProcessGroupCollection:
    """Groups of the ranks that share a matrix; in the layer-wise optimizer data-parallel ranks have different matrices."""
    copies = not is_layer_wise(config)
    return ProcessGroupCollection(
        tp=theirs.tp,
        pp=getattr(theirs, "pp", None),
        dp=getattr(theirs, "dp_cp", None) if copies else None,
        expt_tp=getattr(theirs, "expt_tp", None),
        expt_dp=getattr(theirs, "expt_dp", None) if copies else None,
    )


def _their_keys(overrides: Mapping[ParamKey, Mapping[str, Any]]) -> dict[Any, dict[str, Any]]:
    key_cls, *test_cls = lookup(CONFIG, "ParamKey", "ParamPredicate", "ParamWithNamePredicate")

    def tests(ours: Any, cls: Any) -> tuple[Any, ...]:
        return tuple(cls(f"{PREFIX}{test.name}", test.fn) for test in (ours if isinstance(ours, tuple) else (ours,)))

    return {
        key_cls(
            name=key.name,
            attr=key.attr,
            predicate=tests(key.predicate, test_cls[0]),
            with_name_predicate=tests(key.with_name_predicate, test_cls[1]),
        ): dict(settings)
        for key, settings in overrides.items()
    }
