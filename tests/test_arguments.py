"""Flags: defaults, the YAML file, who wins, and values of the wrong kind."""

import dataclasses
import re
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from core.optimizer import emerging_optimizers
from core.optimizer.emerging_optimizers import EmergingOptimizerEntry, get_optimizer, register_optimizer
from core.optimizer.optimizer_config import OptimizerConfig
from tools.pretrain.arguments import FLAGS, Arguments, flag_of, parse_arguments, setting_flags
from tools.pretrain.launch import Launch, Machine
from tools.pretrain.param_rules import check_rules, optimizer_config
from tools.pretrain.resume import changed_flags
from tools.pretrain.validation import gpt_config, validate
from tools.usage import UsageError

CONFIGS = sorted(Path(__file__).parents[1].glob("configs/*.yaml"))

MEGATRON = """
    optimizer lr min_lr weight_decay adam_beta1 adam_beta2 adam_eps sgd_momentum muon_momentum muon_tp_mode
    muon_coefficient_type muon_num_ns_steps muon_scale_mode muon_nesterov muon_extra_scale_factor muon_fp32_matmul_prec
    train_iters micro_batch_size global_batch_size seq_length num_layers hidden_size num_attention_heads num_query_groups
    kv_channels ffn_hidden_size swiglu untie_embeddings_and_output_weights lr_decay_style lr_warmup_iters lr_decay_iters
    clip_grad save load save_interval ckpt_format seed data_path eval_interval eval_iters log_interval
    tensor_model_parallel_size pipeline_model_parallel_size num_layers_per_virtual_pipeline_stage distributed_backend
    bf16 fp16
""".split()


@pytest.fixture
def config(tmp_path):
    """Writes a YAML file and gives the flags that name it."""

    def write(text: str) -> list[str]:
        path = tmp_path / "job.yaml"
        path.write_text(text)
        return ["--config", str(path)]

    return write


def test_without_flags_the_defaults_hold_and_are_valid_themselves():
    assert parse_arguments([]) == Arguments()
    for name, flag in FLAGS.items():
        default = getattr(Arguments(), name)
        assert flag.convert(list(default) if flag.setting.many else default, flag_of(name)) == default


@pytest.fixture
def toy():
    """Registers an optimizer with settings of every kind."""

    class Toy(torch.optim.SGD):
        def __init__(
            self,
            params: Any,
            lr: float = 0.1,
            weight_decay: float = 0.0,
            betas: tuple[float, float] = (0.9, 0.99),
            weights: tuple[float, ...] = (),
            rank: int | None = 4,
            exact: bool = False,
            side: Literal["left", "right"] = "left",
            mu_dtype: torch.dtype | None = None,
        ) -> None:
            self.given = (betas, weights, rank, exact, side, mu_dtype)
            super().__init__(params, lr=lr, weight_decay=weight_decay)

    def ready(optimizer, config=None):
        pass

    register_optimizer("toy", EmergingOptimizerEntry(Toy, init_state_fn=ready, default_param_overrides={}))
    yield "toy"
    del emerging_optimizers._EMERGING_OPTIMIZERS["toy"]


def test_settings_of_optimizers_are_flags_and_keys_and_reach_them(toy, config):
    file = config("optimizer: toy\ntoy_betas: [0.8, 0.9]\ntoy_rank: null\ntoy_exact: true\ntoy_side: right\n")
    line = "--toy-betas 5e-1 0.75 --no-toy-exact --toy-weights -1e-3 2 --toy-mu-dtype bfloat16"
    args = parse_arguments([*file, *line.split()])
    assert args.settings == {
        "toy_betas": (0.5, 0.75),
        "toy_rank": None,
        "toy_exact": False,
        "toy_side": "right",
        "toy_weights": (-0.001, 2.0),
        "toy_mu_dtype": "bfloat16",
    }
    assert len({args, args}) == 1
    made = get_optimizer(optimizer_config(args), [torch.nn.Linear(2, 2)]).members["toy"]
    assert made.given == ((0.5, 0.75), (-0.001, 2.0), None, False, "right", torch.bfloat16)
    assert parse_arguments(["--optimizer", "toy"]).settings == {}


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("--toy-betas 0.9", r"--toy-betas \[0.9\]: takes 2 values, not 1; possible: a number"),
        ("--toy-betas 0.9 x", "--toy-betas 'x': is not a number"),
        ("--toy-rank 1 2", r"--toy-rank \[1, 2\]: takes one value, not 2; possible: a whole number"),
        ("--toy-side up", "--toy-side 'up': unknown; possible: left, right"),
        ("--toy-mu-dtype bf16", "possible: float16, bfloat16"),
        ("--toy-exact 1", "1: belongs to no flag"),
        ("--toy-betta 1 2", "--toy-betta: is an unknown flag; hint: did you mean '--toy-betas'"),
        ("--toy-lr 1", "--toy-lr: is an unknown flag"),
    ],
)
def test_broken_settings(toy, line, said):
    with pytest.raises(UsageError, match=said):
        parse_arguments(line.split())


