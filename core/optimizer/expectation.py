"""The check that as many matrices as declared go to an optimizer of matrices, made before a run begins."""

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

MAX_NAMED = 20
"""Parameters that an error names; the others are counted."""


@dataclass(frozen=True)
class Choice:
    """What was chosen for one parameter of the model.

    Attributes:
        name: Name of the parameter.
        shape: Its shape, of this rank's shard or of the whole.
        optimizer: What steps it, in words.
        reason: Why, in words.
        in_matrix_optimizer: Whether an optimizer of matrices steps it.
    """

    name: str
    shape: tuple[int, ...]
    optimizer: str
    reason: str
    in_matrix_optimizer: bool

    def __str__(self) -> str:
        return f"{self.name} {' x '.join(map(str, self.shape))} goes to {self.optimizer} ({self.reason})"


class UnexpectedRoutingError(ValueError):
    """Other parameters than declared go to an optimizer of matrices."""


def check_expected(expected: int | str, choices: Sequence[Choice]) -> None:
    """Check that enough parameters of the whole model go to an optimizer of matrices.

    Args:
        expected: Least number of matrices that must go to one; or a glob pattern of names: each parameter that matches must go to
            one, and at least one must match.
        choices: Those of all parameters of the model, on all pipeline stages, each once; frozen ones too.

    Raises:
        UnexpectedRoutingError: names the parameters that do not, and why.
        ValueError: when ``expected`` is neither a positive number nor a pattern.
    """
    if isinstance(expected, bool) or not (expected if isinstance(expected, str) else expected > 0):
        raise ValueError(
            f"expect={expected!r} must be a number of matrices, at least 1, or a pattern of parameter names."
        )
    if isinstance(expected, str):
        matched = [choice for choice in choices if fnmatchcase(choice.name, expected)]
        if not matched:
            example = choices[0].name if choices else "none"
            raise UnexpectedRoutingError(
                f"expect={expected!r} matches no parameter of the model; names look like {example!r}, and "
                f"patterns are globs (*.layers.*.mlp.*.weight)."
            )
        others = [choice for choice in matched if not choice.in_matrix_optimizer]
        if others:
            raise UnexpectedRoutingError(
                f"expect={expected!r}: {len(others)} of the {len(matched)} parameters that match do not go to an optimizer of "
                f"matrices: {_listed(others)}. {_REMEDY}"
            )
        return
    matrices = sum(choice.in_matrix_optimizer for choice in choices)
    if matrices < expected:
        others = [choice for choice in choices if not choice.in_matrix_optimizer and len(choice.shape) > 1]
        raise UnexpectedRoutingError(
            f"expect={expected}: only {matrices} matrices of the whole model go to an optimizer of matrices. Of the parameters "
            f"that are not 1-D, the others are: {_listed(others)}. {_REMEDY}"
        )


_REMEDY = "Set use_muon = True on a parameter that should, write an override for it, or correct what is expected."


def _listed(choices: Sequence[Choice]) -> str:
    more = f"; and {len(choices) - MAX_NAMED} more" if len(choices) > MAX_NAMED else ""
    return "; ".join(map(str, choices[:MAX_NAMED])) + more or "none"
