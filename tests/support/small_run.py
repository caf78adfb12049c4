"""A small model of Megatron's names and shapes on any layout, with an optimizer; what a checkpoint of it holds."""

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard

from core.optimizer.emerging_optimizers import get_optimizer
from core.optimizer.optimizer_config import OptimizerConfig
from core.optimizer.rules.sophia import Sophia
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
    """Sizes of the mesh axes, and whether parameters are DTensors or have Megatron's attributes; FSDP2 cuts over dp."""

    pp: int = 1
    dp: int = 1
    tp: int = 1
    dtensor: bool = False
    fsdp: bool = False

    @property
    def mesh(self) -> tuple[int, int, int]:
        return self.pp, self.dp, self.tp

    def stages(self) -> list[list[str]]:
        if self.pp == 1:
            return [list(SPECS)]
        return [[name for name in SPECS if f"layers.{i}." in name or name == TIED] for i in range(self.pp)]


class Run:
    """This rank's part of a small model on one layout, with its optimizer.

    Attributes:
        chunks: Its modules.
        optimizer: Over all parameters.
        pgs: Process groups.
        weights: Which weights it begins with; others for another text.
        shards: Key of the checkpoint → this rank's memory of it.
    """

    def __init__(
        self,
        world: Any,
        cut: Cut,
        settings: Mapping[str, Any],
        *,
        lr: float = 0.1,
        weights: str = "",
    ) -> None:
        mesh = world.mesh(cut.mesh, ("pp", "dp", "tp")) if world else None
        self.weights = weights
        self.cut, self.dtype = cut, settings.get("dtype", torch.float32)
        self.tp, self.dp, stage = (mesh.get_local_rank(axis) if mesh else 0 for axis in ("tp", "dp", "pp"))
        self.pgs = groups_of(mesh) if mesh else ProcessGroupCollection()
        root = nn.Module()
        for name in cut.stages()[stage]:
            parent, leaf = module_at(root, name)
            parent.register_parameter(leaf, self._parameter(name, mesh))
        if cut.fsdp:
            fully_shard(root, mesh=mesh["dp"])
        for name, p in root.named_parameters():
            p.is_embedding_or_output_parameter = name == TIED
            p.shared = name == TIED and stage > 0
        if stage == cut.pp - 1:
            module_at(root, COUNTER)[0].register_buffer("counter", torch.tensor(7))
            module_at(root, COUNTER)[0].register_buffer("scratch", torch.ones(3), persistent=False)
        self.chunks = [root]
        given = {name: value for name, value in settings.items() if name != "dtype"}
        config = OptimizerConfig.from_dict({"lr": lr, "muon_split_qkv": False, **given})
        self.optimizer = get_optimizer(config, self.chunks, self.pgs)
        self.shards = dict(self._shards())

    def shard(self, whole: Tensor, name: str) -> Tensor:
        """This rank's part of ``whole``, which is the parameter ``name`` or its gradient."""
        cutting = self._cutting(name)
        return piece(whole, *cutting) if cutting else whole

    def part(self, whole: Tensor, key: str) -> Tensor:
        """What of ``whole`` the shard under ``key`` should hold, told by nothing but its shape.

        What another rank owns is empty; a dim that is smaller than in ``whole`` is the one in which the parameter is cut.
        """
        mine, cutting = self.shards[key], self._cutting(name_of(key))
        if mine.shape == whole.shape:
            return whole
        if mine.shape == whole[:0].shape:
            return whole[:0]
        (dim,) = (d for d in range(whole.ndim) if mine.shape[d] != whole.shape[d])
        assert cutting
        assert whole.shape[dim] == SPECS[name_of(key)].shape[cutting[0]]
        return piece(whole, dim, *cutting[1:])

    def clear(self) -> None:
        for shard in self.shards.values():
            shard.zero_()

    def train(self, steps: int) -> None:
        """Step on gradients drawn from the global generator of torch; copies get equal ones."""
        for _ in range(steps):
            seed = int(torch.randint(2**31, ()))
            for name, p in self.chunks[0].named_parameters():
                g = self.shard(noise(f"{seed} {name}", SPECS[name].shape, self.dtype), name)
                if isinstance(p, DTensor):
                    g = DTensor.from_local(g, p.device_mesh, p.placements, shape=p.shape, stride=p.stride())
                p.grad = g
            for member in self.optimizer.optimizers:
                if isinstance(member, Sophia):
                    member.update_hessian(batch_size=4)
            self.optimizer.step()

    def _parameter(self, name: str, mesh: Any) -> nn.Parameter:
        """This rank's part of a parameter, the whole of which is the same on every layout; FSDP2 cuts it later."""
        spec, cutting = SPECS[name], self._cutting(name)
        whole = noise(self.weights + name, spec.shape, self.dtype)
        if self.cut.fsdp:
            return nn.Parameter(whole)
        shard = self.shard(whole, name).clone()
        if self.cut.dtensor and cutting:
            shard = DTensor.from_local(shard, mesh["tp"], [Shard(cutting[0])], shape=whole.shape, stride=whole.stride())
            return nn.Parameter(shard)
        parameter = nn.Parameter(shard)
        parameter.tensor_model_parallel = cutting is not None
        parameter.partition_dim = cutting[0] if cutting else -1
        parameter.partition_stride = spec.stride
        return parameter

    def _cutting(self, name: str) -> tuple[int, int, int, int] | None:
        """Dim in which the parameter is cut, into how many parts, which one is here, and of how many blocks each part is."""
        if name not in SPECS:
            return None
        spec = SPECS[name]
        if self.cut.fsdp:
            return 0, self.cut.dp, self.dp, 1
        if self.cut.tp == 1 or spec.dim is None or (spec.uneven and not self.cut.dtensor):
            return None
        return spec.dim, self.cut.tp, self.tp, 1 if self.cut.dtensor else spec.stride

    def _shards(self) -> Iterator[tuple[str, Tensor]]:
        for name, p in self.chunks[0].named_parameters():
            yield f"model.{name}", memory(p)
            for slot, x in self.optimizer.state[p].items():
                yield f"optimizer.state.{slot}.{name}", memory(x)
        for name, x in self.chunks[0].named_buffers():
            if name == COUNTER:
                yield f"model.{name}", x


