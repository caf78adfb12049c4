"""Checkpoints for the tests of tools.ckpt, and what is done to them."""

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint import filesystem

from core.checkpoint import digests, load, save
from core.checkpoint.manifest import NAME
from core.optimizer.rules.adam import AdamW
from core.optimizer.rules.sgd import SGD
from tests.support.small_run import differing

STEP = "iter_0000005"


def model() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(96, 64), nn.BatchNorm1d(64), nn.Linear(64, 2))


def trained(optimizer: Callable[..., Any] = AdamW, steps: int = 2) -> tuple[nn.Module, Any]:
    net = model()
    opt = optimizer(net.parameters(), lr=0.01, weight_decay=0.1)
    for step in range(steps):
        torch.manual_seed(step)
        net(torch.randn(4, 96)).square().sum().backward()
        opt.step()
        opt.zero_grad()
    return net, opt


def saved(folder: Path, step: int = 5, **kwargs: Any) -> tuple[nn.Module, Any]:
    net, opt = trained(**kwargs)
    save(folder, step=step, model_chunks=[net], optimizer=opt, consumed_samples=40, extra={"seed": 1})
    return net, opt


def state(net: nn.Module, optimizer: Any) -> dict[str, Tensor]:
    """Everything, by name."""
    of = {f"{slot}.{name}": x for name, p in net.named_parameters() for slot, x in optimizer.state[p].items()}
    return {**net.state_dict(), **of}


def same(net: nn.Module, optimizer: Any, folder: Path) -> None:
    """``folder`` loads into another run and makes it this one."""
    torch.manual_seed(4)
    other = nn.Sequential(nn.Linear(96, 64), nn.BatchNorm1d(64), nn.Linear(64, 2))
    again = type(optimizer)(other.parameters(), **{"lr": 0.5} | ({"momentum": 0.9} if type(optimizer) is SGD else {}))
    load(folder, model_chunks=[other], optimizer=again)
    assert differing(state(other, again), state(net, optimizer)) == []


def sign(folder: Path) -> None:
    """Make sizes and digests right again, as an attacker would."""
    said = json.loads((folder / NAME).read_text())
    said["files"] = {name: (folder / name).stat().st_size for name in said["files"]}
    (folder / NAME).write_text(json.dumps(said))
    seal(folder)


def seal(folder: Path) -> None:
    files = [file.name for file in folder.iterdir() if file.name != digests.NAME]
    (folder / digests.NAME).write_text(digests.text(digests.digests(folder, files)))


def flip(path: Path, at: int | None = None) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2 if at is None else at] ^= 1
    path.write_bytes(data)


def train(net: nn.Module, optimizer: Any, batch: Tensor) -> None:
    net(batch).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


class Malice:
    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, ("touch stolen",)


def put(folder: Path, key: str, value: Any) -> None:
    """Put ``value`` in place of what is stored under ``key``."""
    found = pickle.loads((folder / ".metadata").read_bytes())
    index, info = next((index, info) for index, info in found.storage_data.items() if index.fqn == key)
    torch.save(value, folder / "evil")
    size = (folder / "evil").stat().st_size
    found.storage_data[index] = filesystem._StorageInfo(
        info.relative_path, (folder / info.relative_path).stat().st_size, size
    )
    with (folder / info.relative_path).open("ab") as file:
        file.write((folder / "evil").read_bytes())
    (folder / "evil").unlink()
    (folder / ".metadata").write_bytes(pickle.dumps(found))
