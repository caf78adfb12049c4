"""Times a step of the elementwise and reducing optimizers beside their peers, on the parameters of a GPT of 124 M.

    python -m tools.bench.optimizers                 # every optimizer that has a peer
    python -m tools.bench.optimizers --names lamb came --reps 5

It runs in one process. Our optimizer and its peers take turns, step by step, on the same gradients.
``bash scripts/bootstrap.sh bench`` installs the peers.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn

from core.optimizer.registry import entry_of

from ..pretrain.report import format_rows
from .command import environment

LAYERS, WIDTH, VOCABULARY, CONTEXT = 12, 768, 50257, 1024
Make = Callable[[list[nn.Parameter]], Any]


def shapes() -> Iterator[tuple[int, ...]]:
    """Shapes of GPT-2's parameters: embeddings, layers, final norm."""
    yield from ((VOCABULARY, WIDTH), (CONTEXT, WIDTH))
    for _ in range(LAYERS):
        yield from ((WIDTH,), (WIDTH,), (3 * WIDTH, WIDTH), (3 * WIDTH,), (WIDTH, WIDTH), (WIDTH,))
        yield from ((WIDTH,), (WIDTH,), (4 * WIDTH, WIDTH), (4 * WIDTH,), (WIDTH, 4 * WIDTH), (WIDTH,))
    yield from ((WIDTH,), (WIDTH,))


def peer(path: str, **kwargs: Any) -> Make:
    """A function that builds the class at ``path`` with these settings."""
    module, _, name = path.rpartition(".")
    return lambda params: getattr(import_module(module), name)(params, lr=1e-4, **kwargs)


TORCH, PO, TIMM, BNB = "torch.optim", "pytorch_optimizer", "timm.optim", "bitsandbytes.optim"
PEERS: dict[str, dict[str, Make]] = {
    "sgd": {
        "torch fused": peer(f"{TORCH}.SGD", momentum=0.9, fused=True),
        "torch foreach": peer(f"{TORCH}.SGD", momentum=0.9, foreach=True),
    },
    "adam": {
        "torch fused": peer(f"{TORCH}.Adam", fused=True),
        "torch foreach": peer(f"{TORCH}.Adam", foreach=True),
    },
    "adamw": {
        "torch fused": peer(f"{TORCH}.AdamW", fused=True),
        "torch foreach": peer(f"{TORCH}.AdamW", foreach=True),
        "pytorch_optimizer": peer(f"{PO}.StableAdamW"),
    },
    "adamw_sr": {
        "torch AdamW foreach": peer(f"{TORCH}.AdamW", foreach=True),
        "torch AdamW, a loop": peer(f"{TORCH}.AdamW", foreach=False),
    },
    "radam": {
        "torch foreach": peer(f"{TORCH}.RAdam", foreach=True),
        "torch, a loop": peer(f"{TORCH}.RAdam", foreach=False),
        "pytorch_optimizer": peer(f"{PO}.RAdam"),
    },
    "rmsprop": {
        "torch foreach": peer(f"{TORCH}.RMSprop", foreach=True),
        "torch, a loop": peer(f"{TORCH}.RMSprop", foreach=False),
    },
    "lion": {"pytorch_optimizer": peer(f"{PO}.Lion"), "timm": peer(f"{TIMM}.Lion")},
    "ademamix": {"pytorch_optimizer": peer(f"{PO}.AdEMAMix")},
    "schedule_free_adamw": {
        "schedulefree": peer("schedulefree.AdamWScheduleFree"),
        "pytorch_optimizer": peer(f"{PO}.ScheduleFreeAdamW"),
    },
    "schedule_free_sgd": {
        "schedulefree": peer("schedulefree.SGDScheduleFree"),
        "pytorch_optimizer": peer(f"{PO}.ScheduleFreeSGD"),
    },
    "lamb": {
        "pytorch_optimizer": peer(f"{PO}.Lamb"),
        "timm": peer(f"{TIMM}.Lamb", max_grad_norm=None),
        "bitsandbytes": peer(f"{BNB}.LAMB", max_unorm=1.0),
    },
    "lars": {
        "pytorch_optimizer": peer(f"{PO}.LARS", weight_decay=1e-4),
        "timm": peer(f"{TIMM}.Lars", momentum=0.9, weight_decay=1e-4, always_adapt=True),
    },
    "adafactor": {
        "torch foreach": peer(f"{TORCH}.Adafactor", foreach=True),
        "torch, a loop": peer(f"{TORCH}.Adafactor", foreach=False),
        "pytorch_optimizer": peer(f"{PO}.AdaFactor", momentum_dtype=torch.float32, betas=(None, 0.999)),
    },
    "came": {"pytorch_optimizer": peer(f"{PO}.CAME")},
    "mars": {"pytorch_optimizer": peer(f"{PO}.MARS"), "timm": peer(f"{TIMM}.Mars")},
    # No other library has the same rule, or none that runs on a CPU.
    "adafactor_sr": {},
    "sophia": {},
    "bge_adam": {},
    "hn_adam": {},
    "apollo": {},
}
"""Peers of each of our optimizers. A peer keeps its own defaults if the rule has no common ones: only its work counts."""

