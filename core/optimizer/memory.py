"""Memory of an optimizer's state, as its declaration predicts it and as it is measured."""

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod

from torch import Tensor
from torch.optim import Optimizer

from ..sharding.parameter_layout import local
from .members import members_of


@dataclass(frozen=True)
class StateMemory:
    """One kind of state tensor of one optimizer, on this rank.

    Attributes:
        optimizer: Class of the optimizer.
        state: Name of the state tensor.
        parameters: Entries of the whole parameters that have this state.
        whole: Bytes of the whole state tensors, each counted once even if several ranks keep it.
        predicted: Bytes that this rank keeps according to the declaration.
        measured: Bytes that this rank keeps.
    """

    optimizer: str
    state: str
    parameters: int
    whole: int
    predicted: int
    measured: int


@dataclass(frozen=True)
class MemoryReport:
    """The state memory of an optimizer; ``str`` makes a table of it.

    Attributes:
        rows: One row for each optimizer and kind of state tensor.
        parameters: Entries of all whole parameters that this rank has a part of.
    """

    rows: tuple[StateMemory, ...]
    parameters: int

    @property
    def bytes_per_parameter(self) -> float:
        """Bytes of state for each entry of a parameter, in the whole model."""
        return sum(row.whole for row in self.rows) / max(1, self.parameters)

    @property
    def predicted(self) -> int:
        """Bytes that this rank keeps according to the declarations."""
        return sum(row.predicted for row in self.rows)

    @property
    def measured(self) -> int:
        """Bytes that this rank keeps."""
        return sum(row.measured for row in self.rows)

    def __str__(self) -> str:
        """The rows and their sum as a table."""
        head = ("optimizer", "state", "bytes/parameter", "predicted here", "measured here")
        cells = [
            (r.optimizer, r.state, f"{r.whole / max(1, r.parameters):.4g}", f"{r.predicted:,}", f"{r.measured:,}")
            for r in self.rows
        ]
        total = ("all", "", f"{self.bytes_per_parameter:.4g}", f"{self.predicted:,}", f"{self.measured:,}")
        table = [head, *cells, total]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in table)


def memory_report(optimizer: Optimizer) -> MemoryReport:
    """Memory of the state of ``optimizer``, one of this package or a chain of them, on this rank.

    Raises:
        ValueError: for an optimizer that does not declare its state.
    """
    members = members_of(optimizer)
    rows: dict[tuple[str, str], StateMemory] = {}
    entries = 0
    for member in members:
        if not hasattr(member, "state_sizes"):
            raise ValueError(f"{type(member).__name__} does not declare its state; use an optimizer of this package.")
        kind = type(member).__name__
        kept: dict[str, list[Tensor]] = {}
        for group in member.param_groups:
            for p in group["params"]:
                size = prod(member.layout(p).shape)
                entries += size
                for slot, (shard, whole) in member.state_sizes(p, group).items():
                    kept.setdefault(slot, []).append(local(member.state[p][slot]))
                    was = rows.get((kind, slot), StateMemory(kind, slot, 0, 0, 0, 0))
                    rows[kind, slot] = StateMemory(
                        kind, slot, was.parameters + size, was.whole + whole, was.predicted + shard, was.measured
                    )
        for slot, tensors in kept.items():
            row = rows[kind, slot]
            rows[kind, slot] = StateMemory(
                kind, slot, row.parameters, row.whole, row.predicted, row.measured + _storage_bytes(tensors)
            )
    return MemoryReport(tuple(rows.values()), entries)


def _storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storage of ``tensors``; views of one stack share their storage, which counts once."""
    return sum({s.data_ptr(): s.nbytes() for t in tensors for s in [t.untyped_storage()] if s.nbytes()}.values())
