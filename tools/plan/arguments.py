"""The planner's command line, and the model, the cluster and the job that it describes."""

import argparse
import math
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path

from core.cost.model import Link

from ..usage import UsageError
from .models import PRESETS, Cluster, Model

ITEMSIZE = {"medium": 2, "high": 4, "highest": 4}
"""Bytes of an entry as it travels, by precision."""

OPTIMIZERS = ("muon", "adaptive_muon", "adamw")

SIZES = (
    ("--world-size", 8, "ranks"),
    ("--tp", 1, "tensor-parallel size"),
    ("--pp", 1, "pipeline-parallel size; the ranks that remain are data parallel"),
    ("--ep", 1, "expert-parallel size"),
    ("--etp", None, "tensor-parallel size of experts (default: --tp)"),
    ("--ranks-per-node", 8, "ranks that the intra-node link joins"),
)
RATES = (
    ("--intra-gbytes", 450.0, "GB/s that a rank receives in a node"),
    ("--inter-gbytes", 50.0, "GB/s that a rank receives from other nodes"),
    ("--intra-us", 10.0, "microseconds of a collective in a node"),
    ("--inter-us", 20.0, "microseconds of a collective between nodes"),
    ("--tflops", 790.0, "sustained TFLOP/s of bfloat16 products"),
    ("--tf32-tflops", 395.0, "sustained TFLOP/s of tf32 products: --precision high, and Gram matrices at medium"),
    ("--fp32-tflops", 50.0, "sustained TFLOP/s of float32 products: --precision highest"),
    ("--memory-gbytes", 4300.0, "GB/s of memory"),
)
HELP = {
    "ffn_hidden_size": "inner width of a dense MLP or the shared expert, 0 for none (default: 4 times the width)",
    "num_query_groups": "key and value heads (default: the attention heads)",
    "kv_channels": "width of a head (default: the hidden size over the heads)",
    "vocab_size": "rows of the embedding (default: 50304)",
    "num_experts": "routed experts of each layer, 0 for none",
    "moe_ffn_hidden_size": "inner width of a routed expert",
}


