"""Times Muon's step beside its peers, on the matrices of a GPT and one CPU thread a rank.

    torchrun --nproc-per-node 4 -m tools.bench --hidden 512 --layers 8 --precision highest
    python -m tools.bench --single            # one process, against torch.optim and emerging-optimizers
    python -m tools.bench --all               # every run of BENCHMARKS.md, in processes of its own

All candidates take turns in one set of processes, so that a busy machine slows all of them.
"""

import argparse
import json
import os
import platform
import statistics
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

from . import bench_cases as cases
from .bench_measure import Result, measure
from .launch import Launch
from .report import format_rows
from .usage import UsageError, refuse

SIZES = ((512, 8), (1024, 4))
RANKS = (2, 4)
PRECISIONS = ("highest", "medium")


def environment() -> dict[str, Any]:
    """The machine and the versions that a result belongs to."""
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


def rows(results: Sequence[Result]) -> list[tuple[str, ...]]:
    """A head and a line for each candidate; speed-ups are of medians, over the fastest exact peer."""
    peers = [r for r in results if r.exact and not r.ours]
    cpu = min(map(_cpu, peers), default=None)
    wall = min((statistics.median(r.wall) for r in peers), default=None)
    lines: list[tuple[str, ...]] = [
        ("optimizer", "CPU s, median (min)", "speed-up", "wall s, median (min)", "speed-up", "error", "collectives")
    ]
    for r in results:
        lines.append(
            (
                r.name if r.exact else f"{r.name} (inexact)",
                f"{_cpu(r):.3f} ({min(r.cpu):.3f})",
                "" if cpu is None else f"{cpu / _cpu(r):.2f}",
                f"{statistics.median(r.wall):.3f} ({min(r.wall):.3f})",
                "" if wall is None else f"{wall / statistics.median(r.wall):.2f}",
                f"{r.error:.1e}",
                str(r.collectives),
            )
        )
    return lines


def run(options: argparse.Namespace) -> dict[str, Any]:
    """One run: all candidates for one model, number of ranks and precision."""
    torch.set_num_threads(1)
    group = None if options.single else dist.group.WORLD
    matrices = cases.gpt_matrices(options.hidden, options.layers)
    if group is None:
        candidates = cases.single_process(matrices, options.precision, options.only)
    else:
        candidates = cases.tensor_parallel(matrices, options.precision, group, options.only)
    if not candidates:
        raise UsageError("--only", " ".join(options.only), "leaves no candidate")
    results = measure(candidates, matrices, options.reps, group)
    return {
        "hidden": options.hidden,
        "layers": options.layers,
        "ranks": 1 if group is None else dist.get_world_size(group),
        "precision": options.precision,
        "reps": options.reps,
        "environment": environment(),
        "results": [asdict(result) for result in results],
    }


