"""Which parameters Megatron-Core's layer-wise layout keeps whole on one rank: those that our optimizer steps.

Megatron-Core keeps the parameters whole that its own Muon steps: matrices that are no embeddings. Some of our optimizers step all
parameters, and others leave routers and position embeddings to Adam. Without this, nobody would step the difference.
"""

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from .refusals import steps_whole
from .settings import flags
from .upstream import LAYER_WISE, patch


def keep_together(name_of: Callable[[str], str | None]) -> None:
    """Let Megatron-Core's layer-wise layout follow our optimizer, if the command line names one. Safe to call twice.

    Args:
        name_of: Function from a name that ``--optimizer`` takes to the name in our registry; None for an optimizer that is not
            ours.
    """

    def with_ours(theirs: Callable[..., None], model_chunks: Sequence[nn.Module]) -> None:
        """Megatron-Core's ``tag_params_for_buffer_routing``, which follows an optimizer of ours that the command line names."""
        theirs(model_chunks)
        name = name_of(str(flags().get("optimizer")))
        if name is not None:
            tag_whole(name, model_chunks)

    patch(LAYER_WISE, "tag_params_for_buffer_routing", with_ours)


def tag_whole(name: str, model_chunks: Sequence[nn.Module]) -> None:
    """Mark, for the layout of the gradient buffers, the parameters that our optimizer ``name`` steps.

    Call it before the model is wrapped in ``DistributedDataParallel``, on all chunks.
    """
    for chunk in model_chunks:
        for parameter, p in chunk.named_parameters():
            if p.requires_grad:
                tagged: Any = p
                tagged.is_managed_by_layer_wise_optimizer = steps_whole(name, parameter, p)
