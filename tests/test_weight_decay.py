"""Weight decay: the four styles on every optimizer, against emerging-optimizers' own, and masks."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from emerging_optimizers.mixin import WeightDecayMixin
from emerging_optimizers.orthogonalized_optimizers.muon import Muon
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from core.optimizer.emerging_optimizers import get_optimizer, list_optimizers
from core.optimizer.optimizer_config import OptimizerConfig, ParamKey
from core.optimizer.registry import entry_of
from core.optimizer.rules.adafactor import AdafactorSR
from core.optimizer.rules.adamw_sr import AdamWSR
from core.optimizer.rules.schedule_free import ScheduleFreeAdamW, ScheduleFreeSGD
from core.optimizer.rules.tensor_parallel_muon import TensorParallelMuon
from core.optimizer.steps.weight_decay import METHODS
from core.process_groups_config import ProcessGroupCollection
from tests.support.sharding import CUTS, build, cutter, parameters, whole_gradient, whole_parameters

SHAPES = ((12, 8), (8, 16), (12, 8), (8, 8))
LR, DECAY, STEPS = 0.1, 0.3, 3
SCHEDULE_FREE = ("schedule_free_adamw", "schedule_free_sgd")
FAST = ("adamw", "adamw_sr", "lion", "lamb", "mars", "adafactor", "muon", "sgd", "shampoo", "oblique_sgd")
"""One for each way that a step goes."""
SETTINGS: dict[str, dict[str, Any]] = {"apollo": {"rank": 3}, "sgd": {"momentum": 0.9}}


def draws(step: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape in SHAPES]


def make(cls: Any, dtype: torch.dtype, **kwargs: Any) -> tuple[list[nn.Parameter], Any]:
    params = [nn.Parameter(x) for x in draws(99, dtype)]
    group = {"params": params, **{k: kwargs.pop(k) for k in ("weight_decay_method",) if k in kwargs}}
    return params, cls([group], lr=LR, **kwargs)


def step(params: list[nn.Parameter], optimizer: Any, at: int) -> None:
    for p, g in zip(params, draws(at, params[0].dtype), strict=True):
        p.grad = g
    optimizer.step()


class Theirs(WeightDecayMixin):
    """The library's weight decay alone."""

    def __init__(self, method: str) -> None:
        self.weight_decay_method = method

    @torch.no_grad()
    def __call__(self, params: list[nn.Parameter], grads: list[Tensor]) -> None:
        for p, g in zip(params, grads, strict=True):
            self._apply_weight_decay_inplace(p, g, LR, DECAY)


def check_equals_theirs(name: str) -> None:
    cls: Any = entry_of(name).optimizer_cls
    only_float32 = getattr(cls, "float32_only", False)
    dtype = torch.float32 if only_float32 else torch.float64
    kwargs = SETTINGS.get(name, {})
    for method in METHODS:
        mine, optimizer = make(cls, dtype, weight_decay=DECAY, weight_decay_method=method, **kwargs)
        wanted, plain = make(cls, dtype, weight_decay=0.0, **kwargs)
        theirs = Theirs(method)
        for at in range(STEPS):
            step(mine, optimizer, at)
            grads = draws(at, dtype)
            theirs(wanted, grads)
            for p, g in zip(wanted, grads, strict=True):
                p.grad = g
            plain.step()
        tolerance = 1e-4 if only_float32 else 1e-10
        for p, q in zip(mine, wanted, strict=True):
            torch.testing.assert_close(p, q, rtol=tolerance, atol=tolerance, msg=f"{name}, {method}")


@pytest.mark.parametrize("name", FAST)
def test_the_styles_are_the_librarys(name):
    check_equals_theirs(name)


@pytest.mark.soak
@pytest.mark.parametrize("name", [n for n in list_optimizers() if n not in (*FAST, *SCHEDULE_FREE, "scion")])
def test_the_styles_of_every_optimizer_are_the_librarys(name):
    check_equals_theirs(name)


@pytest.mark.parametrize("method", METHODS)
def test_muon_decays_as_the_librarys_own_class(method):
    kwargs = {"momentum": 0.9, "nesterov": True, "weight_decay": DECAY, "fp32_matmul_prec": "highest"}
    mine, optimizer = make(TensorParallelMuon, torch.float32, weight_decay_method=method, **kwargs)
    wanted, theirs = make(
        lambda groups, **k: Muon(groups[0]["params"], **k, weight_decay_method=method), torch.float32, **kwargs
    )
    check_alike((mine, optimizer), (wanted, theirs), rtol=1e-4, atol=1e-5)


