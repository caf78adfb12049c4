"""A check of the first step: a sample of parameters must change as they do when one process without groups steps them whole.

A layout that is set up wrongly, or a bug in a mode, gives no error: the loss falls all the same, only less. This check takes
one step and needs no second run.
"""

import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.optim import Optimizer

from ..process_groups_config import ProcessGroupCollection, gather
from ..sharding.parameter_layout import layout_of
from ..sharding.tp_modes import TP_MODES, working_axes
from .chained import ChainedOptimizer
from .probe_sample import Place, Row, Sample, compared, sampled, stepped
from .steps.base import ShardedStep


class ProbeError(RuntimeError):
    """The first step of the layout is not that of the unsharded model; its text has a table. Parameters have taken the step."""


class _Candidate(NamedTuple):
    """What all ranks know of a parameter on one of them.

    Attributes:
        stage: Index of the pipeline stage.
        optimizer: Name of its optimizer.
        name: Name of the parameter.
        kind: What tells it from parameters that are stepped in another way.
        entries: Number of entries of the whole parameter.
        ready: Whether this step changes it: it has a gradient, and a learning rate that is not 0.
        exact: Whether its mode is exact by definition.
    """

    stage: int
    optimizer: str
    name: str
    kind: tuple[Any, ...]
    entries: int
    ready: bool
    exact: bool


def probe(
    optimizer: Optimizer, *, tell: Callable[[str], None] | None = None, group: ProcessGroup | None = None
) -> "Probe":
    """Compare the next step of ``optimizer`` with the unsharded step, for a sample of its parameters.

    Of each kind of parameter (optimizer, mode, cut, dtype, number of dims, tall or wide) on each pipeline stage the smallest is
    taken. When the step is about to be taken, with gradients as they are then, the whole parameter, its gradient and its state
    come to one rank; there a copy of the optimizer, with the same class and settings but without process groups, steps them.
    After the step all ranks compare their shards and copies with the result. Parameters without a gradient, or with a learning
    rate of 0, are left out; a step that changes none (the first of a warm-up from 0) is passed over, and the next one is
    compared.

    The norm over the whole model by which some optimizers scale (``mars``, ``lamb`` with ``max_grad_norm``) is taken from the
    run. ``blockwise`` is another step than the unsharded one by definition: its parameters are not compared, and the report
    says so.

    All ranks must take the step together. That excludes :class:`.early_step.EarlyStep`, which does not call ``step()``, and
    :class:`.speculative_step.SpeculativeStep` on several pipeline stages, which step one after the other.

    Args:
        optimizer: A chain (:func:`get_optimizer`), or one optimizer of this package.
        tell: Called once, on every rank, with the report when the step has been compared and agrees. None: nothing is said, but a
            warning is given when parameters could not be compared.
        group: The ranks that step together; None: the default process group, or one process.

    Returns:
        The probe, with its ``rows`` and ``report`` after the step.

    Raises:
        TypeError: for an optimizer of another package that is not in a chain.
        ProbeError: by ``optimizer.step()``, on all ranks, when an entry of a parameter differs by more than its bound.
    """
    return Probe(optimizer, tell, group)


