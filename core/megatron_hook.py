"""This package's optimizers in any Megatron job, by the environment variable ``SHARDSTEP_MEGATRON=1`` alone.

The wheel contains a path file that imports this module when Python starts. It imports only the standard library until
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
"""Name of a module → function to call as soon as the module is imported."""


class _After(MetaPathFinder):
    """Finds the modules of :data:`AFTER` by the usual finders, and has their functions called after the import."""

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
    """Loads a module with ``loader``, and then calls ``then``."""

    def __init__(self, loader: Loader, then: Callable[[], None]) -> None:
        self.loader, self.then = loader, then

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        self.then()


def install() -> None:
    """Prepare for the import of Megatron-Core, if :data:`VARIABLE` is set to 1; changes ``sys.meta_path``."""
    if os.environ.get(VARIABLE) == "1" and not any(isinstance(finder, _After) for finder in sys.meta_path):
        sys.meta_path.insert(0, _After())
