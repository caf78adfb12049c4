"""Error of one Muon update by layout, measured and drawn: ``python -m tools.plot.layout_errors``.

Real gloo ranks take one step of Megatron-Core's, our and, where a checkout of it is given, dion's Muon on the same gradient, in
float32 with the same iteration. The error is that of the whole update, relative to the unsharded update in float64. Results and
versions go to docs/layout_errors.json, and the picture is made from that file; ``--draw`` only draws.

A class is measured where it takes the layout's kind of parameters: Megatron-Core's plain tensors with its attributes, dion's
DTensors, ours both. What refuses or crashes is recorded with its message.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from math import sqrt
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from emerging_optimizers.orthogonalized_optimizers import get_muon_scale_factor
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.multiprocessing.spawn import start_processes

from core import TensorParallelMuon
from core.linalg.coefficients import coefficients

from ..bench.cases import MEGATRON, OURS, TP_SCALE, TP_SET, normal, tensor_parallel
from ..bench.command import environment
from ..usage import UsageError, refuse

RESULTS = Path(__file__).parent.parent.parent / "docs" / "layout_errors.json"
DION, STEPS, TIMEOUT_S = "dion", 5, 120.0


@dataclass(frozen=True)
class Layout:
    """A matrix and the way in which ranks share it.

    Attributes:
        rows: Rows of the whole matrix.
        cols: Columns of the whole matrix.
        dim: The dim that tensor parallelism cuts.
        tp: Ranks that the matrix is cut over.
        copies: Data-parallel copies of each shard.
        qkv: Rows of queries, keys and values in a query group, for a fused matrix.
        fsdp: Ranks that FSDP2 shards the rows over; then the matrix is a DTensor.
    """

    rows: int = 256
    cols: int = 64
    dim: int = 0
    tp: int = 1
    copies: int = 1
    qkv: tuple[int, int, int] | None = None
    fsdp: int = 1

    @property
    def ranks(self) -> int:
        """Number of processes."""
        return self.tp * self.copies * self.fsdp

    def gradient(self) -> Tensor:
        """(rows, cols) float32, the same on every rank."""
        return normal(0, 0, self.rows, self.cols)

    def update(self) -> Tensor:
        """(rows, cols) float64: the unsharded update over the learning rate."""
        out = torch.empty(self.rows, self.cols, dtype=torch.float64)
        for at in self._parts():
            scale = get_muon_scale_factor(len(at), self.cols, mode=TP_SCALE)
            out[at] = scale * orthogonalized(self.gradient()[at].double())
        return out

    def _parts(self) -> list[Tensor]:
        """Row numbers of each matrix that is orthogonalized by itself."""
        rows = torch.arange(self.rows)
        if self.qkv is None:
            return [rows]
        return [part.flatten() for part in rows.view(-1, sum(self.qkv)).split(list(self.qkv), 1)]


LAYOUTS = {
    "1 rank": Layout(),
    "TP 2, rows": Layout(tp=2),
    "TP 2, columns": Layout(64, 256, dim=1, tp=2),
    "TP 4, rows": Layout(tp=4),
    "TP 2 × DP 2": Layout(tp=2, copies=2),
    "QKV split, TP 2": Layout(128, qkv=(16, 8, 8), tp=2),
    "QKV split, TP 4, 2 groups": Layout(96, qkv=(32, 8, 8), tp=4),
    "FSDP2, 4 ranks": Layout(fsdp=4),
    "FSDP2 2 × TP 2": Layout(tp=2, fsdp=2),
}
MEGATRON_MODES = [f"{MEGATRON} {mode}" for mode in ("blockwise", "duplicated", "distributed")]
OUR_MODES = [f"{OURS} {mode}" for mode in ("owner", "distributed")]
Outcome = dict[str, Any]
"""``squares``: sums over this rank of the squared error and the squared update; or ``failed``, a message."""


def orthogonalized(x: Tensor, epsilon: float = 0.0) -> Tensor:
    """Newton-Schulz of a matrix or a stack (..., rows, cols), in its own dtype, by the iteration that all candidates take."""
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + epsilon)
    for a, b, c in coefficients(TP_SET, STEPS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


def in_float32(x: Tensor, epsilon: float) -> Tensor:
    """:func:`orthogonalized` of what dion hands on, which it has rounded to bfloat16."""
    return orthogonalized(x.float(), epsilon).to(x.dtype)


def plain_parameter(layout: Layout, tp_rank: int) -> nn.Parameter:
    """This rank's shard of a zero matrix, with Megatron's attributes and a gradient."""
    p: Any = nn.Parameter(cut(torch.zeros(layout.rows, layout.cols), layout, tp_rank))
    p.grad = cut(layout.gradient(), layout, tp_rank)
    if layout.tp > 1:
        p.tensor_model_parallel, p.partition_dim, p.partition_stride = True, layout.dim, 1
    if layout.qkv:
        p.is_qkv, p.qkv_split_shapes = True, list(layout.qkv)
    return p  # type: ignore[no-any-return]


def cut(whole: Tensor, layout: Layout, tp_rank: int) -> Tensor:
    """This rank's shard of ``whole``."""
    return whole.chunk(layout.tp, layout.dim)[tp_rank].contiguous()


