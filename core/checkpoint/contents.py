"""Contents of a checkpoint: a run's tensors under global names, and the settings of its optimizer."""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from ..module_names import named_buffers, named_parameters
from ..optimizer.members import members_of
from ..process_groups_config import ProcessGroupCollection
from ..sharding.layout import Layout
from ..sharding.parameter_layout import layout_of, local
from .boxes import Boxes

MODEL = "model."
STATE = "optimizer.state."
_BLOCK = "/shard_"  # parameter names have no slash
_PEAK_LR = ("initial_lr", "max_lr")
"""Settings of a group from which schedulers compute ``lr``; the first that exists counts."""


@dataclass(frozen=True)
class Group:
    """A parameter group: parameters to which one optimizer applies the same settings.

    Attributes:
        optimizer: Name of the optimizer's class.
        settings: Settings of the group and of the optimizer, as JSON types.
        parameters: Names of the parameters.
    """

    optimizer: str
    settings: dict[str, Any]
    parameters: list[str]


@dataclass(frozen=True)
class Contents:
    """This rank's part of a checkpoint.

    Attributes:
        tensors: Key → shard, to save or to load into. Keys are ``model.<name>``, ``optimizer.state.<slot>.<name>``, and
            ``optimizer.state.<slot>.<name>/shard_<i>_of_<n>_at_<ranges>`` for state of one block of a parameter, whose blocks
            have separate states.
        groups: One entry for each parameter group.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    groups: list[Group] = field(default_factory=list)

    @classmethod
    def of(
        cls, model_chunks: Sequence[nn.Module], optimizer: Optimizer | None, pgs: ProcessGroupCollection
    ) -> "Contents":
        """Parameters, persistent buffers and optimizer state of this rank; makes state that does not exist yet.

        Raises:
            ValueError: when two tensors have one name, a parameter of the optimizer has no name, the optimizer does not say how
                its state is laid out, or a module's ``state_dict`` has something that no key stands for.
        """
        contents = cls()
        names: dict[Tensor, str] = {}
        for name, x in _named_tensors(model_chunks):
            if x in names:
                continue  # shared by two chunks
            if f"{MODEL}{name}" in contents.tensors:
                raise ValueError(
                    f"two model chunks have different tensors called {name!r}; names must be global (decoder.layers.7…, "
                    f"not numbered from 0 in every chunk)."
                )
            names[x] = name
            contents.tensors[f"{MODEL}{name}"] = Boxes(local(x), layout_of(x, pgs, name=name))
        for member in members_of(optimizer):
            for group in member.param_groups:
                contents._add(member, group, names, pgs)
        return contents

    def _add(self, member: Any, group: dict[str, Any], names: dict[Tensor, str], pgs: ProcessGroupCollection) -> None:
        optimizer = type(member).__name__
        if not hasattr(member, "state_layouts"):
            raise ValueError(
                f"{optimizer} does not say how its state is laid out (state_layouts); save its state_dict yourself, or use an "
                f"optimizer of this package."
            )
        member._init_group(group)
        for p in group["params"]:
            if p not in names:
                raise ValueError(
                    f"{optimizer} has a parameter of shape {tuple(p.shape)} that is in none of the {len(names)} "
                    f"named tensors of model_chunks; pass the modules that the optimizer was built from."
                )
            for slot, layout in member.state_layouts(p, group).items():
                value = local(member.state[p][slot])
                key = f"{STATE}{slot}.{names[p]}"
                if layout is None:
                    key += _block(layout_of(p, pgs, name=names[p]))
                    layout = Layout.whole(value.shape)
                self.tensors[key] = Boxes(value, layout)
        if not group["params"]:
            return  # of a stage with nothing for this optimizer, which no other layout may have
        self.groups.append(Group(optimizer, _settings(member, group), [names[p] for p in group["params"]]))


def process_groups(pg_collection: Any, optimizer: Optimizer | None) -> ProcessGroupCollection:
    """``pg_collection``, or the process groups that the optimizer was built with if it is None."""
    sources = (pg_collection, *(getattr(x, "pg_collection", None) for x in (optimizer, *members_of(optimizer))))
    return next((ProcessGroupCollection.from_any(pgs) for pgs in sources if pgs is not None), ProcessGroupCollection())


def base_of(key: str) -> tuple[str, int]:
    """The key without the part that numbers a block, and the number of blocks; 0 for a tensor that is saved whole."""
    block = re.fullmatch(rf"(.+){_BLOCK}\d+_of_(\d+)(?:_at_[^/]+)?", key)
    return (block[1], int(block[2])) if block else (key, 0)


def parameter_of(key: str) -> str:
    """Name of the parameter that a key of optimizer state belongs to."""
    return base_of(key)[0].removeprefix(STATE).partition(".")[2]


def _named_tensors(model_chunks: Iterable[nn.Module]) -> Iterator[tuple[str, Tensor]]:
    """Parameters and persistent buffers; what else a ``state_dict`` has is extra state (:mod:`.extra_state`), or is refused."""
    for chunk in model_chunks:
        state = chunk.state_dict(keep_vars=True)
        persistent = {id(x) for x in state.values()}
        named: list[tuple[str, Tensor]] = list(named_parameters([chunk]))
        named += [(name, x) for name, x in named_buffers(chunk) if id(x) in persistent]
        known = {id(x) for _, x in named}
        for name, x in state.items():
            if x is not None and id(x) not in known and name.rpartition(".")[2] != "_extra_state":
                raise ValueError(
                    f"the model's state_dict has {name!r} ({type(x).__name__}), which is neither a parameter nor a buffer of "
                    f"its modules, so a load could not put it back; register it as a buffer, or return it from "
                    f"get_extra_state()."
                )
        yield from named


def _block(layout: Layout) -> str:
    """End of the key for state of this rank's block of a parameter; empty when the block is the whole parameter."""
    index = 0
    for axis in layout.axes:
        index = index * axis.size + axis.index
    # Blocks of one size may hold different rows, by a strided cut, or may be cut in the other dim.
    held = [
        "+".join(f"{lo}-{hi}" for lo, hi in split.held[split.axis.index]) if split else "all" for split in layout.splits
    ]
    at = f"{index}_of_{prod(axis.size for axis in layout.axes)}_at_{','.join(held)}"
    return f"{_BLOCK}{at}" if layout.axes else ""


def _settings(member: Optimizer, group: dict[str, Any]) -> dict[str, Any]:
    """The settings that JSON can hold; functions and process groups are left out."""
    values = {k: v for k, v in vars(member).items() if not k.startswith("_")} | group
    if peak := [values[k] for k in _PEAK_LR if k in values]:
        values["lr"] = peak[0]  # the scheduler changes lr itself every step
    skip = {"params", "param_names", *_PEAK_LR}
    plain = {k: v.item() if isinstance(v, Tensor) and v.numel() == 1 else v for k, v in values.items() if k not in skip}
    settings: dict[str, Any] = json.loads(json.dumps({k: v for k, v in plain.items() if _is_plain(v)}))
    return settings


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)
