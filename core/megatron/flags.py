"""Flags for every optimizer in Megatron's command line, made from the constructors."""

import argparse
import functools
import sys
from typing import Any

from ..optimizer import emerging_optimizers as ours
from ..optimizer.settings import Setting
from .registration import PREFIX, REPLACED, replace_muon
from .seam import ARGUMENTS, seam
from .settings import EXACT, TP_MODE

REPLACE = "--shardstep-replace-muon"


def extend_arguments() -> None:
    """Let Megatron's parser know our names and flags. Again it does nothing new.

    Raises:
        ImportError: when this Megatron has no such parser.
    """
    (add,) = seam(ARGUMENTS, "add_megatron_arguments")
    if hasattr(add, "shardstep"):
        return

    @functools.wraps(add)
    def with_ours(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        return add_arguments(add(parser))

    with_ours.shardstep = True  # type: ignore[attr-defined]
    sys.modules[ARGUMENTS].add_megatron_arguments = with_ours  # type: ignore[attr-defined]


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add our names to ``--optimizer`` and a flag for each setting that the parser has none for; mutates ``parser``."""
    known = {option: action for action in parser._actions for option in action.option_strings}
    names = ours.list_optimizers()
    chosen = known["--optimizer"]
    chosen.choices = [*(chosen.choices or ()), *(PREFIX + name for name in names)]
    group = parser.add_argument_group("shardstep")
    group.add_argument(REPLACE, action=_Replace, nargs=0, help=f"make {' and '.join(REPLACED)} ours too")
    group.add_argument(
        f"--{TP_MODE.replace('_', '-')}",
        choices=[*EXACT, "blockwise"],
        help="how the shards of a matrix come together (default: owner; blockwise is not exact)",
    )
    for name in names:
        for field, setting in ours.settings_of(name).items():
            option = f"--{field.replace('_', '-')}"
            if option not in known:
                known[option] = _add(group, option, field, setting)
    return parser


def _add(group: Any, option: str, field: str, setting: Setting) -> argparse.Action:
    about = f"(default: {setting.default})".replace("%", "%%")
    common: dict[str, Any] = {"dest": field, "default": None, "help": about}
    if setting.kind is bool and not setting.many:
        added: argparse.Action = group.add_argument(option, action=argparse.BooleanOptionalAction, **common)
        return added
    if setting.choices:
        common["choices"] = setting.choices
    if setting.many:
        common["nargs"] = setting.length or "+"
    added = group.add_argument(option, type=setting.kind, **common)
    return added


class _Replace(argparse.Action):
    def __call__(self, parser: Any, namespace: argparse.Namespace, *rest: Any) -> None:
        replace_muon()
        setattr(namespace, self.dest, True)
