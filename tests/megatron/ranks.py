"""A program of several ranks in which the real Megatron-Core saves and loads; started by test_ckpt_megatron.py.

Importing Megatron-Core takes long, so one program does everything, and waits between its steps for what the test does.
"""

import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tools.compare_megatron.on_cpu import serve_on_cpu

RANKS = 2
JOBS = {"adam": torch.float32, "muon": torch.bfloat16}
"""Optimizer → dtype of the weights."""
GPT = {"num_layers": 3, "hidden_size": 16, "num_attention_heads": 2, "ffn_hidden_size": 32}


class Rank:
    """One rank of the program.

    Attributes:
        rank: Its number.
        folder: That it shares with the others and with the test.
    """

    def __init__(self, rank: int, folder: Path) -> None:
        self.rank, self.folder = rank, folder
        store = dist.FileStore(str(folder / "store"), RANKS)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS, timeout=timedelta(seconds=300))

    def parallel(self, tp: int) -> None:
        from megatron.core import parallel_state

        parallel_state.destroy_model_parallel()
        parallel_state.initialize_model_parallel(tp)
        self.tp = tp
        # The generators that weights are drawn from; Megatron-Core's own way asks for CUDA's.
        torch.manual_seed(7)

    def job(self, optimizer: str, dtype: torch.dtype, seed: int) -> tuple[Any, Any]:
        """A tiny GPT of this rank and its optimizer."""
        from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
        from megatron.core.models.gpt import GPTModel
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
        from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
        from megatron.core.transformer import TransformerConfig
        from megatron.core.transformer.module import Float16Module

        bf16 = dtype == torch.bfloat16
        config = TransformerConfig(
            **GPT,
            use_cpu_initialization=True,
            tensor_model_parallel_size=self.tp,
            params_dtype=dtype,
            bf16=bf16,
            add_bias_linear=False,
            gradient_accumulation_fusion=False,
            bias_activation_fusion=False,
            masked_softmax_fusion=False,
            bias_dropout_fusion=False,
        )
        torch.manual_seed(seed)
        model = GPTModel(
            config, get_gpt_layer_local_spec(normalization="LayerNorm"), 32, 8, position_embedding_type="rope"
        )
        model = Float16Module(config, model) if bf16 else model
        model = DistributedDataParallel(config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), model)
        settings = OptimizerConfig(
            optimizer=optimizer, lr=0.01, min_lr=0.0, weight_decay=0.01, bf16=bf16, params_dtype=dtype, clip_grad=0.0
        )
        return model, get_megatron_optimizer(settings, [model], use_gloo_process_groups=False)

    def step(self, model: Any, optimizer: Any) -> None:
        for name, p in model.named_parameters():
            whole_seed = sum(name.encode())
            p.main_grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(whole_seed + self.rank))
        optimizer.step()

    def state(self, model: Any, optimizer: Any, *, loading: bool) -> dict[str, Any]:
        inner = model.module.module if hasattr(model.module, "module") else model.module
        metadata = {"chained_optim_avoid_prefix": True}
        of_model = inner.sharded_state_dict(metadata=metadata)
        of_optimizer = optimizer.sharded_state_dict({"model": of_model}, is_loading=loading, metadata=metadata)
        return {"model": of_model, "optimizer": of_optimizer}

    def save(self, name: str, step: int, state: dict[str, Any]) -> None:
        from megatron.core import dist_checkpointing

        path = self.folder / name / f"iter_{step:07d}"
        if self.rank == 0:
            path.mkdir(parents=True)
        dist.barrier()
        dist_checkpointing.save({**state, "iteration": step}, str(path))
        if self.rank == 0:
            (self.folder / name / "latest_checkpointed_iteration.txt").write_text(str(step))

    def load(self, path: Path, state: dict[str, Any]) -> dict[str, Any]:
        from megatron.core import dist_checkpointing

        loaded: dict[str, Any] = dist_checkpointing.load(state, str(path))
        return loaded

    def wait(self, name: str) -> None:
        """Until the test has done its part."""
        dist.barrier()
        if self.rank == 0:
            (self.folder / f"{name}.ready").touch()
        while not (self.folder / f"{name}.go").exists():
            time.sleep(0.05)

    def tell(self, what: str, outcome: Any) -> None:
        """A line for the test; the ranks must agree on it."""
        outcomes: list[Any] = [None] * RANKS
        dist.all_gather_object(outcomes, outcome)
        if self.rank == 0:
            print(f"> {what}: {outcomes[0] if outcomes.count(outcomes[0]) == RANKS else outcomes}", flush=True)


