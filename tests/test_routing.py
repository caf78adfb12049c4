"""Which weights are no matrices to a matrix optimizer: those of the common families of models, and what only looks like them."""

from collections import defaultdict
from typing import Any

import pytest
import torch
from torch import nn

from core.optimizer.emerging_optimizers import get_optimizer
from core.optimizer.expectation import UnexpectedRoutingError
from core.optimizer.optimizer_config import OptimizerConfig, ParamKey
from core.process_groups_config import ProcessGroupCollection

VOCABULARY, WIDTH, EXPERTS = 40, 12, 4
TABLE = nn.Embedding, VOCABULARY, WIDTH


def linear(outputs: int = WIDTH, inputs: int = WIDTH) -> tuple[Any, ...]:
    return nn.Linear, inputs, outputs


def model(spec: dict[str, tuple[Any, ...]]) -> nn.Module:
    """A module tree with these modules under these dotted names."""
    tree: dict[str, Any] = defaultdict(dict)
    for name, made in spec.items():
        first, _, rest = name.partition(".")
        tree[first] = {**tree[first], rest: made} if rest else made
    root = nn.Module()
    for name, made in tree.items():
        root.add_module(name, model(made) if isinstance(made, dict) else made[0](*made[1:]))
    return root


def assigned(chunk: nn.Module, **kwargs: Any) -> dict[str, Any]:
    chain = get_optimizer(OptimizerConfig(optimizer="muon", lr=0.01), chunk, **kwargs)
    return {a.name.removesuffix(".weight"): a for a in chain.assignments() if not a.name.endswith(".bias")}


def in_adam(chunk: nn.Module, **kwargs: Any) -> set[str]:
    """Names of the modules whose weights go to adamw; all others go to muon."""
    chosen = assigned(chunk, **kwargs)
    assert {a.optimizer for a in chosen.values()} <= {"adamw", "muon"}
    return {name for name, a in chosen.items() if a.optimizer == "adamw"}


BLOCK = {
    "layers.0.attention.wq": linear(),
    "layers.0.feed_forward.w1": linear(30),
    "layers.0.feed_forward.w2": linear(12, 30),
}
HEAD = linear(VOCABULARY)
FAMILIES: dict[str, tuple[dict[str, tuple[Any, ...]], set[str]]] = {
    "torchtitan": ({"tok_embeddings": TABLE, **BLOCK, "output": HEAD}, {"tok_embeddings", "output"}),
    "GPT-NeoX": ({"gpt_neox.embed_in": TABLE, **BLOCK, "embed_out": HEAD}, {"gpt_neox.embed_in", "embed_out"}),
    "OLMo": (
        {"transformer.wte": TABLE, "transformer.blocks.0.ff_out": linear(12, 30), "transformer.ff_out": HEAD},
        {"transformer.wte", "transformer.ff_out"},
    ),
    "RWKV, Mamba": ({"emb": TABLE, **BLOCK, "head": HEAD}, {"emb", "head"}),
    "a head of another name": ({"words": TABLE, **BLOCK, "to_words": HEAD}, {"words", "to_words"}),
    "no table": ({**BLOCK, "lm_head": HEAD}, {"lm_head"}),
    "a table of codes": ({"codes": (nn.EmbeddingBag, VOCABULARY, WIDTH), **BLOCK}, {"codes"}),
    "timm": ({"blocks.0.qkv": linear(36), "head": linear(7)}, {"head"}),
    "timm, torchvision: a head of several layers": (
        {"blocks.0.qkv": linear(36), "head.pre_logits": linear(24), "head.fc": linear(7, 24), "heads.head": linear(7)},
        {"head.fc", "heads.head"},
    ),
    "HF score": ({"model.layers.0.q": linear(), "score": linear(3)}, {"score"}),
    "HF classifier": (
        {
            "roberta.encoder.layer.0.output.dense": linear(12, 30),
            "classifier.dense": linear(),
            "classifier.out": linear(3),
        },
        {"classifier.out"},
    ),
    "Mixtral": (
        {
            "layers.0.block_sparse_moe.gate": linear(EXPERTS),
            **{f"layers.0.block_sparse_moe.experts.{i}.w1": linear(30) for i in range(4)},
        },
        {"layers.0.block_sparse_moe.gate"},
    ),
    "Mixtral, its experts elsewhere": (
        {"layers.0.block_sparse_moe.gate": linear(EXPERTS)},
        {"layers.0.block_sparse_moe.gate"},
    ),
    "Qwen, DeepSeek": (
        {
            "layers.0.mlp.gate_proj": linear(30),
            "layers.0.mlp.up_proj": linear(30),
            "layers.1.mlp.gate": linear(EXPERTS),
            "layers.1.mlp.shared_expert.gate_proj": linear(30),
            "layers.1.mlp.shared_expert_gate": linear(1),
            **{f"layers.1.mlp.experts.{i}.up_proj": linear(EXPERTS) for i in range(EXPERTS)},
        },
        {"layers.1.mlp.gate", "layers.1.mlp.shared_expert_gate"},
    ),
    "a router of another name": (
        {
            "layers.0.moe.chooser": linear(EXPERTS),
            **{f"layers.0.moe.experts.{i}.w1": linear(30) for i in range(EXPERTS)},
        },
        {"layers.0.moe.chooser"},
    ),
    "DeepSpeed": ({"layers.0.moe.gate.wg": linear(EXPERTS)}, {"layers.0.moe.gate.wg"}),
    "a head in a numbered layer": (
        {"layers.0.embed_tokens": TABLE, "layers.0.shared_head.head": HEAD, "layers.0.mlp.up": HEAD},
        {"layers.0.embed_tokens", "layers.0.shared_head.head"},
    ),
}
"""Modules of a model, and those whose weights must not be orthogonalized."""


