"""One rank of a job that is compared: a GPT without data in Megatron-Core, its optimizer, and the unsharded run beside it."""

import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from core.optimizer.rules.emerging_library import library_optimizer

from .cases import Side

GPT: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "ffn_hidden_size": 256,
    "add_bias_linear": False,
    "use_cpu_initialization": True,
}
VOCABULARY, LENGTH = 64, 16
LR, DECAY, BETAS = 0.1, 0.01, (0.9, 0.999)


def device() -> torch.device:
    """Where the job is: a GPU of its own, or the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def whole(name: str, shape: Sequence[int], what: str) -> Tensor:
    """Standard normal float32 of ``shape`` on :func:`device`, the same on every rank; another for each name and ``what``."""
    draw = torch.Generator().manual_seed(zlib.crc32(f"{name} {what}".encode()))
    return torch.randn(tuple(shape), generator=draw).to(device())


class Job:
    """A GPT and its optimizer, as Megatron-Core makes them; the weights are those of :func:`whole`.

    Args:
        side: How the optimizer is asked for.
        tp: Tensor-parallel ranks. The others are data-parallel.
        model: Fields of ``TransformerConfig`` and arguments of ``GPTModel``, over those of :data:`GPT`.
        distributed: Whether gradients are scattered for a distributed optimizer.
        gradient: Size of their entries.
        lr: Learning rate.

    Attributes:
        model: Megatron-Core's ``DistributedDataParallel``.
        optimizer: What ``get_megatron_optimizer`` made.
        config: Megatron-Core's ``TransformerConfig``.
    """

    def __init__(
        self,
        side: Side,
        *,
        tp: int,
        model: Mapping[str, Any] | None = None,
        distributed: bool = False,
        gradient: float = 1.0,
        lr: float = LR,
    ) -> None:
        from megatron.core import parallel_state
        from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

        if not parallel_state.model_parallel_is_initialized():
            parallel_state.initialize_model_parallel(tp)
            model_parallel_cuda_manual_seed(1)
        self.tp, self.tp_rank = tp, parallel_state.get_tensor_model_parallel_rank()
        self.dp_rank = parallel_state.get_data_parallel_rank()
        self.gradient, self.lr = gradient, lr
        self.model = self._model(dict(model or {}), distributed)
        self.optimizer = self._optimizer(side)
        self.config = self.model.module.config

    def _model(self, given: dict[str, Any], distributed: bool) -> Any:
        from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
        from megatron.core.models.gpt import GPTModel
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
        from megatron.core.transformer import TransformerConfig

        position = given.pop("position_embedding_type", "rope")
        config = TransformerConfig(**{**GPT, **given}, tensor_model_parallel_size=self.tp)
        spec = get_gpt_layer_local_spec(
            num_experts=config.num_moe_experts, moe_grouped_gemm=False, normalization="LayerNorm"
        )
        model = GPTModel(config, spec, VOCABULARY, LENGTH, position_embedding_type=position).to(device())
        for name, p in model.named_parameters():
            p.data.copy_(self.piece(self.start(name, p), p))
        scatter = DistributedDataParallelConfig(use_distributed_optimizer=distributed)
        return DistributedDataParallel(config, scatter, model)

    def _optimizer(self, side: Side) -> Any:
        from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

        known = {f.name for f in fields(OptimizerConfig)}
        settings = {
            "optimizer": side.optimizer,
            "lr": self.lr,
            "min_lr": 0.0,
            "weight_decay": DECAY,
            "clip_grad": 0.0,
            "muon_fp32_matmul_prec": "highest",
            **side.settings,
        }
        config = OptimizerConfig(**{k: v for k, v in settings.items() if k in known})
        for name in settings.keys() - known:
            setattr(config, name, settings[name])
        return get_megatron_optimizer(config, [self.model], use_gloo_process_groups=False)

    def shape(self, p: Tensor) -> tuple[int, ...]:
        """Shape of the whole tensor that ``p`` is a shard of."""
        cut = self._cut(p)
        return tuple(n * self.tp if d == cut else n for d, n in enumerate(p.shape))

    def start(self, name: str, p: Tensor) -> Tensor:
        """The whole weight before the first step."""
        return 0.02 * whole(name, self.shape(p), "weight")

    def piece(self, x: Tensor, p: Tensor) -> Tensor:
        """This rank's part of the whole tensor ``x``, cut as ``p`` is."""
        cut = self._cut(p)
        if cut is None:
            return x
        chunks = x.chunk(self.tp * getattr(p, "partition_stride", 1), cut)
        return torch.cat(chunks[self.tp_rank :: self.tp], cut)

    def _cut(self, p: Any) -> int | None:
        return p.partition_dim if self.tp > 1 and getattr(p, "tensor_model_parallel", False) else None

    def weights(self, pattern: str = "") -> Iterator[tuple[str, Any]]:
        """Names and this rank's shards of the weights whose name has ``pattern`` in it."""
        return ((name, p) for name, p in self.model.module.named_parameters() if re.search(pattern, name))

    def step(self, number: int) -> None:
        """Set the gradients of step ``number``, let Megatron-Core reduce them, and take a step of the optimizer."""
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        sign = 1 - 2 * (self.dp_rank % 2)
        for name, p in self.weights():
            g = gradient(name, self.shape(p), number)
            if dist.get_world_size() > self.tp:
                g = g + sign * whole(name, g.shape, "noise")  # the ranks' mean is the gradient
            p.main_grad.copy_(self.piece(g * self.gradient, p))
        self.model.finish_grad_sync()
        self.optimizer.step()

    def save(self, path: Path) -> None:
        """Write a ``torch_dist`` checkpoint; ``path`` exists."""
        from megatron.core import dist_checkpointing

        dist_checkpointing.save(self._state(loading=False), str(path))

    def load(self, path: Path) -> None:
        """Read it, and set the learning rate, both as Megatron-Core's training does it."""
        from megatron.core import dist_checkpointing
        from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

        found = dist_checkpointing.load(self._state(loading=True), str(path))
        self.model.module.load_state_dict(found["model"])
        self.optimizer.load_state_dict(found["optimizer"])
        schedule = {"init_lr": 0.0, "max_lr": self.lr, "min_lr": 0.0, "lr_warmup_steps": 0, "lr_decay_steps": 10}
        decay = {"start_wd": DECAY, "end_wd": DECAY, "wd_incr_steps": 10, "wd_incr_style": "constant"}
        constant = partial(OptimizerParamScheduler, lr_decay_style="constant", override_opt_param_scheduler=True)
        constant(self.optimizer, **schedule, **decay, use_checkpoint_opt_param_scheduler=False).step(0)

    def _state(self, *, loading: bool) -> dict[str, Any]:
        from megatron.core import parallel_state

        metadata = {
            "singleton_local_shards": False,
            "chained_optim_avoid_prefix": True,
            "distrib_optim_sharding_type": "dp_reshardable",
            "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
        }
        model = self.model.module.sharded_state_dict(metadata=metadata)
        state = self.optimizer.sharded_state_dict({"model": model}, is_loading=loading, metadata=metadata)
        return {"model": model, "optimizer": state}


