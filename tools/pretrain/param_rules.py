"""From the flags to the optimizer: its settings, the rules of ``--param-override``, and whether they fit the model."""

import contextlib
import dataclasses
import math
import re
from collections.abc import Iterable, Sequence

import torch
from torch import nn

from core.optimizer.chained import ChainedOptimizer
from core.optimizer.emerging_optimizers import get_optimizer
from core.optimizer.expectation import UnexpectedRoutingError
from core.optimizer.optimizer_config import OptimizerConfig, ParamKey
from core.optimizer.registry import list_optimizers, takers_of
from core.process_groups_config import ProcessGroupCollection

from ..usage import UsageError, nearest
from .arguments import Arguments, flag_of
from .model import GPT, GPTConfig, tag_parameters
from .schedule import configured_start, make_scheduler

FLAG = "--param-override"
KEYS = ("optimizer", "lr", "min_lr", "lr_mult", "weight_decay", "wd_mult", "momentum", "eps")
Settings = dict[str, str | float]
_HINT = "write NAME_PATTERN=OPTIMIZER or NAME_PATTERN=key:value,... such as 'decoder.layers.0.*=adamw'"


def optimizer_config(args: Arguments) -> OptimizerConfig:
    """The flags that are settings of an optimizer."""
    names = [field.name for field in dataclasses.fields(OptimizerConfig) if hasattr(args, field.name)]
    values = {name: getattr(args, name) for name in names}
    if args.weight_decay is None:
        values["weight_decay"] = 0.0 if args.optimizer == "sgd" else OptimizerConfig.weight_decay
    return OptimizerConfig(**values)


def param_overrides(rules: Iterable[str]) -> dict[ParamKey, Settings]:
    """The rules by pattern; two rules with the same pattern are one.

    Raises:
        UsageError: A rule has another form than :func:`parse_rule` knows, or two with the same pattern disagree.
    """
    overrides: dict[ParamKey, Settings] = {}
    for rule in rules:
        pattern, settings = parse_rule(rule)
        known = overrides.setdefault(ParamKey(name=pattern), {})
        for key, value in settings.items():
            if known.setdefault(key, value) != value:
                problem = f"another rule gives {pattern!r} the {key} {known[key]}"
                raise UsageError(
                    FLAG, repr(rule), problem, possible="one value a pattern", hint="leave one of them out"
                )
    return overrides


def parse_rule(rule: str) -> tuple[str, Settings]:
    """``decoder.*.mlp.*=adamw,lr:1e-4`` -> its pattern and ``{"optimizer": "adamw", "lr": 1e-4}``.

    Raises:
        UsageError: The rule has another form, its pattern has a lone bracket, a key or an optimizer is unknown, or a value
            is not a number.
    """
    pattern, equals, body = (part.strip() for part in rule.rpartition("="))
    if not equals or not pattern or not body:
        raise UsageError(FLAG, repr(rule), "is not a rule", possible="NAME_PATTERN=SETTINGS", hint=_HINT)
    # fnmatch would take a lone bracket for a letter, and no name has one.
    if set("[]") & set(re.sub(r"\[!?[^][]+\]", "", pattern)):
        problem = f"the pattern {pattern!r} has a lone bracket"
        raise UsageError(FLAG, repr(rule), problem, possible="*, ?, [letters], [!letters]", hint=_HINT)
    settings: Settings = {}
    for item in body.split(","):
        key, colon, value = (part.strip() for part in item.partition(":"))
        key, value = (key, value) if colon else ("optimizer", key)
        if key not in KEYS:
            raise UsageError(
                FLAG, repr(rule), f"unknown key {key!r}", possible=", ".join(KEYS), hint=nearest(key, KEYS)
            )
        if key in settings:
            raise UsageError(FLAG, repr(rule), f"{key} stands twice", hint=_HINT)
        settings[key] = _optimizer(value, rule) if key == "optimizer" else _number(key, value, rule)
    return pattern, settings


def check_rules(args: Arguments, model: GPTConfig) -> None:
    """Route the parameters of the whole model, without memory for them, so that every rank finds the same faults.

    Raises:
        UsageError: As :func:`build_optimizer` raises it; also when ``--optimizer`` gets no parameter, or a setting belongs to
            no optimizer of this run.
    """
    with torch.device("meta"):
        whole = GPT(model)
    tag_parameters(whole, split_gate_up=args.split_gate_up)
    optimizer = build_optimizer(args, [whole])
    make_scheduler(args, optimizer, done=0, start=configured_start(args))
    used = optimizer.members
    # Adam with decoupled weight decay is called by its name.
    if args.optimizer not in used and not (args.optimizer == "adam" and "adamw" in used):
        problem = f"the rules of {FLAG} leave it no parameter"
        hint = f"make a rule match less, or take {' or '.join(used)}"
        raise UsageError("--optimizer", args.optimizer, problem, possible="at least one parameter", hint=hint)
    for setting, value in args.settings.items():
        takers = list(takers_of(setting))
        if not {*takers} & {*used}:
            problem = f"is a setting of {' and '.join(takers)}, and this run uses only {' and '.join(used)}"
            hint = f"leave it out, or take --optimizer {takers[0]}, or a {FLAG} that gives it parameters"
            raise UsageError(flag_of(setting), value, problem, hint=hint)


def build_optimizer(
    args: Arguments, model_chunks: Sequence[nn.Module], groups: ProcessGroupCollection | None = None
) -> ChainedOptimizer:
    """The optimizer of this rank's part of the model.

    Raises:
        UsageError: A rule matches nothing, two rules disagree about a parameter, an optimizer of matrices gets another
            tensor, the split of a fused matrix does not add up, a parameter has no optimizer, or parameters do not go where
            ``--expect-matrix-params`` says.
    """
    overrides = param_overrides(args.param_override)
    asked = args.expect_matrix_params
    expect = int(asked) if asked and asked.isdecimal() else asked
    if expect == 0:
        possible = "a whole number >= 1, or a pattern of parameter names"
        raise UsageError(
            flag_of("expect_matrix_params"), asked, "expects nothing", possible=possible, hint="leave it out"
        )
    try:
        optimizer = get_optimizer(
            optimizer_config(args), model_chunks, groups, overrides, args.weight_decay_mask or None, expect
        )
    except UnexpectedRoutingError as error:
        raise UsageError(flag_of("expect_matrix_params"), repr(asked), str(error)) from error
    except (ValueError, ImportError) as error:
        flag_and_value = (
            (FLAG, " ".join(map(repr, args.param_override))) if overrides else ("--optimizer", args.optimizer)
        )
        raise UsageError(*flag_and_value, str(error)) from error
    assigned = {a.name for a in optimizer.assignments()}
    for chunk in model_chunks:
        for name, param in chunk.named_parameters():
            if param.requires_grad and name not in assigned:
                raise UsageError(
                    "--optimizer", args.optimizer, f"{name} is left without an optimizer", hint=f"add {FLAG}"
                )
    return optimizer


def _optimizer(name: str, rule: str) -> str:
    known = list_optimizers()
    if name not in known:
        hint = nearest(name, known)
        raise UsageError(FLAG, repr(rule), f"unknown optimizer {name!r}", possible=", ".join(known), hint=hint)
    return name


def _number(key: str, word: str, rule: str) -> float:
    with contextlib.suppress(ValueError):
        if math.isfinite(value := float(word)) and value >= 0:
            return value
    raise UsageError(FLAG, repr(rule), f"{key} is {word!r}", possible="a number >= 0", hint="write key:number")
