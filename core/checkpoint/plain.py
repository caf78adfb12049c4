"""Python values as JSON text that comes back equal; reading executes no code.

JSON alone turns keys into text and tuples into lists, without a word. Here a value that JSON has no form for becomes an object
with the key :data:`MARK`, and whatever has no form at all is refused.
"""

import base64
import io
import json
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

MARK = "__shardstep__"
"""Key that no dict of JSON form has; its value names the type."""
MAX_TENSOR_BYTES = 1 << 24
"""Larger tensors belong into a module's buffer, where each rank saves its part."""


def text(name: str, value: Any) -> str:
    """``value`` as JSON text.

    Args:
        name: Name of the value in errors.
        value: None, booleans, numbers, text, bytes, ``io.BytesIO``, dense tensors, dtypes, and lists, tuples, sets and dicts of
            these, with keys of any of these types.

    Raises:
        ValueError: names the first thing inside ``value`` that cannot be saved.
    """
    return json.dumps(form(name, value))


def value_of(given: str) -> Any:
    """Inverse of :func:`text`; tensors are on the host.

    Raises:
        ValueError: when ``given`` is not the result of :func:`text`.
    """
    return restored(json.loads(given))


def copied(name: str, value: Any) -> Any:
    """``value`` as it will come back from a checkpoint; shares nothing with it. Arguments and errors as of :func:`text`."""
    return value_of(text(name, value))


def form(name: str, value: Any) -> Any:
    """``value`` in types of JSON; arguments and errors as of :func:`text`."""
    if value is None or isinstance(value, bool | int | float | str):
        return _plain(value)
    if isinstance(value, list):
        return [form(f"{name}[{i}]", x) for i, x in enumerate(value)]
    if isinstance(value, dict):
        if all(type(k) is str for k in value) and MARK not in value:
            return {k: form(f"{name}[{k!r}]", x) for k, x in value.items()}
        items = [[form(f"a key of {name}", k), form(f"{name}[{k!r}]", x)] for k, x in value.items()]
        return {MARK: "dict", "items": items}
    if isinstance(value, tuple | set | frozenset):
        kind = next(kind for kind in (tuple, set, frozenset) if isinstance(value, kind))
        return {MARK: kind.__name__, "items": [form(f"{name}[{i}]", x) for i, x in enumerate(value)]}
    if isinstance(value, bytes | bytearray | io.BytesIO):
        raw = value.getvalue() if isinstance(value, io.BytesIO) else bytes(value)
        return {MARK: type(value).__name__, "base64": base64.b64encode(raw).decode()}
    if isinstance(value, complex):
        return {MARK: "complex", "items": [value.real, value.imag]}
    if isinstance(value, torch.dtype):
        return {MARK: "dtype", "name": str(value).removeprefix("torch.")}
    if isinstance(value, Tensor):
        return _tensor_form(name, value)
    raise ValueError(
        f"{name} cannot be saved: it is of type {type(value).__module__}.{type(value).__qualname__}. A checkpoint holds no "
        f"Python objects; give None, numbers, text, bytes, tensors, and lists, tuples, sets and dicts of these."
    )


def restored(given: Any) -> Any:
    """Inverse of :func:`form`.

    Raises:
        ValueError: when ``given`` is not its result.
    """
    if isinstance(given, list):
        return [restored(x) for x in given]
    if not isinstance(given, dict):
        return given
    if MARK not in given:
        return {k: restored(x) for k, x in given.items()}
    try:
        return _READERS[given[MARK]](given)
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(
            f"{str(given)[:80]} is no value that a save writes ({type(error).__name__}: {error})."
        ) from None


def _plain(value: Any) -> Any:
    """``value`` in JSON's own type of it: subclasses, such as numpy's float64 and enumerations of numbers, are equal to it."""
    kinds: tuple[Callable[[Any], Any], ...] = (bool, int, float, str)
    return next((kind(value) for kind in kinds if isinstance(value, kind)), None)  # type: ignore[arg-type]


def _tensor_form(name: str, value: Tensor) -> dict[str, Any]:
    if isinstance(value, DTensor) or value.layout is not torch.strided or value.is_quantized or value.is_meta:
        raise ValueError(
            f"{name} cannot be saved: it is not a dense tensor with values on this rank; give a plain tensor."
        )
    size = value.numel() * value.element_size()
    if size > MAX_TENSOR_BYTES:
        raise ValueError(
            f"{name} cannot be saved: it is a tensor of {size:,} bytes, and {MAX_TENSOR_BYTES:,} is the most; register it as "
            f"a buffer of the model, which is saved as a tensor."
        )
    host = value.detach().cpu().contiguous().reshape(-1)
    raw = host.view(torch.uint8).numpy().tobytes() if size else b""
    dtype = str(value.dtype).removeprefix("torch.")
    return {MARK: "tensor", "dtype": dtype, "shape": list(value.shape), "base64": base64.b64encode(raw).decode()}


def _tensor(given: dict[str, Any]) -> Tensor:
    raw = bytearray(base64.b64decode(given["base64"], validate=True))
    dtype = _dtype(given["dtype"])
    flat = torch.frombuffer(raw, dtype=torch.uint8).view(dtype) if raw else torch.empty(0, dtype=dtype, device="cpu")
    return flat.reshape(given["shape"])


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name)
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"torch.{name} is no dtype")
    return dtype


_READERS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "dict": lambda given: {restored(k): restored(x) for k, x in given["items"]},
    "tuple": lambda given: tuple(map(restored, given["items"])),
    "set": lambda given: set(map(restored, given["items"])),
    "frozenset": lambda given: frozenset(map(restored, given["items"])),
    "bytes": lambda given: base64.b64decode(given["base64"], validate=True),
    "bytearray": lambda given: bytearray(base64.b64decode(given["base64"], validate=True)),
    "BytesIO": lambda given: io.BytesIO(base64.b64decode(given["base64"], validate=True)),
    "complex": lambda given: complex(*given["items"]),
    "dtype": lambda given: _dtype(given["name"]),
    "tensor": _tensor,
}
