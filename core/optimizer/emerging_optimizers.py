"""The optimizer registry: names to classes, with Megatron-Core's interface.

To add an optimizer: write or import its class, and add an ``EmergingOptimizerEntry`` to ``_EMERGING_OPTIMIZERS`` below (or
call :func:`register_optimizer`). Write a ``_<name>_config_to_kwargs`` where :func:`_kwargs_from_config` does not serve.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import entry_points
from typing import Any, get_args

from emerging_optimizers.orthogonalized_optimizers.muon_utils import NSCoeffT
from torch import Tensor, nn
from torch.optim import Optimizer

from ..process_groups_config import ProcessGroupCollection
from .chained import ChainedOptimizer
from .optimizer_config import OptimizerConfig, ParamKey, ParamPredicate, unknown
from .routing import Mask, Overrides, check_settings, param_groups, route
from .rules.adafactor import Adafactor, AdafactorSR
from .rules.adam import Adam, AdamW, RAdam
from .rules.adamw_sr import AdamWSR
from .rules.adaptive_muon import TensorParallelAdaptiveMuon
from .rules.ademamix import AdEMAMix
from .rules.apollo import Apollo, ApolloMini
from .rules.bge_adam import BGEAdam
from .rules.came import Came
from .rules.emerging_library import LIBRARY, library_optimizer
from .rules.hn_adam import HNAdam
from .rules.lamb_lars import Lamb, Lars
from .rules.lion import Lion
from .rules.mars import Mars
from .rules.micro_adam import MicroAdam
from .rules.muon_optax import OptaxMuon
from .rules.psgd import Quad, Skew
from .rules.rmsprop import RMSprop
from .rules.schedule_free import ScheduleFreeAdamW, ScheduleFreeSGD
from .rules.sgd import SGD
from .rules.shampoo_soap import Shampoo, Soap
from .rules.sophia import Sophia
from .rules.tensor_parallel_muon import TensorParallelMuon
from .steps.constructor_settings import Setting, constructor_arguments, settings
from .steps.weight_decay import METHOD

__all__ = [
    "EmergingOptimizerEntry",
    "TensorParallelAdaptiveMuon",
    "TensorParallelMuon",
    "get_optimizer",
    "get_supported_coefficient_types",
    "list_optimizers",
    "register_optimizer",
    "validate_coefficient_type",
]

ENTRY_POINTS = "shardstep.optimizers"
"""Entry-point group in which other packages name their ``EmergingOptimizerEntry``."""


def get_supported_coefficient_types() -> tuple[str, ...]:
    """The coefficient sets that the installed ``emerging_optimizers`` names."""
    return get_args(NSCoeffT)


def validate_coefficient_type(coefficient_type: str) -> None:
    """Raise ValueError, naming the supported types, unless ``coefficient_type`` is among them."""
    supported = get_supported_coefficient_types()
    if coefficient_type not in supported:
        raise ValueError(f"Unsupported muon coefficient type '{coefficient_type}'. Supported types: {supported}")


def _is_nonlinear_or_embedding(param: Tensor) -> bool:
    """True for parameters that must not use a matrix optimizer."""
    return bool(getattr(param, "is_embedding_or_output_parameter", False)) or param.ndim != 2


_NOT_A_MATRIX = ("*embed*", "*router*", "*output_layer.weight", "*lm_head.weight")
"""Names of weights that are 2-D, but tables of rows or too sensitive to be orthogonalized, whether or not they are tagged."""


def _default_param_overrides_factory() -> dict[ParamKey, dict[str, Any]]:
    """Route non-linear, embedding, output and router parameters to Adam."""
    tests = (
        ParamPredicate("nonlinear_or_embedding", _is_nonlinear_or_embedding),
        ParamPredicate("use_muon=False", lambda param: getattr(param, "use_muon", True) is False),
    )
    return {ParamKey(name=_NOT_A_MATRIX, predicate=tests): {"optimizer": "adam"}}


def _eopt_init_state_fn(opt: Any, config: Any = None) -> None:
    """Make state for every parameter, also those without a gradient: a checkpoint is loaded into it."""
    for group in opt.param_groups:
        opt._init_group(group, skip_non_grad_params=False)


@dataclass
class EmergingOptimizerEntry:
    """What it takes to build an optimizer by name.

    Attributes:
        optimizer_cls: The class.
        init_state_fn: ``(optimizer, config=None)``: makes the state of every parameter.
        config_to_kwargs: ``(config, model_chunks, pg_collection)`` → constructor arguments; None for the default.
        default_param_overrides: Settings for parameters that the class must not get.
        builder: Class that makes functional optimizers of it (:mod:`.builders`); None for the one that serves all.
    """

    optimizer_cls: type
    init_state_fn: Callable[..., None] = _eopt_init_state_fn
    config_to_kwargs: Callable[[Any, Sequence[nn.Module], Any], dict[str, Any]] | None = None
    default_param_overrides: dict[ParamKey, dict[str, Any]] = field(default_factory=_default_param_overrides_factory)
    builder: type | None = None


def _kwargs_from_config(optimizer_cls: type, prefix: str, config: Any) -> dict[str, Any]:
    """For each constructor argument but ``self`` and ``params``: ``config.{prefix}_{name}``, or ``config.{name}``, or nothing."""
    kwargs = {}
    for name in constructor_arguments(optimizer_cls):
        if name in ("self", "params"):
            continue
        for field_name in (f"{prefix}_{name}", name) if name != METHOD else (f"{prefix}_{name}",):
            if hasattr(config, field_name):
                kwargs[name] = getattr(config, field_name)
                break
    return kwargs


def _get_qkv_split_shapes(model_cfg: Any) -> list[int]:
    """Rows of q (and its gate), k and v in one query group of a fused QKV weight."""
    query = model_cfg.num_attention_heads // model_cfg.num_query_groups * model_cfg.kv_channels
    queries = [query, query] if getattr(model_cfg, "attention_output_gate", False) else [query]
    return [*queries, model_cfg.kv_channels, model_cfg.kv_channels]


def _muon_config_to_kwargs(config: Any, model_chunks: Sequence[nn.Module], pg_collection: Any) -> dict[str, Any]:
    """Constructor arguments of :class:`TensorParallelMuon`."""
    kwargs = _kwargs_from_config(TensorParallelMuon, "muon", config)
    kwargs.setdefault("use_decoupled_weight_decay", getattr(config, "decoupled_weight_decay", True))
    kwargs["is_qkv_fn"] = lambda p: bool(getattr(p, "is_qkv", False))
    model_cfg = getattr(model_chunks[0], "config", None) if model_chunks else None
    if hasattr(model_cfg, "num_query_groups"):
        kwargs["qkv_split_shapes"] = _get_qkv_split_shapes(model_cfg)
    kwargs["pg_collection"] = pg_collection
    return kwargs


def _adaptive_muon_config_to_kwargs(
    config: Any, model_chunks: Sequence[nn.Module], pg_collection: Any
) -> dict[str, Any]:
    """Constructor arguments of :class:`TensorParallelAdaptiveMuon`: Muon's, then its own."""
    own = _kwargs_from_config(TensorParallelAdaptiveMuon, "adaptive_muon", config)
    return {**_muon_config_to_kwargs(config, model_chunks, pg_collection), **own}


