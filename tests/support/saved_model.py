"""A small saved model, and the refusal to load it into something else."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from core.checkpoint import CheckpointError, load, save
from core.optimizer.rules.adam import AdamW


def model(width: int = 4, *, bias: bool = True, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(width)
    return nn.Sequential(nn.Linear(3, width, bias=bias), nn.Linear(width, 2)).to(dtype)


def saved(folder: Path, step: int = 5, **kwargs: Any) -> tuple[nn.Module, AdamW]:
    net = model()
    optimizer = AdamW(net.parameters(), lr=0.1, weight_decay=0.2)
    save(folder, step=step, model_chunks=[net], optimizer=optimizer, **kwargs)
    return net, optimizer


def refused(folder: Path, net: nn.Module, optimizer: Any) -> str:
    """The error of loading into these, which must stay as they are."""
    before = [p.detach().clone() for p in net.parameters()]
    with pytest.raises(CheckpointError, match="does not fit this run; nothing was loaded") as error:
        load(folder, model_chunks=[net], optimizer=optimizer)
    assert all(torch.equal(p, x) for p, x in zip(net.parameters(), before, strict=True))
    return str(error.value)
