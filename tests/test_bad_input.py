"""Wrong input is one line that names the flag and the value, says what is possible, and the exit code is 2."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from core.optimizer.emerging_optimizers import TensorParallelMuon, get_optimizer
from tests.support.usage import check
from tools.pretrain.arguments import parse_arguments
from tools.pretrain.launch import Launch, Machine
from tools.pretrain.model import GPT
from tools.pretrain.param_rules import build_optimizer
from tools.pretrain.validation import check_device, gpt_config
from tools.usage import UsageError

ROOT = Path(__file__).parents[1]
OLD_GPU, NEW_GPU = Machine(gpus=4, capability=(7, 5)), Machine(gpus=4, capability=(9, 0))
QKV = "*.linear_qkv.weight"


# What is wrong, by the name of the case; the command line; what the message must say.
LINES = [
    ("unknown optimizer", "--optimizer moun", "--optimizer 'moun'.*possible: .*muon.*did you mean 'muon'"),
    ("lr is no number", "--lr 1e-3x", "--lr '1e-3x'.*possible: a number > 0.*write it like"),
    ("lr is NaN", "--lr nan", "--lr nan.*possible: a number > 0"),
    ("lr is infinite", "--lr inf", "--lr inf.*possible: a number > 0"),
    ("lr is 0", "--lr 0", "--lr 0: .*possible: a number > 0"),
    ("lr is negative", "--lr -1e-3", "--lr -1e-3: .*possible: a number > 0"),
    ("momentum is 1", "--muon-momentum 1.0", "--muon-momentum 1.0.*>= 0 and < 1"),
    ("momentum is negative", "--sgd-momentum -0.1", "--sgd-momentum -0.1.*>= 0 and < 1"),
    ("two betas in one", "--adam-beta1 0.9 0.95", r"--adam-beta1 \[0.9, 0.95\].*not 2.*--adam-beta2 0.95"),
    ("beta is 1", "--adam-beta2 1", "--adam-beta2 1: .*>= 0 and < 1"),
    ("weight decay is negative", "--weight-decay -0.1", "--weight-decay -0.1.*>= 0.*0 means none"),
    (
        "clipping and a step during backward",
        "--overlap-optimizer-with-backward",
        "--overlap-optimizer-with-backward: --clip-grad 1.0 needs the norm.*--clip-grad 0",
    ),
    (
        "a bubble without a pipeline",
        "--overlap-optimizer-with-bubble",
        "--overlap-optimizer-with-bubble: without a pipeline.*--pipeline-model-parallel-size 2",
    ),
    ("no iterations", "--muon-num-ns-steps 0", "--muon-num-ns-steps 0.*>= 1 and <= 20"),
    ("too many iterations", "--muon-num-ns-steps 21", "--muon-num-ns-steps 21.*>= 1 and <= 20"),
    (
        "unknown coefficients",
        "--muon-coefficient-type polar",
        "'polar'.*possible: .*quintic.*did you mean 'polar_express'",
    ),
    ("coefficients without numbers", "--muon-coefficient-type custom", "'custom' needs its numbers: give ns_coeffs="),
    (
        "no heads fit",
        "--num-attention-heads 3",
        "--hidden-size 128.*--num-attention-heads 3.*multiple of 3.*--kv-channels",
    ),
    ("qkv groups", "--num-query-groups 3", "--num-query-groups 3.*--num-attention-heads 4.*possible: 1, 2, 4"),
    ("fp16", "--fp16", "--fp16: .*no loss scaler.*use --bf16"),
    ("triton without a GPU", "--use-triton", "--use-triton: .*torch sees none.*leave it out"),
    (
        "kernels that do not exist",
        "--optimizer adafactor_sr --adafactor-sr-use-triton",
        "--optimizer adafactor_sr: use_triton=True.*leave",
    ),
    ("nccl without a GPU", "--distributed-backend nccl", "--distributed-backend nccl.*no GPU.*possible: gloo"),
    ("min-lr above lr", "--lr 1e-3 --min-lr 1e-2", "--min-lr 0.01.*--lr 0.001"),
    ("warm-up too long", "--train-iters 10 --lr-warmup-iters 10", "--lr-warmup-iters 10.*--train-iters 10.*0 to 9"),
    ("nowhere to save", "--save-interval 5", "--save-interval 5.*--save DIRECTORY"),
]

LAYOUTS = [
    (
        "tp does not divide groups",
        8,
        "--tensor-model-parallel-size 8",
        "--tensor-model-parallel-size 8.*--num-query-groups 4",
    ),
    ("tp does not divide the MLP", 4, "--tensor-model-parallel-size 4 --ffn-hidden-size 66", "4.*--ffn-hidden-size 66"),
    (
        "tp x pp x dp",
        6,
        "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2",
        "--tensor-model-parallel-size 2.*--pipeline-model-parallel-size 2.*2 x 2 x .*6",
    ),
    ("batch", 2, "--global-batch-size 12", "--global-batch-size 12.*--micro-batch-size 4.*multiples of 8"),
    ("more stages than layers", 8, "--pipeline-model-parallel-size 8 --global-batch-size 32", "8.*--num-layers"),
    (
        "too few micro-batches",
        4,
        "--pipeline-model-parallel-size 4 --global-batch-size 8",
        "2 micro-batches.*4 pipeline",
    ),
]

RULES = [
    ("no rule", ["decoder.layers.0"], "'decoder.layers.0'.*NAME_PATTERN=OPTIMIZER"),
    ("invalid pattern", ["decoder.layers.[0.*=adamw"], "lone bracket"),
    ("unknown optimizer", ["*.bias=adamww"], "unknown optimizer 'adamww'.*did you mean 'adamw'"),
    ("unknown key", ["*.bias=wd_mut:0"], "unknown key 'wd_mut'.*possible: .*did you mean 'wd_mult'"),
    ("no number", ["*.bias=lr:fast"], "lr is 'fast'.*possible: a number"),
    ("no match", ["encoder.*=adamw"], "'encoder.*' matches no parameter"),
    ("two rules of one pattern", [f"{QKV}=adamw", f"{QKV}=sgd"], "another rule gives"),
    ("two rules of one parameter", [f"{QKV}=adamw", "decoder.layers.0.*=sgd"], r"layers\.0.*'adamw'.*'sgd'"),
    ("vector for a matrix rule", ["*layernorm.weight=muon"], r"layernorm\.weight.*matri.*\(128,\).*adamw"),
    ("no matrix left", ["*.weight=adamw"], "--optimizer muon: .*leave it no parameter.*take adamw"),
    ("lowest above highest", ["*.bias=lr:1e-4,min_lr:1e-3"], "min_lr:0.001.*above the lr 0.0001"),
]


@pytest.mark.parametrize(("line", "said"), [case[1:] for case in LINES], ids=[case[0] for case in LINES])
def test_flag(line, said):
    assert_refused(said, check, line)


@pytest.mark.parametrize(
    ("processes", "line", "said"), [case[1:] for case in LAYOUTS], ids=[case[0] for case in LAYOUTS]
)
def test_layout(processes, line, said):
    assert_refused(said, check, line, processes)


@pytest.mark.parametrize(("rules", "said"), [case[1:] for case in RULES], ids=[case[0] for case in RULES])
def test_rule(rules, said):
    assert_refused(said, check, ["--param-override", *rules])


def test_a_matrix_that_no_optimizer_has_is_named(monkeypatch):
    """The registry gives every parameter an optimizer; one that did not would be found."""
    args = parse_arguments([])
    with torch.device("meta"):
        model = GPT(gpt_config(args, vocab_size=264))
    lost = "decoder.layers.2.mlp.linear_fc1.weight"

    def forgetful(*args):
        optimizer = get_optimizer(*args)
        known = optimizer.assignments()
        optimizer.assignments = lambda: [a for a in known if a.name != lost]
        return optimizer

    monkeypatch.setattr("tools.pretrain.param_rules.get_optimizer", forgetful)
    assert_refused(f"{re.escape(lost)} is left without an optimizer", build_optimizer, args, [model])


def test_qkv_split_must_add_up():
    weight = torch.nn.Parameter(torch.zeros(96, 32))
    with pytest.raises(ValueError, match=r"\(20, 8, 8\) sum to 36, which does not divide the 96 rows"):
        TensorParallelMuon([weight], split_qkv=True, is_qkv_fn=lambda p: True, qkv_split_shapes=(20, 8, 8))


@pytest.mark.parametrize(
    ("line", "machine", "local_size", "said"),
    [
        ("--bf16", OLD_GPU, 1, r"--bf16: .*7\.5.*possible: compute capability >= 8\.0.*fp32"),
        ("--use-triton", NEW_GPU, 1, "--use-triton: .*no Triton kernels in this version"),
        ("--fp16", NEW_GPU, 1, "no loss scaler"),
        ("--distributed-backend nccl", NEW_GPU, 8, "--distributed-backend nccl.*8 processes.*at most 4"),
    ],
)
def test_gpu(line, machine, local_size, said):
    assert_refused(said, check, line, 8, machine, local_size)


def test_backend_must_carry_the_tensors():
    assert_refused("--distributed-backend gloo.*on a GPU.*possible: nccl", check_device, "cuda", "gloo")
    assert_refused("--distributed-backend nccl.*on the CPU.*possible: gloo", check_device, "cpu", "nccl")
    check_device("cpu", "gloo")
    check_device("cuda", "nccl")


@pytest.mark.parametrize(
    ("environ", "said"),
    [
        ({"RANK": "0"}, "WORLD_SIZE: is not set, but RANK is.*possible: .*torchrun"),
        ({"WORLD_SIZE": "2"}, "RANK: is not set, but WORLD_SIZE is.*torchrun"),
        ({"RANK": "one", "WORLD_SIZE": "2"}, "RANK 'one': is not a whole number.*from 0 to 1"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK 2: is out of range.*from 0 to 1"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "WORLD_SIZE 0: is out of range.*>= 1"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR: is not set"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}, "MASTER_PORT: is not set"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "http"}, "MASTER_PORT 'http'"),
        ({"PMI_SIZE": "4"}, "PMI_SIZE 4: .*RANK and WORLD_SIZE are not set.*torchrun"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "-1"}, "LOCAL_RANK -1: is out of range"),
    ],
)
def test_environment(environ, said):
    assert_refused(said, Launch.from_environ, environ)


def test_environment_of_one_process_and_of_torchrun():
    assert Launch.from_environ({}) == Launch()
    environ = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "a"}
    launch = Launch.from_environ({**environ, "MASTER_PORT": "29500"})
    assert (launch.rank, launch.world_size, launch.local_rank, launch.local_size) == (3, 4, 1, 2)


@pytest.mark.parametrize("flag", ["--save", "--log-dir"])
def test_folders_must_be_writable(tmp_path, flag):
    (tmp_path / "file").write_text("")
    check([flag, str(tmp_path / "new" / "folder")])
    assert_refused(f"{flag} .*file: cannot be written to.*hint", check, [flag, str(tmp_path / "file")])


def test_port_in_use():
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        first = Launch(world_size=2, master_addr="localhost", master_port=port)
        assert_refused(f"MASTER_PORT {port}: is in use.*possible: any free port.*set MASTER_PORT", first.check_port)
        # Only the first rank listens, and not under torchrun, whose agent does.
        Launch(rank=1, world_size=2, master_addr="localhost", master_port=port).check_port()
        Launch(world_size=2, master_addr="localhost", master_port=port, agent_store=True).check_port()


@pytest.mark.parametrize(
    ("line", "environ", "said"),
    [
        ("--muon-tp-mode onwer", {}, "--muon-tp-mode 'onwer'.*did you mean 'owner'"),
        ("", {"RANK": "0"}, "WORLD_SIZE: is not set"),
    ],
)
def test_the_command_itself_says_one_line_and_exits_with_2(line, environ, said):
    clean = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    command = [sys.executable, "-m", "tools.pretrain", *line.split()]
    done = subprocess.run(command, cwd=ROOT, env=clean | environ, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert re.fullmatch(rf"pretrain: error: [^\n]*{said}[^\n]*\n", done.stderr), done.stderr


def assert_refused(said, function, *given):
    with pytest.raises(UsageError, match=said) as refused:
        function(*given)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("groups", [{"tp": None}, {}])
def test_what_is_no_collection_of_groups_is_refused(groups):
    with pytest.raises(TypeError, match="pg_collection is a dict, but must be a collection of process groups"):
        TensorParallelMuon([torch.nn.Parameter(torch.ones(2, 2))], pg_collection=groups)
