"""The flags of the main job, under Megatron's names, from the command line and from a YAML file.

`Arguments` is the one list of them: the field ``muon_tp_mode`` is the flag ``--muon-tp-mode`` and a key of the YAML
file. Values from either place go through the same checks. The command line wins over the file, the file over the
defaults. Below them come the settings of the registered optimizers that have no field: ``lion_betas`` is the flag
``--lion-betas``, read from the constructor.
"""

import argparse
import dataclasses
import inspect
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from core.optimizer.emerging_optimizers import get_supported_coefficient_types
from core.optimizer.registry import list_optimizers, settings_of
from core.optimizer.steps.constructor_settings import Setting
from core.optimizer.steps.weight_decay import METHODS
from core.sharding.tp_modes import AUTO, TP_MODES, tp_mode_names

from ..usage import UsageError, nearest
from .flags import NOT_NEGATIVE, POSITIVE, SHARE, Flag, count, count_or_text, number, switch, text, words
from .model import NORMALIZATIONS
from .parallel import SCHEDULES
from .schedule_flags import ScheduleArguments
from .yaml_file import read_yaml

SCALE_MODES = ("shape_scaling", "spectral", "unit_rms_norm")


_MODES = "; ".join(f"{name}: {mode.summary}" for name, mode in TP_MODES.items())
_AUTO = f"{AUTO}: for each matrix the exact one of these that is predicted to be the fastest"
SPIKE = "a factor above 1, like 3"
BETAS = "one number a flag: --adam-beta1 0.9 --adam-beta2 0.95"


