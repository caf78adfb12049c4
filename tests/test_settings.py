"""What can be set of an optimizer: read from constructors, held by a config, handed to the constructor."""

import copy
import dataclasses
import inspect
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import pytest
import torch
from emerging_optimizers.orthogonalized_optimizers import MOP, MuonHyperball
from torch import nn

from core.optimizer import registry
from core.optimizer.emerging_optimizers import EmergingOptimizerEntry, get_optimizer
from core.optimizer.optimizer_config import OptimizerConfig
from core.optimizer.registry import list_optimizers, settings_of
from core.optimizer.steps.constructor_settings import DTYPES, Setting, constructor_arguments, settings
from core.process_groups_config import ProcessGroupCollection

Precision = Literal["low", "high"]


class Toy(torch.optim.SGD):
    """One argument of every kind."""

    def __init__(
        self,
        params: Any,
        lr: float = 0.1,
        betas: tuple[float, float] = (0.9, 0.99),
        weights: tuple[float, ...] = (1.0,),
        rank: int = 4,
        threshold: float | None = None,
        scale: int | float = 1.0,
        exact: bool = False,
        corrected: bool | None = None,
        label: str = "toy",
        precision: Precision | Literal["exact"] = "high",
        mu_dtype: torch.dtype | None = None,
        weight_decay: float = 0.0,
        chooser: Callable[[Any], bool] | None = None,
        pair: tuple[int, str] = (1, "a"),
        either: float | Literal["auto"] = "auto",
        untold=0.5,
        untold_pair=(1, 2.0),
        untold_other=None,
        unknown: "Missing" = 3,  # noqa: F821
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        here = locals()
        self.given = {k: here[k] for k in inspect.signature(Toy).parameters if k not in ("params", "pg_collection")}
        super().__init__(params, lr=lr, weight_decay=weight_decay)


class Passing(Toy):
    """Hands on what it does not know."""

    def __init__(self, *args: Any, radius: float | None = None, label: str = "mine", **kwargs: Any) -> None:
        super().__init__(*args, label=label, **kwargs)
        self.given["radius"] = radius


@pytest.fixture
def toy():
    """Registers the class above; gives its name."""
    entry = EmergingOptimizerEntry(
        Toy,
        init_state_fn=lambda opt, config=None: None,
        config_to_kwargs=registry.from_config("toy"),
        default_param_overrides={},
    )
    registry.register_optimizer("toy", entry)
    yield "toy"
    del registry._EMERGING_OPTIMIZERS["toy"]


def by_name(cls: type) -> dict[str, Setting]:
    return {setting.argument: setting for setting in settings(cls)}


def test_what_a_constructor_can_be_given():
    assert settings(Toy) == (
        Setting("betas", float, (0.9, 0.99), many=True, length=2),
        Setting("weights", float, (1.0,), many=True),
        Setting("rank", int, 4),
        Setting("threshold", float, None, optional=True),
        Setting("scale", float, 1.0),
        Setting("exact", bool, False),
        Setting("corrected", bool, None, optional=True),
        Setting("label", str, "toy"),
        Setting("precision", str, "high", choices=("low", "high", "exact")),
        Setting("mu_dtype", str, None, choices=tuple(DTYPES), optional=True, is_dtype=True),
        Setting("untold", float, 0.5),
        Setting("untold_pair", float, (1, 2.0), many=True, length=2),
        Setting("unknown", int, 3),
    )


def test_arguments_that_are_handed_on_count_too():
    assert list(constructor_arguments(Passing))[:4] == ["self", "radius", "label", "params"]
    found = by_name(Passing)
    assert found["label"].default == "mine"
    assert found["betas"] == by_name(Toy)["betas"]


def test_arguments_of_emerging_optimizers():
    mop, hyperball = by_name(MOP), by_name(MuonHyperball)
    assert mop["scale_mode"].choices == ("shape_scaling", "spectral", "unit_rms_norm", "nuclear_norm")
    assert hyperball["hyperball_radius"] == Setting("hyperball_radius", float, None, optional=True)
    assert {"hyperball_eps", "momentum", "num_ns_steps"} <= set(hyperball)


def test_a_config_holds_them_beside_its_fields(toy):
    config = OptimizerConfig.from_dict(
        {"optimizer": toy, "lr": 0.5, "toy_betas": [0.5, 0.6], "toy_mu_dtype": "bfloat16", "toy_corrected": True}
    )
    assert (config.toy_betas, config.toy_mu_dtype, config.toy_corrected) == ((0.5, 0.6), torch.bfloat16, True)
    assert not hasattr(config, "toy_rank")
    member = get_optimizer(config, [nn.Linear(2, 2)]).members[toy]
    wanted = {"betas": (0.5, 0.6), "mu_dtype": torch.bfloat16, "corrected": True, "lr": 0.5, "weight_decay": 0.01}
    defaults = {name: parameter.default for name, parameter in inspect.signature(Toy).parameters.items()}
    assert member.given == {k: wanted.get(k, v) for k, v in defaults.items() if k not in ("params", "pg_collection")}


def test_copies_of_a_config_hold_them_too(toy):
    config = OptimizerConfig.from_dict({"toy_rank": 7})
    for other in (copy.deepcopy(config), pickle.loads(pickle.dumps(config)), dataclasses.replace(config, lr=1.0)):
        assert other.toy_rank == 7
    assert OptimizerConfig.from_dict(dataclasses.asdict(config)) == config != OptimizerConfig()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (
            "toy_bettas",
            "unknown optimizer setting 'toy_bettas'; did you mean 'toy_betas'.*possible: toy_betas, toy_corrected",
        ),
        ("tyo_rank", "'tyo_rank'; did you mean 'toy_rank'"),
        ("toy_lr", "unknown optimizer setting 'toy_lr'"),
        ("toy_chooser", "unknown optimizer setting 'toy_chooser'"),
        ("adam_betas", "did you mean 'adam_beta2' or 'adam_beta1'"),
    ],
)
def test_a_setting_that_does_not_exist(toy, name, said):
    with pytest.raises(ValueError, match=said):
        OptimizerConfig.from_dict({name: 1})