@pytest.mark.parametrize(("spec", "wanted"), FAMILIES.values(), ids=FAMILIES)
def test_heads_routers_and_tables_of_the_families_go_to_adam(spec, wanted):
    chosen = assigned(model(spec))
    assert {name for name, a in chosen.items() if a.optimizer == "adamw"} == wanted
    assert all(a.reason for a in chosen.values())


LOOKALIKES: dict[str, dict[str, tuple[Any, ...]]] = {
    "as wide as the vocabulary, in a layer": {"layers.0.mlp.up": HEAD, "layers.0.mlp.output": linear(30)},
    "square, outside": {"mixer": linear(VOCABULARY, VOCABULARY)},
    "as wide as a table is": {"projector": linear(WIDTH, 30)},
    "the gate of a gated MLP": {
        "layers.0.mlp.gate": linear(8),
        "layers.0.mlp.up": linear(8),
        "layers.0.mlp.down": linear(12, 8),
    },
    "a square gate": {"layers.0.mixer.gate": linear()},
    "in attention": {"attention.head": linear(30), "layers.0.self_attn.gate": linear(4), "self_attn.to_all": HEAD},
    "an expert's": {
        f"layers.0.experts.{i}.{name}": linear(8) for i in range(EXPERTS) for name in ("gate_proj", "up_proj")
    },
    "heads in a stack": {"layers.0.mlp.head": linear(30), "layers.0.classifier": linear(30)},
}


@pytest.mark.parametrize("spec", LOOKALIKES.values(), ids=LOOKALIKES)
def test_what_only_looks_like_one_stays_a_matrix(spec):
    assert in_adam(model({"tokens": TABLE, **spec})) == {"tokens"}


def test_experts_in_one_parameter_are_counted():
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w1 = nn.Parameter(torch.ones(EXPERTS, 30, WIDTH))

    assert in_adam(model({"layers.0.ffn.chooser": linear(EXPERTS), "layers.0.ffn.experts": (Experts,)})) >= {
        "layers.0.ffn.chooser"
    }


@pytest.mark.parametrize("first", ["head", "table"])
def test_a_tied_weight_is_a_table_by_whichever_name(first):
    tree = model({"layers.0.mlp.up": linear(30)})
    for name in (first, "table" if first == "head" else "head"):
        tree.add_module(
            f"its_{name}",
            nn.Linear(WIDTH, VOCABULARY, bias=False) if name == "head" else nn.Embedding(VOCABULARY, WIDTH),
        )
    tree.its_head.weight = tree.its_table.weight
    assert in_adam(tree) == {f"its_{first}"}