def check_alike(mine: Any, theirs: Any, *, rtol: float, atol: float) -> None:
    """Parameters and optimizer, beside others: equal after some steps."""
    for at in range(STEPS):
        step(*mine, at)
        step(*theirs, at)
    for p, q in zip(mine[0], theirs[0], strict=True):
        torch.testing.assert_close(p, q, rtol=rtol, atol=atol)


@pytest.mark.parametrize("cls", [ScheduleFreeAdamW, ScheduleFreeSGD])
@pytest.mark.parametrize(("method", "same"), [("decoupled", DECAY), ("palm", DECAY * LR), ("independent", DECAY / LR)])
def test_schedule_free_decays_both_of_its_sequences(cls, method, same):
    mine, optimizer = make(cls, torch.float64, weight_decay=DECAY, weight_decay_method=method)
    wanted, plain = make(cls, torch.float64, weight_decay=same)
    check_alike((mine, optimizer), (wanted, plain), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("cls", [AdamWSR, AdafactorSR])
def test_bfloat16_decays_before_it_is_rounded(cls):
    p = nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))
    groups = [{"params": [p], "weight_decay_method": "decoupled"}]
    optimizer = cls(groups, lr=1e-3, weight_decay=0.1, bf16_stochastic_round=True)
    for _ in range(20):
        p.grad = torch.zeros_like(p)
        optimizer.step()
    # Each step takes off 1e-4, a fortieth of what bfloat16 can tell from 1.
    assert float(p.detach().float().mean()) == pytest.approx((1 - 1e-4) ** 20, abs=5e-4)


def test_a_method_that_does_not_exist_is_refused():
    with pytest.raises(
        ValueError, match="weight_decay_method='coupled' is unknown; possible: decoupled, independent, l2, palm"
    ):
        get_optimizer(OptimizerConfig(optimizer="lion", lr=0.1, weight_decay_method="coupled"), [nn.Linear(2, 2)])


NAMES = ("0.weight", "1.weight", "1.bias", "2.weight", "2.bias")


def a_model() -> nn.Sequential:
    return nn.Sequential(nn.Embedding(4, 8), nn.Linear(8, 8), nn.LayerNorm(8))


