"""Saved on any layout, loaded on any other, and by plain torch; resumed on the same one bit for bit."""

import random
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import product
from math import prod
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from core.checkpoint import load, save
from core.checkpoint.reader import SafeReader
from core.optimizer.emerging_optimizers import get_optimizer
from core.optimizer.optimizer_config import OptimizerConfig
from core.process_groups_config import ProcessGroupCollection


@dataclass(frozen=True)
class Spec:
    """A whole parameter: its shape, and the dim and blocks in which tensor parallelism cuts it."""

    shape: tuple[int, ...]
    dim: int | None = None
    stride: int = 1
    uneven: bool = False  # cut only where it need not divide, that is as a DTensor


LAYER = {
    "qkv.weight": Spec((24, 8), 0),
    "proj.weight": Spec((8, 16), 1),
    "fc1.weight": Spec((32, 8), 0, stride=2),
    "fc2.weight": Spec((8, 16), 1),
    "norm.weight": Spec((8,)),
    "adapter.weight": Spec((5, 8), 0, uneven=True),
}
TIED = "embedding.word_embeddings.weight"
SPECS = {TIED: Spec((12, 8), 0)} | {f"layers.{i}.{name}": spec for i in (0, 1) for name, spec in LAYER.items()}
COUNTER = "layers.1.norm.counter"


@dataclass(frozen=True)
class Cut:
    """Sizes of the mesh axes, and whether parameters are DTensors or have Megatron's attributes."""

    pp: int = 1
    dp: int = 1
    tp: int = 1
    dtensor: bool = False

    @property
    def mesh(self) -> tuple[int, int, int]:
        return self.pp, self.dp, self.tp

    def stages(self) -> list[list[str]]:
        if self.pp == 1:
            return [list(SPECS)]
        return [[name for name in SPECS if f"layers.{i}." in name or name == TIED] for i in range(self.pp)]


CUTS = {
    1: {"one": Cut()},
    2: {"copies": Cut(dp=2), "tp2": Cut(tp=2), "dtensor": Cut(tp=2, dtensor=True), "pp2": Cut(pp=2)},
    4: {
        "copies": Cut(dp=4),
        "tp4": Cut(tp=4),
        "dtensor": Cut(tp=4, dtensor=True),
        "tp2 dp2": Cut(dp=2, tp=2),
        "pp2 tp2": Cut(pp=2, tp=2),
        "pp2 tp2 dtensor": Cut(pp=2, tp=2, dtensor=True),
    },
}
OPTIMIZERS = {
    "adamw": {"optimizer": "adamw"},
    "sgd": {"optimizer": "sgd"},
    **{f"muon {mode}": {"optimizer": "muon", "muon_tp_mode": mode} for mode in ("owner", "distributed", "duplicated")},
    **{
        f"adaptive_muon {method}": {"optimizer": "adaptive_muon", "adaptive_muon_moment2_method": method}
        for method in ("adamuon", "normuon", "namo")
    },
}


