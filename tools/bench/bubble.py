"""Times a pipeline's step with the optimizer after the flush and in the bubble, in turn, in one run.

``torchrun --nproc-per-node 4 -m tools.bench.bubble --out DIRECTORY`` prints the time of a step in both orders, and writes a
trace of each and a picture of both.
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist

from core.faults import Guard
from core.optimizer.emerging_optimizers import get_optimizer
from core.optimizer.optimizer_config import OptimizerConfig
from core.process_groups_config import ProcessGroupCollection

from ..plot.timeline import draw, read_step, table
from ..pretrain.bubble_step import BubbleStep
from ..pretrain.model import GPTConfig
from ..pretrain.parallel import Engine, build_mesh
from ..pretrain.trace import Trace

ORDERS = {"after the flush": False, "in the bubble": True}
VOCABULARY = 512


class Candidate:
    """A pipeline that trains in one of the two orders."""

    def __init__(self, options: argparse.Namespace, inside: bool) -> None:
        mesh = build_mesh("cpu", pp=dist.get_world_size(), dp=1, tp=1)
        config = GPTConfig(
            num_layers=options.layers,
            hidden_size=options.hidden,
            num_attention_heads=options.hidden // 64,
            seq_length=options.length,
            vocab_size=VOCABULARY,
            untie_embeddings_and_output_weights=True,
        )
        self.engine = Engine(config, mesh, micro_batches=options.micro_batches, schedule=options.schedule)
        settings = OptimizerConfig(optimizer=options.optimizer, lr=1e-3)
        groups = ProcessGroupCollection.from_mesh(mesh)
        self.optimizer = get_optimizer(settings, self.engine.model_chunks, groups)
        self.guard, self.inside, self.clip = Guard(self.optimizer), inside, options.clip_grad
        stage = mesh["pp"].get_local_rank()
        self.trace = Trace(dist.get_rank(), stage, self.engine.device)
        self.trace.follow(self.engine.stages)
        self.engine.tell = self._at
        self.bubble = BubbleStep(self.optimizer, self.guard, has_bubble=stage > 0, tell=self._at)
        self.done, self.seconds, self.losses = 0, list[float](), list[float]()

    def _at(self, phase: str) -> None:
        self.trace.at(phase, self.done + 1)

    def step(self, batch: torch.Tensor) -> None:
        """A training step, timed from a barrier until the last rank is done."""
        dist.barrier()
        begun = time.perf_counter()
        self._at("forward")
        loss = self.engine.train_step(batch, then=self.bubble.begin if self.inside else None)
        self._at("clip")
        if self.inside:
            self.bubble.settle(self.done + 1, loss, self.clip)
        else:
            self.guard.judge(self.done + 1, loss, max_norm=self.clip)
            self._at("optimizer")
            self.optimizer.step()
        self._at("")
        dist.barrier()
        self.seconds.append(time.perf_counter() - begun)
        self.losses.append(loss)
        self.done += 1


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line; the module's docstring describes it."""
    parser = argparse.ArgumentParser(prog="torchrun ... -m tools.bench.bubble", description=__doc__)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--length", type=int, default=64, help="tokens of a sequence; a micro-batch is one sequence")
    parser.add_argument("--micro-batches", type=int, default=8)
    parser.add_argument("--schedule", choices=("1f1b", "gpipe"), default="1f1b")
    parser.add_argument("--optimizer", default="muon")
    parser.add_argument("--clip-grad", type=float, default=0.0)
    parser.add_argument(
        "--steps", type=int, default=12, help="timed steps of each order, after one that does not count"
    )
    parser.add_argument("--out", type=Path, default=Path("."), help="directory of traces and picture")
    options = parser.parse_args(argv)
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    candidates = {name: Candidate(options, inside) for name, inside in ORDERS.items()}
    draws = torch.Generator().manual_seed(1)
    for _ in range(options.steps + 1):
        batch = torch.randint(VOCABULARY, (options.micro_batches, options.length + 1), generator=draws)
        for candidate in candidates.values():
            candidate.step(batch)
    _report(candidates, options)
    dist.destroy_process_group()


def _report(candidates: dict[str, Candidate], options: argparse.Namespace) -> None:
    ordinary, inside = candidates.values()
    if ordinary.losses != inside.losses:
        raise AssertionError(f"the two orders trained differently: {ordinary.losses} and {inside.losses}")
    options.out.mkdir(parents=True, exist_ok=True)
    steps = {}
    for name, candidate in candidates.items():
        path = options.out / f"{name.replace(' ', '_')}.json"
        candidate.trace.write(path)
        if dist.get_rank() == 0:
            steps[name] = read_step(path)
            print(f"{name}: {1e3 * median(candidate.seconds[1:]):.1f} ms a step\n{table(steps[name])}")
    if dist.get_rank() == 0:
        ratios = [b / a for a, b in zip(ordinary.seconds[1:], inside.seconds[1:], strict=True)]
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
        print(f"ratio, in the bubble / after the flush: {median(ratios):.2f} ({spread}); losses are equal bit for bit")
        draw(steps, options.out / "bubble.png")


if __name__ == "__main__":
    main()
