"""torch's default dtype and device belong to the user's own code: they do not reach what this package makes."""

import ast
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from core.checkpoint import load, save
from core.faults import Guard, check_state
from core.optimizer.emerging_optimizers import get_optimizer, list_optimizers
from core.optimizer.optimizer_config import OptimizerConfig

FACTORIES = """tensor zeros ones empty full arange eye rand randn randint randperm linspace logspace as_tensor scalar_tensor
empty_strided frombuffer""".split()
HAS_NO_DEVICE = {"frombuffer"}
"""Functions whose result is always on the host."""


@contextmanager
def defaults(dtype: torch.dtype, device: str) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


def run(name: str, folder: Path, dtype: torch.dtype, device: str) -> list[torch.Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4, bias=False))
    gradients = [[torch.randn_like(p) for p in model.parameters()] for _ in range(3)]
    found = []
    with defaults(dtype, device):
        optimizer = get_optimizer(OptimizerConfig(optimizer=name, lr=0.01), model)
        guard = Guard(optimizer)
        for at, of_step in enumerate(gradients):
            for p, g in zip(model.parameters(), of_step, strict=True):
                p.grad = g.clone()
            assert guard.judge(at, 1.0, max_norm=0.5).take
            optimizer.step()
            if at == 1:
                save(folder, step=at, model_chunks=[model], optimizer=optimizer, extra={"lr": 0.1})
                optimizer.state.clear()
                load(folder, model_chunks=[model], optimizer=optimizer)
        optimizer.load_state_dict(optimizer.state_dict())
        check_state(optimizer, 3)
    for held in optimizer.state_dict()["state"].values():
        found += [value for _, value in sorted(held.items())]
    return [p.detach() for p in model.parameters()] + found


@pytest.mark.parametrize("name", list_optimizers())
def test_the_step_does_not_see_them(name, tmp_path):
    expected = run(name, tmp_path / "plain", torch.float32, "cpu")
    for k, (dtype, device) in enumerate([(torch.float64, "cpu"), (torch.bfloat16, "meta")]):
        found = run(name, tmp_path / str(k), dtype, device)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_every_tensor_is_made_with_dtype_and_device():
    root = Path(__file__).parents[1] / "core"
    bare = []
    for path in sorted(root.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            of_torch = isinstance(node.func.value, ast.Name) and node.func.value.id == "torch"
            if of_torch and node.func.attr in FACTORIES:
                given: set[Any] = {keyword.arg for keyword in node.keywords}
                missing = {"dtype", "device"} - given - ({"device"} if node.func.attr in HAS_NO_DEVICE else set())
                if missing:
                    bare.append(f"{path.relative_to(root)}:{node.lineno}: {ast.unparse(node)} lacks {sorted(missing)}")
    assert not bare, "\n".join(bare)