@dataclass(frozen=True)
class Arguments(ScheduleArguments):
    """Flags of the main job. Field names are Megatron's."""

    # the optimizer
    optimizer: str = text("muon", "by name; what one for matrices cannot take goes to adamw", list_optimizers)
    weight_decay: float | None = number(
        None, "weight decay (default: 0.01, and none with --optimizer sgd)", NOT_NEGATIVE, hint="0 means none"
    )
    decoupled_weight_decay: bool = switch(True, "decay weights apart from the gradient; without it, as l2")
    weight_decay_method: str | None = text(None, "style of weight decay (default: the optimizer's own)", METHODS)
    weight_decay_mask: tuple[str, ...] = words(
        "name patterns of what is decayed, with ! of what not (default: no vectors)"
    )
    adam_beta1: float = number(0.9, "Adam's first beta", SHARE, hint=BETAS)
    adam_beta2: float = number(0.95, "Adam's second beta", SHARE, hint=BETAS)
    adam_eps: float = number(1e-8, "Adam's epsilon", POSITIVE, hint="1e-8 is usual")
    sgd_momentum: float = number(0.0, "momentum of sgd", SHARE, hint="0.9 is usual")
    muon_momentum: float = number(0.95, "Muon's momentum", SHARE, hint="0.95 is usual")
    muon_tp_mode: str = text("owner", f"how a sharded matrix comes together. {_MODES}; {_AUTO}", tp_mode_names)
    muon_coefficient_type: str = text(
        "quintic", "Newton-Schulz coefficients; custom: those of --muon-ns-coeffs", get_supported_coefficient_types
    )
    muon_num_ns_steps: int = count(5, "Newton-Schulz iterations", at_most=20)
    muon_scale_mode: str = text("spectral", "scale of the update", SCALE_MODES)
    muon_split_qkv: bool = switch(True, "orthogonalize query, key and value of each group apart")
    muon_nesterov: bool = switch(False, "Nesterov momentum")
    muon_extra_scale_factor: float = number(1.0, "factor on Muon's update", POSITIVE, hint="leave it out for 1")
    muon_fp32_matmul_prec: str = text("medium", "fp32, tf32 or bf16 in Newton-Schulz", ("highest", "high", "medium"))
    adaptive_muon_moment2_method: str = text(
        "adamuon", "second moment of adaptive_muon", ("adamuon", "normuon", "namo")
    )
    adaptive_muon_beta2: float = number(0.95, "decay of that second moment", SHARE, hint="0.95 is usual")
    adaptive_muon_eps: float = number(1e-8, "epsilon of that second moment", POSITIVE, hint="1e-8 is usual")
    clip_grad: float = number(1.0, "largest global gradient norm; 0: no clipping", NOT_NEGATIVE, hint="1 is usual")
    param_override: tuple[str, ...] = words("rules NAME_PATTERN=OPTIMIZER or NAME_PATTERN=key:value,...")
    expect_matrix_params: str | None = count_or_text(
        "N or NAME_PATTERN: fail at the start when fewer matrices, or not all of these, go to an optimizer of matrices"
    )
    probe_first_step: bool = switch(False, "compare the first step with the unsharded one; stop if it is another")

    # the model
    num_layers: int = count(4, "transformer layers")
    hidden_size: int = count(128, "width of the model")
    num_attention_heads: int = count(4, "query heads")
    num_query_groups: int | None = count(None, "key/value heads (default: as many as query heads)")
    kv_channels: int | None = count(None, "width of a head (default: hidden size / heads)")
    ffn_hidden_size: int | None = count(None, "width of the MLP (default: 4 x hidden size, 8/3 x with --swiglu)")
    normalization: str = text("LayerNorm", "norm before attention and MLP", NORMALIZATIONS)
    swiglu: bool = switch(False, "gated MLP")
    split_gate_up: bool = switch(True, "orthogonalize gate and value of a gated MLP apart")
    untie_embeddings_and_output_weights: bool = switch(False, "give the output layer a weight of its own")

    # the batches
    seq_length: int = count(128, "tokens a sequence")
    micro_batch_size: int = count(4, "sequences a micro-batch")
    global_batch_size: int = count(16, "sequences a step, over all data-parallel ranks")
    data_path: tuple[str, ...] = words("text files, or one Megatron .bin/.idx prefix (default: Python's own texts)")
    seed: int = count(1234, "seed of weights and data order", at_least=0)
    eval_interval: int = count(50, "steps between validations; 0: never", at_least=0)
    eval_iters: int = count(4, "batches a validation")

    # the layout; what remains of the processes is data-parallel
    tensor_model_parallel_size: int = count(1, "ranks that share every layer")
    pipeline_model_parallel_size: int = count(1, "ranks that share the stack of layers")
    num_layers_per_virtual_pipeline_stage: int | None = count(
        None, "layers a model chunk; makes the schedule interleaved"
    )
    pipeline_schedule: str | None = text(None, "default: 1f1b, or interleaved", SCHEDULES)
    distributed_backend: str | None = text(None, "default: nccl where there is a GPU", ("gloo", "nccl"))
    distributed_timeout_minutes: float = number(
        10.0,
        "time after which a collective that a rank is missing from is an error",
        POSITIVE,
        hint="fractions are possible",
    )
    overlap_optimizer_with_backward: bool = switch(
        False, "step Muon's matrices of owner mode as their gradients come; needs --clip-grad 0 and no pipeline"
    )
    overlap_optimizer_with_bubble: bool = switch(
        False, "a pipeline stage steps when its own last backward is done; keeps parameters and state twice"
    )
    bf16: bool = switch(False, "matrix products in bfloat16, parameters in fp32")
    fp16: bool = switch(False, "refused: there is no loss scaler")
    use_triton: bool = switch(False, "refused: there are no Triton kernels yet")

    # faults, and leaving early
    on_non_finite: str = text(
        "error", "a gradient or loss that is not finite stops the run, or its step is left out", ("error", "skip")
    )
    skip_loss_spike: float = number(
        0.0, "leave out steps whose loss is above so many times its running median; 0: none", NOT_NEGATIVE, hint=SPIKE
    )
    skip_grad_norm_spike: float = number(
        0.0,
        "leave out steps whose gradient norm is above so many times its running median; 0: none",
        NOT_NEGATIVE,
        hint=SPIKE,
    )
    spike_window: int = count(
        64, "steps that the running medians run over; until there are so many, nothing is a spike"
    )
    max_skipped_steps: int = count(10, "steps left out in a row that stop the run")
    check_state_interval: int = count(
        0, "steps between checks that weights and state are finite; 0: only before they are saved", at_least=0
    )
    exit_signal_handler: bool = switch(False, "on SIGTERM or SIGUSR1, save and exit after the step")
    exit_duration_in_mins: float = number(
        0.0, "save and exit after so many minutes; 0: never", NOT_NEGATIVE, hint="60 is an hour"
    )
    exit_interval: int | None = count(None, "save and exit after a step that is a multiple of it (default: never)")

    # files
    save: str | None = text(None, "directory to write checkpoints to")
    load: str | None = text(None, "directory to resume from, on any layout")
    save_interval: int | None = count(None, "steps between checkpoints (default: only at the end)")
    async_save: bool = switch(False, "write checkpoints while training goes on")
    keep_checkpoints: int | None = count(None, "checkpoints to keep, the newest (default: all)", at_least=2)
    ckpt_step: int | None = count(None, "step to resume from (default: the newest)", at_least=0)
    load_optim: bool = switch(True, "resume with the optimizer's state; the one saved must be the one here")
    load_rng: bool = switch(True, "resume with the random states, on the layout that was saved")
    load_only: tuple[str, ...] = words("patterns of the keys to load, like model.layers.0.*; the run begins at step 0")
    finetune: bool = switch(False, "load the weights only and begin at step 0")
    verify_checkpoint: bool = switch(True, "compare the contents of a checkpoint's files with their digests")
    ckpt_format: str = text("torch_dist", "format of checkpoints", ("torch_dist",))
    log_dir: str | None = text(None, "directory of log.csv and log.jsonl")
    log_interval: int = count(1, "steps between logged lines")
    trace: str | None = text(None, "file for a Chrome trace of the last three steps, for tools.plot.timeline")
    config: str | None = text(None, "YAML file of these flags, with underscores; the command line wins")

    # settings of optimizers that have no field above; only those that were given
    settings: dict[str, Any] = dataclasses.field(default_factory=dict, hash=False)