def gradient(name: str, shape: Sequence[int], step: int) -> Tensor:
    """Gradient of the whole weight in step ``step``."""
    return whole(name, shape, f"gradient {step}")


def _unsharded() -> dict[str, tuple[bool, Callable[..., Any]]]:
    from emerging_optimizers.orthogonalized_optimizers import AdaptiveMuon, Muon

    # Where these two are defined changes from release to release.
    lion: Any
    soap: Any
    lion, soap = (library_optimizer(name).inner for name in ("eo_lion", "eo_soap"))
    decay: dict[str, Any] = {"weight_decay": DECAY}
    muon: dict[str, Any] = {"momentum": 0.95, "fp32_matmul_prec": "highest"}
    adaptive = partial(AdaptiveMuon, **muon, **decay)
    return {
        "muon": (True, partial(Muon, **muon, **decay)),
        "muon, L2 decay": (True, partial(Muon, **muon, weight_decay=1.0, weight_decay_method="l2")),
        "normuon": (True, partial(adaptive, moment2_method="normuon")),
        "adamuon": (True, partial(adaptive, moment2_method="adamuon")),
        "soap": (False, partial(soap, betas=BETAS, **decay, use_kl_shampoo=True)),
        "lion": (False, partial(lion, betas=(0.95, 0.98), **decay)),
        "adam": (False, partial(torch.optim.AdamW, betas=BETAS, **decay)),
    }


TRUTHS = _unsharded
"""Name → whether q, k, v, gate and up are matrices of their own, and the optimizer: emerging-optimizers' or torch's."""


def unsharded(truth: str, name: str, weight: Tensor, lrs: Sequence[float], config: Any) -> Tensor:
    """The whole ``weight`` after a step with each of ``lrs``, taken by one process.

    Args:
        truth: Key of :func:`TRUTHS`.
        name: Of the weight in the model of ``config``.
        weight: (rows, cols). Unchanged.
    """
    splits, make = TRUTHS()[truth]
    out = weight.clone()
    for rows in _parts(name, weight.shape[0], config) if splits else [torch.arange(weight.shape[0])]:
        at = rows.to(weight.device)
        p = torch.nn.Parameter(weight[at])
        optimizer = make([p], lr=lrs[0])
        for step, lr in enumerate(lrs):
            p.grad = gradient(name, weight.shape, step)[at]
            optimizer.param_groups[0]["lr"] = lr
            optimizer.step()
        out[at] = p.detach()
    return out


def _parts(name: str, rows: int, config: Any) -> list[Tensor]:
    """The numbers of the rows of each matrix that a weight consists of."""
    numbers = torch.arange(rows)
    if name.endswith("linear_qkv.weight"):
        query = config.num_attention_heads // config.num_query_groups * config.kv_channels
        groups = numbers.view(config.num_query_groups, -1)
        return [part.flatten() for part in groups.split([query, config.kv_channels, config.kv_channels], 1)]
    if name.endswith("linear_fc1.weight") and config.gated_linear_unit:
        return list(numbers.chunk(2))
    return [numbers]
