"""Small GPTs for the training engine, and text for them."""

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from tools.pretrain.model import GPTConfig
from tools.pretrain.parallel import AXES, Engine

SIZES = {"hidden_size": 32, "num_attention_heads": 4, "vocab_size": 40, "seq_length": 12}
TIED = GPTConfig(num_layers=4, **SIZES)
UNTIED = GPTConfig(
    num_layers=5,
    num_query_groups=2,
    swiglu=True,
    ffn_hidden_size=24,
    normalization="RMSNorm",
    untie_embeddings_and_output_weights=True,
    **SIZES,
)
MODELS = {"tied": TIED, "untied": UNTIED}
BATCH = 8


def batch(step: int) -> Tensor:
    return torch.randint(SIZES["vocab_size"], (BATCH, 13), generator=torch.Generator().manual_seed(step))


def build(world, config: GPTConfig, layout: dict[str, int], **options) -> Engine:
    """``layout`` gives the sizes of tp and pp, and may give v, the layers of a virtual stage."""
    tp, pp = layout.get("tp", 1), layout.get("pp", 1)
    dp = world.size // (tp * pp)
    if "v" in layout:
        options |= {"schedule": "interleaved", "layers_per_virtual_stage": layout["v"]}
    mesh = world.mesh((pp, dp, tp), AXES)
    return Engine(config, mesh, micro_batches=4 if pp > 1 else 2, **options)


def parameters(engine: Engine) -> dict[str, torch.nn.Parameter]:
    return {name: param for chunk in engine.model_chunks for name, param in chunk.named_parameters()}


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
