"""Flags for every optimizer in Megatron's command line, made from the constructors."""

import argparse
import dataclasses
from collections.abc import Callable
from typing import Any

from ..optimizer import registry as ours
from ..optimizer.steps.constructor_settings import Setting
from .refusals import REPLACED, runs_flat
from .registration import name_of, replace_muon
from .settings import EXACT, EXPECT, PREFIX, SPLIT_HEADS, TP_MODE
from .upstream import ARGUMENTS, CONFIG, lookup, patch

REPLACE = "--shardstep-replace-muon"

type Provider = Callable[[argparse.ArgumentParser], argparse.ArgumentParser]
"""What a script adds to the parser."""


def extend_arguments() -> None:
    """Let Megatron's parser know our names and flags. A second call changes nothing.

    Raises:
        ImportError: when this Megatron has no such parser.
    """
    patch(ARGUMENTS, "parse_args", _parsed)
    patch(ARGUMENTS, "validate_args", _validated)


def _parsed(
    parse: Callable[..., argparse.Namespace], extra_args_provider: Provider | None = None, *rest: Any, **more: Any
) -> argparse.Namespace:
    """Megatron's ``parse_args``, with the names and flags of our optimizers."""

    # Ours come last, where a flag of the script's own that is called like one of ours is seen.
    def extra(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        return add_arguments(extra_args_provider(parser) if extra_args_provider else parser)

    return parse(extra, *rest, **more)


def _validated(validate: Callable[..., Any], args: argparse.Namespace, *rest: Any, **more: Any) -> Any:
    """Megatron's ``validate_args``, which allows its distributed optimizer for two names only, with those of ours allowed too.

    Raises:
        ValueError: for a flag of ours that the optimizer does not have.
    """
    name = name_of(args.optimizer)
    _check_taken(args, name)
    if not args.use_distributed_optimizer or name is None or not runs_flat(name):
        return validate(args, *rest, **more)
    optimizer, args.optimizer = args.optimizer, "adam"
    try:
        return validate(args, *rest, **more)
    finally:
        args.optimizer = optimizer


def _check_taken(args: argparse.Namespace, name: str | None) -> None:
    """Refuse settings that belong to another optimizer than ``name``: they would be accepted and have no effect."""
    taken = {PREFIX + field for field in ours.settings_of(name)} if name else set()
    known = {PREFIX + field for field in ours.all_settings()}
    if name is None:
        known.add(EXPECT)
    lost = sorted(given for given in known & vars(args).keys() - taken if getattr(args, given) is not None)
    if lost:
        flags = ", ".join(_option(given.removeprefix(PREFIX)) for given in lost)
        raise ValueError(
            f"--optimizer {args.optimizer} does not take {flags}; leave that out, or take the shardstep optimizer of that name."
        )


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add our names to ``--optimizer`` and a flag for each setting that Megatron has none for; mutates ``parser``.

    A flag that the script has for something else keeps its meaning: ours is then ``--shardstep-soap-eps`` for ``--soap-eps``.
    """
    (config,) = lookup(CONFIG, "OptimizerConfig")
    reaches_config = {field.name for field in dataclasses.fields(config)}
    names = ours.list_optimizers()
    chosen = parser._option_string_actions["--optimizer"]
    chosen.choices = [*(chosen.choices or ()), *(PREFIX + name for name in names)]
    group = parser.add_argument_group("shardstep")
    group.add_argument(REPLACE, action=_Replace, nargs=0, help=f"make {' and '.join(REPLACED)} ours too")
    group.add_argument(
        _option(TP_MODE),
        choices=[*EXACT, "blockwise"],
        help="how the shards of a matrix come together (default: owner; blockwise is not exact)",
    )
    group.add_argument(
        _option(SPLIT_HEADS),
        action="store_true",
        help="Muon: orthogonalize each head of attention by itself (default: all heads of a kind together)",
    )
    plain = _option(EXPECT.removeprefix(PREFIX))
    group.add_argument(
        _option(EXPECT) if plain in parser._option_string_actions else plain,
        dest=EXPECT,
        metavar="N|PATTERN",
        help="fail at the start when fewer than N matrices of the model, or not all parameters whose names match PATTERN, go to "
        "an optimizer of matrices",
    )
    settings = {field: setting for name in names for field, setting in ours.settings_of(name).items()}
    before = set(parser._option_string_actions)
    for field, setting in settings.items():
        option = _option(field)
        if not before & {option, f"--no-{option[2:]}"}:
            _add(group, option, field, setting)
        elif field not in reaches_config:
            _add(group, _option(PREFIX + field), field, setting)
    return parser


def _option(field: str) -> str:
    return f"--{field.replace('_', '-')}"


def _add(group: Any, option: str, field: str, setting: Setting) -> None:
    about = f"(default: {setting.default})".replace("%", "%%")
    # Under a name that no field of Megatron's OptimizerConfig has, and not there unless given: Megatron copies, prints and logs.
    common: dict[str, Any] = {"dest": PREFIX + field, "default": argparse.SUPPRESS, "help": about}
    if setting.kind is bool and not setting.many:
        group.add_argument(option, action=argparse.BooleanOptionalAction, **common)
        return
    if setting.choices:
        common["choices"] = setting.choices
    if setting.many:
        common["nargs"] = setting.length or "+"
    group.add_argument(option, type=setting.kind, **common)


class _Replace(argparse.Action):
    def __call__(self, parser: Any, namespace: argparse.Namespace, *rest: Any) -> None:
        replace_muon()
        setattr(namespace, self.dest, True)
