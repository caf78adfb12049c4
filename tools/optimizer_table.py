"""The table of optimizers in docs/, made from the registry: torchrun --nproc-per-node 2 -m tools.optimizer_table [--write]."""

import argparse
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from core.optimizer.emerging_optimizers import get_optimizer, list_optimizers
from core.optimizer.memory import memory_report
from core.optimizer.optimizer_config import OptimizerConfig
from core.optimizer.registry import entry_of
from core.optimizer.steps.torch_class import LibraryStep
from core.process_groups_config import ProcessGroupCollection

PAGE = Path(__file__).parent.parent / "docs" / "optimizers.md"
BEGIN, END = "<!-- table of optimizers: begin -->", "<!-- table of optimizers: end -->"
LIBRARY = "https://github.com/NVIDIA-NeMo/Emerging-Optimizers"
ROWS, COLS = 1024, 4096
_COLLECTIVES = ("all_reduce", "all_to_all_single", "all_gather_into_tensor", "all_gather", "broadcast")


def table(pg: dist.ProcessGroup) -> str:
    """The table; ``pg`` is a tensor-parallel group of two ranks, all of which must ask."""
    rows = [
        ("name", "source", "state, bytes/parameter", "collectives a step", "needs"),
        ("---", "---", "---", "---", "---"),
        *(
            (f"`{name}`", _source(name), f"{state_bytes(name):.4g}", str(collectives(name, pg)), _needs(name))
            for name in list_optimizers()
        ),
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def state_bytes(name: str) -> float:
    """Bytes of state for each entry of a float32 matrix of 1024 x 4096, all ranks together."""
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(COLS, ROWS, bias=False))
    optimizer = get_optimizer(OptimizerConfig(optimizer=name, lr=1e-3), [model])
    return memory_report(optimizer).bytes_per_parameter


def collectives(name: str, pg: dist.ProcessGroup) -> int:
    """Collectives of a step of six matrices, half of them split by rows and half by columns over ``pg``.

    The most of a few steps; settings are the defaults of :class:`OptimizerConfig`.
    """
    torch.manual_seed(0)
    size = dist.get_world_size(pg)
    model = nn.Sequential(*(nn.Linear(192, 160, bias=False) for _ in range(6)))
    for i, linear in enumerate(model):
        linear.weight.tensor_model_parallel = True  # type: ignore[union-attr]
        linear.weight.partition_dim = i % 2  # type: ignore[union-attr]
    optimizer = get_optimizer(OptimizerConfig(optimizer=name, lr=1e-3), [model], ProcessGroupCollection(tp=pg))
    most = 0
    for step in range(4):
        for i, p in enumerate(model.parameters()):
            generator = torch.Generator().manual_seed(100 * step + i + size * dist.get_rank(pg))
            p.grad = torch.randn(p.shape, generator=generator)
        with _counted() as calls:
            optimizer.step()
        most = max(most, len(calls))
    return most


def written() -> str:
    """The table that the page holds."""
    found = re.search(f"{BEGIN}\n(.*?)\n?{END}", PAGE.read_text(), re.DOTALL)
    if found is None:
        raise ValueError(f"{PAGE} has no lines {BEGIN} and {END}; put them where the table belongs.")
    return found[1]


@contextmanager
def _counted() -> Iterator[list[str]]:
    """Collects the names of the collectives that are called."""
    calls: list[str] = []
    originals = {name: getattr(dist, name) for name in _COLLECTIVES}

    def counting(name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            return originals[name](*args, **kwargs)

        return call

    for name in _COLLECTIVES:
        setattr(dist, name, counting(name))
    try:
        yield calls
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


def _source(name: str) -> str:
    """The paper: the first address in the docstring of the class, or of a class that it is made from."""
    if issubclass(entry_of(name).optimizer_cls, LibraryStep):
        return f"[emerging-optimizers]({LIBRARY})"
    for cls in entry_of(name).optimizer_cls.__mro__:
        doc = cls.__doc__ or ""
        if url := re.search(r"https?://[^\s)>`\]]+", doc):
            address = url[0].rstrip(".,;")
            arxiv = re.search(r"arxiv\.org/(?:abs|pdf)/([\d.]+\d)", address)
            return f"[{f'arXiv {arxiv[1]}' if arxiv else address.split('/')[2]}]({address})"
    raise ValueError(f"the docstring of {entry_of(name).optimizer_cls.__name__} names no source; add one.")


def _needs(name: str) -> str:
    entry = entry_of(name)
    what = "matrices; the rest goes to adamw" if entry.default_param_overrides else "parameters of any shape"
    extra = getattr(entry.optimizer_cls, "needs", "")
    return f"{what}; {extra}" if extra else what


def main() -> None:
    """Print the table, or write it into the PAGE."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="put it into PAGE.md")
    write = parser.parse_args().write
    dist.init_process_group("gloo")
    assert dist.group.WORLD is not None
    text = table(dist.group.WORLD)
    if dist.get_rank() == 0:
        if write:
            before, _, rest = PAGE.read_text().partition(BEGIN)
            PAGE.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.partition(END)[2]}")
        else:
            print(text)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
