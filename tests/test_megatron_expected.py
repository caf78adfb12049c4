"""``--expect-matrix-params`` in Megatron-Core, and which weights ours leave to its Adam."""

import argparse
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("megatron.core", reason="Megatron-Core is not installed: bash scripts/bootstrap.sh megatron")

from core.optimizer.expectation import UnexpectedRoutingError


def chunk() -> nn.Module:
    """Names and shapes of a mixture of experts."""
    shapes = {
        "embedding.word_embeddings.weight": (16, 8),
        "decoder.layers.0.self_attention.linear_proj.weight": (8, 8),
        "decoder.layers.0.mlp.router.weight": (4, 8),
        "decoder.layers.0.mlp.shared_experts.gate_weight": (1, 8),
        "decoder.layers.0.mlp.experts.linear_fc1.weight0": (16, 8),
        "decoder.final_layernorm.weight": (8,),
        "output_layer.weight": (16, 8),
    }
    root = nn.Module()
    for name, shape in shapes.items():
        *path, leaf = name.split(".")
        at = root
        for part in path:
            if part not in at._modules:
                at.add_module(part, nn.Module())
            at = at._modules[part]  # type: ignore[assignment]
        at.register_parameter(leaf, nn.Parameter(torch.ones(shape)))
    return root


@pytest.fixture
def check(monkeypatch) -> Any:
    """``check(expected, chunk, overrides, optimizer)`` as one pipeline stage alone."""
    from megatron.core import parallel_state

    from core.megatron.expected_matrices import check_expected_matrices

    monkeypatch.setattr(parallel_state, "get_pipeline_model_parallel_group", lambda: None)

    def checked(expected: Any, model: nn.Module, overrides: Any = None, optimizer: str = "muon") -> None:
        config = SimpleNamespace(shardstep_expect_matrix_params=expected)
        check_expected_matrices(optimizer, config, [model], overrides, None)

    return checked


def test_what_goes_to_adam_is_said(check):
    check(2, chunk())
    check("decoder.*linear*", chunk())
    check(None, chunk())
    with pytest.raises(UnexpectedRoutingError, match="expect=3: only 2 matrices") as error:
        check("3", chunk())
    for said in (
        "embedding.word_embeddings.weight 16 x 8 goes to adam (name matches *embed*)",
        "decoder.layers.0.mlp.router.weight 4 x 8 goes to adam (name matches *router*)",
        "decoder.layers.0.mlp.shared_experts.gate_weight 1 x 8 goes to adam (it has one row or column)",
        "output_layer.weight 16 x 8 goes to adam (name matches *output_layer.weight)",
    ):
        assert said in str(error.value)


def test_overrides_and_attributes_are_counted(check):
    from megatron.core.optimizer.optimizer_config import ParamKey

    model = chunk()
    model.get_submodule("decoder.layers.0.mlp.router").weight.use_muon = True
    check(3, model)
    with pytest.raises(UnexpectedRoutingError, match="an override of Megatron-Core's"):
        check("*linear_proj*", model, {ParamKey(name="*linear_proj*"): {"optimizer": "adam"}})
    with pytest.raises(UnexpectedRoutingError, match="only 0"):
        check(1, model, optimizer="adamw")


def test_megatrons_keys_choose_what_ours_do():
    from megatron.core.optimizer.emerging_optimizers import _EMERGING_OPTIMIZERS

    import core.megatron  # noqa: F401
    from core.megatron.refusals import steps_whole

    (key,) = _EMERGING_OPTIMIZERS["shardstep_muon"].default_param_overrides
    model = chunk()
    model.get_submodule("output_layer").weight.use_muon = True
    model.get_submodule("decoder.layers.0.self_attention.linear_proj").weight.use_muon = False
    stepped = {name for name, p in model.named_parameters() if not key.matches(p, name)}
    assert stepped == {name for name, p in model.named_parameters() if steps_whole("muon", name, p)}
    assert stepped == {
        "output_layer.weight",
        "decoder.layers.0.mlp.experts.linear_fc1.weight0",
    }


def test_attributes_that_megatron_adds_do_not_ask_for_muon():
    from megatron.core.tensor_parallel.layers import set_defaults_if_not_set_tensor_model_parallel_attributes

    import core.megatron  # noqa: F401
    from core.megatron.refusals import steps_whole

    table = nn.Parameter(torch.ones(4, 8))
    set_defaults_if_not_set_tensor_model_parallel_attributes(table)
    assert not steps_whole("muon", "embedding.weight", table)


def test_the_flag_gives_way_to_a_scripts_own():
    from core.megatron.flags import add_arguments

    for own in (False, True):
        parser = argparse.ArgumentParser()
        parser.add_argument("--optimizer", choices=["adam", "muon"], default="adam")
        if own:
            parser.add_argument("--expect-matrix-params", default="own")
        option = "--shardstep-expect-matrix-params" if own else "--expect-matrix-params"
        args = add_arguments(parser).parse_args([option, "*.mlp.*"])
        assert args.shardstep_expect_matrix_params == "*.mlp.*"
        assert getattr(args, "expect_matrix_params", None) == ("own" if own else None)