def _default_adam_based_eopt_config_to_kwargs(
    eopt_name: str, config: Any, model_chunks: Sequence[nn.Module], pg_collection: Any
) -> dict[str, Any]:
    """Constructor arguments by name; ``betas``, ``eps`` and process groups only where the class takes them."""
    cls = _entry(eopt_name).optimizer_cls
    known = {"betas": (config.adam_beta1, config.adam_beta2), "pg_collection": pg_collection}
    taken = constructor_arguments(cls)
    return {**{k: v for k, v in known.items() if k in taken}, **_kwargs_from_config(cls, eopt_name, config)}


def from_config(eopt_name: str) -> Callable[[Any, Sequence[nn.Module], Any], dict[str, Any]]:
    """For an entry whose class has defaults of its own: ``lr``, ``weight_decay`` and what the config says of it by name."""

    def to_kwargs(config: Any, model_chunks: Sequence[nn.Module], pg_collection: Any) -> dict[str, Any]:
        return {
            **_kwargs_from_config(_entry(eopt_name).optimizer_cls, eopt_name, config),
            "pg_collection": pg_collection,
        }

    return to_kwargs


def _adam_config_to_kwargs(config: Any, model_chunks: Sequence[nn.Module], pg_collection: Any) -> dict[str, Any]:
    kwargs = _kwargs_from_config(AdamW, "adam", config)
    return {**kwargs, "betas": (config.adam_beta1, config.adam_beta2), "pg_collection": pg_collection}


