"""Names of a module's tensors that do not depend on what the module is wrapped in."""

from collections.abc import Iterator, Sequence

from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

_RESERVED = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
"""Names under which ``torch.compile``, activation checkpointing and FSDP keep the module that they wrap."""


def unwrapped(root: nn.Module, name: str) -> str:
    """``name``, of a tensor or module below ``root``, without the segments that name a wrapper's inner module.

    A module that a user called ``module`` keeps its name; only a data-parallel wrapper's loses it.
    """
    *path, last = name.split(".")
    kept: list[str] = []
    module: object = root
    for part in path:
        if part not in _RESERVED and not (part == "module" and _wraps_module(module)):
            kept.append(part)
        # A module may name parameters of its own with dots, by a named_parameters() of its own.
        module = getattr(module, part, None)
    return ".".join([*kept, last])


def named_parameters(chunks: Sequence[nn.Module]) -> Iterator[tuple[str, nn.Parameter]]:
    """Name and parameter of every parameter of ``chunks``, each chunk's own once."""
    for chunk in chunks:
        yield from ((unwrapped(chunk, name), p) for name, p in chunk.named_parameters())


def named_buffers(chunk: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Name and tensor of every buffer of ``chunk``, each once."""
    return ((unwrapped(chunk, name), x) for name, x in chunk.named_buffers())


def _wraps_module(module: object) -> bool:
    if not isinstance(module, nn.Module):
        return False
    # Megatron-Core's DistributedDataParallel and Float16Module, without importing it.
    of_megatron = type(module).__module__.startswith("megatron.core.")
    is_only_child = [name for name, _ in module.named_children()] == ["module"]
    return isinstance(module, DataParallel | DistributedDataParallel) or (of_megatron and is_only_child)
