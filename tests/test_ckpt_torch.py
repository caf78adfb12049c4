"""Conversion from files of torch.save and to them."""

import json
import re
import shutil
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import nn

from core.checkpoint import load
from core.checkpoint.manifest import NAME
from core.optimizer.rules.adam import AdamW
from core.optimizer.rules.sgd import SGD
from core.optimizer.rules.tensor_parallel_muon import TensorParallelMuon
from tests.support.checkpoints import model, same, saved, state, train, trained
from tests.support.small_run import differing
from tools.ckpt import command as ckpt


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("optimizer", ["AdamW", "SGD"])
def test_torchs_own_state_goes_on_here(tmp_path, capsys, optimizer, named):
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(96, 64), nn.Linear(64, 2))
    kwargs = {"lr": 0.01} | ({"momentum": 0.9} if optimizer == "SGD" else {})
    theirs = getattr(torch.optim, optimizer)(net.named_parameters() if named else net.parameters(), **kwargs)
    batch = torch.randn(4, 96)
    for _ in range(3):
        train(net, theirs, batch)
    torch.save({"model": net.state_dict(), "optimizer": theirs.state_dict(), "step": 3}, tmp_path / "x.pt")
    assert ckpt.main(["convert", str(tmp_path / "x.pt"), str(tmp_path / "run"), "--from", "torch"]) == 0
    torch.manual_seed(9)
    ours = nn.Sequential(nn.Linear(96, 64), nn.Linear(64, 2))
    mine = {"AdamW": AdamW, "SGD": SGD}[optimizer](ours.parameters(), **kwargs)
    assert load(tmp_path / "run", model_chunks=[ours], optimizer=mine).step == 3
    assert differing(state(ours, mine), state(net, theirs)) == []
    for _ in range(3):
        train(net, theirs, batch)
        train(ours, mine, batch)
    for a, b in zip(ours.parameters(), net.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_torchs_muon_and_adamw_in_groups_with_names(tmp_path):
    torch.manual_seed(3)
    net = nn.Linear(8, 4)
    muon, adamw = torch.optim.Muon([("weight", net.weight)], lr=0.1), torch.optim.AdamW([("bias", net.bias)], lr=0.1)
    for optimizer in (muon, adamw):
        train(net, optimizer, torch.randn(2, 8))
    # One state_dict of both, as a chain would write it.
    first, second = muon.state_dict(), adamw.state_dict()
    second["param_groups"][0]["params"] = [1]
    both = {
        "state": first["state"] | {1: second["state"][0]},
        "param_groups": first["param_groups"] + second["param_groups"],
    }
    torch.save({"model": net.state_dict(), "optimizer": both}, tmp_path / "x.pt")
    assert ckpt.main(["convert", str(tmp_path / "x.pt"), str(tmp_path / "run"), "--from", "torch"]) == 0
    said = json.loads((tmp_path / "run" / "iter_0000001" / NAME).read_text())
    assert [(group["optimizer"], group["parameters"]) for group in said["groups"]] == [
        ("TensorParallelMuon", ["weight"]),
        ("AdamW", ["bias"]),
    ]
    other = nn.Linear(8, 4, bias=False)
    mine = TensorParallelMuon(other.parameters())
    load(tmp_path / "run", model_chunks=[other], optimizer=mine, only=["*weight"])
    assert torch.equal(mine.state[other.weight]["momentum_buffer"], muon.state[net.weight]["momentum_buffer"])


def test_to_torch_and_back(tmp_path, capsys):
    net, opt = saved(tmp_path / "run")
    assert ckpt.main(["convert", str(tmp_path / "run"), str(tmp_path / "x.pt"), "--to", "torch"]) == 0
    assert (
        "left out, since torch has no place for it: common_state/shard_0_1, rng/rank_00000" in capsys.readouterr().out
    )
    whole = torch.load(tmp_path / "x.pt", weights_only=True)
    assert whole["model"].keys() == net.state_dict().keys()
    model().load_state_dict(whole["model"])
    assert torch.equal(whole["optimizer"]["state"]["0.weight"]["exp_avg"], opt.state[net[0].weight]["exp_avg"])
    assert (whole["step"], whole["consumed_samples"], whole["extra"]) == (5, 40, {"seed": 1})
    assert (
        ckpt.main(["convert", str(tmp_path / "x.pt"), str(tmp_path / "back"), "--from", "torch", "--files", "2"]) == 0
    )
    capsys.readouterr()
    assert ckpt.main(["diff", str(tmp_path / "run"), str(tmp_path / "back"), "--values"]) == 1
    out = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in out[1:-1]] == ["rng/rank_00000"]
    assert out[-1].startswith("27 of 27 tensors")
    same(net, opt, tmp_path / "back")


