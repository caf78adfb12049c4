"""``tp_mode="auto"``: a tensor-parallel mode for every matrix, by what :mod:`.model` predicts on this machine."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from math import prod

import torch

from ..process_groups_config import Domain, ProcessGroupCollection, by_name
from ..sharding.layout import Layout
from ..sharding.tp_modes import TP_MODES
from .cheapest import choose
from .measure import measure
from .model import TEAM, Link, Machine, Matrices, mode_of, team_size

Rates = tuple[float, float, float, float]
"""FLOP/s of products, bytes/s of memory, seconds of latency and bytes/s of the link between ranks."""


@dataclass(frozen=True)
class Choice:
    """How the matrices of one layout come together.

    Attributes:
        mode: The tensor-parallel mode.
        layout: The layout, with the ranks that the mode works with as its domain.
        label: The mode and its predicted time, for tables.
    """

    mode: str
    layout: Layout
    label: str


def choices(
    counts: Mapping[Layout, int],
    groups: ProcessGroupCollection,
    *,
    device: torch.device,
    dtype: torch.dtype,
    precision: str,
    iterations: int,
    rates: Rates | None = None,
) -> dict[Layout, Choice]:
    """The exact mode of each layout with which a step of all matrices takes the least time.

    Every rank that shares a layout must call, in the same order: links are measured once in a process, and the slowest rank
    counts, so that all ranks choose alike.

    Args:
        counts: Layouts of parameters, whose domain spans splits and copies, and the number of parameters with each.
        groups: Process groups.
        device: Device of the matrices.
        dtype: Dtype in which matrices travel.
        precision: Arithmetic of Newton-Schulz: ``highest``, ``high`` or ``medium``.
        iterations: Number of Newton-Schulz iterations.
        rates: Rates to predict with; None measures them.
    """
    chosen: dict[Layout, Choice] = {}
    for domain in dict.fromkeys(lay.domain for lay in counts):
        assert domain is not None
        layouts = [lay for lay in counts if lay.domain == domain]
        if domain.size == 1:
            chosen |= {lay: Choice("owner", lay, "one rank") for lay in layouts}
            continue
        splits = {lay: groups.domain(by_name(lay.axes)) for lay in layouts}
        machine = (
            Machine(rates[0], rates[1], Link(*rates[2:]), device=device.type)
            if rates
            else _measured(domain, splits.values(), device, dtype, precision)
        )
        parts = [(lay, part, _matrices(part, counts[lay], dtype)) for lay in layouts for part in lay.part_layouts]
        predicted = choose([kind for _, _, kind in parts], machine, iterations=iterations)
        teamed = [kind for (_, _, kind), (mode, _) in zip(parts, predicted, strict=True) if mode == TEAM]
        team = team_size(teamed, machine, iterations=iterations) if teamed else 1
        for lay in layouts:
            own = [(part, best) for (whole, part, _), best in zip(parts, predicted, strict=True) if whole is lay]
            # A parameter has one mode: that of its largest part.
            _, (mode, _) = max(own, key=lambda item: prod(item[0].shape))
            ms = 1e3 * sum(cost.seconds for _, (_, cost) in own) / counts[lay]
            label = f"{mode} {team}" if mode == TEAM else mode
            chosen[lay] = Choice(*_placed(mode, lay, splits[lay], groups, team), f"auto: {label}, {ms:.2f} ms")
    return chosen


def _measured(
    domain: Domain,
    splits: Iterable[Domain],
    device: torch.device,
    dtype: torch.dtype,
    precision: str,
) -> Machine:
    """Rates of the slowest rank of ``domain``, and the slowest link among the ranks that split a matrix."""
    joint = measure(domain, device, dtype, precision=precision)
    split = max(splits, key=lambda domain: domain.size)
    if split.size in (1, domain.size):
        return joint
    # Each copy has a link of its own, and all must choose alike.
    links = domain.gather(measure(split, device, dtype, precision=precision).link)
    slowest = Link(max(link.latency for link in links), min(link.bandwidth for link in links))
    return replace(joint, link=slowest, far=joint.link)


def _placed(cost: str, lay: Layout, split: Domain, groups: ProcessGroupCollection, team: int) -> tuple[str, Layout]:
    """The mode that a name in :data:`.model.COSTS` stands for, and the layout with the ranks that it works with."""
    mode = mode_of(cost)
    if cost == TEAM:
        assert lay.domain is not None
        return mode, replace(lay, domain=groups.teamed(lay.domain, team))
    return mode, lay if TP_MODES[mode].copies_share else replace(lay, domain=split)


def _matrices(part: Layout, count: int, dtype: torch.dtype) -> Matrices:
    rows, cols = part.shape
    tp = prod(axis.size for axis in part.axes)
    copies = prod(axis.size for axis in part.copies)
    return Matrices(count, rows, cols, tp, copies, not part.splits_long_dim_only, dtype.itemsize)
