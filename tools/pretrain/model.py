"""A small GPT with Megatron's parameter names and fused layouts, in plain torch; parallelism is added from outside."""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..usage import UsageError

NORMALIZATIONS = ("LayerNorm", "RMSNorm")
INIT_STD = 0.02


@dataclass(frozen=True)
class GPTConfig:
    """Shape of a GPT, in Megatron's field names. A zero stands for the default given beside it.

    Raises:
        UsageError: A size is not positive, or one does not divide another.
    """

    num_layers: int
    hidden_size: int
    num_attention_heads: int
    vocab_size: int
    seq_length: int
    num_query_groups: int = 0  # num_attention_heads
    kv_channels: int = 0  # hidden_size / num_attention_heads
    ffn_hidden_size: int = 0  # 4 * hidden_size; with swiglu 8/3 of it, rounded down to a multiple of 64 (at least 64)
    swiglu: bool = False
    normalization: str = "LayerNorm"
    untie_embeddings_and_output_weights: bool = False
    attention_output_gate: bool = False

    def __post_init__(self) -> None:
        for name in ("num_layers", "hidden_size", "num_attention_heads", "vocab_size", "seq_length"):
            if getattr(self, name) < 1:
                raise UsageError(_flag(name), getattr(self, name), "is out of range", possible="a whole number >= 1")
        for name in ("num_query_groups", "kv_channels", "ffn_hidden_size"):
            if getattr(self, name) < 0:
                raise UsageError(
                    _flag(name), getattr(self, name), "is out of range", possible="a whole number >= 1, or left out"
                )
        hidden, heads = self.hidden_size, self.num_attention_heads
        if not self.kv_channels and hidden % heads:
            problem = f"is not divisible by --num-attention-heads {heads}"
            hint = "or give the width of a head with --kv-channels"
            raise UsageError("--hidden-size", hidden, problem, possible=f"a multiple of {heads}", hint=hint)
        groups = self.num_query_groups or heads
        if heads % groups:
            problem = f"does not divide --num-attention-heads {heads}"
            possible = ", ".join(str(d) for d in range(1, heads + 1) if heads % d == 0)
            raise UsageError("--num-query-groups", groups, problem, possible=possible)
        if self.normalization not in NORMALIZATIONS:
            raise UsageError("--normalization", self.normalization, "unknown", possible=", ".join(NORMALIZATIONS))
        if self.attention_output_gate:
            raise UsageError("--attention-output-gate", True, "this GPT has no gated attention", hint="leave it out")
        ffn = max(64, hidden * 8 // 3 // 64 * 64) if self.swiglu else 4 * hidden
        object.__setattr__(self, "num_query_groups", groups)
        object.__setattr__(self, "kv_channels", self.kv_channels or hidden // heads)
        object.__setattr__(self, "ffn_hidden_size", self.ffn_hidden_size or ffn)

    @property
    def qkv_split_shapes(self) -> list[int]:
        """Rows of q, k and v within one query group of the fused weight."""
        return [
            self.num_attention_heads // self.num_query_groups * self.kv_channels,
            self.kv_channels,
            self.kv_channels,
        ]


@dataclass(frozen=True)
class Stage:
    """The part of a GPT that one pipeline stage holds: its layers, and whether it is the first or the last one."""

    layers: range
    first: bool
    last: bool


class Embedding(nn.Module):
    """Token plus learned position embeddings. Without positions it only holds a tied output weight."""

    def __init__(self, config: GPTConfig, *, positions: bool) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        if positions:
            self.position_embeddings = nn.Embedding(config.seq_length, config.hidden_size)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, S) token ids -> (B, S, hidden)."""
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        return cast(Tensor, self.word_embeddings(tokens) + self.position_embeddings(positions))


class SelfAttention(nn.Module):
    """Causal attention with Megatron's fused weight: per query group the rows of its queries, its key, its value.

    The number of heads is read off the projected tensor, so a rank that holds some of the groups runs the same code.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.kv_channels = config.kv_channels
        self.queries_per_group = config.num_attention_heads // config.num_query_groups
        groups, hidden = config.num_query_groups, config.hidden_size
        self.linear_qkv = nn.Linear(hidden, groups * sum(config.qkv_split_shapes), bias=False)
        self.linear_proj = nn.Linear(config.num_attention_heads * config.kv_channels, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, S, hidden) -> (B, S, hidden)."""
        batch, seq, _ = x.shape
        qkv = self.linear_qkv(x).view(batch, seq, -1, self.queries_per_group + 2, self.kv_channels)
        q, k, v = qkv.split([self.queries_per_group, 1, 1], dim=3)  # (B, S, groups, heads of one group, kv_channels)
        q, k, v = (part.flatten(2, 3).transpose(1, 2) for part in (q, k, v))  # (B, heads or groups, S, kv_channels)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.queries_per_group > 1)
        return cast(Tensor, self.linear_proj(out.transpose(1, 2).flatten(2)))


class MLP(nn.Module):
    """GELU, or SwiGLU with row 2i of the first weight the i-th gate and row 2i + 1 the i-th value.

    Interleaved, a shard of rows holds whole pairs on any number of ranks, which two stacked halves would not.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.swiglu = config.swiglu
        self.linear_fc1 = nn.Linear(
            config.hidden_size, config.ffn_hidden_size * (2 if config.swiglu else 1), bias=False
        )
        self.linear_fc2 = nn.Linear(config.ffn_hidden_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, S, hidden) -> (B, S, hidden)."""
        x = self.linear_fc1(x)
        if self.swiglu:
            gate, value = x.unflatten(-1, (-1, 2)).unbind(-1)
            return cast(Tensor, self.linear_fc2(F.silu(gate) * value))
        return cast(Tensor, self.linear_fc2(F.gelu(x)))


class TransformerLayer(nn.Module):
    """Pre-norm residual layer."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.input_layernorm = _norm(config)
        self.self_attention = SelfAttention(config)
        self.pre_mlp_layernorm = _norm(config)
        self.mlp = MLP(config)

    def forward(self, x: Tensor) -> Tensor:
        """(B, S, hidden) -> (B, S, hidden)."""
        x = x + self.self_attention(self.input_layernorm(x))
        return cast(Tensor, x + self.mlp(self.pre_mlp_layernorm(x)))


class Decoder(nn.Module):
    """The layers of one stage, each under its number in the whole model."""

    def __init__(self, config: GPTConfig, stage: Stage) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({str(i): TransformerLayer(config) for i in stage.layers})
        self.final_layernorm = _norm(config) if stage.last else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, S, hidden) -> (B, S, hidden)."""
        for layer in self.layers.values():
            x = layer(x)
        return cast(Tensor, self.final_layernorm(x))


class GPT(nn.Module):
    """A GPT or one pipeline stage of it. There is no dropout: forward is a function of its input and the weights.

    A tied output weight goes by one name, ``embedding.word_embeddings.weight``, also on a last stage that holds its own
    copy of it; ``named_parameters`` yields it once.

    Args:
        config: Shape of the whole model.
        stage: Part of the model that this instance holds; all of it by default. Parameter names do not depend on it.
        autocast: Low precision of the computation (torch.autocast); parameters and residuals keep theirs.
    """

    def __init__(self, config: GPTConfig, stage: Stage | None = None, *, autocast: torch.dtype | None = None) -> None:
        super().__init__()
        self.config = config
        self.stage = stage or Stage(range(config.num_layers), first=True, last=True)
        self.autocast = autocast
        self.tied = not config.untie_embeddings_and_output_weights
        if self.stage.first or (self.stage.last and self.tied):
            self.embedding = Embedding(config, positions=self.stage.first)
        self.decoder = Decoder(config, self.stage)
        if self.stage.last:
            self.output_layer = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tie_weights()

    def tie_weights(self) -> None:
        """Make the output layer share the token embedding; again after anything that replaces parameters."""
        if self.stage.last and self.tied:
            self.output_layer.weight = self.embedding.word_embeddings.weight

    def forward(self, x: Tensor) -> Tensor:
        """(B, S, hidden), on the first stage token ids (B, S) -> (B, S, hidden), on the last logits (B, S, vocab)."""
        with torch.autocast(x.device.type, dtype=self.autocast, enabled=self.autocast is not None):
            if self.stage.first:
                x = self.embedding(x)
            x = self.decoder(x)
            return cast(Tensor, self.output_layer(x)) if self.stage.last else x


def build_gpt(
    config: GPTConfig,
    *,
    seed: int,
    stage: Stage | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    autocast: torch.dtype | None = None,
) -> GPT:
    """A GPT whose every weight is a function of (``seed``, parameter name), whatever the stage, device and global RNG.

    Weights are normal with deviation 0.02, the two projections into the residual stream divided by sqrt(2 * num_layers)
    (as Megatron does); norms start as the identity. Values are drawn in float32 on the CPU and then converted.
    """
    with torch.device("meta"):
        model = GPT(config, stage, autocast=autocast)
    model = model.to(dtype).to_empty(device=device)
    model.tie_weights()
    with torch.no_grad():
        for name, param in model.named_parameters():
            if param.ndim == 1:
                param.fill_(0.0 if name.endswith(".bias") else 1.0)
                continue
            digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:7]))
            into_residual = name.endswith(("linear_proj.weight", "linear_fc2.weight"))
            std = INIT_STD / math.sqrt(2 * config.num_layers) if into_residual else INIT_STD
            param.copy_(torch.empty(param.shape, device="cpu").normal_(0.0, std, generator=generator))
    return model


def tag_parameters(model: GPT, *, split_gate_up: bool = True) -> None:
    """Set the attributes by which an optimizer knows a parameter. Call after parallelizing, which replaces parameters.

    Token and position embeddings and the output layer get ``is_embedding_or_output_parameter``; the fused QKV weight
    ``is_qkv`` and ``qkv_split_shapes``; with ``split_gate_up`` a SwiGLU's first weight ``matrix_parts`` (1, 1), for its
    alternating gate and value rows are two matrices; a last stage's copy of a tied embedding ``shared``.
    """
    config = model.config
    for name, param in model.named_parameters():
        attributes: dict[str, object] = {}
        if name.startswith(("embedding.", "output_layer.")):
            attributes["is_embedding_or_output_parameter"] = True
            if name.startswith("embedding.") and not model.stage.first:
                attributes["shared"] = True
        elif name.endswith("linear_qkv.weight"):
            attributes["is_qkv"] = True
            attributes["qkv_split_shapes"] = config.qkv_split_shapes
        elif name.endswith("linear_fc1.weight") and config.swiglu and split_gate_up:
            attributes["matrix_parts"] = (1, 1)
        for attribute, value in attributes.items():
            setattr(param, attribute, value)


def pipeline_stages(num_layers: int, num_stages: int) -> Iterator[Stage]:
    """Cut the layers into consecutive stages whose sizes differ by at most one, the larger ones first."""
    each, larger = divmod(num_layers, num_stages)
    start = 0
    for i in range(num_stages):
        stop = start + each + (i < larger)
        yield Stage(range(start, stop), first=i == 0, last=i == num_stages - 1)
        start = stop


def _norm(config: GPTConfig) -> nn.Module:
    cls = nn.LayerNorm if config.normalization == "LayerNorm" else nn.RMSNorm
    return cls(config.hidden_size, eps=1e-5)


def _flag(field: str) -> str:
    return "--" + field.replace("_", "-")
