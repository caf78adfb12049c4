"""Ranks for a test that needs several numbers of them: each rank a process of its own, made for one call."""

import io
import multiprocessing
import os
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import start_processes

from tools.pretrain.job import main

PRELOAD = ["tests.support.variants", "tests.support.small_run", "tools.pretrain.job"]


def on_ranks(size: int, work: Callable[..., None], *args: Any) -> None:
    """``work(rank, *args)`` in ``size`` processes, with the environment that torchrun gives; ends them, whatever happens.

    They are forked from a server that has imported torch, so they are there at once.

    Raises:
        ProcessException: when one fails, with its traceback.
    """
    multiprocessing.set_forkserver_preload(PRELOAD)
    # Here, as torchrun has it: a port that is only looked for may be taken before the ranks are there.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = start_processes(
        _rank, (size, store.port, work, args), nprocs=size, join=False, daemon=True, start_method="forkserver"
    )
    try:
        while not context.join():
            pass
    finally:
        for process in context.processes:
            process.kill()
            process.join()


def train(rank: int, flags: Sequence[str]) -> None:
    """The main job, as the work of one rank.

    Raises:
        AssertionError: with what the job said, when it ends otherwise than well.
    """
    said = io.StringIO()
    with redirect_stdout(said), redirect_stderr(said):
        try:
            main(flags)
        except SystemExit as left:
            raise AssertionError(said.getvalue()) from left


def _rank(rank: int, size: int, port: int, work: Callable[..., None], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_PORT": port}
    store = {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    os.environ.update({**store, **{name: str(value) for name, value in place.items()}})
    work(rank, *args)
