"""Times Muon's step beside its peers, on the matrices of a GPT and one CPU thread a rank.

    torchrun --nproc-per-node 4 -m tools.bench --hidden 512 --layers 8 --precision highest
    torchrun --nproc-per-node 4 -m tools.bench --whole-step    # embedding and vectors too, by AdamW
    python -m tools.bench --single            # one process, against torch.optim and emerging-optimizers
    python -m tools.bench --virtual 8         # one rank's work on 2, 4, 8 ranks that do not exist
    python -m tools.bench --all               # every run of BENCHMARKS.md, in processes of its own

All candidates take turns in one set of processes, so that a busy machine slows all of them.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ..pretrain.launch import Launch
from ..pretrain.report import format_rows
from ..usage import UsageError, refuse
from . import cases, virtual, whole_step
from .figures import SIZES, figures_table
from .measure import measure
from .tables import markdown, of_report

PRECISIONS = ("highest", "medium")
RUNS = (
    *((ranks, precision, ()) for ranks, precision in product((2, 4, 1), PRECISIONS)),
    (4, "medium", ("--whole-step",)),
    (1, "medium", ("--virtual", "8")),
)
"""Ranks, precision and further flags of each run of ``--all``."""


def environment() -> dict[str, Any]:
    """The machine and the package versions of a result."""
    model = platform.processor() or "unknown"
    flags: list[str] = []
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        facts = dict(line.split(":", 1) for line in cpuinfo.read_text().splitlines() if ":" in line)
        facts = {key.strip(): value.strip() for key, value in facts.items()}
        model = f"{facts.get('model name', model)} (family {facts.get('cpu family')}, model {facts.get('model')})"
        flags = [
            flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in facts.get("flags", "").split()
        ]
    packages = ("torch", "emerging-optimizers", "megatron-core")
    return {
        "cpu": model,
        "flags": " ".join(flags),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **{package: _version(package) for package in packages},
        "load": round(os.getloadavg()[0], 1),
    }


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Run all candidates for one model, number of ranks and precision; returns the report.

    Raises:
        UsageError: ``options.only`` leaves no candidate.
    """
    torch.set_num_threads(1)
    group = dist.group.WORLD if dist.is_initialized() and not options.single else None
    ranks = 1 if group is None else dist.get_world_size(group)
    matrices = cases.gpt_matrices(options.hidden, options.layers)
    case = "step"
    results: Sequence[Any]
    if options.virtual:
        case, ranks = "virtual", options.virtual
        results = virtual.run(options.virtual, matrices, options.precision, options.reps, options.only)
    elif options.whole_step:
        assert group is not None
        case = "whole step"
        others = whole_step.gpt_others(options.hidden, options.layers, options.vocabulary)
        candidates = whole_step.candidates(matrices, others, options.precision, group, options.only)
        results = measure(candidates, matrices, options.reps, group, others)
    else:
        makers = (
            cases.single_process(options.precision)
            if group is None
            else cases.tensor_parallel(options.precision, group)
        )
        candidates = cases.candidates(makers, matrices, group, options.only)
        results = measure(candidates, matrices, options.reps, group)
    if not results:
        raise UsageError("--only", " ".join(options.only), "leaves no candidate")
    return {
        "case": case,
        "hidden": options.hidden,
        "layers": options.layers,
        "ranks": ranks,
        "precision": options.precision,
        "reps": options.reps,
        "environment": environment(),
        "results": [asdict(result) for result in results],
    }


