"""Megatron-Core's optimizers and these, case by case, each against the unsharded run.

    python -m tools.compare_megatron                      # the whole table
    python -m tools.compare_megatron --cases qkv,soap-tp  # some rows
    python -m tools.compare_megatron --speed              # time of the optimizer of a GPT on 4 ranks
    python -m tools.compare_megatron --megatron-lm FOLDER # with Megatron-LM's main, from a checkout of it

Every case is a small GPT of Megatron-Core's with its own ``get_megatron_optimizer``, in processes of its own; the truth is
emerging-optimizers' or torch's optimizer on whole matrices in one process. Errors are relative, of the worst matrix. Without
CUDA the ranks run on the CPU, with gloo.
"""

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import textwrap
import time
from collections.abc import Sequence
from datetime import timedelta
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import ProcessExitedException, start_processes
from tqdm import tqdm

from ..bench.command import environment
from ..bench.measure import Result
from ..bench.tables import Row, table
from ..bench.tables import rows as speed_rows
from ..pretrain.report import format_rows
from ..usage import UsageError, refuse
from .cases import CASES, Case
from .measure import SPEED_FLAGS, Outcome, Work, errors, run, speed

PRELOAD = [
    "core.optimizer.emerging_optimizers",
    "tools.bench.command",
    "tools.compare_megatron.measure",
    "megatron.core.dist_checkpointing",
    "megatron.core.models.gpt.gpt_layer_specs",
    "torch.distributed.tensor.debug",
]
"""What takes long to import; ranks are forked from a process that has. Not ``core.megatron``: that changes Megatron-Core."""
PATIENCE_S, CRASH_WIDTH = 600.0, 64
VERSIONS = ("python", "torch", "emerging-optimizers", "megatron-core")
CLOCKS = {"cpu": "CPU", "wall": "wall"}


def on_ranks(ranks: int, work: Work) -> list[Outcome]:
    """What ``work(folder)`` returns on each of ``ranks`` ranks, in processes of their own that share an empty folder.

    Raises:
        ProcessException: when a rank ends otherwise than by returning.
        TimeoutError: when they take too long.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "work").mkdir()
        context = start_processes(
            _rank,
            (ranks, folder, work),
            nprocs=ranks,
            join=False,
            # Who has looked at a GPU cannot be forked.
            start_method="spawn" if torch.cuda.is_available() else "forkserver",
        )
        deadline = time.monotonic() + PATIENCE_S
        try:
            while not context.join(timeout=max(0.0, deadline - time.monotonic())):
                if time.monotonic() > deadline:
                    raise TimeoutError(f"not done after {PATIENCE_S:.0f} s")
        finally:
            for process in context.processes:
                process.kill()
                process.join()
        return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(ranks)]


def _rank(rank: int, ranks: int, folder: Path, work: Work) -> None:
    torch.set_num_threads(1)
    with (folder / f"{rank}.log").open("w") as log:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(log.fileno(), stream.fileno())
    if torch.cuda.is_available():
        torch.cuda.set_device(rank)
    else:
        from tools.compare_megatron.on_cpu import serve_on_cpu

        serve_on_cpu()
    dist.init_process_group(
        "nccl" if torch.cuda.is_available() else "gloo",
        init_method=f"file://{folder / 'store'}",
        rank=rank,
        world_size=ranks,
        timeout=timedelta(seconds=PATIENCE_S / 4),
    )
    (folder / f"{rank}.json").write_text(json.dumps(work(folder / "work")))
    dist.destroy_process_group()


def compare(case: Case) -> dict[str, Any]:
    """Both sides of ``case``: for each, what :func:`_joined` says; or the signal that ended a rank."""
    sides = {}
    for side in ("theirs", "ours"):
        try:
            sides[side] = _joined(on_ranks(case.tp * case.dp, partial(run, case, side == "theirs")))
        except (ProcessExitedException, TimeoutError) as error:
            sides[side] = {"crash": f"{type(error).__name__}: {error}", "stage": "the process"}
    return {"name": case.name, "about": case.about, "measured": case.measured, "how": case.how, **sides}


def _joined(ranks: Sequence[Outcome]) -> Outcome:
    """One outcome out of the ranks': the first crash; else the error over all shards of the worst weight, the slowest rank."""
    if crashes := [found for found in ranks if "crash" in found]:
        return min(crashes, key=lambda found: float(found["at"]))
    if "text" in ranks[0]:
        return ranks[0]
    by_weight = errors(ranks)
    return {
        "error": max(by_weight.values()),
        "errors": by_weight,
        "collectives": max(found["collectives"] for found in ranks),
        **{clock: max(found[clock] for found in ranks) for clock in ("cpu", "wall")},
    }


