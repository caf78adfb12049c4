"""Which variant of the Newton-Schulz iteration each shape takes: by the static rule, by measurement, or as a file says."""

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
"""Of plan files; another one is not read."""

REPS = 3
"""Timed runs of a variant, after one that is not; the shortest counts."""


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
    """The variant of whole matrices of each shape.

    Ranks that run the same matrices must use the same plan, or their results differ by rounding.

    Args:
        choice: ``static``: :func:`.variants.variant_for`; nothing is measured, read or written. ``tune``: the fastest on this
            device of those that are as accurate; kept in :func:`cache_file`, so that later runs neither measure nor differ.
            Otherwise the path of a plan file that ``tune`` wrote.
        shapes: (rows, cols) of whole matrices.
        dtype: In which they are given to :func:`.newton_schulz.newton_schulz`.
        precision: ``highest``, ``high`` or ``medium``.
        device: Where they are.
        coefs: Polynomial of each iteration.
        agree: Calls its argument on one rank and returns the result on all; default: for one rank. Not called for ``static``.

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
    """Where ``tune`` keeps what it measured: ``$XDG_CACHE_HOME/shardstep/newton_schulz.json``, or the same in ``~/.cache``."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "shardstep" / "newton_schulz.json"


@dataclass(frozen=True)
class _Case:
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
    known = _read(path) if path.exists() else {}
    plan: Plan = {}
    fresh: dict[str, Any] = {}
    for shape in shapes:
        key = case.key(shape)
        kept = _variant(known[key], path) if key in known else None
        # Another release may have allowed other variants.
        if kept not in case.possible(shape):
            spent = _seconds(case, shape)
            kept = min(spent, key=spent.__getitem__)
            fresh[key] = kept.to_json()
        plan[shape] = kept
    if fresh:
        _write(path, {**(_read(path) if path.exists() else {}), **fresh})
    return plan


def _pinned(case: _Case, shapes: Sequence[Shape], path: Path) -> Plan:
    known = _read(path)
    plan: Plan = {}
    for shape in shapes:
        key = case.key(shape)
        if key not in known:
            raise ValueError(
                f"{path} has no entry {key!r}. Run once with 'tune' on this device: it writes {cache_file()}."
            )
        plan[shape] = _variant(known[key], path)
        if plan[shape] not in case.possible(shape):
            raise ValueError(
                f"{path}: {plan[shape]} does not keep the accuracy of {case.precision!r} for {key!r}; possible: "
                f"{case.possible(shape)}."
            )
    return plan


def _seconds(case: _Case, shape: Shape) -> dict[Variant, float]:
    """What each variant takes for a matrix of normal entries; in turns, so that all meet the same disturbances."""
    x = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0)).to(case.device, case.dtype)
    spent: dict[Variant, list[float]] = {variant: [] for variant in case.possible(shape)}
    for _ in range(REPS + 1):
        for variant, times in spent.items():
            rule = newton_schulz(x, Layout.whole(shape), coefs=case.coefs, precision=case.precision, variant=variant)
            began = time.perf_counter()
            # One whole matrix asks nobody for anything: the rule runs to its end.
            assert next(rule, None) is None
            if case.device.type != "cpu":
                torch.accelerator.synchronize(case.device)
            times.append(time.perf_counter() - began)
    return {variant: min(times[1:]) for variant, times in spent.items()}


def _device_name(device: torch.device) -> str:
    if device.type != "cpu":
        return str(torch.cuda.get_device_name(device)) if device.type == "cuda" else device.type
    found = torch.cpu.get_capabilities()
    units = [name for name in ("avx512_bf16", "amx_bf16", "avx512_fp16", "amx_fp16") if found.get(name)]
    name = found.get("cpu_name", found.get("architecture", "cpu"))
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