def test_a_plain_state_dict_is_a_model(tmp_path):
    net, _ = trained()
    torch.save(net.state_dict(), tmp_path / "x.pt")
    assert ckpt.main(["convert", str(tmp_path / "x.pt"), str(tmp_path / "run"), "--from", "torch"]) == 0
    other = model()
    nn.init.zeros_(other[0].weight)
    assert load(tmp_path / "run", model_chunks=[other]).step == 0
    assert differing(other.state_dict(), net.state_dict()) == []


def test_tied_weights_are_written_once(tmp_path, capsys):
    net = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    net[1].weight = net[0].weight
    opt = torch.optim.AdamW(net.parameters())
    train(net, opt, torch.ones(2, 4))
    torch.save({"model": net.state_dict(), "optimizer": opt.state_dict()}, tmp_path / "x.pt")
    assert ckpt.main(["convert", str(tmp_path / "x.pt"), str(tmp_path / "run"), "--from", "torch"]) == 0
    assert "1.weight is 0.weight, and is written once" in capsys.readouterr().out
    again = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    again[1].weight = again[0].weight
    mine = AdamW(again.parameters())
    load(tmp_path / "run", model_chunks=[again], optimizer=mine)
    assert differing(state(again, mine), state(net, opt)) == []


def of_torch(optimizer: type[torch.optim.Optimizer], **kwargs: Any) -> dict[str, Any]:
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    opt = optimizer(net.parameters(), **kwargs)
    train(net, opt, torch.ones(2, 4))
    return {"model": net.state_dict(), "optimizer": opt.state_dict()}


def swapped() -> dict[str, Any]:
    given = of_torch(torch.optim.AdamW)
    given["optimizer"]["param_groups"][0]["params"] = [1, 0, 2, 3]
    return given


def in_two_groups() -> dict[str, Any]:
    given = of_torch(torch.optim.AdamW)
    group = given["optimizer"]["param_groups"][0]
    given["optimizer"]["param_groups"] = [group | {"params": [0, 1]}, group | {"params": [2, 3]}]
    return given


NOT_STATE = {
    "a list": (lambda: [1], "holds a list; a state_dict is needed"),
    "text in the model": (lambda: {"model": {"a": "b"}}, "a of the model is no ordinary tensor"),
    "no optimizer": (lambda: {"model": {}, "optimizer": {"a": 1}}, '"optimizer" is not the state_dict of an optimizer'),
    "a tensor": (
        lambda: {"model": {}, "optimizer": torch.ones(2)},
        '"optimizer" is not the state_dict of an optimizer',
    ),
    "amsgrad": (lambda: of_torch(torch.optim.Adam, amsgrad=True), "possible: torch's Adam and AdamW without amsgrad"),
    "another optimizer": (
        lambda: of_torch(torch.optim.Adadelta),
        "an optimizer with the settings .*rho.* is not known",
    ),
    "another order": (swapped, r"exp_avg of parameter 0 is \(4, 4\), but 0.bias is \(4,\)"),
    "groups without names": (
        in_two_groups,
        "4 parameters in 2 groups, and which of the model's 4 tensors they are is not said",
    ),
    "a step that is none": (lambda: {"model": {}, "step": "now"}, "step of .* is 'now'; a whole number is needed"),
}


@pytest.mark.parametrize("case", NOT_STATE)
def test_what_is_no_state_of_torch_is_refused(tmp_path, capsys, case):
    make, said = NOT_STATE[case]
    torch.save(make(), tmp_path / "x.pt")
    assert ckpt.main(["convert", str(tmp_path / "x.pt"), str(tmp_path / "run"), "--from", "torch"]) == 1
    assert re.search(said, capsys.readouterr().err)
    assert not list(tmp_path.glob("run/*iter*"))


TREES = st.recursive(
    st.none()
    | st.integers(-2, 2)
    | st.floats()
    | st.text(max_size=2)
    | st.sampled_from([torch.ones(2), torch.ones(2).to_sparse()]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["w", "b", "params", "param_names", "optimizer", "exp_avg", "dampening", 0, 1]),
            inner,
            max_size=3,
        )
    ),
    max_leaves=8,
)
GROUPS = st.fixed_dictionaries(
    {"params": TREES | st.just(["w"]) | st.just([0])},
    optional={"param_names": TREES, "dampening": TREES, "optimizer": TREES},
)
FILES = TREES | st.fixed_dictionaries(
    {"model": st.just({"w": torch.ones(2)}) | TREES},
    optional={
        "optimizer": TREES
        | st.fixed_dictionaries({"param_groups": st.lists(GROUPS, max_size=2) | TREES, "state": TREES}),
        **dict.fromkeys(("step", "consumed_samples", "schedule", "extra"), TREES),
    },
)


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=100, suppress_health_check=list(HealthCheck))
@given(FILES)
def test_random_files_never_give_a_traceback(tmp_path, content):
    shutil.rmtree(tmp_path / "run", ignore_errors=True)
    torch.save(content, tmp_path / "x.pt")
    assert ckpt.main(["convert", str(tmp_path / "x.pt"), str(tmp_path / "run"), "--from", "torch"]) in (0, 1)
