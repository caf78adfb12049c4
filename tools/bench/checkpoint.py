"""Measures how much a save slows training down: ``python -m tools.bench.checkpoint``, or under ``torchrun --nproc-per-node 2``.

Prints a Markdown table for AdamW and Muon on a GPT, tensor-parallel over the ranks: the time of a step alone; of a save that is
waited for; of a save in the background until it returns and until it is complete, and of the steps that are trained meanwhile;
and the same for torch's own ``dcp.async_save`` of the same tensors, which makes no digests and no durable names. Times are
medians, on the slowest rank. *stolen*: time that training lost to one save, until it returned and in slower steps after that.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.state_dict_saver import async_save

from core import checkpoint
from core.optimizer.chained import ChainedOptimizer
from core.optimizer.emerging_optimizers import get_optimizer
from core.optimizer.optimizer_config import OptimizerConfig
from core.process_groups_config import ProcessGroupCollection

from ..pretrain.launch import Launch
from ..pretrain.model import GPTConfig
from ..pretrain.parallel import Engine, build_mesh
from ..usage import UsageError, refuse

OPTIMIZERS = ("adamw", "muon")
HEAD = (
    *("optimizer", "ranks", "M parameters", "save", "step, ms", "returns after, ms", "complete after, ms"),
    *("steps meanwhile", "each, ms", "x step alone", "stolen, ms", "x dcp.async_save"),
)
OURS, WAITED, TORCH = "save(background=...)", "save()", "dcp.async_save"


@dataclass(frozen=True)
class Taken:
    """Seconds that one save took.

    Attributes:
        returned: Seconds until training could go on.
        complete: Seconds until the checkpoint was complete.
        steps: Seconds of each training step that began before the checkpoint was complete.
    """

    returned: float
    complete: float
    steps: tuple[float, ...] = ()

    def stolen(self, step: float) -> float:
        """Seconds that training lost, if a step alone takes ``step`` seconds."""
        return self.returned + sum(self.steps) - len(self.steps) * step


@dataclass
class Training:
    """One rank's training.

    Attributes:
        engine: Engine that holds the model.
        optimizer: Optimizer of all parameters of the model.
        batch: Token ids, (batch, sequence + 1).
    """

    engine: Engine
    optimizer: ChainedOptimizer
    batch: Tensor

    def step(self) -> float:
        """Take a step; returns its seconds on the slowest rank."""
        return timed(self._step)

    def _step(self) -> None:
        self.engine.train_step(self.batch)
        self.optimizer.step()

    def tensors(self) -> dict[str, Any]:
        """Weights and state by name, as torch's checkpoints expect them."""
        named = [(name, p) for chunk in self.engine.model_chunks for name, p in chunk.named_parameters()]
        state = {f"{slot}.{name}": x for name, p in named for slot, x in self.optimizer.state[p].items()}
        return {**{name: p.detach() for name, p in named}, **state}


class Writing(Protocol):
    """A save that is going on."""

    @property
    def busy(self) -> bool:
        """Whether this rank is still writing."""

    def wait(self) -> Any:
        """Wait until the save is complete."""


class TorchSave:
    """A save by torch, which begins when this object is called."""

    future: Future[Any]

    def __init__(self, training: Training, path: Path, group: ProcessGroup) -> None:
        self._training, self._path, self._group = training, path, group

    def __call__(self) -> None:
        tensors = self._training.tensors()
        future = async_save(tensors, checkpoint_id=self._path, process_group=self._group)
        assert isinstance(future, Future)
        self.future = future

    @property
    def busy(self) -> bool:
        """Whether this rank is still writing."""
        return not self.future.done()

    def wait(self) -> None:
        """Wait until the checkpoint is complete."""
        self.future.result()


def timed(do: Callable[[], Any]) -> float:
    """Seconds from a barrier until the last rank is done."""
    dist.barrier()
    began = time.perf_counter()
    do()
    return slowest(time.perf_counter() - began)


def slowest(seconds: float) -> float:
    """The largest value over all ranks."""
    most = torch.tensor(seconds, dtype=torch.float64)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return float(most)


def measure(training: Training, begin: Callable[[], Any], writing: Writing) -> Taken:
    """Begin a save and train until it is complete on all ranks."""
    dist.barrier()
    began = time.perf_counter()
    begin()
    returned = slowest(time.perf_counter() - began)
    steps = []
    while slowest(float(writing.busy)):
        steps.append(training.step())
    writing.wait()
    return Taken(returned, slowest(time.perf_counter() - began), tuple(steps))