def _create_emerging_optimizer(
    config: Any, param_groups: Any, eopt_name: str, model_chunks: Sequence[nn.Module], pg_collection: Any
) -> tuple[Optimizer, Callable[..., None]]:
    """Build the optimizer called ``eopt_name`` for ``param_groups``; returns it and what makes its state."""
    entry = _entry(eopt_name)
    to_kwargs = entry.config_to_kwargs or partial(_default_adam_based_eopt_config_to_kwargs, eopt_name)
    return entry.optimizer_cls(param_groups, **to_kwargs(config, model_chunks, pg_collection)), entry.init_state_fn


_EMERGING_OPTIMIZERS: dict[str, EmergingOptimizerEntry] = {
    "muon": EmergingOptimizerEntry(TensorParallelMuon, config_to_kwargs=_muon_config_to_kwargs),
    "adaptive_muon": EmergingOptimizerEntry(
        TensorParallelAdaptiveMuon, config_to_kwargs=_adaptive_muon_config_to_kwargs
    ),
    "muon_optax": EmergingOptimizerEntry(OptaxMuon, config_to_kwargs=from_config("muon_optax")),
    "adamw": EmergingOptimizerEntry(AdamW, config_to_kwargs=_adam_config_to_kwargs, default_param_overrides={}),
    "adam": EmergingOptimizerEntry(Adam, config_to_kwargs=_adam_config_to_kwargs, default_param_overrides={}),
    "sgd": EmergingOptimizerEntry(SGD, default_param_overrides={}),
    "radam": EmergingOptimizerEntry(RAdam, default_param_overrides={}),
    "rmsprop": EmergingOptimizerEntry(RMSprop, config_to_kwargs=from_config("rmsprop"), default_param_overrides={}),
    "lion": EmergingOptimizerEntry(Lion, config_to_kwargs=from_config("lion"), default_param_overrides={}),
    "ademamix": EmergingOptimizerEntry(AdEMAMix, config_to_kwargs=from_config("ademamix"), default_param_overrides={}),
    "schedule_free_adamw": EmergingOptimizerEntry(
        ScheduleFreeAdamW, config_to_kwargs=from_config("schedule_free_adamw"), default_param_overrides={}
    ),
    "schedule_free_sgd": EmergingOptimizerEntry(
        ScheduleFreeSGD, config_to_kwargs=from_config("schedule_free_sgd"), default_param_overrides={}
    ),
    "sophia": EmergingOptimizerEntry(Sophia, config_to_kwargs=from_config("sophia"), default_param_overrides={}),
    "adamw_sr": EmergingOptimizerEntry(AdamWSR, default_param_overrides={}),
    "micro_adam": EmergingOptimizerEntry(
        MicroAdam, config_to_kwargs=from_config("micro_adam"), default_param_overrides={}
    ),
    "apollo": EmergingOptimizerEntry(Apollo, config_to_kwargs=from_config("apollo")),
    "apollo_mini": EmergingOptimizerEntry(ApolloMini, config_to_kwargs=from_config("apollo_mini")),
    "adafactor": EmergingOptimizerEntry(
        Adafactor, config_to_kwargs=from_config("adafactor"), default_param_overrides={}
    ),
    "adafactor_sr": EmergingOptimizerEntry(
        AdafactorSR, config_to_kwargs=from_config("adafactor_sr"), default_param_overrides={}
    ),
    "came": EmergingOptimizerEntry(Came, config_to_kwargs=from_config("came"), default_param_overrides={}),
    "lamb": EmergingOptimizerEntry(Lamb, default_param_overrides={}),
    "lars": EmergingOptimizerEntry(Lars, config_to_kwargs=from_config("lars"), default_param_overrides={}),
    "mars": EmergingOptimizerEntry(Mars, config_to_kwargs=from_config("mars"), default_param_overrides={}),
    "bge_adam": EmergingOptimizerEntry(BGEAdam, config_to_kwargs=from_config("bge_adam"), default_param_overrides={}),
    "hn_adam": EmergingOptimizerEntry(HNAdam, config_to_kwargs=from_config("hn_adam"), default_param_overrides={}),
    "shampoo": EmergingOptimizerEntry(Shampoo, config_to_kwargs=from_config("shampoo")),
    "soap": EmergingOptimizerEntry(Soap, config_to_kwargs=from_config("soap")),
    "quad": EmergingOptimizerEntry(Quad, config_to_kwargs=from_config("quad")),
    "skew": EmergingOptimizerEntry(Skew, config_to_kwargs=from_config("skew")),
    "psgd_skew": EmergingOptimizerEntry(Skew, config_to_kwargs=from_config("psgd_skew")),
}


