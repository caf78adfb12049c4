"""Megatron-Core's rules for maximal update parametrization (MuP), made to know our optimizers.

The rules go by the optimizer's name. They leave the learning rate of matrices alone where the name has ``muon`` in it, and divide
it by the width otherwise; they divide ``eps`` too where the name has ``adam`` in it, and scale vectors instead for ``sgd``. An
optimizer of ours gets what its name without ``shardstep_`` gets. One that orthogonalizes gets what Muon gets, whatever it is
called, because the size of its updates does not grow with the width.
"""

from collections.abc import Callable
from typing import Any

from emerging_optimizers.orthogonalized_optimizers.orthogonalized_optimizer import OrthogonalizedOptimizer

from ..optimizer import registry as ours
from .upstream import FACTORY, patch


def follow_width(name_of: Callable[[str], str | None]) -> None:
    """Let Megatron-Core's rules know our optimizers. A second call changes nothing.

    Args:
        name_of: Function from a name that ``--optimizer`` takes to the name in our registry; None for an optimizer that is not
            ours.
    """

    def with_ours(theirs: Callable[..., Any], config: Any, mup_width_mult: float, optimizer_type: str = "adam") -> Any:
        """Megatron-Core's ``get_mup_config_overrides``, which knows an optimizer of ours by the name that its rules follow."""
        name = name_of(optimizer_type)
        return theirs(config, mup_width_mult, optimizer_type if name is None else rule(name))

    patch(FACTORY, "get_mup_config_overrides", with_ours)


def rule(name: str) -> str:
    """The name that Megatron-Core's rules know our optimizer ``name`` by."""
    cls = ours.entry_of(name).optimizer_cls
    return "muon" if issubclass(getattr(cls, "inner", cls), OrthogonalizedOptimizer) else name
