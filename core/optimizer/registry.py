"""The registry: the entry that builds each optimizer, by name.

One line of :data:`_OPTIMIZERS` registers an optimizer: its class, and beside it only what differs from the defaults.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from importlib.metadata import entry_points
from typing import Any

from torch import Tensor, nn

from .param_key import ParamKey, ParamWithNamePredicate
from .rules.adafactor import Adafactor, AdafactorSR
from .rules.adam import Adam, AdamW, RAdam
from .rules.adamw_sr import AdamWSR
from .rules.adaptive_muon import TensorParallelAdaptiveMuon
from .rules.ademamix import AdEMAMix
from .rules.apollo import Apollo, ApolloMini
from .rules.bge_adam import BGEAdam
from .rules.came import Came
from .rules.emerging_library import library, library_optimizer, missing
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
from .steps.argument_checks import unknown
from .steps.constructor_settings import Setting, constructor_arguments, settings
from .steps.weight_decay import METHOD

ConfigToKwargs = Callable[[Any, Sequence[nn.Module], Any], dict[str, Any]]
"""``(config, model_chunks, pg_collection)`` → constructor arguments."""

ENTRY_POINTS = "shardstep.optimizers"
"""Entry-point group in which other packages name their ``EmergingOptimizerEntry``."""


def _is_nonlinear_or_embedding(param: Tensor) -> bool:
    """True for parameters that must not use a matrix optimizer."""
    return bool(getattr(param, "is_embedding_or_output_parameter", False)) or param.ndim != 2


_NOT_A_MATRIX = ("*embed*", "*router*", "*output_layer.weight", "*lm_head.weight")
"""Names of 2-D weights that must not be orthogonalized, tagged or not: tables of rows, and weights too sensitive for it."""


def _default_param_overrides_factory() -> dict[ParamKey, dict[str, Any]]:
    """Route non-linear, embedding, output and router parameters to Adam; the attribute ``use_muon`` of a parameter wins."""
    tests: dict[str, Callable[[Tensor, str], bool]] = {
        "it is not 2-D": lambda param, _: param.ndim != 2,
        "is_embedding_or_output_parameter": lambda param, _: getattr(param, "is_embedding_or_output_parameter", False),
        "it has one row or column": lambda param, _: _is_one_vector(param),
        **{f"name matches {pattern}": partial(_is_called, pattern) for pattern in _NOT_A_MATRIX},
    }
    predicates = [
        ParamWithNamePredicate("use_muon=False", lambda param, _: getattr(param, "use_muon", None) is False),
        *(ParamWithNamePredicate(why, partial(unless_asked_for, test)) for why, test in tests.items()),
    ]
    return {ParamKey(with_name_predicate=tuple(predicates)): {"optimizer": "adam"}}


def unless_asked_for(test: Callable[[Tensor, str], bool], param: Tensor, name: str) -> bool:
    """``test(param, name)``, but False where the user asks for the matrix optimizer by ``param.use_muon = True``."""
    return getattr(param, "use_muon", None) is not True and bool(test(param, name))


def _is_called(pattern: str, param: Tensor, name: str) -> bool:
    return fnmatchcase(name, pattern)


def _is_one_vector(param: Tensor) -> bool:
    """Whether the whole of a 2-D parameter has one row or one column; a shard may have one row of many."""
    cut = getattr(param, "partition_dim", -1) if getattr(param, "tensor_model_parallel", True) else -1
    return param.ndim == 2 and any(size == 1 and dim != cut for dim, size in enumerate(param.shape))


def _eopt_init_state_fn(opt: Any, config: Any = None) -> None:
    """Make the state of every parameter, also without a gradient, because a checkpoint is loaded into existing state."""
    for group in opt.param_groups:
        opt._init_group(group, skip_non_grad_params=False)


@dataclass
class EmergingOptimizerEntry:
    """An entry of the registry: how to build an optimizer from a config.

    Attributes:
        optimizer_cls: The optimizer class.
        init_state_fn: ``init_state_fn(optimizer, config=None)`` makes the state of every parameter.
        config_to_kwargs: ``(config, model_chunks, pg_collection)`` → constructor arguments; None takes each argument from the
            setting of its name, and ``betas`` from ``adam_beta1`` and ``adam_beta2``.
        default_param_overrides: Overrides that give parameters which the class must not get to another optimizer.
        builder: Class that builds functional optimizers of this class (:mod:`.functional.builders`); None for the default one.
    """

    optimizer_cls: type
    init_state_fn: Callable[..., None] = _eopt_init_state_fn
    config_to_kwargs: ConfigToKwargs | None = None
    default_param_overrides: dict[ParamKey, dict[str, Any]] = field(default_factory=_default_param_overrides_factory)
    builder: type | None = None


def _kwargs_from_config(optimizer_cls: type, prefix: str, config: Any) -> dict[str, Any]:
    """Constructor arguments that the config has, without ``params``: ``config.{prefix}_{name}``, or else ``config.{name}``."""
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
    cls = entry_of(eopt_name).optimizer_cls
    known = {"betas": (config.adam_beta1, config.adam_beta2), "pg_collection": pg_collection}
    taken = constructor_arguments(cls)
    return {**{k: v for k, v in known.items() if k in taken}, **_kwargs_from_config(cls, eopt_name, config)}


def from_config(eopt_name: str) -> ConfigToKwargs:
    """A function of (config, model_chunks, pg_collection) that returns the constructor arguments which the config has.

    It is for a class whose defaults are its own: ``betas`` do not come from ``adam_beta1`` and ``adam_beta2``.
    """

    def to_kwargs(config: Any, model_chunks: Sequence[nn.Module], pg_collection: Any) -> dict[str, Any]:
        cls = entry_of(eopt_name).optimizer_cls
        groups = {"pg_collection": pg_collection} if "pg_collection" in constructor_arguments(cls) else {}
        return {**_kwargs_from_config(cls, eopt_name, config), **groups}

    return to_kwargs


def _adam_config_to_kwargs(config: Any, model_chunks: Sequence[nn.Module], pg_collection: Any) -> dict[str, Any]:
    kwargs = _kwargs_from_config(AdamW, "adam", config)
    if getattr(config, "optimizer", None) == "muon_optax":
        # optax.contrib.muon gives its arguments to the Adam of the other parameters, too.
        kwargs.setdefault("nesterov", getattr(config, "muon_optax_nesterov", True))
        kwargs.setdefault("mu_dtype", getattr(config, "muon_optax_mu_dtype", None))
    return {**kwargs, "betas": (config.adam_beta1, config.adam_beta2), "pg_collection": pg_collection}


_OPTIMIZERS: dict[str, type | tuple[type, ConfigToKwargs | None]] = {
    "muon": (TensorParallelMuon, _muon_config_to_kwargs),
    "adaptive_muon": (TensorParallelAdaptiveMuon, _adaptive_muon_config_to_kwargs),
    "muon_optax": OptaxMuon,
    "adamw": (AdamW, _adam_config_to_kwargs),
    "adam": (Adam, _adam_config_to_kwargs),
    "sgd": SGD,
    "radam": (RAdam, None),
    "rmsprop": RMSprop,
    "lion": Lion,
    "ademamix": AdEMAMix,
    "schedule_free_adamw": ScheduleFreeAdamW,
    "schedule_free_sgd": ScheduleFreeSGD,
    "sophia": Sophia,
    "adamw_sr": (AdamWSR, None),
    "micro_adam": MicroAdam,
    "apollo": Apollo,
    "apollo_mini": ApolloMini,
    "adafactor": Adafactor,
    "adafactor_sr": AdafactorSR,
    "came": Came,
    "lamb": (Lamb, None),
    "lars": Lars,
    "mars": Mars,
    "bge_adam": BGEAdam,
    "hn_adam": HNAdam,
    "shampoo": Shampoo,
    "soap": Soap,
    "quad": Quad,
    "skew": Skew,
    "psgd_skew": Skew,
}
"""Name → class, or class and ``config_to_kwargs`` where the arguments cannot be read from the config by name alone."""


def entry_for(name: str, cls: type, *config_to_kwargs: ConfigToKwargs | None, builder: type | None = None) -> Any:
    """The default entry for a class: arguments by name, and overrides only if the class does not take every parameter.

    Args:
        name: Name in the registry.
        cls: The optimizer class. Its attribute ``matrices_only`` says whether parameters that are not matrices must go to
            Adam; without that attribute they do.
        config_to_kwargs: As in :class:`EmergingOptimizerEntry`; left out, arguments are read by name (:func:`from_config`).
        builder: Builder, as in :class:`EmergingOptimizerEntry`.
    """
    every_shape = getattr(cls, "matrices_only", True) is False
    (to_kwargs,) = config_to_kwargs or (from_config(name),)
    overrides = {} if every_shape else _default_param_overrides_factory()
    return EmergingOptimizerEntry(cls, config_to_kwargs=to_kwargs, default_param_overrides=overrides, builder=builder)


_EMERGING_OPTIMIZERS: dict[str, EmergingOptimizerEntry] = {
    name: entry_for(name, *(line if isinstance(line, tuple) else (line,))) for name, line in _OPTIMIZERS.items()
}
"""The registry."""


def entry_of(name: str) -> EmergingOptimizerEntry:
    """The entry called ``name``, in upper or lower case, also from emerging-optimizers and entry points of other packages.

    Raises:
        ValueError: for an unknown name; names the nearest. For one that only other releases of emerging-optimizers have, says
            which.
    """
    name = name.lower()
    if name in library() and name not in _EMERGING_OPTIMIZERS:
        # The second beta of emerging-optimizers' Lion is the decay of a mean of the gradient, not of its square.
        special = () if name == "eo_lion" else (None,)
        _EMERGING_OPTIMIZERS[name] = entry_for(name, library_optimizer(name), *special)
    if name not in _EMERGING_OPTIMIZERS:
        for point in entry_points(group=ENTRY_POINTS, name=name):
            register_optimizer(name, point.load())
            break
        else:
            raise ValueError(missing().get(name) or unknown("optimizer", name, list_optimizers()))
    return _EMERGING_OPTIMIZERS[name]


def register_optimizer(name: str, entry: EmergingOptimizerEntry | type | None = None) -> Any:
    """Register ``entry`` under ``name``, which becomes lower case.

    Args:
        name: Name in the registry.
        entry: An entry; an optimizer class, whose arguments are read from the config by name; or a builder
            (:class:`.functional.builders.OptimizerBuilder`) with such a class as its ``optimizer_cls``. None returns a
            decorator for a class.

    Returns:
        ``entry``, or the decorator.

    Raises:
        ValueError: when the name is taken.
    """
    name = name.lower()
    if name in _EMERGING_OPTIMIZERS or name in library():
        raise ValueError(f"optimizer {name!r} is already registered, as {entry_of(name).optimizer_cls.__name__}.")
    if entry is None:
        return lambda cls: register_optimizer(name, cls)
    if isinstance(entry, type):
        builds: type | None = getattr(entry, "optimizer_cls", None)
        _EMERGING_OPTIMIZERS[name] = entry_for(name, builds or entry, builder=entry if builds else None)
    elif isinstance(entry, EmergingOptimizerEntry):
        _EMERGING_OPTIMIZERS[name] = entry
    else:
        raise TypeError(f"{entry!r} is no optimizer class and no EmergingOptimizerEntry; give one of the two.")
    return entry


def list_optimizers() -> tuple[str, ...]:
    """All names in alphabetical order, with those of the installed emerging-optimizers and of entry points of other packages.

    :func:`missing_optimizers` has the names that only other releases of emerging-optimizers have.
    """
    return tuple(
        sorted({*_EMERGING_OPTIMIZERS, *library(), *(point.name for point in entry_points(group=ENTRY_POINTS))})
    )


def missing_optimizers() -> dict[str, str]:
    """Names that only other releases of emerging-optimizers have → why the installed one does not offer them."""
    return missing()


_READS = {"adamw": ("adam",), "adaptive_muon": ("adaptive_muon", "muon")}
"""Optimizer → prefixes of its settings, where these are not its own name alone."""


def settings_of(name: str) -> dict[str, Setting]:
    """The settings that the optimizer called ``name`` takes from a config, ``lion_betas`` and the like."""
    return {
        f"{prefix}_{setting.argument}": setting
        for prefix in _READS.get(name, (name,))
        for setting in settings(entry_of(prefix).optimizer_cls)
        if (prefix, setting.argument) != ("adam", "betas")  # the config has adam_beta1 and adam_beta2
    }


def takers_of(field: str) -> dict[str, Setting]:
    """Optimizer → its setting called ``field``, for the optimizers that have one."""
    # Some classes take seconds to import, so only those whose prefix matches are imported.
    near = (n for n in list_optimizers() if any(field.startswith(f"{prefix}_") for prefix in _READS.get(n, (n,))))
    return {name: of_name[field] for name in near if field in (of_name := settings_of(name))}


def all_settings() -> list[str]:
    """Names of the settings of all registered optimizers; imports all their classes."""
    return list(dict.fromkeys(field for name in list_optimizers() for field in settings_of(name)))


def needs_l2(name: str, config: Any) -> bool:
    """Whether weight decay must be added to the gradients before they reach the optimizer called ``name``.

    It must if ``config`` asks for that and the optimizer has only decoupled decay and no argument to change it.
    """
    own = {"decoupled_weight_decay", "use_decoupled_weight_decay"} & constructor_arguments(
        entry_of(name).optimizer_cls
    ).keys()
    return not (config.decoupled_weight_decay or name in ("adam", "sgd") or own)
