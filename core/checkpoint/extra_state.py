"""This module saves and loads what modules return from ``get_extra_state``, such as the scales of FP8.

Each value is one tensor of bytes, JSON text that :mod:`.plain` writes, so that no code is executed when it is read. A value that
all ranks have alike is saved once and fits every layout. Where ranks have different values, each saves its own, and these fit the
layout that saved them only: nobody but the module knows how to cut them anew.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import STORAGE_TYPES, TensorStorageMetadata

from ..module_names import unwrapped
from ..process_groups_config import gather
from . import plain
from .compare import Mismatch
from .together import joined, rank, together

PREFIX = "extra_state."
NAME = "_extra_state"
"""Name that torch gives it in a ``state_dict``."""
_OF_RANK = "/rank_"


@dataclass(frozen=True)
class Holder:
    """A module with an extra state.

    Attributes:
        module: The module.
        value: The extra state of the module at the time of the call.
    """

    module: nn.Module
    value: object


def holders(chunks: Sequence[nn.Module]) -> dict[str, Holder]:
    """Name of the module → the module, for those of this rank whose class defines an extra state."""
    found = {}
    for chunk in chunks:
        for name, module in chunk.named_modules():
            if type(module).get_extra_state is not nn.Module.get_extra_state:
                full = unwrapped(chunk, f"{name}.{NAME}".removeprefix("."))
                found[full.removesuffix(NAME).removesuffix(".")] = Holder(module, module.get_extra_state())
    return found


def tensors(found: Mapping[str, Holder]) -> dict[str, Tensor]:
    """Key → bytes of the extra states that this rank writes; all ranks call it.

    Raises:
        CheckpointError: on all ranks, when one of them cannot be saved; names the module.
    """
    mine = together(
        lambda: {name: packed(f"extra state of {name or 'the model'}", h.value) for name, h in _filled(found).items()}
    )
    digests = gather({name: hashlib.sha256(x.numpy().tobytes()).hexdigest() for name, x in mine.items()})
    written = {}
    for name, x in mine.items():
        owners = [r for r, of_rank in enumerate(digests) if name in of_rank]
        if len({digests[r][name] for r in owners}) > 1:
            written[f"{PREFIX}{name}{_OF_RANK}{rank()}"] = x
        elif owners[0] == rank():
            written[f"{PREFIX}{name}"] = x
    return written


def to_read(
    found: Mapping[str, Holder], saved: Mapping[str, STORAGE_TYPES], *, same_layout: bool
) -> tuple[dict[str, tuple[str, torch.Size]], list[Mismatch]]:
    """Find the saved state of each of this rank's modules, and list what does not fit; all ranks call this function.

    Args:
        found: This rank's modules with an extra state.
        saved: Key → metadata of what the checkpoint holds, as far as it is to be loaded.
        same_layout: True if this run has the same layout as the run that saved.

    Returns:
        Name of a module → key and size of its bytes in the checkpoint; and the differences.
    """
    sizes = {
        key: x.size
        for key, x in saved.items()
        if key.startswith(PREFIX) and isinstance(x, TensorStorageMetadata) and x.properties.dtype == torch.uint8
    }
    keys, rows = {}, []
    for name, holder in found.items():
        key = f"{PREFIX}{name}"
        own = f"{key}{_OF_RANK}{rank()}"
        of_ranks = [k for k in sizes if k.startswith(f"{key}{_OF_RANK}")]
        if key in sizes:
            keys[name] = key, sizes[key]
        elif own in sizes and same_layout:
            keys[name] = own, sizes[own]
        elif of_ranks:
            rows.append(Mismatch(key, f"another on each of {len(of_ranks)} ranks", "another layout", "extra"))
        elif holder.value is not None:
            rows.append(Mismatch(key, "missing", "an extra state", "model"))
    wanted = {f"{PREFIX}{name}" for name in joined(found)}
    for key in dict.fromkeys(k.partition(_OF_RANK)[0] for k in sizes):
        if key not in wanted:
            rows.append(Mismatch(key, "an extra state", "missing", "model"))
    return keys, rows


def put(found: Mapping[str, Holder], states: Mapping[str, Tensor]) -> None:
    """Give each module its state.

    Args:
        found: Name → module; mutated, by ``set_extra_state``.
        states: Name → bytes of the state, as :func:`tensors` made them.

    Raises:
        ValueError: names the module that does not take its state.
    """
    for name, x in states.items():
        try:
            found[name].module.set_extra_state(unpacked(x))
        except Exception as error:  # the module's own code may raise anything
            raise ValueError(
                f"{name or 'the model'} did not take its extra state back ({type(error).__name__}: {error}). Weights and "
                f"optimizer state were loaded: do not go on with this model."
            ) from error


def _filled(found: Mapping[str, Holder]) -> dict[str, Holder]:
    """Those with a state; modules of Megatron-Core say None for "nothing to keep"."""
    return {name: holder for name, holder in found.items() if holder.value is not None}


def packed(name: str, value: object) -> Tensor:
    """``value`` as bytes, uint8 (n,); errors as of :func:`.plain.text`, which call it ``name``."""
    return torch.frombuffer(bytearray(plain.text(name, value).encode()), dtype=torch.uint8)


def unpacked(x: Tensor) -> object:
    """Inverse of :func:`packed`."""
    return plain.value_of(x.numpy().tobytes().decode())


def is_of_all_ranks(key: str) -> bool:
    """Return whether ``key`` stands for one state that all ranks with the module had alike."""
    return _OF_RANK not in key
