"""The GPT by itself: fused layouts against plain formulas, weights that do not depend on the stage, attributes."""

import math

import pytest
import torch
from torch import Tensor

from tools.pretrain.model import GPT, GPTConfig, Stage, build_gpt, pipeline_stages, tag_parameters
from tools.usage import UsageError

SMALL = GPTConfig(num_layers=2, hidden_size=32, num_attention_heads=4, vocab_size=48, seq_length=16)
GROUPED = GPTConfig(
    num_layers=3,
    hidden_size=32,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=6,
    vocab_size=48,
    seq_length=16,
    swiglu=True,
    ffn_hidden_size=20,
    normalization="RMSNorm",
    untie_embeddings_and_output_weights=True,
)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_attention_heads": 5}, "--hidden-size 32: is not divisible by --num-attention-heads 5"),
        ({"num_query_groups": 3}, "--num-query-groups 3: does not divide --num-attention-heads 4; possible: 1, 2, 4"),
        ({"num_layers": 0}, "--num-layers 0: is out of range"),
        ({"ffn_hidden_size": -1}, "--ffn-hidden-size -1: is out of range"),
        ({"normalization": "layernorm"}, "--normalization layernorm: unknown; possible: LayerNorm, RMSNorm"),
        ({"attention_output_gate": True}, "has no gated attention"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(change, message):
    sizes = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "vocab_size": 48, "seq_length": 16}
    with pytest.raises(UsageError, match=message):
        GPTConfig(**(sizes | change))


def test_defaults_are_megatrons():
    assert (SMALL.num_query_groups, SMALL.kv_channels, SMALL.ffn_hidden_size) == (4, 8, 128)
    wide = GPTConfig(num_layers=1, hidden_size=96, num_attention_heads=4, vocab_size=8, seq_length=4, swiglu=True)
    assert wide.ffn_hidden_size == int(4 * 96 * 2 / 3 / 64) * 64


def attention(layer: torch.nn.Module, x: Tensor, config: GPTConfig) -> Tensor:
    """One head after the other, from the rows of the fused weight that belong to it."""
    weight, width = layer.linear_qkv.weight, config.kv_channels
    per_group = config.num_attention_heads // config.num_query_groups
    rows = iter(weight.split(width))  # per group: its queries, its key, its value
    future = torch.ones(x.shape[1], x.shape[1]).triu(1).bool()
    heads = []
    for _ in range(config.num_query_groups):
        *queries, key, value = (next(rows) for _ in range(per_group + 2))
        for query in queries:
            scores = (x @ query.T) @ (x @ key.T).mT / math.sqrt(width)
            heads.append(scores.masked_fill(future, -math.inf).softmax(-1) @ (x @ value.T))
    return torch.cat(heads, -1) @ layer.linear_proj.weight.T


@pytest.mark.parametrize("config", [SMALL, GROUPED], ids=["small", "grouped"])
def test_fused_attention_is_attention_head_by_head(config):
    layer = build_gpt(config, seed=1, dtype=torch.float64).decoder.layers["0"].self_attention
    x = torch.randn(3, 16, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(layer(x), attention(layer, x, config))


def test_swiglu_alternates_gate_and_value_rows():
    mlp = build_gpt(GROUPED, seed=1, dtype=torch.float64).decoder.layers["0"].mlp
    x = torch.randn(3, 16, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    gate, value = x @ mlp.linear_fc1.weight[0::2].T, x @ mlp.linear_fc1.weight[1::2].T
    torch.testing.assert_close(mlp(x), (gate * gate.sigmoid() * value) @ mlp.linear_fc2.weight.T)


@pytest.mark.parametrize("config", [SMALL, GROUPED], ids=["small", "grouped"])
def test_a_token_changes_no_logits_before_it(config):
    model = build_gpt(config, seed=1)
    tokens = torch.arange(16).unsqueeze(0)
    changed = tokens.clone()
    changed[0, 10] = 47
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :10], after[:, :10])
    assert not torch.allclose(before[:, 10:], after[:, 10:])


@pytest.mark.parametrize("config", [SMALL, GROUPED], ids=["tied", "untied"])
def test_stages_hold_the_weights_of_the_whole_model_and_compute_what_it_does(config):
    whole = build_gpt(config, seed=7)
    names = {name: param for name, param in whole.named_parameters()}
    seen: set[str] = set()
    x = torch.arange(16).unsqueeze(0)
    logits = whole(x)
    for stage in pipeline_stages(config.num_layers, 2):
        part = build_gpt(config, seed=7, stage=stage)
        x = part(x)
        for name, param in part.named_parameters():
            assert torch.equal(param, names[name]), name
            seen.add(name)
    assert seen == set(names)
    torch.testing.assert_close(x, logits)