def run_all(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Do every run of BENCHMARKS.md, each in processes of its own; prints Markdown after each."""
    reports = []
    for (hidden, layers), (ranks, precision, further) in product(SIZES, RUNS):
        with tempfile.TemporaryDirectory() as directory:
            out = Path(directory, "run.json")
            flags = ["--hidden", hidden, "--layers", layers, "--precision", precision, "--reps", options.reps]
            _launch(ranks, [str(flag) for flag in (*further, *flags, "--json", out)])
            reports.append(json.loads(out.read_text()))
        if len(reports) == 1:
            print(_describe(reports[0]["environment"]))
        print(markdown(reports[-1]), flush=True)
    print(figures_table(reports), flush=True)
    return reports


def _launch(ranks: int, flags: Sequence[str]) -> None:
    environ = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "MASTER_PORT")}
    environ.setdefault("OMP_NUM_THREADS", "1")
    launcher = ["torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1", f"--nproc-per-node={ranks}", "-m"]
    start = [*launcher, "tools.bench"] if ranks > 1 else ["tools.bench"]
    if ranks == 1 and "--virtual" not in flags:
        start.append("--single")
    command = [sys.executable, "-m", *start, *flags]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    if done.returncode:
        tail = "\n".join(done.stderr.splitlines()[-20:])
        sys.exit(f"{' '.join(command)}: ended with code {done.returncode}\n{tail}")


def _describe(environment: dict[str, Any]) -> str:
    return ", ".join(f"{key}: {value}" for key, value in environment.items())


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line; the module's docstring describes it."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hidden", type=int, default=512, help="hidden size of the GPT (default: 512)")
    parser.add_argument("--layers", type=int, default=8, help="its layers, of four matrices each (default: 8)")
    parser.add_argument(
        "--precision", choices=PRECISIONS, default="highest", help="float32 or bfloat16 (default: highest)"
    )
    parser.add_argument("--reps", type=int, default=7, help="timed steps of each candidate (default: 7)")
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="TEXT", help="only candidates with one of these in the name"
    )
    parser.add_argument(
        "--vocabulary",
        type=int,
        default=whole_step.VOCABULARY,
        help="rows of the embedding of --whole-step (default: %(default)s)",
    )
    parser.add_argument("--json", type=Path, metavar="OUT", help="write every timed step there")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--single", action="store_true", help="one process, whole matrices")
    which.add_argument(
        "--whole-step", action="store_true", help="embedding, norms and biases too, by AdamW, as get_optimizer does it"
    )
    which.add_argument("--virtual", type=int, metavar="N", help="one process: one rank's work on 2, 4, … N ranks")
    which.add_argument("--all", action="store_true", help="every run of BENCHMARKS.md; prints Markdown and the figures")
    options = parser.parse_args(argv)
    needs_ranks = not (options.single or options.all or options.virtual is not None)
    starts_ranks = needs_ranks and not dist.is_initialized()
    rank = 0
    try:
        if needs_ranks and not starts_ranks:
            rank, ranks = dist.get_rank(), dist.get_world_size()
        else:
            launch = Launch.from_environ(os.environ)
            rank, ranks = launch.rank, launch.world_size
        _check(options, ranks)
        if starts_ranks:
            dist.init_process_group("gloo")
        report = run_all(options) if options.all else run(options)
    except UsageError as error:
        refuse(error, rank=rank, program="bench")
    finally:
        if starts_ranks and dist.is_initialized():
            dist.destroy_process_group()
    if rank:
        return
    if not isinstance(report, list):
        print(_describe(report["environment"]))
        print("\n".join(format_rows(of_report(report))))
    if options.json:
        options.json.write_text(json.dumps(report, indent=1))


def _check(options: argparse.Namespace, ranks: int) -> None:
    if options.json and not options.json.parent.is_dir():
        raise UsageError("--json", options.json, "is in a folder that does not exist")
    for flag in ("--hidden", "--layers", "--reps", "--vocabulary"):
        value = getattr(options, flag.removeprefix("--"))
        if value < 1:
            raise UsageError(flag, value, "is out of range", possible="a whole number >= 1")
    virtual = options.virtual is not None
    if virtual and (options.virtual < 2 or options.virtual & (options.virtual - 1)):
        raise UsageError("--virtual", options.virtual, "is out of range", possible="2, 4, 8, 16, …")
    if (options.single or options.all or virtual) and ranks > 1:
        raise UsageError("WORLD_SIZE", ranks, "is for runs on several ranks", hint="leave torchrun out")
    if options.single or options.all:
        return
    if ranks == 1 and not virtual and not dist.is_initialized():
        raise UsageError(
            "--single",
            None,
            "and --virtual and --all are not given, and there are no ranks",
            hint="torchrun --nproc-per-node 4 -m tools.bench, or add --single",
        )
    cut = [("--hidden", options.hidden)] + ([("--vocabulary", options.vocabulary)] if options.whole_step else [])
    parts = options.virtual or ranks
    for flag, value in cut:
        if value % parts:
            raise UsageError(flag, value, f"cannot be cut over {parts} ranks", possible=f"a multiple of {parts}")


def _version(package: str) -> str:
    try:
        return version(package)
    except ImportError:
        return "not installed"