def test_a_setting_of_an_optimizer_that_has_no_parameters_is_refused(toy):
    def check(*line: str) -> None:
        args = parse_arguments(["--toy-rank", "3", *line])
        check_rules(args, gpt_config(args, vocab_size=264))

    said = "--toy-rank 3: is a setting of toy, and this run uses only adamw; hint: .*--optimizer toy"
    with pytest.raises(UsageError, match=said):
        check("--optimizer", "adamw")
    check("--optimizer", "toy")
    check("--optimizer", "adamw", "--param-override", "*.bias=toy")


def test_a_resumed_run_tells_settings_that_changed(toy):
    args = parse_arguments(["--toy-betas", "0.5", "0.75", "--toy-side", "right"])
    saved = {"settings": {"toy_betas": [0.5, 0.7], "toy_side": "right", "toy_rank": 2}}
    assert changed_flags(saved, args) == [
        "--toy-betas was [0.5, 0.7] and is now [0.5, 0.75]",
        "--toy-rank was 2 and is now left out",
    ]


def test_flags_have_megatrons_names():
    assert set(MEGATRON) <= set(FLAGS)


def test_optimizer_fields_are_those_of_the_core():
    known = {field.name for field in dataclasses.fields(OptimizerConfig)}
    ours = {name for name in FLAGS if name.startswith(("muon_", "adaptive_muon_", "adam_", "sgd_"))}
    assert ours | {"optimizer", "lr", "min_lr", "weight_decay", "clip_grad"} <= known


def test_numbers_and_switches():
    line = "--lr 3e-4 --weight-decay 0 --train-iters 7 --swiglu --muon-no-split-qkv --muon-nesterov --data-path a b"
    args = parse_arguments(line.split())
    assert (args.lr, args.weight_decay, args.train_iters) == (3e-4, 0.0, 7)
    assert (args.swiglu, args.muon_split_qkv, args.muon_nesterov) == (True, False, True)
    assert args.data_path == ("a", "b")
    assert parse_arguments(["--muon-no-split-qkv", "--muon-split-qkv"]).muon_split_qkv


def test_overrides_add_up():
    line = ["--param-override", "a=sgd", "--param-override", "b=adamw", "c=lr:1e-4"]
    assert parse_arguments(line).param_override == ("a=sgd", "b=adamw", "c=lr:1e-4")


def test_the_command_line_wins_over_the_file_and_the_file_over_the_default(config):
    file = config("lr: 1e-3\nmin_lr: 1.0e-4\nswiglu: true\nnum_query_groups: null\nparam_override: [a=sgd]\n")
    args = parse_arguments([*file, "--lr", "2e-3", "--no-swiglu"])
    assert (args.lr, args.min_lr, args.swiglu, args.num_query_groups) == (2e-3, 1e-4, False, None)
    assert args.param_override == ("a=sgd",)
    assert args.weight_decay == Arguments().weight_decay


def test_an_empty_file_is_no_flags(config):
    assert dataclasses.replace(parse_arguments(config("# nothing\n")), config=None) == Arguments()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configs_are_valid(path):
    assert parse_arguments(["--config", str(path)]).config == str(path)


def test_there_are_shipped_configs():
    assert {path.stem for path in CONFIGS} >= {"muon_tp2_pp2"}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("lr:\t0.1\n", "line 1.*not tabs"),
        ("lr: 0.1\nlr: 0.2\n", "line 2: key 'lr' stands twice"),
        ("momentun: 0.9\n", "unknown key"),
        ("muon_momentun: 0.9\n", "did you mean 'muon_momentum'"),
        ("config: other.yaml\n", "unknown key"),
        ("lr: fast\n", "lr in .*'fast': is not a number; possible: a number > 0"),
        ("lr: true\n", "True: is not a number"),
        ("lr: null\n", "None: is not a number"),
        ("lr: .nan\n", "nan: is out of range"),
        ("lr: {peak: 1}\n", "is not a number"),
        ("train_iters: 2.5\n", "2.5: is not a whole number"),
        ("train_iters: .inf\n", "is not a whole number"),
        ("swiglu: 1\n", "1: is not a switch; possible: true or false"),
        ("swiglu: 'true'\n", "'true': is not a switch"),
        ("save: 3\n", "3: is not a text"),
        ("save: ''\n", "is not a text"),
        ("optimizer: [muon]\nadam_beta1: [0.9, 0.95]\n", r"\[0.9, 0.95\]: takes one value, not 2"),
        ("- lr\n- min_lr\n", "not a list of `key: value` lines"),
        ("3: 4\n", "not a list of `key: value` lines"),
        ("? [a]\n: b\n", "--config"),
        ("lr: [1\n", "line 2"),
        ("lr: 1\0\n", "--config"),
    ],
)
def test_broken_yaml_is_one_line(config, text, said):
    with pytest.raises(UsageError, match=said) as refused:
        parse_arguments(config(text))
    assert "\n" not in str(refused.value)


