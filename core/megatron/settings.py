"""The settings of an optimizer under Megatron-Core: Megatron's own ``OptimizerConfig``, and flags that never reach it."""

import sys
from typing import Any

from ..optimizer.registry import settings_of
from ..sharding.tp_modes import AUTO, exact_modes
from .upstream import GLOBALS

PREFIX = "shardstep_"
"""Prefix of our optimizers' names in Megatron, and of our flags in its parsed command line."""

TP_MODE = f"{PREFIX}tp_mode"
SPLIT_HEADS = f"{PREFIX}split_heads"
EXPECT = f"{PREFIX}expect_matrix_params"
EXACT = (*exact_modes(), AUTO)


class Settings:
    """Megatron-Core's config as our registry reads one: an attribute, or none.

    On the command line only our own flags count (``--soap-eps``). Megatron's flags reach the config where they mean the same, and
    some of its other flags (``rank``, ``seed``) have names that mean something else here. Our flags win over an attribute of the
    config, which may also be one that its class does not declare (``config.soap_eps = 1e-2``).

    Args:
        config: Megatron-Core's ``OptimizerConfig``.
        name: Name of the optimizer in our registry.
    """

    def __init__(self, config: Any, name: str) -> None:
        self._config = config
        self._settings = settings_of(name)
        self._flags = flags()

    def __getattr__(self, name: str) -> Any:
        if name == "muon_tp_mode":
            return self._tp_mode()
        setting = self._settings.get(name)
        given = self._flags.get(PREFIX + name) if setting else None
        if setting and given is not None:
            return setting.value(given)
        if name == "lion_betas" and not hasattr(self._config, name):
            return self._config.lion_beta1, self._config.lion_beta2
        return getattr(self._config, name)

    @property
    def splits_heads(self) -> bool:
        """Whether each head of attention is a matrix of its own."""
        return bool(self._flags.get(SPLIT_HEADS) or getattr(self._config, SPLIT_HEADS, False))

    def _tp_mode(self) -> str:
        """Our flag where it is given; else Megatron's mode where that is exact and not just its default; else ``owner``."""
        asked = self._flags.get(TP_MODE) or getattr(self._config, TP_MODE, None)
        theirs = getattr(self._config, "muon_tp_mode", None)
        # Its default is blockwise in 0.19, and duplicated from 0.20 on, which owner equals bit for bit in less time.
        by_default = getattr(type(self._config), "muon_tp_mode", None)
        return asked or (theirs if theirs in EXACT and theirs != by_default else "owner")


def flags() -> dict[str, Any]:
    """Megatron's parsed command line; empty where there is none."""
    module = sys.modules.get(GLOBALS)
    args = getattr(module, "_GLOBAL_ARGS", None)
    return dict(vars(args)) if args is not None else {}