def register_optimizer(name: str, entry: EmergingOptimizerEntry | None = None) -> Any:
    """Make ``entry`` available as ``name``; without an entry, a decorator for an optimizer class with default settings, or for
    a builder (:class:`.builders.OptimizerBuilder`) whose ``optimizer_cls`` that is. Names are in lower case.

    Raises:
        ValueError: when the name is taken.
    """
    name = name.lower()
    if name in _EMERGING_OPTIMIZERS or name in LIBRARY:
        raise ValueError(f"optimizer {name!r} is already registered, as {_entry(name).optimizer_cls.__name__}.")

    def register(cls: type) -> type:
        builds: type | None = getattr(cls, "optimizer_cls", None)
        _EMERGING_OPTIMIZERS[name] = EmergingOptimizerEntry(builds or cls, builder=cls if builds else None)
        return cls

    if entry is None:
        return register
    if not isinstance(entry, EmergingOptimizerEntry):
        raise TypeError(f"{entry!r} is not an EmergingOptimizerEntry; write EmergingOptimizerEntry({entry!r}).")
    _EMERGING_OPTIMIZERS[name] = entry
    return entry


def list_optimizers() -> tuple[str, ...]:
    """All names, those of other packages' entry points included, in alphabetical order."""
    return tuple(sorted({*_EMERGING_OPTIMIZERS, *LIBRARY, *(point.name for point in entry_points(group=ENTRY_POINTS))}))


_READS = {"adamw": ("adam",), "adaptive_muon": ("adaptive_muon", "muon")}
"""Optimizers whose settings carry other names than their own."""


def settings_of(name: str) -> dict[str, Setting]:
    """The settings that the optimizer called ``name`` takes from a config, ``lion_betas`` and the like."""
    return {
        f"{prefix}_{setting.argument}": setting
        for prefix in _READS.get(name, (name,))
        for setting in settings(_entry(prefix).optimizer_cls)
        if (prefix, setting.argument) != ("adam", "betas")  # the config has adam_beta1 and adam_beta2
    }


def takers_of(field: str) -> dict[str, Setting]:
    """The optimizers that have the setting ``field``, and what each says of it; none where there is no such setting."""
    # Some classes take seconds to import, so only those that the name may belong to are.
    near = (n for n in list_optimizers() if any(field.startswith(f"{prefix}_") for prefix in _READS.get(n, (n,))))
    return {name: of_name[field] for name in near if field in (of_name := settings_of(name))}


def all_settings() -> list[str]:
    """The names of the settings of all registered optimizers; imports them all."""
    return list(dict.fromkeys(field for name in list_optimizers() for field in settings_of(name)))


def _library_entry(name: str) -> EmergingOptimizerEntry:
    cls = library_optimizer(name)
    entry = EmergingOptimizerEntry(cls)
    if name == "eo_lion":  # its second beta is the decay of a mean of the gradient, not of its square
        entry.config_to_kwargs = from_config(name)
    return replace(entry, default_param_overrides={}) if not cls.matrices_only else entry


def _entry(name: str) -> EmergingOptimizerEntry:
    name = name.lower()
    if name in LIBRARY and name not in _EMERGING_OPTIMIZERS:
        _EMERGING_OPTIMIZERS[name] = _library_entry(name)
    if name not in _EMERGING_OPTIMIZERS:
        for point in entry_points(group=ENTRY_POINTS, name=name):
            _EMERGING_OPTIMIZERS[name] = point.load()
            break
        else:
            raise ValueError(unknown("optimizer", name, list_optimizers()))
    return _EMERGING_OPTIMIZERS[name]