def test_a_dtype_that_does_not_exist(toy):
    with pytest.raises(ValueError, match="mu_dtype='bf16' is unknown; possible: float16, bfloat16"):
        OptimizerConfig.from_dict({"toy_mu_dtype": "bf16"})


def test_optimizers_that_share_a_setting_agree_about_it():
    seen: dict[str, Setting] = {}
    for name in list_optimizers():
        for field, setting in settings_of(name).items():
            other = seen.setdefault(field, setting)
            assert dataclasses.replace(other, default=None) == dataclasses.replace(setting, default=None), field


@pytest.mark.parametrize("name", list_optimizers())
def test_every_setting_reaches_the_constructor(name):
    """One at a time, none is left unread; and the defaults, said aloud, change nothing."""
    entry = registry.entry_of(name)
    to_kwargs = entry.config_to_kwargs or partial(registry._default_adam_based_eopt_config_to_kwargs, name)
    for field, setting in settings_of(name).items():
        value = object()
        config = OptimizerConfig(optimizer=name, lr=0.1)
        setattr(config, field, value)
        assert to_kwargs(config, [], None)[setting.argument] is value, field


@pytest.mark.parametrize("name", list_optimizers())
def test_defaults_said_aloud_are_what_the_constructor_takes(name):
    said = {
        field: setting.default
        for field, setting in settings_of(name).items()
        if setting.default is not inspect.Parameter.empty
    }
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    chain = get_optimizer(OptimizerConfig.from_dict({"optimizer": name, "lr": 0.1, **said}), [model])
    # Adam with decoupled weight decay is called by its name.
    assert (name if name != "adam" else "adamw") in chain.members


def test_settings_are_keywords_of_the_config():
    config = OptimizerConfig(optimizer="soap", soap_eps=1e-2, lion_betas=[0.9, 0.98])
    assert config == OptimizerConfig.from_dict({"optimizer": "soap", "soap_eps": 1e-2, "lion_betas": (0.9, 0.98)})
    assert (config.soap_eps, config.lion_betas, config.muon_momentum) == (1e-2, (0.9, 0.98), 0.95)
    assert config.settings == {"soap_eps": 1e-2, "lion_betas": (0.9, 0.98)}
    again = dataclasses.replace(config, lr=0.5, soap_eps=1e-3)
    assert (again.lr, again.soap_eps, config.soap_eps) == (0.5, 1e-3, 1e-2)
    assert copy.deepcopy(config) == config and "soap_eps" in repr(config)
    with pytest.raises(ValueError, match=r"unknown optimizer setting 'soap_epz'; did you mean 'soap_eps'"):
        OptimizerConfig(optimizer="soap", soap_epz=1e-2)
    with pytest.raises(ValueError, match="soap_eps is 'small'"):
        OptimizerConfig(optimizer="soap", soap_eps="small")
    with pytest.raises(ValueError, match="muon_momentum is 'much'"):
        OptimizerConfig(muon_momentum="much")


@dataclasses.dataclass
class Extended(OptimizerConfig):
    """A config with a field of its own."""

    warmup: int = 3


def test_a_config_can_be_extended():
    config = Extended(lr=0.1, warmup=5, settings={"soap_eps": 1e-2})
    assert (config.warmup, config.soap_eps) == (5, 1e-2)
    assert Extended.from_dict({"soap_eps": 1e-3}).soap_eps == 1e-3
    with pytest.raises(ValueError, match="lr is 'small'"):
        Extended(lr="small")
    assert "muon_tp_mode" in inspect.signature(OptimizerConfig).parameters
    assert OptimizerConfig("muon", 0.1, 0.01).min_lr == 0.01
