"""Attributes that say what a Megatron parameter is: which rows of it are matrices of their own, which ranks hold it."""

from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from ..optimizer.emerging_optimizers import _get_qkv_split_shapes
from .seam import LAYERS, seam

KEPT = {"matrix_parts": None, "use_muon": True, "is_embedding_or_output_parameter": False}
"""Attributes, with what stands for them when they are not there, that float32 copies of 16-bit parameters must have too."""


def keep_attributes() -> None:
    """Let Megatron-Core copy our attributes to the main parameters that it makes."""
    (defaults,) = seam(LAYERS, "_MODEL_PARALLEL_ATTRIBUTE_DEFAULTS")
    for name, default in KEPT.items():
        defaults.setdefault(name, default)


def tag(model_chunks: Sequence[nn.Module]) -> None:
    """Mark fused weights by the shape of the whole, so that every tensor-parallel size splits them alike.

    Sets ``is_qkv``, ``qkv_split_shapes``, ``matrix_parts`` and ``expert_tp``. What a parameter declares already
    (``matrix_parts`` of an MLA projection) stays.
    """
    for chunk in model_chunks:
        for name, p, module in _parameters(chunk):
            if "experts" in name and "shared" not in name:
                p.expert_tp = True
            config = getattr(module, "config", None) or getattr(chunk, "config", None)
            if p.ndim != 2 or getattr(p, "matrix_parts", None) is not None or config is None:
                continue
            if name.endswith("linear_qkv.weight"):
                p.is_qkv = True
                p.qkv_split_shapes = _get_qkv_split_shapes(config)
            elif name.endswith("linear_fc1.weight") and getattr(config, "gated_linear_unit", False):
                rows = p.shape[0] * _tensor_parallel(p, module)
                p.matrix_parts = (rows // 2, rows // 2)
                p.partition_stride = 2


def _parameters(chunk: nn.Module) -> Iterator[tuple[str, Any, nn.Module]]:
    modules = dict(chunk.named_modules())
    for name, p in chunk.named_parameters():
        if p.requires_grad:
            yield name, p, modules[name.rpartition(".")[0]]


def _tensor_parallel(p: Any, module: nn.Module) -> int:
    """Ranks that ``p`` is cut over."""
    if not getattr(p, "tensor_model_parallel", False):
        return 1
    group = getattr(module, "tp_group", None)
    return 1 if group is None else int(group.size())