def test_config_must_be_a_readable_file(tmp_path):
    with pytest.raises(UsageError, match="no such file"):
        parse_arguments(["--config", str(tmp_path / "missing.yaml")])
    with pytest.raises(UsageError, match="cannot be read"):
        parse_arguments(["--config", str(tmp_path)])
    (tmp_path / "latin.yaml").write_bytes("# gr\u00fc\u00dfe".encode("latin-1"))
    with pytest.raises(UsageError, match="cannot be read"):
        parse_arguments(["--config", str(tmp_path / "latin.yaml")])


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("--lrr 1", "--lrr: is an unknown flag; hint: did you mean '--lr'"),
        ("--muon-tp-mod owner", "did you mean '--muon-tp-mode'"),
        ("muon", "muon: belongs to no flag"),
        ("--lr", "--lr: expected at least one argument"),
        ("--swiglu yes", "yes: belongs to no flag"),
        ("--seed 99999999999999999999", "is out of range"),
        ("--train-iters 1e3", "'1e3': is not a whole number"),
    ],
)
def test_broken_command_lines(line, said):
    with pytest.raises(UsageError, match=said):
        parse_arguments(line.split())


def test_help_names_every_flag(capsys):
    with pytest.raises(SystemExit) as left:
        parse_arguments(["--help"])
    assert left.value.code == 0
    said = capsys.readouterr().out
    assert all(flag_of(name) in said for name in FLAGS)
    for optimizer, flags in setting_flags().items():
        assert all(flag_of(name) in said for name in flags), optimizer


def test_help_groups_settings_by_optimizer(toy, capsys):
    with pytest.raises(SystemExit):
        parse_arguments(["--help"])
    own = capsys.readouterr().out.partition("settings of toy:")[2]
    assert "--toy-betas VALUE" in own
    assert "betas (default: 0.9 0.99)" in own
    assert "--no-toy-exact" in own


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("16", ""),
        ("*linear*.weight", ""),
        (
            "17",
            "expect=17: only 16 matrices .*embedding.word_embeddings.weight 264 x 128 goes to adamw .it is an embedding.",
        ),
        ("*norm*", "input_layernorm.weight 128 goes to adamw .it is not 2-D."),
        ("encoder.*", "matches no parameter"),
        ("0", "expects nothing"),
    ],
)
@pytest.mark.parametrize("by_file", [False, True])
def test_expected_matrices_are_counted_before_anything_begins(config, value, said, by_file):
    line = config(f"expect_matrix_params: {value if value.isdecimal() else repr(value)}\n")
    args = parse_arguments(line if by_file else ["--expect-matrix-params", value])
    if not said:
        check_rules(args, gpt_config(args, vocab_size=264))
        return
    with pytest.raises(UsageError, match=f"--expect-matrix-params '?{re.escape(value)}'?: .*{said}"):
        check_rules(args, gpt_config(args, vocab_size=264))


@pytest.mark.parametrize("other", ["backward", "bubble"])
def test_a_probed_step_is_taken_by_all_ranks_together(other):
    line = f"--probe-first-step --overlap-optimizer-with-{other}"
    line += " --clip-grad 0" if other == "backward" else " --pipeline-model-parallel-size 2"
    with pytest.raises(UsageError, match=f"--probe-first-step: with --overlap-optimizer-with-{other}"):
        validate(parse_arguments(line.split()), Launch(), Machine(gpus=0))


@pytest.mark.parametrize(
    ("line", "momentum", "decay"),
    [
        ("--optimizer sgd", 0.0, 0.0),
        ("--optimizer sgd --sgd-momentum 0.9 --weight-decay 0.02", 0.9, 0.02),
        ("--optimizer sgd --weight-decay 0", 0.0, 0.0),
        ("--optimizer adamw", 0.0, 0.01),
        ("--optimizer adamw --weight-decay 0", 0.0, 0.0),
    ],
)
def test_sgd_is_minimal_unless_flags_add_to_it(line, momentum, decay):
    """As Forgather's SGD; the other optimizers decay by default."""
    config = optimizer_config(parse_arguments(line.split()))
    assert (config.sgd_momentum, config.weight_decay) == (momentum, decay)
