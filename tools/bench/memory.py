"""Measures the memory that a step of Muon takes besides parameters, gradients and state; ours and its peers.

    torchrun --nproc-per-node 2 -m tools.bench.memory --hidden 512 --layers 8 16
    python -m tools.bench.memory --virtual 4 --device cuda    # as rank 0 of 4 that do not exist, like tools.bench.virtual

*temporary*: peak of the memory that a step allocates, by the events of torch's allocator. *kept*: memory that the optimizer holds
between steps besides its state (buffers). The sum of both is given per element of the largest whole matrix, 4 hidden x hidden: an
optimizer whose figure does not grow with the layers works matrix by matrix. Both are counted with torch's fake process group,
because gloo's threads free memory without an event; they do not include what a backend itself allocates.
*RSS*: growth of the process during a step on real ranks, as the operating system sees it, including the backend. All figures are
the largest over the ranks. The peers called local treat each shard as a matrix, as ``blockwise`` does.
"""

import argparse
import ctypes
import gc
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.profiler import ProfilerActivity, profile

from ..pretrain.launch import Launch
from ..pretrain.report import format_rows
from ..usage import UsageError, refuse
from . import cases, virtual
from .command import PRECISIONS

LIMIT = 20
"""Most bytes, temporary and kept, that our exact modes may take per element of the largest whole matrix."""
WARM_UP = 2
_MB = 1e6
_M_MMAP_THRESHOLD = -3  # from malloc.h


@dataclass(frozen=True)
class Memory:
    """Bytes on the rank where they are most.

    Attributes:
        temporary: Bytes allocated at the peak of a step.
        kept: Bytes held between steps, besides state.
        rss: Growth of the process in a step; nan where the system does not report it.
    """

    temporary: float
    kept: float
    rss: float


def counted(make: cases.Make, params: cases.Parameters) -> tuple[int, int]:
    """Bytes at the peak of a step of the optimizer that ``make`` builds, and bytes kept between steps; steps ``params``."""
    device = params[0].device.type
    made: list[Any] = []

    def build() -> None:
        made.append(stepped(make, params))
        gc.collect()

    _, left = allocated(build, device)
    (optimizer,) = made
    return allocated(optimizer.step, device)[0], left - state_bytes(optimizer)


def stepped(make: cases.Make, params: cases.Parameters) -> torch.optim.Optimizer:
    """The optimizer that ``make`` builds, after its first steps, which may allocate what it keeps."""
    optimizer = make(params)
    for _ in range(WARM_UP):
        optimizer.step()
    return optimizer


def allocated(run: Callable[[], Any], device: str) -> tuple[int, int]:
    """Bytes of tensors on ``device`` that ``run`` allocates: at the peak, and at the end."""
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before, torch.cuda.memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    assert profiler.profiler is not None
    events = profiler.profiler.kineto_results.events()
    held = most = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most, held


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the tensors in ``optimizer.state``, each storage once."""
    tensors = (value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor))
    storages = (tensor.untyped_storage() for tensor in tensors)
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def rss_growth(run: Callable[[], Any]) -> float:
    """Growth of this process's resident memory, in bytes, at the peak of ``run``.

    It needs Linux, where the process's high-water mark can be reset; nan elsewhere.
    """
    reset = Path("/proc/self/clear_refs")
    if not reset.exists():
        run()
        return float("nan")
    libc = ctypes.CDLL(None)
    # Tensors then go back to the system as soon as they are freed, and what was freed before does not count as there already.
    libc.mallopt(_M_MMAP_THRESHOLD, 1 << 16)
    gc.collect()
    libc.malloc_trim(0)
    reset.write_text("5")
    before = _status("VmRSS")
    run()
    grown = _status("VmHWM") - before
    # Where malloc's own threshold ends up in a process that frees large tensors.
    libc.mallopt(_M_MMAP_THRESHOLD, 32 << 20)
    return grown


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def makers(precision: str, group: ProcessGroup) -> dict[str, cases.Make]:
    """Every mode of Megatron-Core's and ours, and the peers that know no tensor parallelism."""
    local = {f"{name} (local)": make for name, make in cases.single_process(precision).items() if name != cases.OURS}
    return {**cases.tensor_parallel(precision, group), **local}


def rows(measured: dict[str, list[Memory]], layers: Sequence[int], largest: int) -> list[tuple[str, ...]]:
    """A head and a line for each optimizer, with columns for each number of layers.

    Args:
        measured: By name, for each number of layers.
        layers: Those numbers.
        largest: Elements of the largest whole matrix.
    """
    columns = ("temporary MB", "kept MB", "B/element", "RSS MB")
    heads = (f"{columns[0]}, {n} layers" if c == columns[0] else c for n in layers for c in columns)
    lines: list[tuple[str, ...]] = [("optimizer", *heads, f"<= {LIMIT} B/element")]
    for name, memories in measured.items():
        shares = [(m.temporary + m.kept) / largest for m in memories]
        cells = (
            cell
            for m, share in zip(memories, shares, strict=True)
            for cell in (f"{m.temporary / _MB:.1f}", f"{m.kept / _MB:.1f}", f"{share:.1f}", f"{m.rss / _MB:.1f}")
        )
        lines.append((name, *cells, "yes" if max(shares) <= LIMIT else "no"))
    return lines