def _embedding_names(model_chunks: Sequence[nn.Module]) -> tuple[str, ...]:
    """Weights of ``nn.Embedding`` modules, whatever they are called."""
    return tuple(
        f"{name}.weight".removeprefix(".")
        for chunk in model_chunks
        for name, module in chunk.named_modules()
        if isinstance(module, nn.Embedding)
    )


def get_optimizer(
    config: OptimizerConfig,
    model_chunks: nn.Module | Sequence[nn.Module],
    pg_collection: ProcessGroupCollection | None = None,
    param_overrides: Overrides | None = None,
    weight_decay_mask: Mask | None = None,
) -> ChainedOptimizer:
    """Build the optimizer of a model: every parameter gets one, by ``config.optimizer``, its entry's overrides and yours.

    Args:
        config: Names the optimizer and its settings.
        model_chunks: This rank's module, or modules; parameter names must be global.
        pg_collection: Process groups, ours or Megatron-Core's. DTensors (``fully_shard``, ``parallelize_module``) need none,
            their meshes say who holds what; pipeline stages, and plain tensors with Megatron's attributes, do.
        param_overrides: Settings for the parameters that a key selects, ``{"optimizer": "adamw", "lr": 1e-3}``; they win
            over the entry's own.
        weight_decay_mask: Which parameters get weight decay: ``mask(name, param)``, or patterns of names, of which
            ``"!*.bias"`` excludes; None: those that are not 1-D. Overrides that set ``wd_mult`` win over it.

    Raises:
        ValueError: for an unknown name, a missing learning rate, or overrides that contradict each other or match nothing.
    """
    if config.lr is None:
        raise ValueError("config.lr is None; give the learning rate.")
    model_chunks = [model_chunks] if isinstance(model_chunks, nn.Module) else model_chunks
    groups = ProcessGroupCollection() if pg_collection is None else ProcessGroupCollection.from_any(pg_collection)
    defaults = _entry(config.optimizer).default_param_overrides
    if defaults and (tables := _embedding_names(model_chunks)):
        defaults = {**defaults, ParamKey(name=tables): {"optimizer": "adam"}}
    routed = route(config, model_chunks, defaults, param_overrides or {}, groups, weight_decay_mask)
    decoupled = {"adam": "adamw"} if config.decoupled_weight_decay else {}
    routed = [replace(r, optimizer=decoupled.get(r.optimizer, r.optimizer)) for r in routed]
    members: dict[str, Optimizer] = {}
    stages = groups.domain((groups.axis("pp"),)).gather(list(dict.fromkeys(r.optimizer for r in routed)))
    # In one order on all stages: a norm over the whole model is a collective of its own.
    here = {r.optimizer for r in routed}
    for name in (name for name in dict.fromkeys(name for stage in stages for name in stage) if name in here):
        mine = [_with_decay(group, name, config) for group in param_groups([r for r in routed if r.optimizer == name])]
        optimizer, init_state = _create_emerging_optimizer(config, mine, name, model_chunks, groups)
        check_settings(name, optimizer)
        init_state(optimizer, config)
        members[name] = optimizer
    _check_global_clips(members, stages, groups)
    return ChainedOptimizer(members, groups)


def _with_decay(group: dict[str, Any], name: str, config: OptimizerConfig) -> dict[str, Any]:
    """``group``, told to add weight decay to the gradient if ``config`` says so and the optimizer has no word for it."""
    own = {"decoupled_weight_decay", "use_decoupled_weight_decay"} & constructor_arguments(
        _entry(name).optimizer_cls
    ).keys()
    coupled = config.decoupled_weight_decay or name in ("adam", "sgd") or own
    return group if coupled else {METHOD: "l2", **group}


def _check_global_clips(
    members: dict[str, Optimizer], stages: Sequence[Sequence[str]], groups: ProcessGroupCollection
) -> None:
    """Refuse, on all stages, an optimizer that clips by a norm over the whole model and is missing on one of them."""
    mine = [name for name, member in members.items() if getattr(member, "max_norm", None) is not None]
    for clipping in groups.domain((groups.axis("pp"),)).gather(mine):
        for name in clipping:
            if missing := [i for i, stage in enumerate(stages) if name not in stage]:
                raise ValueError(
                    f"{name} clips by a norm over the whole model, but pipeline stages {missing} have no parameter for it and "
                    f"would not take part; give every stage one, or turn its clipping off ({name}_max_grad_norm=0)."
                )
