"""The registry's interface, routing of parameters, and the chain that comes out."""

import inspect
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from core.optimizer import emerging_optimizers as registry
from core.optimizer.emerging_optimizers import EmergingOptimizerEntry, get_optimizer
from core.optimizer.optimizer_config import OptimizerConfig, ParamKey, ParamPredicate, ParamWithNamePredicate


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(16, 8)
        self.router = nn.Linear(8, 4, bias=False)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.norm = nn.LayerNorm(8)
        self.output = nn.Linear(8, 16, bias=False)
        self.output.weight.is_embedding_or_output_parameter = True

    def forward(self, x):
        x = self.embedding(x)
        for layer in self.layers:
            x = x + layer(x).tanh()
        return self.output(self.norm(x)) + self.router(x).sum()


def config(**kwargs) -> OptimizerConfig:
    return OptimizerConfig(**{"optimizer": "muon", "lr": 0.1, **kwargs})


def routes(chain) -> dict[str, str]:
    return {a.name: a.optimizer for a in chain.assignments()}


def test_every_contracted_name_is_there():
    names = (
        "get_supported_coefficient_types validate_coefficient_type _eopt_init_state_fn _default_param_overrides_factory "
        "EmergingOptimizerEntry _create_emerging_optimizer _is_nonlinear_or_embedding _get_qkv_split_shapes _EMERGING_OPTIMIZERS "
        "_kwargs_from_config _muon_config_to_kwargs _adaptive_muon_config_to_kwargs _default_adam_based_eopt_config_to_kwargs "
        "TensorParallelMuon TensorParallelAdaptiveMuon register_optimizer list_optimizers get_optimizer"
    )
    assert all(hasattr(registry, name) for name in names.split())
    assert {"muon", "adaptive_muon", "adamw", "adam", "sgd"} <= set(registry.list_optimizers())


def test_coefficient_types_are_the_librarys():
    assert {"simple", "quintic", "polar_express"} <= set(registry.get_supported_coefficient_types())
    registry.validate_coefficient_type("quintic")
    with pytest.raises(ValueError, match=r"quintik.*Supported types.*quintic"):
        registry.validate_coefficient_type("quintik")


@pytest.mark.parametrize(("gate", "wanted"), [(False, [16, 8, 8]), (True, [16, 16, 8, 8])])
def test_qkv_split_shapes(gate, wanted):
    model = SimpleNamespace(num_attention_heads=4, num_query_groups=2, kv_channels=8, attention_output_gate=gate)
    assert registry._get_qkv_split_shapes(model) == wanted


def test_kwargs_come_from_the_prefix_then_the_name():
    kwargs = registry._kwargs_from_config(
        registry.TensorParallelMuon, "muon", config(muon_momentum=0.5, weight_decay=0.25)
    )
    assert kwargs["momentum"] == 0.5
    assert kwargs["weight_decay"] == 0.25
    assert "params" not in kwargs
    assert "is_qkv_fn" not in kwargs


def test_weight_decay_style_reaches_muon():
    chain = get_optimizer(config(decoupled_weight_decay=False), [Model()])
    assert chain.members["muon"].weight_decay_method == "l2"
    assert set(chain.members) == {"muon", "adam"}


def test_adaptive_muon_takes_muons_settings_and_its_own():
    made = registry._adaptive_muon_config_to_kwargs(
        config(adaptive_muon_beta2=0.5, muon_momentum=0.25), [Model()], None
    )
    assert (made["beta2"], made["momentum"], made["moment2_method"]) == (0.5, 0.25, "adamuon")


def test_betas_are_passed_only_to_classes_that_take_them():
    kwargs = registry._default_adam_based_eopt_config_to_kwargs("sgd", config(), [], None)
    assert "betas" not in kwargs
    assert kwargs["momentum"] == 0.9
    registry._EMERGING_OPTIMIZERS["sgd"].optimizer_cls([nn.Parameter(torch.ones(2))], **kwargs)


def test_default_routing():
    chain = get_optimizer(config(), [Model()])
    assert routes(chain) == {
        "embedding.weight": "adamw",
        "router.weight": "adamw",
        "layers.0.weight": "muon",
        "layers.0.bias": "adamw",
        "layers.1.weight": "muon",
        "layers.1.bias": "adamw",
        "norm.weight": "adamw",
        "norm.bias": "adamw",
        "output.weight": "adamw",
    }
    decay = {name: g["weight_decay"] for g in chain.param_groups for name in g["param_names"]}
    assert decay["norm.weight"] == 0
    assert decay["layers.0.weight"] == 0.01


def test_use_muon_false_goes_to_adam():
    model = Model()
    model.layers[0].weight.use_muon = False
    assert routes(get_optimizer(config(), [model]))["layers.0.weight"] == "adamw"


def test_adamw_takes_everything():
    assert set(routes(get_optimizer(config(optimizer="adamw"), [Model()])).values()) == {"adamw"}