def rows(compared: Sequence[dict[str, Any]], clock: str) -> list[Row]:
    """A head and a line for each case."""
    lines: list[Row] = [
        (
            "case",
            "weak point",
            "measured",
            "Megatron-Core",
            "shardstep",
            "collectives a step",
            f"{CLOCKS[clock]} ms a step",
        )
    ]
    for case in compared:
        sides = (case["theirs"], case["ours"])
        lines.append(
            (
                *(case[key] for key in ("name", "about", "measured")),
                *(_shown(side, case["how"]) for side in sides),
                " / ".join(str(side.get("collectives", "-")) for side in sides),
                " / ".join(f"{1000 * side[clock]:.1f}" if clock in side else "-" for side in sides),
            )
        )
    return lines


def _shown(side: Outcome, how: str) -> str:
    if "crash" in side:
        return f"{textwrap.shorten(side['crash'].rstrip(': '), CRASH_WIDTH, placeholder=' …')} ({side['stage']})"
    if "text" in side:
        return str(side["text"])
    if how == "size":
        return f"{side['error']:.3g}"
    return f"{side['error']:.1e}" if side["error"] else "0"


def _chosen(names: Sequence[str]) -> list[Case]:
    known = {case.name: case for case in CASES}
    for name in names:
        if name not in known:
            raise UsageError("--cases", name, "is no case", possible=", ".join(known))
    return [known[name] for name in names or known]


def _take(checkout: Path) -> None:
    """Let this process, and those that it starts, import Megatron-Core from ``checkout``."""
    folder = str(checkout.resolve())
    sys.path.insert(0, folder)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (folder, os.environ.get("PYTHONPATH"))))


def versions() -> dict[str, Any]:
    """What was compared: the machine, and the versions of Python and of the packages that were imported."""
    core = import_module("megatron.core")
    return {**environment(), "megatron-core": str(core.__version__).partition("+")[0]}


def _check(options: argparse.Namespace, cases: Sequence[Case]) -> None:
    if options.megatron_lm and not (options.megatron_lm / "megatron" / "core").is_dir():
        raise UsageError("--megatron-lm", options.megatron_lm, "is no checkout of Megatron-LM; it has no megatron/core")
    if options.json and not options.json.parent.is_dir():
        raise UsageError("--json", options.json, "is in a folder that does not exist")
    if find_spec("megatron") is None:
        raise UsageError("megatron-core", None, "is not installed", hint="bash scripts/bootstrap.sh megatron")
    ranks = options.tp if options.speed else max(case.tp * case.dp for case in cases)
    if torch.cuda.is_available() and torch.cuda.device_count() < ranks:
        raise UsageError(
            "CUDA",
            torch.cuda.device_count(),
            f"GPUs are too few for {ranks} ranks",
            hint="choose --cases of fewer ranks, or set CUDA_VISIBLE_DEVICES= for the CPU",
        )
    for flag, of in (
        ("--tp", 1),
        ("--layers", 1),
        ("--rounds", 1),
        ("--heads", options.tp),
        ("--hidden", options.heads),
    ):
        value = getattr(options, flag.removeprefix("--"))
        if value < 1 or of < 1 or value % of:
            raise UsageError(flag, value, "does not fit", possible=f"a multiple of {max(of, 1)}, at least that")


def main(argv: Sequence[str] | None = None) -> None:
    """Command line; see the module."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.compare_megatron",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--list", action="store_true", help="name the cases")
    parser.add_argument("--cases", default="", metavar="A,B", help="only these (default: all)")
    parser.add_argument("--markdown", action="store_true", help="print Markdown")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all that was found there")
    parser.add_argument(
        "--megatron-lm",
        type=Path,
        metavar="FOLDER",
        help="take Megatron-Core from this checkout, not the installed one",
    )
    parser.add_argument(
        "--speed",
        action="store_true",
        help="time the optimizer of one GPT instead: CPU seconds of all ranks together, and seconds of the slowest",
    )
    for flag, settings in SPEED_FLAGS.items():
        parser.add_argument(flag, **settings)
    options = parser.parse_args(argv)
    try:
        cases = _chosen([name for name in options.cases.split(",") if name])
        if options.list:
            print("\n".join(format_rows([(case.name, case.about, case.measured) for case in cases])))
            return
        if options.megatron_lm:
            _take(options.megatron_lm)
        _check(options, cases)
    except UsageError as error:
        refuse(error, rank=0, program="compare_megatron")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("PYTHONWARNINGS", "ignore")  # Megatron-Core says at length what is not installed
    multiprocessing.set_forkserver_preload(PRELOAD)
    found: Any
    if options.speed:
        found = speed(options, on_ranks)
        lines = speed_rows([Result(**result) for result in found])
    else:
        found = [compare(case) for case in tqdm(cases, file=sys.stderr, disable=None)]
        lines = rows(found, "wall" if torch.cuda.is_available() else "cpu")
    compared = versions()
    print(", ".join(f"{key} {compared[key]}" for key in VERSIONS), end="\n\n")
    print("\n".join(table(lines) if options.markdown else format_rows(lines)))
    if options.json:
        options.json.write_text(json.dumps({"environment": compared, "found": found}, indent=1))
