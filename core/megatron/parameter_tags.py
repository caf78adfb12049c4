"""Attributes that say what a Megatron parameter is: which rows of it are matrices of their own, which ranks hold it.

A fused weight is split where the model splits its output: attention's weight into queries (and gates), keys and values; weights
of multi-head latent attention into the rotated and the unrotated part; the first weight of a gated MLP into gate and up.

For any other weight, say it yourself before the optimizer is built: ``p.matrix_parts = (rows, rows, ...)``, rows of the whole
weight, whatever the tensor parallelism. The sizes repeat over all rows, and what repeats is one matrix: (64, 64) on 512 rows are
two matrices of 256 rows, eight times 64 are eight of 64. ``p.matrix_parts = (all rows,)`` keeps a fused weight one matrix. An
attribute that a parameter already has wins over the split made here. ``p.use_muon = False`` leaves a weight to the Adam that
stands beside a matrix optimizer, and ``p.use_muon = True`` gives a weight to the matrix optimizer whatever it is called.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import nn

from ..optimizer.registry import _get_qkv_split_shapes
from ..process_groups_config import ProcessGroupCollection
from ..sharding.parameter_layout import layout_of
from .upstream import LAYERS, lookup

KEPT = {"matrix_parts": None, "use_muon": None, "is_embedding_or_output_parameter": False}
"""Attributes, with what stands for them when they are not there, that float32 copies of 16-bit parameters must have too."""


def keep_attributes() -> None:
    """Let Megatron-Core copy our attributes to the main parameters that it makes."""
    (defaults,) = lookup(LAYERS, "_MODEL_PARALLEL_ATTRIBUTE_DEFAULTS")
    for name, default in KEPT.items():
        defaults.setdefault(name, default)


def tag(model_chunks: Sequence[nn.Module], groups: ProcessGroupCollection, *, split_heads: bool = False) -> None:
    """Mark fused weights by the shape of the whole, so that every tensor-parallel size splits them alike.

    Sets ``expert_tp``; ``is_qkv`` and ``qkv_split_shapes`` of attention, for Muon's ``split_qkv``; ``matrix_parts`` and
    ``partition_stride`` of gated MLPs.

    Args:
        model_chunks: Modules of this pipeline stage.
        groups: Process groups over which their parameters are cut.
        split_heads: Split attention into heads too (``config.shardstep_split_heads``): the parts of each head apart.

    Raises:
        ValueError: for a weight whose shards do not say which rows of the whole they are.
    """
    for chunk in model_chunks:
        for name, p, module in _parameters(chunk):
            if "experts" in name and "shared" not in name:
                p.expert_tp = True
            config = getattr(module, "config", None) or getattr(chunk, "config", None)
            if getattr(p, "matrix_parts", None) is not None:
                p.is_qkv = False
            elif p.ndim == 2 and config is not None:
                _mark(name, p, config, groups, split_heads)


def _mark(name: str, p: Any, config: Any, groups: ProcessGroupCollection, split_heads: bool) -> None:
    layer = _layer(name)
    sizes_of = _ATTENTION.get(layer) or (
        _LATENT.get(layer) if getattr(config, "multi_latent_attention", False) else None
    )
    if sizes_of is not None:
        rows = layout_of(p, groups, name=name).shape[0]
        if layer == "linear_qkv_down_proj" and rows > p.shape[0]:
            raise ValueError(
                f"{name}: a rank holds rows of queries and of keys and values, in proportions that partition_stride does not "
                f"tell; leave mla_down_proj_fusion out, or tensor parallelism."
            )
        sizes = [size for size in sizes_of(config) if size]
        if layer == "linear_qkv" and split_heads:
            sizes = [config.kv_channels] * (sum(sizes) // config.kv_channels)
        p.is_qkv = True
        p.qkv_split_shapes = sizes * max(1, rows // sum(sizes)) if split_heads else sizes
    elif layer == "linear_fc1" and getattr(config, "gated_linear_unit", False):
        half = layout_of(p, groups, name=name).shape[0] // 2
        block = _interleaved(name, config)
        p.matrix_parts = (block, block) if block else (half, half)
        p.partition_stride = 1 if block else 2


_ATTENTION: dict[str, Callable[[Any], Sequence[int]]] = {
    "linear_qkv": _get_qkv_split_shapes,
    "linear_kv": lambda config: (config.kv_channels, config.kv_channels),
}
"""Rows of the parts of attention's fused weights, in a group of queries or in a head."""

_LATENT: dict[str, Callable[[Any], Sequence[int]]] = {
    "linear_q_proj": lambda config: (config.qk_head_dim, config.qk_pos_emb_head_dim),
    "linear_q_up_proj": lambda config: (config.qk_head_dim, config.qk_pos_emb_head_dim),
    "linear_kv_up_proj": lambda config: (config.qk_head_dim, config.v_head_dim),
    "linear_kv_down_proj": lambda config: (config.kv_lora_rank, config.qk_pos_emb_head_dim),
    "linear_qkv_down_proj": lambda config: (config.q_lora_rank, config.kv_lora_rank, config.qk_pos_emb_head_dim),
}
"""The same of multi-head latent attention: in a head, or, of projections down, in the whole."""


def _layer(name: str) -> str:
    """Name of the layer whose weight ``name`` is; Transformer Engine numbers those of several experts."""
    layer, _, weight = name.rpartition(".")
    return layer.rpartition(".")[2] if re.fullmatch(r"weight\d*", weight) else ""


def _interleaved(name: str, config: Any) -> int:
    """Rows in a block where gate and up alternate block by block; 0 where they do not."""
    if "shared_experts" in name:
        grouped = getattr(config, "use_grouped_gemm_for_shared_expert", False)
        size = getattr(config, "moe_shared_expert_glu_interleave_size", None) if grouped else None
    else:
        size = getattr(config, "moe_mlp_glu_interleave_size", None) if "experts" in name else None
    return size or 0


def _parameters(chunk: nn.Module) -> Iterator[tuple[str, Any, nn.Module]]:
    modules = dict(chunk.named_modules())
    for name, p in chunk.named_parameters():
        if p.requires_grad:
            yield name, p, modules[name.rpartition(".")[0]]
