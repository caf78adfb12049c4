"""Choice of the Newton-Schulz variant for each shape: by the static rule, by measurement, or from a plan file."""

import json
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import torch

from ..sharding.layout import Layout
from .newton_schulz import newton_schulz
from .variants import Coefficients, Variant, variants_for

Shape = tuple[int, int]
Plan = dict[Shape, Variant]

FORMAT = 1
"""Version of the format of plan files; files of another version are refused."""

TIMED_RUNS = 3
"""Timed runs of each variant, after one run that is not timed; the shortest time counts."""


def plan_for(
    choice: str,
    shapes: Iterable[Sequence[int]],
    *,
    dtype: torch.dtype,
    precision: str,
    device: torch.device,
    coefs: Coefficients,
    agree: Callable[[Callable[[], Plan]], Plan] | None = None,
) -> Plan:
    """The variant for whole matrices of each shape.

    Ranks that run the same matrices must use the same plan, or their results differ by rounding.

    Args:
        choice: ``static``: the result of :func:`.variants.variant_for`; nothing is measured, read or written. ``tune``: the
            fastest variant on this device among those that are as accurate; it is kept in :func:`cache_file`, so that later
            runs neither measure again nor choose differently. Otherwise the path of a plan file that ``tune`` wrote.
        shapes: (rows, cols) of whole matrices.
        dtype: Dtype of the matrices that :func:`.newton_schulz.newton_schulz` gets.
        precision: ``highest``, ``high`` or ``medium``.
        device: Device of the matrices.
        coefs: Coefficients of each iteration.
        agree: Function that calls its argument on one rank and returns the result on all; not called for ``static``. None on a
            single rank.

    Raises:
        ValueError: for a file that cannot be read, lacks a shape, or names a variant that cannot be used for it.
    """
    wanted = list(dict.fromkeys((int(rows), int(cols)) for rows, cols in shapes))
    case = _Case(dtype, precision, device, coefs)
    if choice == "static":
        return {shape: case.possible(shape)[0] for shape in wanted}
    make = partial(_tuned, case, wanted) if choice == "tune" else partial(_pinned, case, wanted, Path(choice))
    return make() if agree is None else agree(make)


def cache_file() -> Path:
    """Plan file that ``tune`` writes: ``$XDG_CACHE_HOME/shardstep/newton_schulz.json``, by default in ``~/.cache``."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "shardstep" / "newton_schulz.json"


@dataclass(frozen=True)
class _Case:
    """All that a choice of variants depends on, but for the shape."""

    dtype: torch.dtype
    precision: str
    device: torch.device
    coefs: Coefficients

    def possible(self, shape: Shape) -> list[Variant]:
        return variants_for(shape, self.dtype, self.precision, self.device, self.coefs)

    def key(self, shape: Shape) -> str:
        steps = ";".join(",".join(f"{c:g}" for c in abc) for abc in self.coefs)
        size = f"{shape[0]}x{shape[1]}"
        dtype = str(self.dtype).removeprefix("torch.")
        return " | ".join((_device_name(self.device), f"torch {torch.__version__}", size, dtype, self.precision, steps))


def _tuned(case: _Case, shapes: Sequence[Shape]) -> Plan:
    path = cache_file()
    cached = _read(path) if path.exists() else {}
    plan: Plan = {}
    measured: dict[str, Any] = {}
    for shape in shapes:
        key = case.key(shape)
        variant = _variant(cached[key], path) if key in cached else None
        # Another release may have allowed other variants.
        if variant not in case.possible(shape):
            seconds = _seconds(case, shape)
            variant = min(seconds, key=seconds.__getitem__)
            measured[key] = variant.to_json()
        plan[shape] = variant
    if measured:
        _write(path, {**(_read(path) if path.exists() else {}), **measured})
    return plan


def _pinned(case: _Case, shapes: Sequence[Shape], path: Path) -> Plan:
    pinned = _read(path)
    plan: Plan = {}
    for shape in shapes:
        key = case.key(shape)
        if key not in pinned:
            raise ValueError(
                f"{path} has no entry {key!r}. Run once with 'tune' on this device: it writes {cache_file()}."
            )
        plan[shape] = _variant(pinned[key], path)
        if plan[shape] not in case.possible(shape):
            raise ValueError(
                f"{path}: {plan[shape]} does not keep the accuracy of {case.precision!r} for {key!r}; possible: "
                f"{case.possible(shape)}."
            )
    return plan


def _seconds(case: _Case, shape: Shape) -> dict[Variant, float]:
    """Seconds that each variant takes for a matrix of normal entries; run in turns, so that all meet the same disturbances."""
    x = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float32, device="cpu")
    x = x.to(case.device, case.dtype)
    times: dict[Variant, list[float]] = {variant: [] for variant in case.possible(shape)}
    for _ in range(TIMED_RUNS + 1):
        for variant in times:
            rule = newton_schulz(x, Layout.whole(shape), coefs=case.coefs, precision=case.precision, variant=variant)
            began = time.perf_counter()
            # The rule of one whole matrix yields no request: it runs to its end.
            assert next(rule, None) is None
            if case.device.type != "cpu":
                torch.accelerator.synchronize(case.device)
            times[variant].append(time.perf_counter() - began)
    return {variant: min(runs[1:]) for variant, runs in times.items()}


def _device_name(device: torch.device) -> str:
    if device.type != "cpu":
        return str(torch.cuda.get_device_name(device)) if device.type == "cuda" else device.type
    capabilities = torch.cpu.get_capabilities()
    units = [unit for unit in ("avx512_bf16", "amx_bf16", "avx512_fp16", "amx_fp16") if capabilities.get(unit)]
    name = capabilities.get("cpu_name", capabilities.get("architecture", "cpu"))
    return " ".join([str(name), torch.backends.cpu.get_cpu_capability(), *units, f"{torch.get_num_threads()} threads"])


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{path} cannot be read as a plan ({error}); possible choices: 'static', 'tune', a plan file."
        ) from error
    if (
        not isinstance(content, dict)
        or content.get("format") != FORMAT
        or not isinstance(content.get("variants"), dict)
    ):
        raise ValueError(f"{path} is no plan of format {FORMAT}; delete it, and make one with 'tune'.")
    variants: dict[str, Any] = content["variants"]
    return variants


def _write(path: Path, variants: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # Renamed into place: a process that reads meanwhile sees the old file or the new one.
    with NamedTemporaryFile("w", dir=path.parent, suffix=".json", delete=False) as file:
        json.dump({"format": FORMAT, "variants": variants}, file, indent=1, sort_keys=True)
    os.replace(file.name, path)


def _variant(value: Any, path: Path) -> Variant:
    try:
        return Variant.from_json(value)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
