"""Our optimizers in any Megatron job, with nothing changed but the environment: ``SHARDSTEP_MEGATRON=1``.

The wheel brings a path file that imports this when Python starts. It imports nothing heavy, and nothing of ours, until
Megatron-Core itself is imported.
"""

import os
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

VARIABLE = "SHARDSTEP_MEGATRON"


def _register() -> None:
    from .megatron import register

    register()


def _extend_arguments() -> None:
    from .megatron.flags import extend_arguments

    extend_arguments()


AFTER: dict[str, Callable[[], None]] = {
    "megatron.core.optimizer": _register,
    "megatron.training.arguments": _extend_arguments,
}
"""Module → what to do as soon as it is imported."""


class _After(MetaPathFinder):
    """Finds the modules of ``AFTER`` where everybody does, and lets something happen after their import."""

    def __init__(self) -> None:
        self.waiting = dict(AFTER)

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in self.waiting:
            return None
        then = self.waiting.pop(name)
        spec = find_spec(name)
        if spec is None or spec.loader is None:
            return None
        spec.loader = _Then(spec.loader, then)
        return spec


class _Then(Loader):
    def __init__(self, loader: Loader, then: Callable[[], None]) -> None:
        self.loader, self.then = loader, then

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        self.then()


def install() -> None:
    """Wait for Megatron-Core, if the environment asks for it."""
    if os.environ.get(VARIABLE) == "1" and not any(isinstance(finder, _After) for finder in sys.meta_path):
        sys.meta_path.insert(0, _After())