def nested(chosen: dict[str, bool]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, value in chosen.items():
        module, weight = name.split(".")
        tree.setdefault(module, {})[weight] = value
    return tree


FORMS: dict[str, Callable[[dict[str, bool]], Any]] = {
    "flat": lambda chosen: chosen,
    "nested": nested,
    "a function of all": lambda chosen: lambda params: nested({name: chosen[name] for name in params}),
    "a function with an option": lambda chosen: lambda params, default=True: chosen,
    "a function of each": lambda chosen: lambda name, param: chosen[name],
    "half nested": lambda chosen: {**nested(dict(list(chosen.items())[:3])), **dict(list(chosen.items())[3:])},
}


def decays(**kwargs: Any) -> dict[str, float]:
    config = OptimizerConfig(optimizer="adamw", lr=0.1, weight_decay=0.5)
    optimizer = get_optimizer(config, [a_model()], **kwargs)
    return {name: group["weight_decay"] for group in optimizer.param_groups for name in group["param_names"]}


@pytest.mark.parametrize(
    ("mask", "decayed"),
    [
        (None, {"0.weight", "1.weight"}),
        (lambda name, param: param.ndim > 1 and name != "0.weight", {"1.weight"}),
        (lambda name, param: True, {"0.weight", "1.weight", "1.bias", "2.weight", "2.bias"}),
        ("1.*", {"1.weight", "1.bias"}),
        (("!*.bias", "!2.*"), {"0.weight", "1.weight"}),
        (("*.weight", "!0.weight"), {"1.weight", "2.weight"}),
        ({"1.weight", "2.bias"}, {"1.weight", "2.bias"}),
        (lambda *args: args[0] == "1.weight", {"1.weight"}),
    ],
)
def test_a_mask_says_what_is_decayed(mask, decayed):
    assert decays(weight_decay_mask=mask) == {name: 0.5 if name in decayed else 0.0 for name in NAMES}


@given(chosen=st.fixed_dictionaries({name: st.booleans() for name in NAMES}), form=st.sampled_from([*FORMS]))
@settings(max_examples=20, deadline=None)
def test_a_tree_of_booleans_says_what_is_decayed(chosen, form):
    assert decays(weight_decay_mask=FORMS[form](chosen)) == {name: 0.5 * chosen[name] for name in NAMES}


@pytest.mark.parametrize(
    ("mask", "error", "text"),
    [
        (dict.fromkeys(NAMES[1:], True), ValueError, r"no entry for \['0\.weight'\]"),
        (
            dict.fromkeys((*NAMES, "1.wieght"), True),
            ValueError,
            r"unknown parameter '1\.wieght'; did you mean '1\.weight'",
        ),
        ({}, ValueError, "no entry for"),
        ({**dict.fromkeys(NAMES, True), "1": {"weight": False}}, ValueError, r"names '1\.weight' twice"),
        ({**dict.fromkeys(NAMES, True), "1.bias": 0}, TypeError, r"has 0, a int, for '1\.bias'"),
        ({**dict.fromkeys(NAMES, True), "1.bias": None}, TypeError, r"has None, a NoneType, for '1\.bias'"),
        (lambda params: {"0.weight": True}, ValueError, r"no entry for \['1\.weight'"),
        (lambda params: True, TypeError, "returned a bool for all parameters"),
        (lambda: True, TypeError, "takes other arguments"),
        (lambda name, param, more: True, TypeError, "takes other arguments"),
        (True, TypeError, "True, a bool; give a function"),
        ([True, False], TypeError, "a list; give a function"),
        (b"*.weight", TypeError, "a bytes; give a function"),
    ],
)
def test_a_mask_that_is_none_is_refused(mask, error, text):
    with pytest.raises(error, match=text):
        decays(weight_decay_mask=mask)


def test_a_tree_may_name_frozen_parameters_and_need_not():
    for names in (NAMES, NAMES[1:]):
        model = a_model()
        model[0].weight.requires_grad_(False)
        config = OptimizerConfig(optimizer="lion", lr=0.1, weight_decay=0.5)
        optimizer = get_optimizer(config, model, weight_decay_mask=dict.fromkeys(names, True))
        assert [group["weight_decay"] for group in optimizer.param_groups] == [0.5]


@pytest.mark.mpi(min_size=2)
def test_a_tree_names_the_parameters_of_all_stages(world):
    groups = ProcessGroupCollection.from_mesh(world.mesh((2,), ("pp",)))
    model = nn.ModuleDict({"first" if world.rank == 0 else "last": nn.Linear(8, 8)})
    config = OptimizerConfig(optimizer="adamw", lr=0.1, weight_decay=0.5)
    tree = {"first": {"weight": True, "bias": False}, "last": {"weight": False, "bias": True}}
    optimizer = get_optimizer(config, model, groups, weight_decay_mask=tree)
    found = {name: group["weight_decay"] for group in optimizer.param_groups for name in group["param_names"]}
    assert found == ({"first.weight": 0.5, "first.bias": 0.0}, {"last.weight": 0.0, "last.bias": 0.5})[world.rank]
    with pytest.raises(ValueError, match=r"no entry for \['last\.bias'\]"):  # on both stages
        get_optimizer(config, model, groups, weight_decay_mask={**tree, "last": {"weight": True}})
    with pytest.raises(ValueError, match=r"unknown parameter 'middle\.weight'"):
        get_optimizer(config, model, groups, weight_decay_mask={**tree, "middle": {"weight": True}})


def test_overrides_win_over_a_mask():
    found = decays(weight_decay_mask="!1.*", param_overrides={ParamKey(name="1.bias"): {"wd_mult": 2.0}})
    assert (found["1.weight"], found["1.bias"], found["2.bias"]) == (0.0, 1.0, 0.5)


def test_a_pattern_that_matches_nothing_is_an_error():
    with pytest.raises(ValueError, match=r"'\*\.biass' matches no parameter"):
        decays(weight_decay_mask=("!*.biass",))


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("name", ["lion", "lamb", "mars", "muon", "shampoo"])
def test_shards_decay_as_the_whole_does(world, name):
    cut = CUTS[2]["rows"]
    parameter, shard, groups = cutter(cut, world)
    for method in METHODS:
        weights = []
        for make_parameter, kwargs in ((parameter, {"pg_collection": groups}), (lambda x: x, {})):
            params = parameters(whole_parameters(cut.shapes), make_parameter, cut)
            optimizer = build(name, params, cut, **kwargs)
            optimizer.param_groups[0]["weight_decay_method"] = method
            for at in range(STEPS):
                for i, p in enumerate(params):
                    g = whole_gradient(i, at, cut.shapes[i])
                    p.grad = None if g is None else make_parameter(g)
                optimizer.step()
            weights.append([p.detach() for p in params])
        for mine, whole in zip(*weights, strict=True):
            torch.testing.assert_close(mine, shard(whole), rtol=1e-9, atol=1e-9)