OURS: dict[str, dict[str, Any]] = {
    "sgd": {"momentum": 0.9},
    "rmsprop": {"variant": "torch"},
    "lars": {"weight_decay": 1e-4},
}
WARM_UP = 8
"""Steps that do not count: RAdam's first ones are cheaper, since they are not rectified or, in some versions, not taken."""
PACKAGES = ("pytorch_optimizer", "schedulefree", "timm", "bitsandbytes")


def candidate(make: Make, grads: Sequence[Tensor]) -> Any:
    """The optimizer that ``make`` builds, with parameters of its own that have these gradients."""
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(g.shape, generator=generator).mul_(0.02)) for g in grads]
    optimizer = make(params)
    for p, g in zip(params, grads, strict=True):
        p.grad = g
    if hasattr(optimizer, "train"):
        optimizer.train()
    return optimizer


def measure(name: str, reps: int, grads: Sequence[Tensor]) -> dict[str, list[float]]:
    """Seconds of each step of our optimizer and its peers, after :data:`WARM_UP` steps."""
    cls: Any = entry_of(name).optimizer_cls
    if entry_of(name).default_param_overrides:
        grads = [g for g in grads if g.ndim == 2]
    makes: dict[str, Make] = {"shardstep": lambda params: cls(params, lr=1e-4, **OURS.get(name, {})), **PEERS[name]}
    optimizers = {label: candidate(make, grads) for label, make in makes.items()}
    seconds: dict[str, list[float]] = {label: [] for label in makes}
    order = list(makes)
    for rep in range(-WARM_UP, reps):
        for i in range(len(order)):
            label = order[(i + rep) % len(order)]
            start = time.perf_counter()
            optimizers[label].step()
            if rep >= 0:
                seconds[label].append(time.perf_counter() - start)
    return seconds


def lines(name: str, seconds: dict[str, list[float]]) -> Iterator[tuple[str, ...]]:
    """A line for each candidate, with the ratio of its median to the fastest peer's."""
    best = min((statistics.median(times) for label, times in seconds.items() if label != "shardstep"), default=None)
    for label, times in seconds.items():
        median = statistics.median(times)
        yield name, label, f"{1e3 * median:.0f} ({1e3 * min(times):.0f})", f"{median / best:.2f}" if best else "no peer"


def main() -> None:
    """Run the command line; the module's docstring describes it."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench.optimizers",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--names", nargs="+", choices=sorted(PEERS), default=list(PEERS), metavar="NAME")
    parser.add_argument("--reps", type=int, default=7, help="steps that count (default: 7)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(shape, generator=generator).mul_(1e-3) for shape in shapes()]
    about = environment() | {package: version(package) for package in PACKAGES} | {"threads": args.threads}
    print(json.dumps(about))
    rows: list[tuple[str, ...]] = [("optimizer", "candidate", "ms, median (min)", "ratio to the fastest peer")]
    for name in args.names:
        rows += lines(name, measure(name, args.reps, grads))
        print("\n".join(format_rows(rows[-1 - len(PEERS[name]) :])), flush=True)
    print("\n".join(("", *format_rows(rows))))


if __name__ == "__main__":
    main()
