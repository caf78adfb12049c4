"""Lets the real Megatron-Core run without CUDA, on gloo. Its computations are untouched: no number changes.

Megatron-Core asks for CUDA devices without looking for one. :func:`serve_on_cpu` puts in place of

* ``torch.cuda.current_device()``: the CPU;
* a CUDA ``device=`` of ``torch.tensor``, ``zeros``, ``ones``, ``empty``, ``full`` and ``arange``: the CPU;
* ``Tensor.cuda()`` and ``Module.cuda()``: nothing, they return what they were called on;
* ``Tensor.type()`` without an argument: the name of the CUDA type, which Megatron-Core compares by;
* streams, events and ``synchronize``: ones whose work is done at once;
* the generators of CUDA devices: the CPU's.
"""

import contextlib
from typing import Any

import torch
from torch import Tensor

FACTORIES = ("tensor", "zeros", "ones", "empty", "full", "arange")


class Stream:
    """What stands for a stream of a device that works at once."""

    cuda_stream = 0
    device = torch.device("cpu")

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Takes whatever CUDA's takes."""

    def _nothing(self, *args: Any, **kwargs: Any) -> None:
        return None

    wait_stream = wait_event = synchronize = record = wait = _nothing

    def record_event(self, *args: Any) -> "Stream":
        return self

    def query(self) -> bool:
        return True


def serve_on_cpu() -> None:
    """Replace in this process what the module names. Imports Megatron-Core."""

    def on_cpu(make: Any) -> Any:
        def made(*args: Any, **kwargs: Any) -> Any:
            if str(kwargs.get("device")).startswith("cuda"):
                kwargs["device"] = "cpu"
            return make(*args, **kwargs)

        return made

    cuda: Any = torch.cuda
    tensor: Any = Tensor
    module: Any = torch.nn.Module
    for name in FACTORIES:
        setattr(torch, name, on_cpu(getattr(torch, name)))
    cuda.current_device = lambda: torch.device("cpu")
    cuda.synchronize = lambda *args, **kwargs: None
    cuda.Stream = cuda.Event = Stream
    cuda.current_stream = cuda.default_stream = lambda *args, **kwargs: Stream()
    cuda.stream = lambda *args, **kwargs: contextlib.nullcontext()
    kind = Tensor.type
    tensor.type = lambda x, *args: kind(x, *args) if args else kind(x).replace("torch.", "torch.cuda.", 1)
    tensor.cuda = module.cuda = lambda self, *args, **kwargs: self

    from megatron.core.tensor_parallel import random as generators

    generators._get_cuda_rng_state = cuda.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    generators._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    cuda.manual_seed = torch.default_generator.manual_seed