def test_weights_depend_on_the_seed_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    one = build_gpt(SMALL, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(5)
    same, other = build_gpt(SMALL, seed=1), build_gpt(SMALL, seed=2)
    qkv = [model.decoder.layers["1"].self_attention.linear_qkv.weight for model in (one, same, other)]
    assert torch.equal(qkv[0], qkv[1])
    assert not torch.equal(qkv[0], qkv[2])


def test_weights_have_megatrons_spread():
    config = GPTConfig(num_layers=8, hidden_size=128, num_attention_heads=4, vocab_size=256, seq_length=16)
    model = build_gpt(config, seed=1)
    layer = model.decoder.layers["3"]
    for weight, std in (
        (model.embedding.word_embeddings.weight, 0.02),
        (layer.self_attention.linear_qkv.weight, 0.02),
        (layer.self_attention.linear_proj.weight, 0.02 / 4),
        (layer.mlp.linear_fc1.weight, 0.02),
        (layer.mlp.linear_fc2.weight, 0.02 / 4),
    ):
        # The relative error of a sample deviation is 1/sqrt(2n), here below 0.6 %.
        assert weight.std().item() == pytest.approx(std, rel=0.03)
        assert abs(weight.mean().item()) < 5 * std / math.sqrt(weight.numel())
    assert layer.input_layernorm.weight.eq(1).all()
    assert layer.input_layernorm.bias.eq(0).all()


def test_names_are_megatrons():
    names = [name for name, _ in build_gpt(SMALL, seed=1).named_parameters()]
    layer = [
        *("input_layernorm.weight", "input_layernorm.bias"),
        *("self_attention.linear_qkv.weight", "self_attention.linear_proj.weight"),
        *("pre_mlp_layernorm.weight", "pre_mlp_layernorm.bias", "mlp.linear_fc1.weight", "mlp.linear_fc2.weight"),
    ]
    assert names == [
        *("embedding.word_embeddings.weight", "embedding.position_embeddings.weight"),
        *(f"decoder.layers.{i}.{name}" for i in range(2) for name in layer),
        *("decoder.final_layernorm.weight", "decoder.final_layernorm.bias"),
    ]
    untied = [name for name, _ in build_gpt(GROUPED, seed=1).named_parameters()]
    assert untied[-1] == "output_layer.weight"


def tags(model: GPT, **options) -> dict[str, dict[str, object]]:
    tag_parameters(model, **options)
    return {name: dict(vars(param)) for name, param in model.named_parameters() if vars(param)}


def test_parameters_say_what_they_are():
    edge = {"is_embedding_or_output_parameter": True}
    qkv = {"is_qkv": True, "qkv_split_shapes": [12, 6, 6]}
    layers = [f"decoder.layers.{i}." for i in range(3)]
    expected = {
        "embedding.word_embeddings.weight": edge,
        "embedding.position_embeddings.weight": edge,
        **{layer + "self_attention.linear_qkv.weight": qkv for layer in layers},
        **{layer + "mlp.linear_fc1.weight": {"matrix_parts": (1, 1)} for layer in layers},
        "output_layer.weight": edge,
    }
    assert tags(build_gpt(GROUPED, seed=1)) == expected
    assert not [name for name in tags(build_gpt(GROUPED, seed=1), split_gate_up=False) if "fc1" in name]


def test_a_last_stages_tied_copy_says_that_it_is_one():
    last = build_gpt(SMALL, seed=1, stage=Stage(range(1, 2), first=False, last=True))
    copy = {"is_embedding_or_output_parameter": True, "shared": True}
    assert tags(last)["embedding.word_embeddings.weight"] == copy
    assert "shared" not in tags(build_gpt(SMALL, seed=1))["embedding.word_embeddings.weight"]


@pytest.mark.parametrize(
    ("layers", "stages", "sizes"), [(4, 2, [2, 2]), (5, 2, [3, 2]), (7, 4, [2, 2, 2, 1]), (3, 3, [1, 1, 1])]
)
def test_stages_share_the_layers_evenly(layers, stages, sizes):
    cut = list(pipeline_stages(layers, stages))
    assert [len(stage.layers) for stage in cut] == sizes
    assert [layer for stage in cut for layer in stage.layers] == list(range(layers))
    assert [stage.first for stage in cut] == [True] + [False] * (stages - 1)
    assert [stage.last for stage in cut] == [False] * (stages - 1) + [True]


def test_autocast_computes_in_bfloat16_and_keeps_the_parameters():
    exact, low = build_gpt(SMALL, seed=1), build_gpt(SMALL, seed=1, autocast=torch.bfloat16)
    tokens = torch.arange(16).unsqueeze(0)
    logits = low(tokens)
    assert logits.dtype == torch.bfloat16
    assert {param.dtype for param in low.parameters()} == {torch.float32}
    torch.testing.assert_close(logits.float(), exact(tokens), rtol=0.05, atol=0.05)