def run(options: argparse.Namespace, fake: ProcessGroup, real: ProcessGroup) -> dict[str, list[Memory]]:
    """For each optimizer, one :class:`Memory` for each number of layers.

    Args:
        options: Of the command line.
        fake: The ranks, as a fake group.
        real: The same ranks; the fake group again where there are none.

    Raises:
        UsageError: when ``options.only`` leaves no optimizer.
    """
    torch.set_num_threads(1)
    to_count, to_run = (makers(options.precision, group) for group in (fake, real))
    chosen = [name for name in to_run if not options.only or any(part in name for part in options.only)]
    if not chosen:
        raise UsageError("--only", " ".join(options.only), "leaves no optimizer")
    measured: dict[str, list[Memory]] = {name: [] for name in chosen}
    for layers in options.layers:
        matrices = cases.gpt_matrices(options.hidden, layers)
        gradients = [cases.shard(m.gradient(), m.cut, fake).to(options.device) for m in matrices]
        for name in chosen:
            with virtual.Noise():
                taken = counted(to_count[name], cases.parameters(matrices, gradients, fake, options.device))
            with virtual.Noise() if real is fake else nullcontext():
                optimizer = stepped(to_run[name], cases.parameters(matrices, gradients, real, options.device))
                rss = rss_growth(optimizer.step)
            most = torch.tensor([*taken, rss], dtype=torch.float64, device=options.device)
            dist.all_reduce(most, dist.ReduceOp.MAX, group=real)
            measured[name].append(Memory(*most.tolist()))
            del optimizer
    return measured


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line; the module's docstring describes it."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench.memory", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hidden", type=int, default=512, help="hidden size of the GPT (default: 512)")
    parser.add_argument("--layers", type=int, nargs="+", default=[8, 16], help="numbers of layers (default: 8 16)")
    parser.add_argument(
        "--precision", choices=PRECISIONS, default="medium", help="precision of Newton-Schulz (default: medium)"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="a GPU for each rank, or the CPU")
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="TEXT", help="only those with one of these in the name"
    )
    parser.add_argument("--virtual", type=int, metavar="N", help="one process, as rank 0 of N")
    options = parser.parse_args(argv)
    # Without it the profiler prints on stderr when it starts and stops.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    rank = 0
    try:
        # In a test the ranks run already.
        if dist.is_initialized():
            rank, ranks = dist.get_rank(), dist.get_world_size()
        else:
            launch = Launch.from_environ(os.environ)
            rank, ranks = launch.rank, launch.world_size
        _check(options, ranks)
        with _groups(options, rank) as (fake, real):
            measured = run(options, fake, real)
    except UsageError as error:
        refuse(error, rank=rank, program="bench.memory")
    if rank == 0:
        print("\n".join(format_rows(rows(measured, options.layers, 4 * options.hidden**2))))


@contextmanager
def _groups(options: argparse.Namespace, rank: int) -> Iterator[tuple[ProcessGroup, ProcessGroup]]:
    """The fake and the real group; without ranks, the fake one twice."""
    if options.virtual:
        with virtual.world(options.virtual) as groups:
            fake = groups(options.virtual, 0)
            yield fake, fake
        return
    starts = not dist.is_initialized()
    if starts:
        if options.device == "cuda":
            torch.cuda.set_device(rank)
        dist.init_process_group("nccl" if options.device == "cuda" else "gloo")
    try:
        assert dist.group.WORLD is not None
        yield dist.new_group(backend="fake"), dist.group.WORLD
    finally:
        if starts:
            dist.destroy_process_group()


def _check(options: argparse.Namespace, ranks: int) -> None:
    counts = [("--hidden", options.hidden), *(("--layers", n) for n in options.layers)]
    if options.virtual is not None:
        counts.append(("--virtual", options.virtual))
    for flag, value in counts:
        if value < 1:
            raise UsageError(flag, value, "is out of range", possible="a whole number >= 1")
    if options.virtual and ranks > 1:
        raise UsageError("--virtual", options.virtual, "is for one process", hint="leave torchrun out")
    if not options.virtual and ranks == 1 and not dist.is_initialized():
        raise UsageError(
            "--virtual",
            None,
            "is not given, and there are no ranks",
            hint="torchrun --nproc-per-node 2 -m tools.bench.memory, or add --virtual 2",
        )
    parts = options.virtual or ranks
    if options.hidden % parts:
        raise UsageError(
            "--hidden", options.hidden, f"cannot be cut over {parts} ranks", possible=f"a multiple of {parts}"
        )
    needed = 1 if options.virtual else ranks
    if options.device == "cuda" and torch.cuda.device_count() < needed:
        raise UsageError(
            "--device",
            "cuda",
            f"needs {needed} GPUs, there are {torch.cuda.device_count()}",
            hint="fewer ranks, or one process with --virtual",
        )


if __name__ == "__main__":
    main()