class Run:
    """This rank's part of a small model on one layout, with its optimizer.

    Attributes:
        chunks: Its modules.
        optimizer: Over all parameters.
        pgs: Process groups.
        shards: Key of the checkpoint → this rank's memory of it.
    """

    def __init__(self, world: Any, cut: Cut, settings: Mapping[str, Any], *, lr: float = 0.1) -> None:
        mesh = world.mesh(cut.mesh, ("pp", "dp", "tp")) if world else None
        self.cut, self.tp = cut, mesh.get_local_rank("tp") if mesh else 0
        stage = mesh.get_local_rank("pp") if mesh else 0
        self.pgs = groups_of(mesh) if mesh else ProcessGroupCollection()
        root = nn.Module()
        for name in cut.stages()[stage]:
            parent, leaf = module_at(root, name)
            parameter = self._parameter(name, mesh)
            parameter.is_embedding_or_output_parameter = name == TIED
            parameter.shared = name == TIED and stage > 0
            parent.register_parameter(leaf, parameter)
        if stage == cut.pp - 1:
            module_at(root, COUNTER)[0].register_buffer("counter", torch.tensor(7))
            module_at(root, COUNTER)[0].register_buffer("scratch", torch.ones(3), persistent=False)
        self.chunks = [root]
        config = OptimizerConfig(**{"lr": lr, "muon_split_qkv": False, **settings})
        self.optimizer = get_optimizer(config, self.chunks, self.pgs)
        self.shards = dict(self._shards())

    def shard(self, whole: Tensor, name: str) -> Tensor:
        """This rank's part of ``whole``, which is like the parameter ``name`` or has some of its dims reduced."""
        spec = SPECS.get(name, Spec(()))
        cut_here = spec.dim is not None and (self.cut.dtensor or not spec.uneven)
        if not cut_here or whole.ndim != len(spec.shape) or whole.shape[spec.dim] != spec.shape[spec.dim]:
            return whole
        blocks = whole.chunk(1 if self.cut.dtensor else spec.stride, spec.dim)
        pieces = [block.chunk(self.cut.tp, spec.dim) for block in blocks]
        mine = [p[self.tp] if self.tp < len(p) else p[0].narrow(spec.dim, 0, 0) for p in pieces]
        return torch.cat(mine, spec.dim)

    def fill(self, values: Mapping[str, Tensor]) -> None:
        """Set everything that a checkpoint holds to its shard of ``values``."""
        for key, shard in self.shards.items():
            shard.copy_(self.shard(values[key], name_of(key)))

    def clear(self) -> None:
        for shard in self.shards.values():
            shard.zero_()

    def train(self, steps: int) -> None:
        """Step on gradients drawn from the global generator of torch; copies get equal ones."""
        for _ in range(steps):
            seed = int(torch.randint(2**31, ()))
            for name, p in self.chunks[0].named_parameters():
                g = self.shard(noise(f"{seed} {name}", SPECS[name].shape), name)
                if isinstance(p, DTensor):
                    g = DTensor.from_local(g, p.device_mesh, p.placements, shape=p.shape, stride=p.stride())
                p.grad = g
            self.optimizer.step()

    def _parameter(self, name: str, mesh: Any) -> nn.Parameter:
        spec = SPECS[name]
        whole = torch.zeros(spec.shape)
        piece = self.shard(whole, name).clone()
        if self.cut.dtensor and spec.dim is not None:
            piece = DTensor.from_local(piece, mesh["tp"], [Shard(spec.dim)], shape=whole.shape, stride=whole.stride())
            return nn.Parameter(piece)
        parameter = nn.Parameter(piece)
        parameter.tensor_model_parallel = piece.shape != whole.shape
        parameter.partition_dim = spec.dim if parameter.tensor_model_parallel else -1
        parameter.partition_stride = spec.stride
        return parameter

    def _shards(self) -> Iterator[tuple[str, Tensor]]:
        for name, p in self.chunks[0].named_parameters():
            yield f"model.{name}", memory(p)
            for slot, x in self.optimizer.state[p].items():
                yield f"optimizer.state.{slot}.{name}", memory(x)
        for name, x in self.chunks[0].named_buffers():
            if name == COUNTER:
                yield f"model.{name}", x


groups_of = cache(ProcessGroupCollection.from_mesh)


def memory(x: Tensor) -> Tensor:
    return (x.to_local() if isinstance(x, DTensor) else x).detach()


