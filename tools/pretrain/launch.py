"""The launch and the machine: what torchrun's environment variables say, and which accelerator there is."""

import errno
import socket
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ..usage import UsageError

_LAUNCH_HINT = (
    "start it with `torchrun --nproc-per-node N -m tools.pretrain ...`, or for one process without these variables"
)


@dataclass(frozen=True)
class Launch:
    """This process's place among the processes of the job."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_size: int = 1  # processes on this host
    master_addr: str | None = None
    master_port: int | None = None
    agent_store: bool = False  # torchrun's agent already holds the store, and with it the port
    max_restarts: int = 0  # restarts that torchrun may make

    @classmethod
    def from_environ(cls, environ: Mapping[str, str]) -> "Launch":
        """Read ``RANK``, ``WORLD_SIZE`` and torchrun's other variables; without these two the job is one process.

        Raises:
            UsageError: A variable is missing, is not a number, or is out of range.
        """
        if "RANK" not in environ and "WORLD_SIZE" not in environ:
            _check_alone(environ)
            return cls()
        world_size = _number(environ, "WORLD_SIZE", 1, None)
        rank = _number(environ, "RANK", 0, world_size - 1)
        local_rank = _number(environ, "LOCAL_RANK", 0, world_size - 1) if "LOCAL_RANK" in environ else rank
        local_size = (
            _number(environ, "LOCAL_WORLD_SIZE", 1, world_size) if "LOCAL_WORLD_SIZE" in environ else local_rank + 1
        )
        if world_size == 1 and "MASTER_PORT" not in environ:
            return cls()
        if not environ.get("MASTER_ADDR"):
            raise UsageError("MASTER_ADDR", None, "is not set, but RANK and WORLD_SIZE are", hint=_LAUNCH_HINT)
        return cls(
            rank=rank,
            world_size=world_size,
            local_rank=local_rank,
            local_size=local_size,
            master_addr=environ["MASTER_ADDR"],
            master_port=_number(environ, "MASTER_PORT", 1, 65535),
            agent_store=environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
            max_restarts=_number(environ, "TORCHELASTIC_MAX_RESTARTS", 0, None)
            if "TORCHELASTIC_MAX_RESTARTS" in environ
            else 0,
        )

    def check_restarts(self) -> None:
        """Raises UsageError where torchrun is to restart the job, and the restarted one would meet the store of the old.

        In a store that outlives a restart gloo finds the addresses of processes that are gone: every restart fails.
        """
        if not (self.max_restarts and self.agent_store):
            return
        raise UsageError(
            "torchrun --max-restarts",
            self.max_restarts,
            "the ranks share the store of torchrun's agent, with which every restart fails",
            possible="ranks with a store of their own",
            hint="set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for torchrun, and give it --standalone or --rdzv-backend c10d",
        )

    def check_port(self) -> None:
        """Raise UsageError if this process must listen at the master port and another process already does."""
        if self.rank != 0 or self.master_port is None or self.agent_store:
            return
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", self.master_port))
            except OSError as error:
                if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                    raise
                problem = "is in use on this host" if error.errno == errno.EADDRINUSE else "may not be listened at"
                raise UsageError(
                    "MASTER_PORT",
                    self.master_port,
                    problem,
                    possible="any free port, 1024..65535",
                    hint="another job may be running; set MASTER_PORT to a free port",
                ) from None


@dataclass(frozen=True)
class Machine:
    """The accelerator of this process.

    Args:
        gpus: Number of CUDA devices that torch sees.
        capability: Compute capability of the first GPU; None without one.
    """

    gpus: int = 0
    capability: tuple[int, int] | None = None

    @classmethod
    def here(cls) -> "Machine":
        """The machine that this process runs on."""
        if not torch.cuda.is_available():
            return cls()
        return cls(gpus=torch.cuda.device_count(), capability=torch.cuda.get_device_capability(0))


def _check_alone(environ: Mapping[str, str]) -> None:
    """Raise UsageError if another launcher started several processes, each of which would train alone."""
    for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS"):
        if environ.get(name, "1") != "1":
            problem = "processes were started, but RANK and WORLD_SIZE are not set, so each would train alone"
            raise UsageError(
                name, environ[name], problem, possible="RANK and WORLD_SIZE of each process", hint=_LAUNCH_HINT
            )


def _number(environ: Mapping[str, str], name: str, low: int, high: int | None) -> int:
    possible = f"a whole number >= {low}" if high is None else f"a whole number from {low} to {high}"
    if name not in environ:
        other = "RANK" if name == "WORLD_SIZE" else "WORLD_SIZE"
        raise UsageError(name, None, f"is not set, but {other} is", possible=possible, hint=_LAUNCH_HINT)
    raw = environ[name]
    try:
        value = int(raw)
    except ValueError:
        raise UsageError(name, repr(raw), "is not a whole number", possible=possible, hint=_LAUNCH_HINT) from None
    if value < low or (high is not None and value > high):
        raise UsageError(name, value, "is out of range", possible=possible, hint=_LAUNCH_HINT)
    return value