def parser(description: str) -> argparse.ArgumentParser:
    """All flags of the planner."""
    made = argparse.ArgumentParser(
        prog="python -m tools.plan", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    model = made.add_argument_group("model")
    model.add_argument("--preset", choices=PRESETS, help="start from this model")
    for field in fields(Model):
        if field.name == "swiglu":
            model.add_argument("--swiglu", action=argparse.BooleanOptionalAction, help="gate and up in one matrix")
        else:
            model.add_argument(_flag(field.name), type=int, metavar="N", help=HELP.get(field.name))
    cluster = made.add_argument_group("cluster; the defaults are an H200's")
    for flag, default, text in SIZES:
        about = text if default is None else f"{text} (default: {default})"
        cluster.add_argument(flag, type=int, default=default, metavar="N", help=about)
    for flag, rate, text in RATES:
        cluster.add_argument(flag, type=float, default=rate, metavar="X", help=f"{text} (default: {rate:g})")
    job = made.add_argument_group("job")
    job.add_argument("--optimizer", choices=OPTIMIZERS, default="muon", help="optimizer (default: muon)")
    job.add_argument(
        "--precision", choices=ITEMSIZE, default="medium", help="arithmetic of Newton-Schulz (default: medium)"
    )
    job.add_argument("--ns-steps", type=int, default=5, metavar="N", help="Newton-Schulz iterations (default: 5)")
    job.add_argument(
        "--global-batch-size", type=int, default=1024, metavar="N", help="sequences of a step (default: 1024)"
    )
    job.add_argument("--seq-length", type=int, default=4096, metavar="N", help="tokens of a sequence (default: 4096)")
    job.add_argument(
        "--mfu", type=float, default=0.4, metavar="X", help="share of --tflops that training reaches (default: 0.4)"
    )
    made.add_argument("--plot", type=Path, metavar="FILE", help="draw the cost against the number of ranks")
    made.add_argument("--json", action="store_true", help="print JSON")
    validation = made.add_argument_group("validation, under torchrun")
    validation.add_argument(
        "--validate", action="store_true", help="predict and measure the steps of tools.bench on this machine"
    )
    validation.add_argument("--hidden", type=int, default=512, metavar="N", help="hidden size (default: 512)")
    validation.add_argument("--layers", type=int, default=8, metavar="N", help="layers (default: 8)")
    validation.add_argument("--reps", type=int, default=7, metavar="N", help="timed steps (default: 7)")
    return made


def model_of(options: argparse.Namespace) -> Model:
    """The model that the options describe: the preset with the options over it, or the options and the usual sizes for the rest.

    Raises:
        UsageError: when a size is missing or out of range.
    """
    sizes = {f.name: v for f in fields(Model) if (v := getattr(options, f.name)) is not None}
    may_be_zero = ("num_experts", "ffn_hidden_size")
    check_range(options, [name for name in sizes if name not in ("swiglu", *may_be_zero)])
    check_range(options, [name for name in may_be_zero if name in sizes], least=0)
    if options.preset:
        model = replace(PRESETS[options.preset], **sizes)
    else:
        for name in ("hidden_size", "num_layers", "num_attention_heads"):
            if name not in sizes:
                raise UsageError(_flag(name), None, "is missing", hint=f"or --preset {'|'.join(PRESETS)}")
        h, heads = options.hidden_size, options.num_attention_heads
        if "kv_channels" not in sizes and h % heads:
            raise UsageError(
                "--num-attention-heads", heads, f"does not divide --hidden-size {h}", hint="give --kv-channels"
            )
        usual = {"ffn_hidden_size": 4 * h, "num_query_groups": heads, "kv_channels": h // heads, "vocab_size": 50304}
        model = Model(**{**usual, "swiglu": False, **sizes})
    if model.num_experts and not model.moe_ffn_hidden_size:
        raise UsageError("--moe-ffn-hidden-size", None, "is missing", hint="experts need it")
    if model.num_experts and model.moe_router_topk > model.num_experts:
        possible = f"1 to --num-experts {model.num_experts}"
        raise UsageError("--moe-router-topk", model.moe_router_topk, "is out of range", possible=possible)
    return model


def cluster_of(options: argparse.Namespace) -> Cluster:
    """The cluster that the options describe, with the rates of products at ``--precision``.

    Raises:
        UsageError: when a number is out of range.
    """
    check_range(options, [_name(flag) for flag, *_ in SIZES])
    check_range(options, ["ns_steps", "global_batch_size", "seq_length"])
    for name in (*(_name(flag) for flag, *_ in RATES), "mfu"):
        value = getattr(options, name)
        zero = name.endswith("_us")
        if not (0 < value < math.inf or (zero and value == 0)):
            raise UsageError(_flag(name), value, "is out of range", possible=f"a number {'>=' if zero else '>'} 0")
    rate = {"medium": options.tflops, "high": options.tf32_tflops, "highest": options.fp32_tflops}
    gram_rate = options.fp32_tflops if options.precision == "highest" else options.tf32_tflops
    return Cluster(
        world_size=options.world_size,
        tp=options.tp,
        pp=options.pp,
        ep=options.ep,
        etp=options.tp if options.etp is None else options.etp,
        ranks_per_node=options.ranks_per_node,
        intra=Link(options.intra_us * 1e-6, options.intra_gbytes * 1e9),
        inter=Link(options.inter_us * 1e-6, options.inter_gbytes * 1e9),
        flops=rate[options.precision] * 1e12,
        gram_flops=gram_rate * 1e12,
        memory=options.memory_gbytes * 1e9,
    )


def check_range(options: argparse.Namespace, names: Sequence[str], least: int = 1) -> None:
    """Raise UsageError for an option that is a number below ``least``."""
    for name in names:
        value = getattr(options, name)
        if value is not None and value < least:
            raise UsageError(_flag(name), value, "is out of range", possible=f"a whole number >= {least}")


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _name(flag: str) -> str:
    return flag.removeprefix("--").replace("-", "_")