def leaves(tree: Any, path: str = "") -> dict[str, Any]:
    """Path → value of everything in dicts and lists."""
    if isinstance(tree, dict | list):
        items = tree.items() if isinstance(tree, dict) else enumerate(tree)
        return {name: x for key, value in items for name, x in leaves(value, f"{path}/{key}").items()}
    return {path: tree}


def unlike(a: Any, b: Any) -> list[str]:
    """Paths of the leaves that only one of two trees has or that are not equal, bit for bit."""
    left, right = leaves(a), leaves(b)
    both = {path for path in left.keys() & right.keys() if not _equal(left[path], right[path])}
    return sorted(both | (left.keys() ^ right.keys()))


def _equal(x: Any, y: Any) -> bool:
    if isinstance(x, Tensor) and isinstance(y, Tensor):
        return x.dtype == y.dtype and torch.equal(x, y)
    return bool(x == y)


def shard_of(key: str, whole: Tensor, dim: int, tp: int, rank: int) -> Any:
    """What Megatron-Core calls this rank's part of a tensor, to load into."""
    from megatron.core.dist_checkpointing import ShardedTensor

    part = torch.zeros_like(whole.chunk(tp, dim)[rank % tp])
    return ShardedTensor.from_rank_offsets(key, part, (dim, rank % tp, tp), replica_id=rank // tp)


def load_ours(here: Rank, expected: dict[str, Tensor]) -> None:
    """A checkpoint of this package, whole and in parts, as it is on disk."""
    for tp in (1, 2):
        dims = {key: max(range(x.ndim), key=lambda d: x.shape[d]) for key, x in expected.items()}
        state = {key: shard_of(key, x, dims[key], tp, here.rank) for key, x in expected.items()}
        loaded = here.load(here.folder / "ours" / "iter_0000005", state)
        parts = {key: x.chunk(tp, dims[key])[here.rank % tp] for key, x in expected.items()}
        here.tell(f"ours at tp {tp}", unlike(loaded, {**parts, "iteration": 5}))


def load_back(here: Rank, optimizer: str, dtype: torch.dtype) -> None:
    """What was converted and converted back, by a job of Megatron-Core's own, beside what the first job saved."""
    for tp in (2, 1):
        here.parallel(tp)
        model, opt = here.job(optimizer, dtype, seed=2)
        first = here.load(here.folder / optimizer / "iter_0000003", here.state(model, opt, loading=True))
        second = here.load(here.folder / f"{optimizer}.back" / "iter_0000003", here.state(model, opt, loading=True))
        here.tell(f"{optimizer} back at tp {tp}", unlike(first, second))
        here.tell(f"{optimizer} tensors at tp {tp}", sum(isinstance(x, Tensor) for x in leaves(second).values()) > 60)
        opt.load_state_dict(second["optimizer"])


def load_trained(here: Rank, dtype: torch.dtype) -> None:
    """Weights that this package trained further, in a model of Megatron-Core's."""
    here.parallel(2)
    model, opt = here.job("muon", dtype, seed=3)
    state = here.state(model, opt, loading=True)["model"]
    wanted = {key: x for key, x in state.items() if not key.endswith("_extra_state")}
    loaded = here.load(here.folder / "trained.mega" / "iter_0000004", {"model": wanted})["model"]
    expected = torch.load(here.folder / "trained.pt", weights_only=True)["model"]
    wrong = []
    for key, x in loaded.items():
        name = wanted[key].key
        if ".layers." in name:
            layer = key.split(".layers.")[1].split(".")[0]
            name = name.replace(".layers.", f".layers.{layer}.")
        whole = expected[name].to(dtype)
        parts = [whole, *(part for d in range(whole.ndim) for part in [whole.chunk(2, d)[here.rank]])]
        if not any(part.shape == x.shape and torch.equal(part, x) for part in parts):
            wrong.append(name)
    here.tell("trained here", (len(loaded), wrong))


def main() -> None:
    rank, folder = int(sys.argv[1]), Path(sys.argv[2])
    serve_on_cpu()
    here = Rank(rank, folder)
    load_ours(here, torch.load(folder / "ours.pt", weights_only=True))
    for optimizer, dtype in JOBS.items():
        here.parallel(2)
        model, opt = here.job(optimizer, dtype, seed=1)
        here.step(model, opt)
        here.save(optimizer, 3, here.state(model, opt, loading=False))
    here.wait("saved")
    for optimizer, dtype in JOBS.items():
        load_back(here, optimizer, dtype)
    load_trained(here, JOBS["muon"])
    dist.destroy_process_group()


# Megatron-Core starts processes of its own when it saves, and they import this file.
if __name__ == "__main__":
    main()