def run_all(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Every run of BENCHMARKS.md, each in processes of its own; prints Markdown as they finish."""
    reports = []
    for (hidden, layers), ranks, precision in product(SIZES, (*RANKS, 1), PRECISIONS):
        with tempfile.TemporaryDirectory() as directory:
            out = Path(directory, "run.json")
            flags = ["--hidden", hidden, "--layers", layers, "--precision", precision, "--reps", options.reps]
            _launch(ranks, [str(flag) for flag in (*flags, "--json", out)])
            reports.append(json.loads(out.read_text()))
        if len(reports) == 1:
            print(_describe(reports[0]["environment"]))
        print(markdown(reports[-1]), flush=True)
    print(summary(reports), flush=True)
    return reports


def _launch(ranks: int, flags: Sequence[str]) -> None:
    environ = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "MASTER_PORT")}
    environ.setdefault("OMP_NUM_THREADS", "1")
    launcher = ["torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1", f"--nproc-per-node={ranks}", "-m"]
    start = [*launcher, "tools.bench"] if ranks > 1 else ["tools.bench", "--single"]
    command = [sys.executable, "-m", *start, *flags]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    if done.returncode:
        tail = "\n".join(done.stderr.splitlines()[-20:])
        sys.exit(f"{' '.join(command)}: ended with code {done.returncode}\n{tail}")


def markdown(report: dict[str, Any]) -> str:
    """A heading and a table for one run."""
    ranks = f"{report['ranks']} ranks" if report["ranks"] > 1 else "one process"
    heading = f"\n### Hidden {report['hidden']}, {report['layers']} layers, {ranks}, {report['precision']}\n"
    return "\n".join([heading, *_table(rows(_results(report)))])


def summary(reports: Sequence[dict[str, Any]]) -> str:
    """A table with a line for each run on several ranks: our fastest exact mode beside Megatron-Core's."""
    lines = [("hidden x layers", "ranks", "precision", "Megatron-Core", "shardstep", "speed-up, CPU", "speed-up, wall")]
    for report in reports:
        if report["ranks"] > 1:
            exact = [r for r in _results(report) if r.exact]
            theirs, ours = (min((r for r in exact if r.ours == own), key=_cpu) for own in (False, True))
            wall = min(statistics.median(r.wall) for r in exact if not r.ours) / statistics.median(ours.wall)
            size = f"{report['hidden']} x {report['layers']}"
            names = (r.name.split()[-1] for r in (theirs, ours))
            speed = (f"{_cpu(theirs) / _cpu(ours):.2f}", f"{wall:.2f}")
            lines.append((size, str(report["ranks"]), report["precision"], *names, *speed))
    return "\n".join(["\n### Fastest exact mode of each\n", *_table(lines)])


def _table(lines: Sequence[tuple[str, ...]]) -> list[str]:
    head, *others = ("| " + " | ".join(line) + " |" for line in lines)
    return [head, "|" + " --- |" * len(lines[0]), *others]


def _results(report: dict[str, Any]) -> list[Result]:
    return [Result(**result) for result in report["results"]]


def _cpu(result: Result) -> float:
    return statistics.median(result.cpu)


def _describe(environment: dict[str, Any]) -> str:
    return ", ".join(f"{key}: {value}" for key, value in environment.items())


def main(argv: Sequence[str] | None = None) -> None:
    """Command line; see the module."""
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
    parser.add_argument("--json", type=Path, metavar="OUT", help="write every timed step there")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--single", action="store_true", help="one process, whole matrices")
    which.add_argument("--all", action="store_true", help="every run of BENCHMARKS.md; prints Markdown")
    options = parser.parse_args(argv)
    needs_ranks = not (options.single or options.all)
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
        print("\n".join(format_rows(rows(_results(report)))))
    if options.json:
        options.json.write_text(json.dumps(report, indent=1))


def _check(options: argparse.Namespace, ranks: int) -> None:
    if options.json and not options.json.parent.is_dir():
        raise UsageError("--json", options.json, "is in a folder that does not exist")
    for flag, value in (("--hidden", options.hidden), ("--layers", options.layers), ("--reps", options.reps)):
        if value < 1:
            raise UsageError(flag, value, "is out of range", possible="a whole number >= 1")
    if options.single or options.all:
        if ranks > 1:
            raise UsageError("WORLD_SIZE", ranks, "is for runs on several ranks", hint="leave torchrun out")
    elif options.hidden % ranks:
        raise UsageError(
            "--hidden", options.hidden, f"cannot be cut over {ranks} ranks", possible=f"a multiple of {ranks}"
        )
    elif ranks == 1 and not dist.is_initialized():
        raise UsageError(
            "--single",
            None,
            "and --all are not given, and there are no ranks",
            hint="torchrun --nproc-per-node 4 -m tools.bench, or add --single",
        )


def _version(package: str) -> str:
    try:
        return version(package)
    except ImportError:
        return "not installed"


if __name__ == "__main__":
    main()
