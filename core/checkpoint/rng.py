"""The state of this rank's random number generators as one tensor: bytes of JSON text, so that reading executes no code."""

import base64
import json
import random
from typing import Any

import numpy as np
import torch
from torch import Tensor


def key(rank: int) -> str:
    """Key of the generators' state of ``rank`` in a checkpoint."""
    return f"rng/rank_{rank:05d}"


def pack() -> Tensor:
    """States of the generators of Python, numpy, torch and this rank's CUDA device; uint8, (n,)."""
    numpy_state = np.random.get_state()
    states: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": [x.tolist() if isinstance(x, np.ndarray) else x for x in numpy_state],
        "torch": _encode(torch.get_rng_state()),
    }
    if torch.cuda.is_available():
        states["cuda"] = _encode(torch.cuda.get_rng_state())
    return torch.frombuffer(bytearray(json.dumps(states).encode()), dtype=torch.uint8)


def unpack(packed: Tensor) -> None:
    """Restore the generators from the result of :func:`pack`."""
    states = json.loads(packed.numpy().tobytes())
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    np.random.set_state(tuple(states["numpy"]))
    torch.set_rng_state(_decode(states["torch"]))
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(_decode(states["cuda"]))


def _encode(state: Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode()


def _decode(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