def plain(name: str, layout: Layout, mesh: DeviceMesh) -> Outcome:
    """One step of Megatron-Core's or our Muon on plain tensors with attributes."""
    group, tp_rank = mesh.get_group("tp"), mesh.get_local_rank("tp")
    p: Any = plain_parameter(layout, tp_rank)
    kwargs: dict[str, Any] = {"split_qkv": layout.qkv is not None}
    if name.startswith(MEGATRON):
        # Its factory marks a fused weight only when a rank's rows are whole query groups, and else does not split it.
        p.is_qkv = layout.qkv is not None and p.shape[0] % sum(layout.qkv) == 0
        kwargs["is_qkv_fn"] = lambda p: p.is_qkv
    make: Any = tensor_parallel("highest", group)[name]
    make([p], **kwargs | {"weight_decay": 0.0}).step()
    return squares(-p.detach(), cut(layout.update(), layout, tp_rank))


def sharded_model(layout: Layout, mesh: DeviceMesh) -> nn.Module:
    """A layer whose zero weight FSDP2 shards, after tensor parallelism where the layout has it, with a gradient."""
    model = nn.Sequential(nn.Linear(layout.cols, layout.rows, bias=False))
    nn.init.zeros_(model[0].weight)  # type: ignore[arg-type]
    if layout.tp > 1:
        parallelize_module(model, mesh["tp"], {"0": ColwiseParallel(use_local_output=False)}, src_data_rank=None)
    fully_shard(model, mesh=mesh["fsdp"])
    out = model(torch.eye(layout.cols))  # (cols, rows): the weight's transpose, so that its gradient can be chosen
    out = out.full_tensor() if isinstance(out, DTensor) else out
    (out * layout.gradient().mT).sum().backward()
    return model


def fsdp(name: str, layout: Layout, mesh: DeviceMesh) -> Outcome:
    """One step of our or dion's Muon on what FSDP2 shards."""
    (p,) = sharded_model(layout, mesh).parameters()
    if name == DION:
        return dions_step(p, layout, mesh["fsdp"])
    optimizer = TensorParallelMuon([p], **common(), tp_mode=name.split()[1])
    optimizer.step()
    return whole_squares(p, layout, TP_SCALE)


def common() -> dict[str, Any]:
    """Settings of our Muon."""
    settings: dict[str, Any] = {"lr": 1.0, "weight_decay": 0.0, "nesterov": True, "fp32_matmul_prec": "highest"}
    return settings | {"coefficient_type": TP_SET, "num_ns_steps": STEPS, "scale_mode": TP_SCALE}


def dtensor(name: str, layout: Layout, mesh: DeviceMesh) -> Outcome:
    """One step of dion's Muon on a DTensor that is cut over tp and copied over dp."""
    place = partial(distribute_tensor, device_mesh=mesh, src_data_rank=None)
    placements = [Replicate(), Shard(layout.dim)]
    p = nn.Parameter(place(torch.zeros(layout.rows, layout.cols), placements=placements))
    p.grad = place(layout.gradient(), placements=placements)
    return dions_step(p, layout, mesh["tp"])


