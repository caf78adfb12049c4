"""What a rank measures of jobs: one side of a case, or the time of several optimizers in turn; and what all ranks found."""

import argparse
import statistics
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from math import sqrt
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..bench.cases import MEGATRON, OURS
from ..bench.measure import Result, count_collectives
from .cases import MATRICES, Case, Side
from .job import LR, Job, device, unsharded

STEPS, TIMED = 3, 5
Outcome = dict[str, Any]
"""What one rank found, ready for JSON: ``squares`` by weight, or ``text``; or ``crash``, ``stage`` and ``traceback``."""

Work = Callable[[Path], Outcome]
"""What a rank does, with a folder that all ranks share."""

OnRanks = Callable[[int, Work], list[Outcome]]
PRECISIONS = ("highest", "high", "medium")
SPEED_FLAGS: dict[str, dict[str, Any]] = {
    "--tp": {"type": int, "default": 4, "help": "tensor-parallel ranks of --speed (default: %(default)s)"},
    "--hidden": {"type": int, "default": 512, "help": "its hidden size (default: %(default)s)"},
    "--layers": {"type": int, "default": 4, "help": "its layers (default: %(default)s)"},
    "--heads": {"type": int, "default": 8, "help": "its heads (default: %(default)s)"},
    "--swiglu": {"action": "store_true", "help": "a gated MLP"},
    "--precision": {"choices": PRECISIONS, "default": "highest", "help": "of Newton-Schulz (default: %(default)s)"},
    "--rounds": {"type": int, "default": 7, "help": "timed steps of each optimizer (default: %(default)s)"},
}
SIDES = {
    **{f"{MEGATRON} {mode}": Side("muon", {"muon_tp_mode": mode}) for mode in ("duplicated", "distributed")},
    **{f"{OURS} {mode}": Side("shardstep_muon", {"shardstep_tp_mode": mode}) for mode in ("owner", "auto")},
}


def _attributes(cls: Any) -> None:
    cls.scale_mode, cls.extra_scale_factor = "spectral", 1.0


def _scale_once(cls: Any) -> None:
    cls._apply_muon_scale = lambda self, update, *shape: update


REPAIRS: dict[str, Callable[[Any], None]] = {"attributes": _attributes, "scale once": _scale_once}
"""Corrections of Megatron-Core's ``TensorParallelAdaptiveMuon``: what its step reads and its constructor does not set; and
no second scale."""


class Run:
    """One side of a case on this rank.

    Args:
        case: The row.
        theirs: Whether Megatron-Core's side of it.
        folder: Empty, the same for all ranks.
    """

    def __init__(self, case: Case, *, theirs: bool, folder: Path) -> None:
        self.case, self.theirs, self.folder = case, theirs, folder
        self.side = case.theirs if theirs else case.ours
        self.stage = ""

    def outcome(self) -> Outcome:
        """Do what the case says, with Megatron-Core untouched on its own side. What is raised becomes part of the outcome."""
        how = {"error": self._error, "size": self._size, "resumed": self._resumed, "names": self._names}
        try:
            self._prepare()
            return how[self.case.how]()
        except Exception as error:
            crash = f"{type(error).__name__}: {error}"
            return {"crash": crash, "stage": self.stage, "at": time.monotonic(), "traceback": traceback.format_exc()}

    def _prepare(self) -> None:
        from megatron.core.optimizer.emerging_optimizers import TensorParallelAdaptiveMuon

        if not self.theirs:
            import core.megatron  # noqa: F401  # registers ours
        for name in self.side.repairs:
            REPAIRS[name](TensorParallelAdaptiveMuon)

    def _job(self, **further: Any) -> Job:
        self.stage = "when built"
        case = self.case
        settings: dict[str, Any] = {
            "tp": case.tp,
            "model": case.model,
            "distributed": case.distributed,
            "gradient": case.gradient,
        }
        job = Job(further.pop("side", self.side), **settings, **further)
        self.stage = "in step"
        return job

    def _error(self) -> Outcome:
        job = self._job()
        for step in range(STEPS):
            job.step(step)
        return self._found(job, self.case.truth, [LR] * STEPS)

    def _size(self) -> Outcome:
        job = self._job()
        job.step(0)
        return self._found(job, "muon", [LR], size=True)

    def _resumed(self) -> Outcome:
        job, later = self._job(), self._job(lr=LR * self.case.next_lr)
        for step in range(STEPS - 1):
            job.step(step)
        self.stage = "in saving"
        job.save(self.folder)
        self.stage = "in loading"
        later.load(self.folder)
        self.stage = "in step"
        later.step(STEPS - 1)
        return self._found(later, self.case.truth, [LR] * (STEPS - 1) + [later.lr])

    def _names(self) -> Outcome:
        from megatron.core.optimizer.emerging_optimizers import _EMERGING_OPTIMIZERS

        names = [name for name in _EMERGING_OPTIMIZERS if name.startswith("shardstep_") != self.theirs]
        failed = {}
        for name in names:
            try:
                self._job(side=Side(name)).step(0)
            except Exception as error:
                failed[name] = f"{self.stage}: {type(error).__name__}: {error}"
        return {"text": f"{len(names) - len(failed)} of {len(names)}", "failed": failed}

    def _found(self, job: Job, truth: str, lrs: Sequence[float], *, size: bool = False) -> Outcome:
        after = partial(unsharded, truth, lrs=lrs, config=job.config)
        found = squares(job, self.case.weights, after, size=size)
        self.stage = "in a further step"
        collectives = count_collectives(job.optimizer)
        times = [spent(job.optimizer.step) for _ in range(TIMED)]
        cpu, wall = (statistics.median(of) for of in zip(*times, strict=True))
        return {"squares": found, "collectives": collectives, "cpu": cpu, "wall": wall}