def module_at(root: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that holds ``name``, made where it is not there, and the last part of the name."""
    *path, leaf = name.split(".")
    for part in path:
        if not hasattr(root, part):
            root.add_module(part, nn.Module())
        root = getattr(root, part)
    return root, leaf


def name_of(key: str) -> str:
    """The parameter or buffer that a key is about."""
    return key.removeprefix("model.") if key.startswith("model.") else key.split(".", 3)[3]


def noise(key: str, shape: tuple[int, ...] | torch.Size, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(crc32(key.encode()))).to(dtype)


@cache
def wholes(optimizer: str) -> dict[str, Tensor]:
    """Key → whole tensor, different everywhere, for all that a checkpoint of ``optimizer`` holds."""
    unsharded = Run(None, Cut(), OPTIMIZERS[optimizer])
    values = {key: noise(key, x.shape, x.dtype) for key, x in unsharded.shards.items()}
    return values | {f"model.{COUNTER}": torch.tensor(42)}


def read_plainly(folder: Path, keys: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What torch.distributed.checkpoint alone makes of a checkpoint: ordinary tensors of one process."""
    state: dict[str, Any] = {key: torch.full_like(x, -1) for key, x in keys.items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.load(state, checkpoint_id=folder, no_dist=True)
    return state


def shared(path: Path) -> Path:
    """The first rank's ``path``, on all ranks."""
    paths = [path]
    dist.broadcast_object_list(paths, src=0)
    return paths[0]


def check(world: Any, path: Path, optimizer: str, pairs: Iterable[tuple[str, str]]) -> None:
    """Save on the first layout of each pair and load on the second; by plain torch too."""
    folder = shared(path)
    values, settings, cuts = wholes(optimizer), OPTIMIZERS[optimizer], CUTS[world.size]
    for step, (saver, cut) in enumerate(cuts.items()):
        run = Run(world, cut, settings)
        run.fill(values)
        saved = save(folder, step=step, model_chunks=run.chunks, optimizer=run.optimizer)
        assert differing(read_plainly(saved, values), values) == [], saver
    for saver, loader in pairs:
        run = Run(world, cuts[loader], settings)
        loaded = load(folder, step=list(cuts).index(saver), model_chunks=run.chunks, optimizer=run.optimizer)
        assert differing(run.shards, {key: run.shard(values[key], name_of(key)) for key in run.shards}) == [], (
            saver,
            loader,
        )
        assert loaded.rng_restored == (loaded.saved_layout == loaded.layout) == (cuts[saver].mesh == cuts[loader].mesh)
        assert loaded.differences == ()


def differing(got: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[str]:
    return [key for key in expected if not torch.equal(got[key], expected[key])]


def ring(size: int) -> list[tuple[str, str]]:
    names = list(CUTS[size])
    return list(zip(names, names[1:] + names[:1], strict=True))


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_another_layout_loads_what_one_saved_on_2_ranks(world, tmp_path, optimizer):
    check(world, tmp_path, optimizer, ring(2))


@pytest.mark.mpi(min_size=4)
@pytest.mark.parametrize("optimizer", ["adamw", "muon owner"])
def test_another_layout_loads_what_one_saved_on_4_ranks(world, tmp_path, optimizer):
    check(world, tmp_path, optimizer, ring(4))


@pytest.mark.mpi(min_size=4)
def test_any_layout_loads_what_any_other_saved(world, tmp_path):
    check(world, tmp_path, "adaptive_muon normuon", product(CUTS[4], repeat=2))


@pytest.mark.mpi(min_size=4)
@pytest.mark.parametrize("cut", ["copies", "pp2 tp2"])
def test_copies_are_written_once(world, tmp_path, cut):
    run = Run(world, CUTS[4][cut], OPTIMIZERS["adamw"])
    path = save(shared(tmp_path), step=1, model_chunks=run.chunks, optimizer=run.optimizer)
    metadata = SafeReader(path).read_metadata()
    for key, x in wholes("adamw").items():
        chunks = metadata.state_dict_metadata[key].chunks
        assert sum(prod(chunk.sizes) for chunk in chunks) == x.numel(), key
    described = sum(info.length for info in metadata.storage_data.values())
    assert described == sum(file.stat().st_size for file in path.glob("*.distcp"))


@pytest.mark.mpi(min_size=4)
@pytest.mark.parametrize("optimizer", ["muon owner", "adaptive_muon adamuon"])
@pytest.mark.parametrize("cut", ["tp2 dp2", "pp2 tp2 dtensor"])
def test_the_same_layout_goes_on_bit_for_bit(world, tmp_path, cut, optimizer):
    torch.manual_seed(1)
    run = Run(world, CUTS[4][cut], OPTIMIZERS[optimizer])
    run.fill({key: x if key.startswith("model.") else torch.zeros_like(x) for key, x in wholes(optimizer).items()})
    run.train(2)
    folder = shared(tmp_path)
    save(folder, step=2, model_chunks=run.chunks, optimizer=run.optimizer)
    run.train(2)
    drawn = random.random(), np.random.rand()

    torch.manual_seed(world.rank)
    again = Run(world, CUTS[4][cut], OPTIMIZERS[optimizer])
    assert load(folder, model_chunks=again.chunks, optimizer=again.optimizer).rng_restored
    again.train(2)
    assert differing(again.shards, run.shards) == []
    assert (random.random(), np.random.rand()) == drawn