def piece(whole: Tensor, dim: int, parts: int, at: int, stride: int) -> Tensor:
    """Part ``at`` of each of ``stride`` blocks of ``whole``; empty where there are too few."""
    pieces = [block.chunk(parts, dim) for block in whole.chunk(stride, dim)]
    return torch.cat([p[at] if at < len(p) else p[0].narrow(dim, 0, 0) for p in pieces], dim)


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


def read_plainly(
    folder: Path, keys: Mapping[str, Tensor] | None = None, *, everything: bool = False
) -> dict[str, Tensor]:
    """What torch.distributed.checkpoint alone makes of a checkpoint: ordinary tensors of one process.

    Args:
        keys: Key → a tensor like the one that is expected; None: all tensors.
        everything: Those of random number generators too.
    """
    if keys is None:
        found = FileSystemReader(folder).read_metadata().state_dict_metadata.items()
        tensors = {key: x for key, x in found if isinstance(x, TensorStorageMetadata)}
        keys = {
            key: torch.empty(x.size, dtype=x.properties.dtype)
            for key, x in tensors.items()
            if everything or not key.startswith("rng/")
        }
    state: dict[str, Any] = {key: torch.full_like(x, 17) for key, x in keys.items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.load(state, checkpoint_id=folder, no_dist=True)
    return state


def shared(path: Path) -> Path:
    """The first rank's ``path``, on all ranks."""
    paths = [path]
    dist.broadcast_object_list(paths, src=0)
    return paths[0]


def differing(got: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[str]:
    return [key for key in expected if not torch.equal(got[key], expected[key])]


CUTS = {
    2: {"copies": Cut(dp=2), "tp2": Cut(tp=2), "dtensor": Cut(tp=2, dtensor=True), "pp2": Cut(pp=2)},
    4: {
        "copies": Cut(dp=4),
        "tp2 dp2": Cut(dp=2, tp=2),
        "pp2 tp2": Cut(pp=2, tp=2),
        "pp2 tp2 dtensor": Cut(pp=2, tp=2, dtensor=True),
    },
}
"""Layouts by the number of ranks, then by name."""
