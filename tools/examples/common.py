"""Functions that all examples use: joining the processes of torchrun, reading text, and reporting each step."""

import argparse
import os
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from ..pretrain.data import Samples, load_corpus, split_samples
from ..pretrain.model import GPTConfig

SEQ_LENGTH = 32
GLOBAL_BATCH = 8
VOCAB_SIZE = 264
"""Number of bytes and the mark for the end of a document, rounded up to a multiple of 8."""


def arguments(example: str, description: str) -> argparse.ArgumentParser:
    """A parser with the flags that all examples share; ``example`` is the name of the module, which adds its own flags."""
    parser = argparse.ArgumentParser(prog=f"python -m tools.examples.{example}", description=description)
    parser.add_argument("--optimizer", default="muon", help="any name that core.optimizer knows")
    parser.add_argument("--lr", type=float, default=0.003)
    parser.add_argument(
        "--precision",
        default="highest",
        help="precision of Muon's products: highest, at which layouts agree best, high or medium",
    )
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument(
        "--data-path", nargs="*", default=(), help="text files (default: the texts that Python carries)"
    )
    return parser


def gpt_config(*, tied: bool) -> GPTConfig:
    """A GPT that trains in seconds on a CPU."""
    return GPTConfig(
        num_layers=2, hidden_size=64, num_attention_heads=4, vocab_size=VOCAB_SIZE, seq_length=SEQ_LENGTH,
        untie_embeddings_and_output_weights=not tied,
    )  # fmt: skip


def start() -> torch.device:
    """Join the processes that torchrun started, over NCCL on CUDA and gloo on a CPU; without torchrun there is nothing to join.

    Returns:
        This process's device.
    """
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if "RANK" in os.environ:
        # Without device_id: with it, NCCL lets only all processes together make a group, and joint groups are made by some.
        dist.init_process_group("nccl" if cuda else "gloo")
    return device


def leave() -> None:
    """Let all processes end together, since one that ends early may interrupt the threads of the others."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def samples(data_path: list[str]) -> Samples:
    """The training sequences of the text, each (``SEQ_LENGTH`` + 1,)."""
    return split_samples(load_corpus(data_path), seq_length=SEQ_LENGTH, seed=0)[0]


def batches(
    data_path: list[str], steps: range, device: torch.device, *, part: int = 0, parts: int = 1
) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs and targets of ``steps``: the same global batches for any number of data-parallel ranks.

    Args:
        data_path: Text files; empty for the texts that Python carries.
        steps: Steps whose batches are returned.
        device: Device of the batches.
        part: This rank's index on the data-parallel axis.
        parts: Size of the data-parallel axis, a divisor of ``GLOBAL_BATCH``.

    Returns:
        Pairs of int64 (``GLOBAL_BATCH / parts``, ``SEQ_LENGTH``).
    """
    text = samples(data_path)
    for step in steps:
        sequences = text.batch(step * GLOBAL_BATCH, GLOBAL_BATCH).chunk(parts)[part].to(device)
        yield sequences[:, :-1].contiguous(), sequences[:, 1:].contiguous()


def report(step: int, loss: Tensor) -> None:
    """Print the mean of ``loss`` over all ranks, on the first of them."""
    loss = loss.detach().clone()
    if dist.is_initialized():
        dist.all_reduce(loss)
        loss /= dist.get_world_size()
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(f"step {step} loss {loss.item():.7f}", flush=True)
