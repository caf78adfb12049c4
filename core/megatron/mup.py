"""Megatron-Core's rules for maximal update parametrization, which look at the optimizer's name, for ours.

They leave the learning rate of matrices alone where the name has ``muon`` in it, divide it by the width otherwise, divide ``eps``
too where it has ``adam`` in it, and scale vectors instead for ``sgd``. Ours get what the name without ``shardstep_`` gets; and
those that orthogonalize, whatever they are called, what Muon gets: the size of their updates does not grow with the width.
"""

from collections.abc import Callable
from typing import Any

from emerging_optimizers.orthogonalized_optimizers.orthogonalized_optimizer import OrthogonalizedOptimizer

from ..optimizer import registry as ours
from .upstream import FACTORY, patch


def follow_width(name_of: Callable[[str], str | None]) -> None:
    """Let Megatron-Core's rules know our optimizers. Again it does nothing new.

    Args:
        name_of: From a name that ``--optimizer`` takes to that in our registry; None for an optimizer that is not ours.
    """

    def with_ours(theirs: Callable[..., Any], config: Any, mup_width_mult: float, optimizer_type: str = "adam") -> Any:
        name = name_of(optimizer_type)
        return theirs(config, mup_width_mult, optimizer_type if name is None else rule(name))

    patch(FACTORY, "get_mup_config_overrides", with_ours)


def rule(name: str) -> str:
    """The name that Megatron-Core's rules know our optimizer ``name`` by."""
    cls = ours.entry_of(name).optimizer_cls
    return "muon" if issubclass(getattr(cls, "inner", cls), OrthogonalizedOptimizer) else name