def dions_step(p: nn.Parameter, layout: Layout, mesh: DeviceMesh) -> Outcome:
    """One step of dion's Muon, with the iteration of all others in place of its own, and uncompiled, which spares minutes."""
    from dion import Muon  # type: ignore[import-not-found]

    settings = {"lr": 1.0, "weight_decay": 0.0, "nesterov": True, "adjust_lr": None}
    optimizer = Muon([p], distributed_mesh=mesh, **settings, newton_schulz_func=in_float32)
    with torch.compiler.set_stance("force_eager"):
        optimizer.step()
    return whole_squares(p, layout, None)


def whole_squares(p: nn.Parameter, layout: Layout, scale_mode: str | None) -> Outcome:
    """:func:`squares` of a DTensor's whole; ``scale_mode`` None: the update is not scaled."""
    whole: Tensor = p.full_tensor()  # type: ignore[attr-defined]
    scale = 1.0 if scale_mode else get_muon_scale_factor(layout.rows, layout.cols, mode=TP_SCALE)
    return squares(-whole.detach() * scale, layout.update())


def squares(update: Tensor, truth: Tensor) -> Outcome:
    """What one rank knows of the relative error."""
    return {"squares": [float((update.double() - truth).square().sum()), float(truth.square().sum())]}


def measured(name: str, layout: Layout) -> Callable[[DeviceMesh], Outcome] | None:
    """How candidate ``name`` is measured on ``layout``; None where it takes no parameters of that kind."""
    if layout.fsdp > 1:
        return None if name.startswith(MEGATRON) else partial(fsdp, name, layout)
    if name == DION:
        return None if layout.qkv else partial(dtensor, name, layout)
    return partial(plain, name, layout)