@pytest.mark.parametrize("norm", [nn.utils.parametrizations.weight_norm, nn.utils.weight_norm])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_magnitudes_of_weight_norm_go_to_adam(norm):
    chosen = assigned(nn.Sequential(norm(nn.Linear(8, 16, bias=False))))
    assert sorted((a.optimizer, a.shape) for a in chosen.values()) == [("adamw", (16, 1)), ("muon", (16, 8))]


def test_parametrized_heads_are_known_without_computing_them():
    tree = model({"table": TABLE, "to_words": HEAD})
    nn.utils.parametrizations.spectral_norm(tree.to_words)
    before = {name: x.clone() for name, x in tree.named_buffers()}
    assert assigned(tree)["to_words.parametrizations.weight.original"].optimizer == "adamw"
    assert all(torch.equal(x, before[name]) for name, x in tree.named_buffers())


def test_wrappers_do_not_hide_what_a_layer_is():
    def wrapped(module: nn.Module) -> nn.Module:  # as torch.compile does
        outer = nn.Module()
        outer.add_module("_orig_mod", module)
        return outer

    tree = model({"table": TABLE, "layers.0.mlp.up": HEAD, "head": linear(7)})
    tree.head = wrapped(tree.head)
    tree.layers._modules["0"] = wrapped(tree.layers.get_submodule("0"))
    assert in_adam(wrapped(tree)) == {"table", "head"}


def test_a_sequence_of_unlike_modules_is_no_stack():
    class Body(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.up = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, 30)

    class End(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.to_words, self.norm = nn.Linear(WIDTH, VOCABULARY), nn.LayerNorm(WIDTH)

    assert {"0.table", "1.to_words"} == in_adam(nn.Sequential(Body(), End())) - {"1.norm"}


def test_a_square_plain_model_keeps_its_matrices():
    assert in_adam(nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))) == set()


def test_the_users_word_wins():
    tree = model({"table": TABLE, **BLOCK, "output": HEAD, "lm_head": HEAD, "router": linear(EXPERTS)})
    for name in ("output", "lm_head", "router"):
        getattr(tree, name).weight.use_muon = True
    tree.layers.get_submodule("0.attention.wq").weight.use_muon = False
    overrides = {
        ParamKey(name="layers.0.feed_forward.w1.*"): {"optimizer": "adamw"},
        ParamKey(name="table.*"): {"optimizer": "muon"},
    }
    chosen = assigned(tree, param_overrides=overrides)
    assert {name: (a.optimizer, a.reason) for name, a in chosen.items()} == {
        "table": ("muon", "override table.*"),
        "layers.0.attention.wq": ("adamw", "use_muon=False"),
        "layers.0.feed_forward.w1": ("adamw", "override layers.0.feed_forward.w1.*"),
        "layers.0.feed_forward.w2": ("muon", "it is a matrix"),
        "output": ("muon", "use_muon=True"),
        "lm_head": ("muon", "use_muon=True"),
        "router": ("muon", "use_muon=True"),
    }


def test_every_reason_is_said():
    tree = model(
        {
            "table": TABLE,
            "to_words": HEAD,
            "moe.chooser": linear(4),
            "moe.experts.0.up": linear(),
            "norm": (nn.LayerNorm, 12),
        }
    )
    tree.moe.experts.num_experts = 4
    tree.add_module("my_router", nn.Linear(12, 2, bias=False))
    tree.add_module("column", nn.Linear(1, 12, bias=False))
    assert {name: a.reason for name, a in assigned(tree).items()} == {
        "table": "it is an embedding",
        "to_words": "output layer: 40 outputs, as many as an embedding has rows",
        "moe.chooser": "router: one output for each of 4 experts",
        "moe.experts.0.up": "it is a matrix",
        "norm": "it is not 2-D",
        "my_router": "name matches *router*",
        "column": "it has one row or column",
    }
    chain = get_optimizer(OptimizerConfig(optimizer="lion", lr=0.01), tree)
    assert {a.reason for a in chain.assignments()} == {"lion takes every parameter"}


class Stage(nn.Module):
    """The table on the first stage, an output layer of an unusual name on the second."""

    def __init__(self, stage: int) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({str(stage): nn.ModuleDict({"up": nn.Linear(WIDTH, WIDTH, bias=False)})})
        if stage == 0:
            self.table = nn.Embedding(VOCABULARY, WIDTH)
        else:
            self.to_words = nn.Linear(WIDTH, VOCABULARY, bias=False)