Squares = dict[str, tuple[float, float]]


def squares(job: Job, pattern: str, after: Callable[[str, Tensor], Tensor], *, size: bool = False) -> Squares:
    """By weight, sums of squares over this rank's shard: of the error of the update so far (of the update for ``size``), and
    of the true update.

    Args:
        job: That took the steps.
        pattern: Of the names of the weights.
        after: Name and first value of a whole weight → its true value now.
    """
    found = {}
    for name, p in job.weights(pattern):
        start = job.start(name, p)
        truth = job.piece(after(name, start).double() - start.double(), p)
        update = p.detach().double() - job.piece(start.double(), p)
        found[name] = (float((update if size else update - truth).square().sum()), float(truth.square().sum()))
    return found


def errors(ranks: Sequence[Outcome]) -> dict[str, float]:
    """By weight, the relative error over all shards, from what :func:`squares` found on each rank."""
    by_weight = {name: [found["squares"][name] for found in ranks] for name in ranks[0]["squares"]}
    sums = {name: [sum(of) for of in zip(*found, strict=True)] for name, found in by_weight.items()}
    return {name: sqrt(off / true) for name, (off, true) in sums.items()}


def spent(step: Callable[[], Any]) -> tuple[float, float]:
    """CPU seconds and wall seconds that this rank takes for ``step``, which all ranks begin together."""
    dist.barrier()
    on_gpu = device().type == "cuda"
    if on_gpu:
        torch.cuda.synchronize()
    wall, cpu = time.perf_counter(), time.process_time()
    step()
    if on_gpu:
        torch.cuda.synchronize()
    return time.process_time() - cpu, time.perf_counter() - wall


def run(case: Case, theirs: bool, folder: Path) -> Outcome:
    """What this rank finds of one side of ``case``."""
    return Run(case, theirs=theirs, folder=folder).outcome()


def speed(options: argparse.Namespace, on_ranks: OnRanks) -> list[Outcome]:
    """A :class:`~tools.bench.measure.Result` as a dictionary for each optimizer; its CPU seconds are of all ranks together."""
    ranks = on_ranks(options.tp, partial(_rank, options))
    return [_joined(name, [found[name] for found in ranks]) for name in SIDES]


def _joined(name: str, ranks: Sequence[Outcome]) -> Outcome:
    result = Result(
        name,
        exact=True,
        ours=name.startswith(OURS),
        cpu=[sum(of) for of in zip(*(found["cpu"] for found in ranks), strict=True)],
        wall=[max(of) for of in zip(*(found["wall"] for found in ranks), strict=True)],
        error=max(errors(ranks).values()),
        collectives=max(found["collectives"] for found in ranks),
    )
    return asdict(result)


def _rank(options: argparse.Namespace, folder: Path) -> Outcome:
    """By optimizer, what this rank found; the times are lists, of each round."""
    import core.megatron  # noqa: F401  # registers ours

    model = {
        "hidden_size": options.hidden,
        "ffn_hidden_size": 4 * options.hidden,
        "num_layers": options.layers,
        "num_attention_heads": options.heads,
        "num_query_groups": options.heads,
        "gated_linear_unit": options.swiglu,
    }
    jobs = {name: Job(_with(side, options.precision), tp=options.tp, model=model) for name, side in SIDES.items()}
    found: dict[str, Outcome] = {}
    truths: dict[str, Tensor] = {}

    def after(name: str, start: Tensor) -> Tensor:
        if name not in truths:
            truths[name] = unsharded("muon", name, start, [LR], job.config)
        return truths[name]

    for name, job in jobs.items():
        job.step(0)
        found[name] = {"squares": squares(job, MATRICES, after), "cpu": [], "wall": []}
        found[name]["collectives"] = count_collectives(job.optimizer)
    names = list(jobs)
    for i in range(options.rounds):
        # Another one begins each time, and each follows each.
        for name in names[i % len(names) :] + names[: i % len(names)]:
            cpu, wall = spent(jobs[name].optimizer.step)
            found[name]["cpu"].append(cpu)
            found[name]["wall"].append(wall)
    return found


def _with(side: Side, precision: str) -> Side:
    return replace(side, settings={**side.settings, "muon_fp32_matmul_prec": precision})