FLAGS: dict[str, Flag] = {
    field.name: field.metadata["flag"] for field in dataclasses.fields(Arguments) if "flag" in field.metadata
}


def setting_flags(names: Iterable[str] | None = None) -> dict[str, dict[str, Flag]]:
    """Optimizer → name → flag, for every setting that is not a field of :class:`Arguments`; shared ones with each optimizer.

    With ``names`` only the optimizers to which one of these may belong, for importing all of them takes seconds.
    """
    return {
        optimizer: {name: _flag(setting) for name, setting in settings_of(optimizer).items() if name not in FLAGS}
        for optimizer in list_optimizers()
        if names is None or any(name.startswith(f"{optimizer}_") for name in names)
    }


def _all_names() -> list[str]:
    return [*FLAGS, *(name for flags in setting_flags().values() for name in flags)]


def _flag(setting: Setting) -> Flag:
    about = setting.argument.replace("_", " ")
    if setting.default not in (None, inspect.Parameter.empty):
        values = setting.default if isinstance(setting.default, tuple) else (setting.default,)
        about += f" (default: {' '.join(map(str, values))})"
    return Flag(about, setting)


def flag_of(name: str) -> str:
    """``muon_tp_mode`` -> ``--muon-tp-mode``."""
    return "--" + name.replace("_", "-")


