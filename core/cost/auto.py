"""Picks a tensor-parallel mode for every matrix, by what :mod:`core.cost.model` predicts on this machine."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from math import prod

import torch

from ..process_groups_config import Domain, ProcessGroupCollection, by_name
from ..sharding.layout import Layout
from ..sharding.tp_modes import TP_MODES
from . import measure as machine
from .cheapest import choose
from .model import TEAM, Link, Machine, Matrices, mode_of, team_size

Rates = tuple[float, float, float, float]
"""FLOP/s of products, bytes/s of memory, seconds of latency and bytes/s of the link between ranks."""


@dataclass(frozen=True)
class Choice:
    """How the matrices of one layout come together.

    Attributes:
        mode: The tensor-parallel mode.
        layout: The layout with the ranks that the mode works with.
        label: The mode and its predicted time, for tables.
    """

    mode: str
    layout: Layout
    label: str


def choices(
    layouts: Mapping[Layout, int],
    groups: ProcessGroupCollection,
    *,
    device: torch.device,
    dtype: torch.dtype,
    precision: str,
    iterations: int,
    given: Rates | None = None,
) -> dict[Layout, Choice]:
    """The exact mode of each layout for which a step of all matrices takes the least time.

    Every rank that shares a layout must call, in the same order: links are measured once in a process, and the slowest rank
    counts, so that all choose alike.

    Args:
        layouts: Of parameters, with their domain of splits and copies; and how many there are of each.
        groups: Process groups.
        device: Where the matrices are.
        dtype: In which they travel.
        precision: Arithmetic of Newton-Schulz.
        iterations: Of Newton-Schulz.
        given: Rates to predict with, instead of measured ones.
    """
    chosen: dict[Layout, Choice] = {}
    for domain in dict.fromkeys(lay.domain for lay in layouts):
        assert domain is not None
        here = [lay for lay in layouts if lay.domain == domain]
        if domain.size == 1:
            chosen |= {lay: Choice("owner", lay, "one rank") for lay in here}
            continue
        splits = {lay: groups.domain(by_name(lay.axes)) for lay in here}
        rates = (
            Machine(given[0], given[1], Link(*given[2:]), device=device.type)
            if given
            else _measured(domain, splits.values(), groups, device, dtype, precision)
        )
        entries = [(lay, part, _matrices(part, layouts[lay], dtype)) for lay in here for part in lay.part_layouts]
        predicted = choose([matrices for _, _, matrices in entries], rates, iterations=iterations)
        teamed = [m for (_, _, m), (mode, _) in zip(entries, predicted, strict=True) if mode == TEAM]
        team = team_size(teamed, rates, iterations=iterations) if teamed else 1
        for lay in here:
            own = [(part, found) for (owner, part, _), found in zip(entries, predicted, strict=True) if owner is lay]
            _, (mode, _) = max(own, key=lambda item: prod(item[0].shape))
            ms = 1e3 * sum(cost.seconds for _, (_, cost) in own) / layouts[lay]
            label = f"{mode} {team}" if mode == TEAM else mode
            chosen[lay] = Choice(*_placed(mode, lay, splits[lay], groups, team), f"auto: {label}, {ms:.2f} ms")
    return chosen


def _measured(
    domain: Domain,
    splits: Iterable[Domain],
    groups: ProcessGroupCollection,
    device: torch.device,
    dtype: torch.dtype,
    precision: str,
) -> Machine:
    """Rates of the slowest rank of ``domain``, and the slowest link among the ranks that split a matrix."""
    joint = machine.measure(domain, device, dtype, precision=precision)
    split = max(splits, key=lambda some: some.size)
    if split.size in (1, domain.size):
        return joint
    # Each copy has a link of its own, and all must choose alike.
    links = domain.gather(machine.measure(split, device, dtype, precision=precision).link)
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
