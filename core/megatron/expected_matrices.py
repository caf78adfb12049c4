"""The check that as many matrices as the command line declares go to our optimizer (``--expect-matrix-params``)."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from ..module_names import unwrapped
from ..optimizer import registry as ours
from ..optimizer.expectation import Choice, check_expected
from ..process_groups_config import gather
from .settings import EXPECT, flags
from .upstream import PARALLEL, lookup


def check_expected_matrices(
    name: str, config: Any, model_chunks: Sequence[nn.Module], config_overrides: Any, groups: Any
) -> None:
    """Compare where Megatron-Core will send the parameters with ``config.shardstep_expect_matrix_params``, or the flag.

    All pipeline stages call this together, because a number counts the matrices of all of them. Of experts that are divided over
    ranks, it counts those of one rank.

    Args:
        name: Name of the optimizer in our registry.
        config: Megatron-Core's ``OptimizerConfig``.
        model_chunks: This rank's modules.
        config_overrides: Megatron-Core's overrides by parameter, before those of the optimizer are added.
        groups: Megatron-Core's process groups; None for its global ones.

    Raises:
        UnexpectedRoutingError: on all ranks; lists the parameters that go elsewhere, and why.
    """
    asked = flags().get(EXPECT) or getattr(config, EXPECT, None)
    if asked is None:
        return
    expected = int(asked) if str(asked).isdecimal() else asked
    local = [
        replace(_choice(name, parameter, p, config_overrides or {}), name=unwrapped(chunk, parameter))
        for chunk in model_chunks
        for parameter, p in chunk.named_parameters()
    ]
    (global_pipeline,) = lookup(PARALLEL, "get_pipeline_model_parallel_group")
    pipeline = getattr(groups, "pp", None) or global_pipeline()
    check_expected(expected, [choice for stage in gather(local, pipeline) for choice in stage])


def _choice(optimizer: str, parameter: str, p: nn.Parameter, overrides: Any) -> Choice:
    shape = tuple(p.shape)
    if not p.requires_grad:
        return Choice(parameter, shape, "no optimizer", "it requires no gradient", False)
    for key, settings in overrides.items():
        if settings.get("optimizer") and key.matches(p, parameter):
            return Choice(parameter, shape, settings["optimizer"], "an override of Megatron-Core's", False)
    defaults = ours.entry_of(optimizer).default_param_overrides
    for key in defaults:
        if why := key.why(p, parameter):
            return Choice(parameter, shape, "adam", why, False)
    return Choice(parameter, shape, optimizer, "it is a matrix", p.ndim == 2 and bool(defaults))