class Probe:
    """The comparison of a step; see :func:`probe`.

    Attributes:
        rows: One for each parameter that was compared, the same on all ranks; empty before the step.
        report: What was compared, in words; empty before the step.
    """

    def __init__(
        self, optimizer: Optimizer, tell: Callable[[str], None] | None = None, group: ProcessGroup | None = None
    ) -> None:
        if not isinstance(optimizer, ChainedOptimizer | ShardedStep):
            raise TypeError(
                f"{type(optimizer).__name__} is no optimizer of this package, which cannot say how its state is cut; give "
                f"probe() a chain that get_optimizer made, or wrap the class with on_whole_tensors."
            )
        self.rows: list[Row] = []
        self.report = ""
        self._optimizer, self._tell, self._group = optimizer, tell, group
        self._groups = ProcessGroupCollection.from_any(optimizer.pg_collection or ProcessGroupCollection())
        self._samples: list[Sample] = []
        self._left_out: list[str] = []
        self._hooks = [optimizer.register_step_pre_hook(self._before), optimizer.register_step_post_hook(self._after)]

    def _before(self, _: Optimizer, args: Any, kwargs: Any) -> Any:
        step, *rest = args
        closure = rest[0] if rest else kwargs.get("closure")
        if closure is None:
            self._take()
            return None

        def with_gradients() -> Any:
            with torch.enable_grad():
                loss = closure()
            self._take()
            return loss

        return (step, with_gradients), {}

    @torch.no_grad()
    def _take(self) -> None:
        """Choose the sample and bring it to the ranks that step it."""
        places = {(place.optimizer, place.name): place for place in self._places()}
        local = [self._candidate(place) for place in places.values()]
        everywhere = [candidate for rank in gather(local, self._group) for candidate in rank]
        self._left_out = sorted({c.name for c in everywhere if not c.exact})
        self._samples = []
        for turn, key in enumerate(_chosen(everywhere)):
            if key in places:
                self._samples.append(sampled(places[key], turn))

    @torch.no_grad()
    def _after(self, *_: Any) -> None:
        local_rows, failures = [], []
        for sample in self._samples:
            whole, failure = stepped(sample)
            failures += [failure] if failure else []
            local_rows.append(compared(sample, whole))
        everywhere = gather((local_rows, failures), self._group)
        self._samples = []
        worst: dict[tuple[str, str], Row] = {}
        for row in (row for rows, _ in everywhere for row in rows):
            key = row.optimizer, row.parameter
            if key not in worst or row.share > worst[key].share:
                worst[key] = row
        if not worst and not self._left_out:
            return  # a step that changes nothing
        for hook in self._hooks:
            hook.remove()
        self.rows = sorted(worst.values(), key=lambda row: -row.share)
        if failed := [failure for _, failures in everywhere for failure in failures]:
            raise ProbeError(f"the first step could not be compared with the unsharded one: {'; '.join(failed)}")
        self.report = "\n".join(self._lines())
        if any(not row.share <= 1 for row in self.rows):
            raise ProbeError(f"{_REFUSED}\n{table(self.rows)}" + (f"\n{self._blockwise()}" if self._left_out else ""))
        if self._tell is not None:
            self._tell(self.report)
        elif self._left_out:
            warnings.warn(self._blockwise(), stacklevel=2)

    def _lines(self) -> Iterable[str]:
        if self.rows:
            first = self.rows[0]
            said = (
                f"the largest difference is {first.difference:.1e} of {first.bound:.1e} allowed, in {first.parameter}"
            )
            how = said if first.difference else "they are equal bit for bit"
            yield f"The first step is the unsharded one for {len(self.rows)} sampled parameters; {how}."
        if self._left_out:
            yield self._blockwise()

    def _blockwise(self) -> str:
        more = " and others" if len(self._left_out) > 3 else ""
        return (
            f"{len(self._left_out)} parameters were not compared ({', '.join(self._left_out[:3])}{more}): blockwise mode takes "
            f"each shard for a matrix of its own, which is not the unsharded step by definition. Take another tp_mode to compare."
        )

    def _places(self) -> Iterable[Place]:
        optimizer = self._optimizer
        members = (
            optimizer.members if isinstance(optimizer, ChainedOptimizer) else {type(optimizer).__name__: optimizer}
        )
        for optimizer_name, member in members.items():
            for group in member.param_groups:
                for p in group["params"]:
                    name = _name(member, p)
                    layout = layout_of(p, self._groups, name=name)
                    layout = replace(layout, domain=self._groups.domain(working_axes(layout, "owner")))
                    mode = member.mode_of(p) if isinstance(member, ShardedStep) else "as it is"
                    yield Place(name, p, layout, optimizer_name, member, group, mode)

    def _candidate(self, place: Place) -> _Candidate:
        shape, layout = place.layout.shape, place.layout
        long = (shape[-2] > shape[-1]) - (shape[-2] < shape[-1]) if len(shape) > 1 else 0
        parts = getattr(place.p, "matrix_parts", None), getattr(place.p, "is_qkv", False)
        kind = (place.mode, layout.describe(), len(shape), long, str(place.p.dtype), str(parts))
        mode = TP_MODES.get(getattr(place.member, "tp_mode", ""))
        ready = place.p.grad is not None and float(place.group["lr"]) != 0
        exact = mode is None or mode.exact or layout.is_whole
        return _Candidate(self._groups.axis("pp").index, place.optimizer, place.name, kind, prod(shape), ready, exact)


_REFUSED = (
    "the first step of this layout is not the unsharded step: parameters differ by more than rounding explains. They have taken "
    "the step, so load a checkpoint or begin anew. Check the attributes and placements that say how these parameters are cut, "
    "that their gradients are summed over all ranks before the step, and try another tp_mode."
)


def table(rows: Sequence[Row]) -> str:
    """A table of ``rows``."""
    cells = [("parameter", "optimizer", "largest difference", "bound", "layout")]
    for row in rows:
        differs = "" if row.share <= 1 else "  differs"
        cells.append((row.parameter, row.optimizer, f"{row.difference:.2e}", f"{row.bound:.2e}", row.layout + differs))
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in cells)


def _chosen(candidates: Iterable[_Candidate]) -> list[tuple[str, str]]:
    """Optimizer and name of what is compared: of each kind on each stage the smallest that changes on all ranks that hold it."""
    held: dict[tuple[int, str, str], list[_Candidate]] = defaultdict(list)
    for candidate in candidates:
        held[candidate.stage, candidate.optimizer, candidate.name].append(candidate)
    smallest: dict[tuple[Any, ...], _Candidate] = {}
    for alike in held.values():
        first = alike[0]
        if all(c.ready and c.exact for c in alike):
            key = first.stage, first.optimizer, first.kind
            smallest[key] = min(smallest.get(key, first), first, key=lambda c: (c.entries, c.name))
    return sorted({(candidate.optimizer, candidate.name) for candidate in smallest.values()})


def _name(member: Any, p: Tensor) -> str:
    """The name by which the randomness of ``p`` is keyed, which the copy must have too."""
    if isinstance(member, ShardedStep):
        return member._key(p)
    named = (
        (n, q)
        for group in member.param_groups
        for n, q in zip(group.get("param_names", ()), group["params"], strict=False)
    )
    return next((name for name, q in named if q is p), f"parameter of shape {tuple(p.shape)}")