def run(options: argparse.Namespace, name: str, folder: Path) -> list[tuple[str, ...]]:
    """The lines of one optimizer."""
    ranks = dist.get_world_size()
    mesh = build_mesh("cpu", pp=1, dp=1, tp=ranks)
    heads = options.hidden // 64
    config = GPTConfig(options.layers, options.hidden, heads, options.vocabulary, options.sequence)
    groups = ProcessGroupCollection.from_mesh(mesh)
    engine = Engine(config, mesh)
    settings = {"optimizer": name, "lr": 1e-3, "muon_split_qkv": False}
    optimizer = get_optimizer(OptimizerConfig.from_dict(settings), engine.model_chunks, groups)
    generator = torch.Generator().manual_seed(0)
    batch = torch.randint(options.vocabulary, (1, options.sequence + 1), generator=generator)
    training = Training(engine, optimizer, batch)
    weights = sum(
        p.numel() for p in engine.model_chunks[0].parameters()
    )  # numel() of a DTensor counts the whole tensor
    background = checkpoint.Background()
    torch_group = dist.new_group(backend="gloo")
    alone: list[float] = []
    taken: dict[str, list[Taken]] = {WAITED: [], OURS: [], TORCH: []}
    for rep in range(options.reps + 1):
        steps = [training.step() for _ in range(options.steps)]
        save = partial(checkpoint.save, folder / "ours", model_chunks=engine.model_chunks, optimizer=optimizer, keep=2)
        waited = timed(partial(save, step=2 * rep))
        began = partial(save, step=2 * rep + 1, background=background)
        ours = measure(training, began, background)
        begin = TorchSave(training, folder / "torch" / str(rep), torch_group)
        torchs = measure(training, begin, begin)
        if rep:  # the first repetition allocates memory, and does not count
            alone += steps
            for kind, one in ((WAITED, Taken(waited, waited)), (OURS, ours), (TORCH, torchs)):
                taken[kind].append(one)
    step = median(alone)
    reference = median(one.stolen(step) for one in taken[TORCH])
    return [line(name, ranks, weights, kind, step, saves, reference) for kind, saves in taken.items()]


def line(
    name: str, ranks: int, weights: int, kind: str, step: float, saves: Sequence[Taken], reference: float
) -> tuple[str, ...]:
    """One line of the table."""
    meanwhile = [seconds for save in saves for seconds in save.steps]
    stolen = median(save.stolen(step) for save in saves)
    each = median(meanwhile) if meanwhile else float("nan")
    return (
        *(name, str(ranks), f"{weights / 1e6:.1f}", kind, f"{1e3 * step:.0f}"),
        *(f"{1e3 * median(column):.0f}" for column in zip(*(astuple(save)[:2] for save in saves), strict=True)),
        f"{len(meanwhile) / len(saves):.1f}",
        *((f"{1e3 * each:.0f}", f"{each / step:.2f}") if meanwhile else ("-", "-")),
        *(f"{1e3 * stolen:.0f}", f"{stolen / reference:.2f}"),
    )


@contextmanager
def ranks_of(launch: Launch, folder: Path) -> Iterator[None]:
    """Make the default process group, for a single process too."""
    if launch.world_size > 1:
        dist.init_process_group("gloo")
    else:
        dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line; the module's docstring describes it."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench.checkpoint",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for flag, default, what in (
        ("--hidden", 512, "hidden size, a multiple of 64"),
        ("--layers", 2, "layers"),
        ("--vocabulary", 32768, "rows of the embedding"),
        ("--sequence", 64, "tokens a step"),
        ("--steps", 5, "steps before each save"),
        ("--reps", 3, "saves of each kind"),
    ):
        parser.add_argument(flag, type=int, default=default, help=f"{what} (default: {default})")
    parser.add_argument("--folder", type=Path, help="directory to save to (default: a temporary one)")
    options = parser.parse_args(argv)
    launch = Launch()
    try:
        launch = Launch.from_environ(os.environ)
        for flag in ("hidden", "layers", "vocabulary", "sequence", "steps", "reps"):
            if getattr(options, flag) < 1:
                raise UsageError(f"--{flag}", getattr(options, flag), "is out of range", possible="a whole number >= 1")
        if options.hidden % 64:
            raise UsageError("--hidden", options.hidden, "has no whole number of heads", possible="a multiple of 64")
        torch.set_num_threads(1)
        with tempfile.TemporaryDirectory(dir=options.folder) as own, ranks_of(launch, Path(own)):
            folders = [own]
            dist.broadcast_object_list(folders, src=0)
            lines = [line for name in OPTIMIZERS for line in run(options, name, Path(folders[0]) / name)]
            dist.barrier()
    except (UsageError, checkpoint.CheckpointError) as error:
        refuse(error, rank=launch.rank, program="bench.checkpoint")
    for row in (HEAD, ("---",) * len(HEAD), *lines) if launch.rank == 0 else ():
        print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    main()