@pytest.mark.mpi(min_size=2)
def test_a_head_is_known_by_the_table_of_another_stage(world):
    groups = ProcessGroupCollection.from_mesh(world.mesh((2,), ("pp",)))
    assert in_adam(Stage(world.rank), pg_collection=groups) == {("table", "to_words")[world.rank]}
    for expect in (2, "layers.*.up.weight", "layers.1.*"):
        in_adam(Stage(world.rank), pg_collection=groups, expect=expect)
    for expect, said in {
        3: "expect=3: only 2 matrices.*table.weight 40 x 12 goes to adamw .it is an embedding.; to_words.weight 40 x 12 goes",
        "*o*.weight": "1 of the 1 parameters.*to_words.weight",
        "decoder.*": "matches no parameter.*'layers.0.up.weight'",
    }.items():
        with pytest.raises(UnexpectedRoutingError, match=said):
            in_adam(Stage(world.rank), pg_collection=groups, expect=expect)


@pytest.mark.mpi(min_size=2)
def test_one_row_of_many_is_no_vector(world):
    groups = ProcessGroupCollection.from_mesh(world.mesh((2,), ("tp",)))
    tree = nn.Module()
    for name, shape in {"cut": (1, WIDTH), "column": (3, 1)}.items():
        p: Any = nn.Parameter(torch.ones(shape))
        p.tensor_model_parallel, p.partition_dim = True, 0
        tree.register_parameter(name, p)
    assert in_adam(tree, pg_collection=groups) == {"column"}


def test_expectations_of_one_process():
    tree = model({"table": TABLE, **BLOCK, "output": HEAD})
    in_adam(tree, expect=3)
    in_adam(tree, expect="layers.*.weight")
    with pytest.raises(ValueError, match="at least 1"):
        in_adam(tree, expect=0)
    tree.layers.get_submodule("0.attention.wq").weight.requires_grad = False
    with pytest.raises(
        UnexpectedRoutingError, match=r"only 2 .*wq.weight 12 x 12 goes to no optimizer \(it requires no gradient\)"
    ):
        in_adam(tree, expect=3)
    with pytest.raises(UnexpectedRoutingError, match="expect=1: only 0"):
        get_optimizer(OptimizerConfig(optimizer="lion", lr=0.01), tree, expect=1)


def small(kind: str) -> nn.Module:
    """A small model of transformers, of random weights."""
    transformers = pytest.importorskip("transformers", reason="bash scripts/bootstrap.sh examples")
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "vocab_size": 50,
    }
    more = {"num_key_value_heads": 2} if kind not in ("GPTNeoX", "Bert") else {}
    experts = {
        "num_experts": 4,
        "num_local_experts": 4,
        "n_routed_experts": 4,
        "moe_intermediate_size": 8,
        "decoder_sparse_step": 1,
    }
    moe = (
        {**experts, "shared_expert_intermediate_size": 8, "num_experts_per_tok": 2}
        if "Moe" in kind or kind == "Mixtral"
        else {}
    )
    config = getattr(transformers, f"{kind}Config")(**sizes, **more, **moe)
    head = "ForSequenceClassification" if kind == "Bert" else "ForCausalLM"
    made: nn.Module = getattr(transformers, f"{kind}{head}")(config)
    return made


@pytest.mark.parametrize(
    ("kind", "wanted"),
    [
        ("Llama", {"model.embed_tokens", "lm_head"}),
        ("GPTNeoX", {"gpt_neox.embed_in", "lm_head"}),
        ("Mixtral", {"model.embed_tokens", "lm_head", *(f"model.layers.{i}.mlp.gate" for i in (0, 1))}),
        (
            "Qwen2Moe",
            {"model.embed_tokens", "lm_head"}
            | {f"model.layers.{i}.mlp.{name}" for i in (0, 1) for name in ("gate", "shared_expert_gate")},
        ),
        (
            "Bert",
            {f"bert.embeddings.{name}_embeddings" for name in ("word", "position", "token_type")} | {"classifier"},
        ),
    ],
)
def test_models_of_transformers(kind, wanted):
    chosen = assigned(small(kind))
    assert {name for name, a in chosen.items() if a.optimizer == "adamw" and len(a.shape) == 2} == wanted
