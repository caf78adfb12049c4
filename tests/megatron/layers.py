"""Layers that the real Megatron-Core has with Transformer Engine alone, made of those that it has without. No number changes."""

from copy import copy
from typing import Any

import torch
from torch import Tensor


def let_norms_be_sequence_parallel() -> None:
    """Megatron-Core's layer norm without Transformer Engine refuses sequence parallelism; it takes a mark on the weights."""
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    norm: Any = WrappedTorchNorm

    def marked(cls: Any, config: Any, *args: Any, plain: Any = norm.__new__, **kwargs: Any) -> Any:
        alone = copy(config)
        alone.sequence_parallel = False
        made = plain(cls, alone, *args, **kwargs)
        for p in made.parameters():
            p.sequence_parallel = config.sequence_parallel
        return made

    norm.__new__ = marked


def latent_attention() -> type:
    """Megatron-Core's own attention without Transformer Engine, for latent heads.

    It is not told their widths: it sees them. And it adds up what the ranks' heads say of the rotated keys, which all heads
    share; where the projection down is column-parallel Megatron-Core takes each rank's for the whole gradient.
    """
    from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    class Attention(DotProductAttention):
        def __init__(self, *args: Any, k_channels: int = 0, v_channels: int = 0, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)

        def forward(self, query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            own, rotated = key.split([self.config.qk_head_dim, self.config.qk_pos_emb_head_dim], -1)
            key = torch.cat([own, copy_to_tensor_model_parallel_region(rotated)], -1)
            return super().forward(query, key, *args, **kwargs)

    return Attention