def parse_arguments(argv: Sequence[str] | None = None) -> Arguments:
    """Read the command line (default: this process's) and the YAML file that it names.

    Raises:
        UsageError: A flag or a key is unknown, or a value is not possible for its flag.
    """
    argv = sys.argv[1:] if argv is None else argv
    groups = setting_flags(None if {"-h", "--help"} & {*argv} else [_name_of(word) for word in argv])
    words_of = vars(_parser(groups).parse_args([_hide_sign(word) for word in argv]))
    values: dict[str, Any] = {}
    if "config" in words_of:
        path = FLAGS["config"].convert(words_of["config"], "--config")
        content = read_yaml(Path(path))
        flags = _together(setting_flags(content))
        for key, raw in content.items():
            source = f"{key} in {path}"
            if key not in flags or key == "config":
                hint = nearest(key, _all_names()) or "keys are flag names with underscores"
                raise UsageError(source, None, "unknown key", hint=hint)
            values[key] = flags[key].convert(raw, source)
    flags = _together(groups)
    values |= {name: flags[name].convert(raw, flag_of(name)) for name, raw in words_of.items()}
    settings = {name: values.pop(name) for name in [*values] if name not in FLAGS}
    return Arguments(**values, settings=settings)


def _together(groups: Mapping[str, Mapping[str, Flag]]) -> dict[str, Flag]:
    return FLAGS | {name: flag for group in groups.values() for name, flag in group.items()}


def _name_of(word: str) -> str:
    """``--no-lion-x=1`` -> ``lion_x``."""
    return word.partition("=")[0].removeprefix("--").removeprefix("no-").replace("-", "_")


class _Parser(argparse.ArgumentParser):
    """A parser of argparse whose errors are a :class:`UsageError` instead of a page of usage."""

    def error(self, message: str) -> NoReturn:
        if message.startswith("unrecognized arguments: "):
            word = message.removeprefix("unrecognized arguments: ").split()[0].split("=")[0]
            known = [flag_of(name) for name in _all_names()]
            problem = "is an unknown flag" if word.startswith("-") else "belongs to no flag"
            raise UsageError(word, None, problem, hint=nearest(word, known) or "see --help")
        flag, _, problem = message.removeprefix("argument ").rpartition(": ")
        raise UsageError(flag or "command line", None, problem, hint="see --help")


def _parser(groups: Mapping[str, Mapping[str, Flag]]) -> _Parser:
    parser = _Parser(
        prog="python -m tools.pretrain", allow_abbrev=False, description="Train a GPT on any TP x PP x DP layout."
    )
    defaults = Arguments()
    for name, flag in FLAGS.items():
        default = getattr(defaults, name)
        about = flag.help + (f" (default: {default})" if default not in (None, ()) else "")
        _add(parser, name, flag, about, "extend" if flag.setting.many else "store")
    added: set[str] = set()
    for optimizer, flags in groups.items():
        if new := {name: flag for name, flag in flags.items() if name not in added}:
            group = parser.add_argument_group(f"settings of {optimizer}")
            for name, flag in new.items():
                _add(group, name, flag, flag.help, "store")
            added |= new.keys()
    return parser


def _add(parser: argparse._ActionsContainer, name: str, flag: Flag, about: str, action: str) -> None:
    option = flag_of(name)
    common: dict[str, Any] = {"dest": name, "default": argparse.SUPPRESS}
    about = about.replace("%", "%%")
    if flag.setting.kind is bool and not flag.setting.many:
        off = ["--no-" + option[2:]]
        if option.startswith("--muon-"):
            off.append(option.replace("--muon-", "--muon-no-"))
        parser.add_argument(option, action="store_const", const=True, help=about, **common)
        parser.add_argument(*off, action="store_const", const=False, help="the opposite", **common)
        return
    # Flags of one value accept many here, because the error of `Flag.convert` is clearer than that of argparse.
    parser.add_argument(option, nargs="+", action=action, type=_show_sign, metavar="VALUE", help=about, **common)


def _hide_sign(word: str) -> str:
    """``-1e-3`` -> `` -1e-3``: argparse takes -1e-3 and -inf for flags."""
    return " " + word if word.startswith("-") and _is_number(word) else word


def _show_sign(word: str) -> str:
    return word.lstrip() if _is_number(word) else word


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True