def test_overrides_by_name_attribute_and_predicate():
    model = Model()
    model.layers[1].weight.special = True
    overrides = {
        ParamKey(name="layers.0.*"): {"lr": 0.5},
        ParamKey(attr="special"): {"optimizer": "sgd"},
        ParamKey(predicate=ParamPredicate("wide", lambda p: p.shape[0] == 16)): {"wd_mult": 2.0},
        ParamKey(with_name_predicate=ParamWithNamePredicate("router", lambda p, n: "router" in n)): {
            "optimizer": "muon"
        },
    }
    chain = get_optimizer(config(), [model], param_overrides=overrides)
    groups = {name: g for g in chain.param_groups for name in g["param_names"]}
    assert routes(chain)["layers.1.weight"] == "sgd"
    assert routes(chain)["router.weight"] == "muon"
    assert groups["layers.0.weight"]["lr"] == 0.5
    assert groups["embedding.weight"]["weight_decay"] == 0.02


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {ParamKey(name="layers.0.*"): {"lr": 0.5}, ParamKey(name="*.weight"): {"lr": 0.25}},
            "layers.0.weight.*lr=0.5.*lr=0.25",
        ),
        ({ParamKey(name="decoder.*"): {"lr": 0.5}}, "'decoder.*' matches no parameter.*embedding.weight"),
        (
            {ParamKey(name="norm.weight"): {"optimizer": "muon"}},
            r"norm.weight: TensorParallelMuon works on matrices.*\(8,\)",
        ),
        ({ParamKey(name="norm.*"): {"optimizer": "adamx"}}, "unknown optimizer 'adamx'; did you mean 'adam'"),
        ({ParamKey(name="layers.*"): {"momentom": 0.5}}, "momentom"),
    ],
)
def test_bad_overrides(overrides, message):
    with pytest.raises(ValueError, match=message):
        get_optimizer(config(), [Model()], param_overrides=overrides)


def test_bad_config():
    with pytest.raises(ValueError, match="unknown optimizer 'mun'; did you mean 'muon'"):
        get_optimizer(config(optimizer="mun"), [Model()])
    with pytest.raises(ValueError, match="lr is None"):
        get_optimizer(OptimizerConfig(optimizer="muon"), [Model()])
    with pytest.raises(ValueError, match="unknown optimizer setting 'muon_momentun'; did you mean 'muon_momentum'"):
        OptimizerConfig.from_dict({"muon_momentun": 0.9})


def test_two_chunks_may_not_share_a_name():
    with pytest.raises(ValueError, match=r"two model chunks.*global"):
        get_optimizer(config(), [Model(), Model()])


def test_frozen_parameters_are_left_out():
    model = Model()
    model.layers[0].weight.requires_grad = False
    assert "layers.0.weight" not in routes(get_optimizer(config(), [model]))


def test_register_and_use_an_optimizer():
    entry = EmergingOptimizerEntry(
        torch.optim.SGD, init_state_fn=lambda opt, config=None: None, default_param_overrides={}
    )
    registry.register_optimizer("plain_sgd", entry)
    try:
        assert "plain_sgd" in registry.list_optimizers()
        with pytest.raises(ValueError, match="already registered"):
            registry.register_optimizer("plain_sgd", entry)
        model = Model()
        chain = get_optimizer(config(optimizer="plain_sgd"), [model])
        before = model.norm.weight.detach().clone()
        model(torch.arange(4)).sum().backward()
        chain.step()
        assert not torch.equal(before, model.norm.weight.detach())
    finally:
        del registry._EMERGING_OPTIMIZERS["plain_sgd"]


def test_register_as_decorator():
    try:
        assert registry.register_optimizer("decorated")(torch.optim.SGD) is torch.optim.SGD
        assert registry._EMERGING_OPTIMIZERS["decorated"].optimizer_cls is torch.optim.SGD
    finally:
        del registry._EMERGING_OPTIMIZERS["decorated"]


def test_entry_signature():
    entry = EmergingOptimizerEntry(torch.optim.SGD)
    assert entry.init_state_fn is registry._eopt_init_state_fn
    assert entry.config_to_kwargs is None
    (overrides,) = entry.default_param_overrides.values()
    assert overrides == {"optimizer": "adam"}
    assert list(inspect.signature(registry._create_emerging_optimizer).parameters) == [
        "config",
        "param_groups",
        "eopt_name",
        "model_chunks",
        "pg_collection",
    ]


class TestChain:
    """A chained optimizer is one torch optimizer."""

    def train(self, chain, model, steps=3):
        for step in range(steps):
            torch.manual_seed(step)
            chain.zero_grad()
            model(torch.randint(0, 16, (4,))).square().mean().backward()
            chain.step()

    def make(self):
        torch.manual_seed(0)
        model = Model()
        return model, get_optimizer(config(lr=0.01), [model])

    def test_a_scheduler_drives_all_groups(self):
        model, chain = self.make()
        scheduler = torch.optim.lr_scheduler.LambdaLR(chain, lambda step: 0.5**step)
        self.train(chain, model, 1)
        scheduler.step()
        assert {g["lr"] for member in chain.optimizers for g in member.param_groups} == {0.005}

    def test_state_dict_resumes_bitwise(self):
        model, chain = self.make()
        self.train(chain, model)
        other = Model()
        resumed = get_optimizer(config(lr=0.5), [other])
        other.load_state_dict(model.state_dict())
        resumed.load_state_dict(chain.state_dict())
        self.train(chain, model)
        self.train(resumed, other)
        for a, b in zip(model.parameters(), other.parameters(), strict=True):
            assert torch.equal(a, b)

    def test_closure_hooks_and_zero_grad(self):
        model, chain = self.make()
        seen = []
        chain.register_step_post_hook(lambda *_: seen.append(1))

        def closure():
            chain.zero_grad()
            loss = model(torch.arange(4)).square().mean()
            loss.backward()
            return loss

        assert chain.step(closure) > 0
        assert seen == [1]
        chain.zero_grad()
        assert all(p.grad is None for p in model.parameters())

    def test_a_foreign_group_is_refused(self):
        _, chain = self.make()
        with pytest.raises(ValueError, match="several optimizers; say which one is to step them"):
            chain.add_param_group({"params": [nn.Parameter(torch.ones(2))]})


def test_the_logger_says_what_each_optimizer_is_given(caplog):
    with caplog.at_level("INFO", logger=registry.logger.name):
        get_optimizer(config(optimizer="lion"), nn.Linear(4, 4))
    assert caplog.messages == ["lion steps 2 parameters of this rank"]
