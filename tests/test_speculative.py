"""A step that is taken back has never been: every optimizer, with everything that it keeps."""

import pytest
import torch
from torch import Tensor

from core.optimizer.emerging_optimizers import get_optimizer
from core.optimizer.speculative_step import SpeculativeStep
from tests.support.variants import ALL, IDS, Shapes, config


def gradients(model: Shapes, step: int) -> None:
    draw = torch.Generator().manual_seed(step)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=draw)


def everything(model: Shapes, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Parameters, gradients, state, and the numbers in groups."""
    found: dict[str, Tensor] = {}
    for name, p in model.named_parameters():
        found |= {name: p.detach().clone(), f"{name}.grad": p.grad.clone()}
        state = optimizer.state[p].items()
        found |= {f"{name}.{slot}": value.clone() for slot, value in state if isinstance(value, Tensor)}
    for i, group in enumerate(optimizer.param_groups):
        numbers = {key: value for key, value in group.items() if isinstance(value, int | float)}
        found |= {f"group {i} {key}": torch.tensor(value) for key, value in numbers.items()}
    return found


def unlike(a: dict[str, Tensor], b: dict[str, Tensor]) -> set[str]:
    # As bytes, for a NaN that is kept is equal to itself.
    same = {name for name in a.keys() & b.keys() if torch.equal(bytes_of(a[name]), bytes_of(b[name]))}
    return (a.keys() | b.keys()) - same


def bytes_of(x: Tensor) -> Tensor:
    return x.reshape(-1).view(torch.uint8)


@pytest.mark.parametrize(("name", "kwargs"), ALL, ids=IDS)
def test_nothing_remains_of_a_step_that_is_taken_back(name, kwargs):
    torch.manual_seed(0)
    models = [Shapes() for _ in range(2)]
    plain, ahead = (get_optimizer(config(name, kwargs, 1e-2), [model]) for model in models)
    speculative = SpeculativeStep(ahead)
    for step in range(3):
        for model in models:
            gradients(model, step)
        before = everything(models[1], ahead)
        speculative.step()
        assert step == 0 or unlike(before, everything(models[1], ahead))
        if step != 1:  # and once it is kept
            speculative.undo()
            assert not unlike(before, everything(models[1], ahead))
            ahead.step()
        plain.step()
        assert not unlike(everything(models[0], plain), everything(models[1], ahead))
