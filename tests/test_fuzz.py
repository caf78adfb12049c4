"""Whatever is given, by flag, YAML, rule, config or shape: it works, or is refused in words. Never a bare traceback."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from core.optimizer.emerging_optimizers import get_optimizer, list_optimizers
from core.optimizer.optimizer_config import OptimizerConfig
from tests.support.usage import check
from tools.pretrain.arguments import FLAGS, flag_of, parse_arguments
from tools.pretrain.param_rules import parse_rule
from tools.usage import UsageError

FAST, MANY = 60, 2000
NUMBERS = st.one_of(st.integers(-3, 40), st.floats(), st.sampled_from([2**31, 2**63, 10**400, -0.0, 1e-400, 1e308]))
WORDS = st.one_of(
    NUMBERS.map(str),
    st.sampled_from([*list_optimizers(), "true", "none", "", "1e-3x", "[", "\0", "é"]),
    st.text(max_size=8),
)
# What would make the model itself too large to build is no fault of the flag.
SMALL = {name: name for name in FLAGS if name not in ("config", "load", "save", "log_dir", "data_path")}
SIZES = ("num_layers", "hidden_size", "ffn_hidden_size", "kv_channels", "num_attention_heads", "seq_length")


def flags(draw: Any) -> list[str]:
    """A command line of some flags, each with what it may or may not take."""
    line = []
    for name in draw(st.lists(st.sampled_from(sorted(SMALL)), max_size=4, unique=True)):
        flag = FLAGS[name]
        choices = [*flag.texts]
        values = st.sampled_from(choices) if choices else WORDS
        if name in SIZES:
            values = st.integers(-1, 64).map(str)
        count = 0 if flag.setting.kind is bool and not flag.setting.many else draw(st.integers(0, 2))
        line += [flag_of(name), *(draw(values) for _ in range(count))]
    return line


def try_flags(line: list[str]) -> None:
    try:
        check(line, world=2, local_size=2)
    except UsageError as error:
        assert str(error)


def try_yaml(path: Path, content: Any) -> None:
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content), errors="surrogateescape")
    try:
        parse_arguments(["--config", str(path)])
    except UsageError as error:
        assert str(error)


def try_rule(rule: str) -> None:
    try:
        parse_rule(rule)
    except UsageError as error:
        assert "--param-override" in str(error)


def try_config(given: dict[str, Any]) -> None:
    try:
        get_optimizer(OptimizerConfig.from_dict({"lr": 0.1, **given}), [nn.Linear(3, 2)])
    except ValueError as error:
        # An error of Python's own would say nothing of what was given.
        assert any(repr(value) in str(error) or name.split("_")[-1] in str(error) for name, value in given.items()), (
            error
        )


def try_shape(optimizer: str, shape: tuple[int, ...], seed: int) -> None:
    torch.manual_seed(seed)
    net = nn.ParameterDict({"w": nn.Parameter(torch.randn(shape)), "b": nn.Parameter(torch.randn(3))})
    try:
        built = get_optimizer(OptimizerConfig(optimizer=optimizer, lr=0.01), [net])
    except ValueError as error:
        assert str(error)
        return
    for p in net.parameters():
        p.grad = torch.randn_like(p)
    built.step()
    assert all(p.isfinite().all() for p in net.parameters())


CONFIGS = st.dictionaries(
    st.sampled_from(
        ["optimizer", "lr", "weight_decay", "muon_momentum", "lion_betas", "adam_beta1", "muon_tp_mode", "lrr"]
    ),
    st.one_of(
        NUMBERS,
        st.sampled_from([*list_optimizers()]),
        st.text(max_size=5),
        st.none(),
        st.lists(st.floats(), max_size=3),
    ),
    max_size=3,
)
YAML = st.one_of(
    st.text(max_size=30),
    st.dictionaries(
        st.one_of(st.sampled_from(sorted(SMALL)), st.text(max_size=5)),
        st.one_of(WORDS, NUMBERS, st.none(), st.booleans()),
    ),
    st.lists(WORDS, max_size=3),
)
RULES = st.one_of(
    st.text(max_size=20),
    st.builds("{}={}:{}".format, WORDS, st.sampled_from(["lr", "weight_decay", "optimizer", "min_lr", "x"]), WORDS),
    st.builds("*.{}={}".format, WORDS, st.sampled_from(list_optimizers())),
)
DIMS = st.one_of(st.integers(0, 3), st.sampled_from([5, 7, 11, 13, 17, 31, 64]))
SHAPES = st.lists(DIMS, min_size=0, max_size=3).map(tuple)

KINDS: dict[str, Callable[[Path], Callable[[st.DataObject], None]]] = {
    "flags": lambda _: lambda data: try_flags(flags(data.draw)),
    "yaml": lambda folder: lambda data: try_yaml(folder / "flags.yaml", data.draw(YAML)),
    "rules": lambda _: lambda data: try_rule(data.draw(RULES)),
    "configs": lambda _: lambda data: try_config(data.draw(CONFIGS)),
    "shapes": lambda _: (
        lambda data: try_shape(
            data.draw(st.sampled_from(list_optimizers())), data.draw(SHAPES), data.draw(st.integers(0, 9))
        )
    ),
}


def fuzz(kind: str, folder: Path, examples: int) -> None:
    attempt = KINDS[kind](folder)

    @settings(max_examples=examples, suppress_health_check=list(HealthCheck))
    @given(st.data())
    def run(data: st.DataObject) -> None:
        attempt(data)

    run()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_given_works_or_is_refused_in_words(tmp_path, kind):
    fuzz(kind, tmp_path, FAST)


@pytest.mark.soak
@pytest.mark.timeout(3000)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_much_that_is_given_works_or_is_refused_in_words(tmp_path, kind):
    fuzz(kind, tmp_path, MANY)
