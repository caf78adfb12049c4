"""The main job with one fault, once: ``python -m tests.support.faulty_job PLACE:NTH:RANK:STEP:HOW MARK FLAGS...``.

PLACE is forward, backward, optimizer, save or load, NTH counts the modules, collectives or file events there, and HOW is kill,
sleep, exit or a signal's name. The file MARK says that it has happened: a job that is started again goes through.
"""

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn

from tools.pretrain import job

HOW: dict[str, Callable[[], Any]] = {
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "sleep": lambda: time.sleep(1000),
    "exit": lambda: (time.sleep(1), os._exit(0)),
    "SIGUSR1": lambda: os.kill(os.getpid(), signal.SIGUSR1),
    "SIGTERM": lambda: os.kill(os.getpid(), signal.SIGTERM),
}


class Fault:
    """Counts the events at a place of one rank, and strikes at one of them."""

    def __init__(self, spec: str, mark: Path) -> None:
        self.place, nth, rank, step, self.how = spec.split(":")
        self.left, self.step, self.mark = int(nth), int(step), mark
        self.here = os.environ["RANK"] == rank
        self.job: job.Job | None = None

    def event(self) -> None:
        if self.mark.exists() or (self.place in ("forward", "backward", "optimizer") and not self.in_step()):
            return
        self.left -= 1
        if not self.left:
            self.mark.touch()
            print(f"rank {os.environ['RANK']} at {self.place}: {self.how}", file=sys.stderr, flush=True)
            HOW[self.how]()

    def in_step(self) -> bool:
        return self.job is not None and self.job.done + 1 == self.step

    def set_up(self, running: job.Job) -> None:
        self.job = running
        layers = [module for module in running.engine.model_chunks[0].modules() if isinstance(module, nn.Linear)]
        for module in layers:
            module.register_forward_hook(self.forward if self.place == "forward" else self.backward)

    def forward(self, *_: Any) -> None:
        self.event()

    def backward(self, module: nn.Module, inputs: Any, out: Any) -> None:
        if self.place == "backward" and out.requires_grad:
            out.register_hook(lambda _: self.event())

    def files(self, name: str, args: tuple[Any, ...]) -> None:
        if name in ("open", "os.mkdir", "os.rename", "os.remove") and f"iter_{self.step:07d}" in str(args[0]):
            self.event()


def main() -> None:
    fault = Fault(sys.argv[1], Path(sys.argv[2]))
    run, all_to_all = job.Job.run, dist.all_to_all_single

    def run_with_fault(running: job.Job, *args: Any) -> None:
        fault.set_up(running)
        run(running, *args)

    def all_to_all_with_fault(*args: Any, **kwargs: Any) -> Any:
        fault.event()
        return all_to_all(*args, **kwargs)

    if fault.here:
        job.Job.run = run_with_fault  # type: ignore[method-assign]
        if fault.place == "optimizer":
            dist.all_to_all_single = all_to_all_with_fault
        if fault.place in ("save", "load"):
            sys.addaudithook(fault.files)
    job.main(sys.argv[3:])


if __name__ == "__main__":
    main()