def run_rank(rank: int, ranks: int, folder: Path, names: Sequence[str], dion: str) -> None:
    """What one of ``ranks`` processes does: all layouts of so many ranks, by every candidate."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # Megatron-Core says at length what is not installed
    sys.path[:0] = [dion] if dion else []
    store, patience = f"file://{folder / f'store{ranks}'}", timedelta(seconds=TIMEOUT_S)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=ranks, timeout=patience)
    found: dict[str, dict[str, Outcome]] = {name: {} for name in names}
    for title, layout in LAYOUTS.items():
        for name in names if layout.ranks == ranks else ():
            outer = "fsdp" if layout.fsdp > 1 else "dp"
            mesh = init_device_mesh("cpu", (layout.copies * layout.fsdp, layout.tp), mesh_dim_names=(outer, "tp"))
            if take := measured(name, layout):
                try:
                    found[name][title] = take(mesh)
                except Exception as error:
                    found[name][title] = {"failed": f"{type(error).__name__}: {error}"}
    (folder / f"{ranks}-{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def measure(dion: str) -> dict[str, Any]:
    """Errors by candidate and layout, or the message of what failed; with versions.

    Args:
        dion: Path of a checkout of dion; empty: it is left out.
    """
    names = [*MEGATRON_MODES, *([DION] if dion else []), *OUR_MODES]
    errors: dict[str, dict[str, float | str]] = {name: {} for name in names}
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        for ranks in sorted({layout.ranks for layout in LAYOUTS.values()}):
            start_processes(run_rank, (ranks, folder, names, dion), nprocs=ranks, start_method="spawn")
            found = [json.loads((folder / f"{ranks}-{rank}.json").read_text()) for rank in range(ranks)]
            for name in names:
                for title in found[0][name]:
                    errors[name][title] = joined([rank[name][title] for rank in found])
    versions = {
        k: v for k, v in environment().items() if k in ("python", "torch", "emerging-optimizers", "megatron-core")
    }
    if dion:
        commit = subprocess.run(["git", "-C", dion, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
        versions[DION] = f"commit {commit.stdout.strip()[:12]}"
    return {"versions": versions, "errors": errors}


def joined(ranks: Sequence[Outcome]) -> float | str:
    """The relative error over all ranks, or the first failure."""
    if failed := [rank["failed"] for rank in ranks if "failed" in rank]:
        return str(failed[0])
    off, true = (sum(of) for of in zip(*(rank["squares"] for rank in ranks), strict=True))
    return float(f"{sqrt(off / true):.3g}")


STYLES = {
    f"{MEGATRON} blockwise": ("#d55e00", "X", "Megatron-Core, blockwise (its training default)"),
    f"{MEGATRON} duplicated": ("#cc79a7", "^", "Megatron-Core, duplicated"),
    f"{MEGATRON} distributed": ("#e69f00", "s", "Megatron-Core, distributed"),
    DION: ("#000000", "D", "dion (rounds momentum to bfloat16)"),
    f"{OURS} owner": ("#0072b2", "o", "shardstep, owner (default)"),
    f"{OURS} distributed": ("#009e73", "P", "shardstep, distributed"),
}
"""Colour (told apart without red and green), marker and label of each candidate."""
LOWEST, FAILED, HIGHEST = 1e-8, 12.0, 40.0


def draw(found: dict[str, Any], out: Path) -> None:
    """Draw what :func:`measure` found; failures stand at the top."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(10, 5), facecolor="white")
    names = [name for name in STYLES if name in found["errors"]]
    width = 0.72 / max(1, len(names) - 1)
    for i, name in enumerate(names):
        color, marker, label = STYLES[name]
        errors = found["errors"][name]
        points = [(at - 0.36 + i * width, errors[title]) for at, title in enumerate(LAYOUTS) if title in errors]
        heights = [FAILED if isinstance(error, str) else max(error, LOWEST) for _, error in points]
        axes.scatter([x for x, _ in points], heights, c=color, marker=marker, s=58, label=label, zorder=3)
        for x, error in points:
            if isinstance(error, str):
                axes.annotate(
                    "raises",
                    (x, FAILED),
                    (0, -7),
                    textcoords="offset points",
                    ha="center",
                    va="top",
                    fontsize=9,
                )
    for at in range(0, len(LAYOUTS), 2):
        axes.axvspan(at - 0.5, at + 0.5, color="#f3f3f3", zorder=0, linewidth=0)
    axes.axhspan(0.1, HIGHEST, color="#d55e00", alpha=0.06, linewidth=0, zorder=1)
    axes.text(-0.45, 1.2, "off by more than 10 %: another optimizer", fontsize=9, color="#8a3c00", va="bottom")
    for height, dtype in ((1.6e-6, "float32"), (3.6e-3, "bfloat16")):
        axes.text(-0.45, height, f"rounding of {dtype}", fontsize=9, color="#404040", va="bottom")
    axes.set(yscale="log", ylim=(LOWEST * 10, HIGHEST), xlim=(-0.5, len(LAYOUTS) - 0.5))
    axes.set_ylabel("relative error of one Muon update\n(against unsharded, float64)")
    axes.set_xticks(range(len(LAYOUTS)), [title.replace(", ", "\n") for title in LAYOUTS], fontsize=9)
    axes.grid(axis="y", alpha=0.3)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=3, frameon=False)
    versions = ", ".join(f"{k} {v}" for k, v in found["versions"].items() if k in ("torch", "megatron-core", DION))
    axes.set_title(f"One step of Muon on shards, float32, gloo ({versions})", fontsize=10)
    figure.savefig(out, dpi=130, bbox_inches="tight")
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line; see the module."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.plot.layout_errors",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--draw", action="store_true", help="draw the results that are there, without measuring")
    parser.add_argument(
        "--dion", default="", metavar="PATH", help="checkout of microsoft/dion, to measure its Muon too"
    )
    options = parser.parse_args(argv)
    try:
        if options.dion and not (Path(options.dion) / "dion" / "muon.py").is_file():
            raise UsageError("--dion", options.dion, "has no dion/muon.py", hint="give the folder of a checkout")
        if not options.draw:
            RESULTS.write_text(json.dumps(measure(options.dion), indent=1) + "\n")
        if not RESULTS.is_file():
            raise UsageError("--draw", None, f"there is no {RESULTS}", hint="leave it out, to measure first")
        draw(json.loads(RESULTS.read_text()), RESULTS.with_suffix(".png"))
    except UsageError as error:
        refuse(error, rank=0, program="layout_errors")
    except ImportError as error:
        missing = UsageError("matplotlib", None, f"cannot be imported ({error})", hint="pip install matplotlib")
        refuse(missing, rank=0, program="layout_errors")
    print(f"wrote {RESULTS} and {RESULTS.with_suffix('.png')}")


if __name__ == "__main__":
    main()
