"""What Megatron's parameters are marked as, by name and config; test_megatron_layouts.py has the real modules."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("megatron.core", reason="Megatron-Core is not installed: bash scripts/bootstrap.sh megatron")

from core.process_groups_config import ProcessGroupCollection

CONFIG: dict[str, Any] = {"num_attention_heads": 4, "num_query_groups": 2, "kv_channels": 8, "gated_linear_unit": True}


def tagged(name: str, rows: int, *, split_heads: bool = False, settings: Any = (), said: Any = ()) -> Any:
    """The weight called ``name``, of ``rows`` rows, after :func:`tag`."""
    from core.megatron.parameter_tags import tag

    *path, leaf = name.split(".")
    chunk = module = nn.Module()
    for part in path:
        module.add_module(part, made := nn.Module())
        module = made
    module.config = SimpleNamespace(**{**CONFIG, **dict(settings)})
    weight: Any = nn.Parameter(torch.ones(rows, 4))
    for attribute, value in dict(said).items():
        setattr(weight, attribute, value)
    module.register_parameter(leaf, weight)
    tag([chunk], ProcessGroupCollection(), split_heads=split_heads)
    return weight


def test_attention_is_split_into_queries_keys_and_values():
    assert tagged("attention.linear_qkv.weight", 64).qkv_split_shapes == [16, 8, 8]
    assert tagged("attention.linear_qkv.weight", 64, split_heads=True).qkv_split_shapes == [8] * 8
    assert tagged("attention.linear_kv.weight", 64).qkv_split_shapes == [8, 8]
    assert tagged("attention.linear_q.weight", 64).__dict__ == {}
    gated = tagged("attention.linear_qkv.weight", 96, settings={"attention_output_gate": True})
    assert gated.qkv_split_shapes == [16, 16, 8, 8]


def test_names_of_latent_attention_are_left_alone_elsewhere():
    latent = {"multi_latent_attention": True, "qk_head_dim": 6, "qk_pos_emb_head_dim": 2, "v_head_dim": 5}
    assert tagged("attention.linear_q_proj.weight", 32, settings=latent).qkv_split_shapes == [6, 2]
    assert tagged("attention.linear_kv_up_proj.weight", 44, settings=latent).qkv_split_shapes == [6, 5]
    assert not hasattr(tagged("attention.linear_q_proj.weight", 32), "is_qkv")


@pytest.mark.parametrize(
    ("name", "settings", "parts", "stride"),
    [
        ("mlp.linear_fc1.weight", {}, (32, 32), 2),
        ("mlp.experts.linear_fc1.weight3", {}, (32, 32), 2),
        ("mlp.experts.linear_fc1.weight3", {"moe_mlp_glu_interleave_size": 8}, (8, 8), 1),
        ("mlp.shared_experts.linear_fc1.weight", {"moe_mlp_glu_interleave_size": 8}, (32, 32), 2),
    ],
)
def test_gate_and_up_are_split_wherever_they_lie(name, settings, parts, stride):
    weight = tagged(name, 64, settings=settings)
    assert (weight.matrix_parts, weight.partition_stride) == (parts, stride)
    assert getattr(weight, "expert_tp", False) is (".experts." in name)


def test_what_a_parameter_says_of_itself_stays():
    weight = tagged("attention.linear_qkv.weight", 64, said={"matrix_parts": (64,), "is_qkv": True})
    assert (weight.matrix_parts, weight.is_qkv) == ((64,), False)


def test_experts_in_one_parameter_are_refused():
    from core.megatron.refusals import check

    chunk = nn.ModuleDict({"mlp": nn.ModuleDict({"experts": nn.ParameterDict({"weight": torch.ones(2, 4, 4)})})})
    given: Any = SimpleNamespace(
        optimizer="shardstep_muon", use_distributed_optimizer=False, decoupled_weight_decay=True
    )
    with pytest.raises(ValueError, match="moe_single_grouped_weight=False"):
        check("muon", given, [chunk], None)
    given.optimizer = "shardstep_adamw"
    check("adamw", given, [chunk], None)
