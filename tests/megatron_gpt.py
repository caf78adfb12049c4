"""A program of four ranks in which the real Megatron-Core trains a tiny GPT on one layout after another; see test_megatron.py."""

import json
import sys
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tests.megatron_ranks import serve_on_cpu

RANKS = 4
VOCABULARY, LENGTH, BATCH, STEPS, MICRO_BATCHES = 64, 16, 2, 3, 4


@dataclass(frozen=True)
class Case:
    """One training run. What is left of the ranks is data-parallel, on the same data."""

    optimizer: str
    tp: int = 1
    pp: int = 1
    ep: int = 1
    bf16: bool = False
    layer_wise: bool = False
    swiglu: bool = False
    moment2: str = "adamuon"
    saves: str = ""
    loads: str = ""


MUON, ADAPTIVE = "shardstep_muon", "shardstep_adaptive_muon"
CASES = {
    "1": Case(MUON, saves="whole"),
    "theirs": Case("muon"),
    "tp2": Case(MUON, tp=2, saves="tp2"),
    "tp4, 2 query groups": Case(MUON, tp=4),
    "pp2": Case(MUON, pp=2),
    "tp2 pp2": Case(MUON, tp=2, pp=2),
    "swiglu 1": Case(MUON, swiglu=True),
    "swiglu tp2": Case(MUON, tp=2, swiglu=True),
    "bf16 1": Case(MUON, bf16=True),
    "bf16 tp2 layer-wise": Case(MUON, tp=2, bf16=True, layer_wise=True),
    "normuon 1": Case(ADAPTIVE, moment2="normuon"),
    "normuon tp2": Case(ADAPTIVE, tp=2, moment2="normuon", saves="normuon"),
    "soap tp2": Case("shardstep_soap", tp=2, saves="soap"),
    "on from tp2": Case(MUON, loads="tp2"),
    "on from 1, tp2": Case(MUON, tp=2, loads="whole"),
    "theirs, on from tp2": Case("muon", loads="tp2"),
    "on from tp2, pp2": Case(MUON, pp=2, loads="tp2"),
    "normuon on from tp2": Case(ADAPTIVE, moment2="normuon", loads="normuon"),
    "normuon on from tp2, pp2": Case(ADAPTIVE, pp=2, moment2="normuon", loads="normuon"),
    "soap on from tp2": Case("shardstep_soap", loads="soap"),
    "soap on from tp2, tp2": Case("shardstep_soap", tp=2, loads="soap"),
}


class Job:
    """One case on this rank."""

    def __init__(self, case: Case, folder: Path) -> None:
        from megatron.core import parallel_state

        self.case, self.folder = case, folder
        parallel_state.destroy_model_parallel()
        parallel_state.initialize_model_parallel(case.tp, case.pp, expert_model_parallel_size=case.ep)
        self.model = self._model()
        self.optimizer = self._optimizer()

    def _model(self) -> Any:
        from megatron.core import parallel_state
        from megatron.core.distributed import (
            DistributedDataParallel,
            DistributedDataParallelConfig,
            finalize_model_grads,
        )
        from megatron.core.models.gpt import GPTModel
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
        from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
        from megatron.core.transformer import TransformerConfig
        from megatron.core.transformer.module import Float16Module

        case = self.case
        dtype = torch.bfloat16 if case.bf16 else torch.float32
        config = TransformerConfig(
            num_layers=2,
            hidden_size=32,
            num_attention_heads=4,
            num_query_groups=2,
            ffn_hidden_size=64,
            use_cpu_initialization=True,
            tensor_model_parallel_size=case.tp,
            pipeline_model_parallel_size=case.pp,
            pipeline_dtype=dtype,
            params_dtype=dtype,
            bf16=case.bf16,
            attention_dropout=0.0,
            hidden_dropout=0.0,
            add_bias_linear=False,
            gated_linear_unit=case.swiglu,
            activation_func=torch.nn.functional.silu if case.swiglu else torch.nn.functional.gelu,
            gradient_accumulation_fusion=False,
            bias_activation_fusion=False,
            masked_softmax_fusion=False,
            bias_dropout_fusion=False,
            finalize_model_grads_func=finalize_model_grads,
        )
        model_parallel_cuda_manual_seed(1)
        torch.manual_seed(1)
        model = GPTModel(
            config,
            get_gpt_layer_local_spec(normalization="LayerNorm"),
            VOCABULARY,
            LENGTH,
            pre_process=parallel_state.is_pipeline_first_stage(),
            post_process=parallel_state.is_pipeline_last_stage(),
            position_embedding_type="rope",
        )
        model = Float16Module(config, model) if case.bf16 else model
        ddp, extra = DistributedDataParallelConfig(grad_reduce_in_fp32=True), {}
        if case.layer_wise:
            extra = self._layer_wise(model, ddp)
        return DistributedDataParallel(config, ddp, model, **extra)

    def _layer_wise(self, model: Any, ddp: Any) -> dict[str, Any]:
        from megatron.core import parallel_state
        from megatron.core.optimizer import layer_wise_optimizer

        ddp.use_distributed_optimizer = True
        layer_wise_optimizer.tag_params_for_buffer_routing([model])
        layout = layer_wise_optimizer.LayerWiseDistributedOptimizer.compute_full_param_layout(
            [p for p in model.parameters() if p.requires_grad],
            ddp.bucket_size,
            parallel_state.get_data_parallel_world_size(with_context_parallel=True),
            ddp,
            expert_data_parallel_world_size=parallel_state.get_expert_data_parallel_world_size(),
        )
        return {"full_param_layout": layout}

    def _optimizer(self) -> Any:
        from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

        case = self.case
        config = OptimizerConfig(
            optimizer=case.optimizer,
            lr=0.01,
            min_lr=0.0,
            weight_decay=0.01,
            bf16=case.bf16,
            params_dtype=torch.bfloat16 if case.bf16 else torch.float32,
            muon_fp32_matmul_prec="highest",
            muon_tp_mode="duplicated",
            adaptive_muon_moment2_method=case.moment2,
            use_layer_wise_distributed_optimizer=case.layer_wise,
        )
        config.soap_eps = 1e-2
        return get_megatron_optimizer(config, [self.model], use_gloo_process_groups=False)

    def train(self) -> list[float]:
        """The loss before each step, the same on all ranks."""
        from megatron.core import parallel_state
        from megatron.core.pipeline_parallel import get_forward_backward_func

        run, losses = get_forward_backward_func(), []
        for step in range(STEPS, 2 * STEPS) if self.case.loads else range(STEPS):
            self.model.zero_grad_buffer()
            self.optimizer.zero_grad()
            found = run(
                forward_step_func=_forward,
                data_iterator=iter(batches(step)),
                model=[self.model],
                num_microbatches=MICRO_BATCHES,
                seq_length=LENGTH,
                micro_batch_size=BATCH,
                forward_only=False,
            )
            assert self.optimizer.step()[0]
            loss = torch.stack([x["loss"] for x in found]).mean() if found else torch.zeros(())
            dist.all_reduce(loss, group=parallel_state.get_pipeline_model_parallel_group())
            losses.append(float(loss))
        return losses

    def state(self, *, loading: bool) -> dict[str, Any]:
        inner = self.model.module.module if self.case.bf16 else self.model.module
        metadata = {"chained_optim_avoid_prefix": True}
        of_model = inner.sharded_state_dict(metadata=metadata)
        of_optimizer = self.optimizer.sharded_state_dict({"model": of_model}, is_loading=loading, metadata=metadata)
        return {"model": of_model, "optimizer": of_optimizer}

    def save(self) -> None:
        from megatron.core import dist_checkpointing

        path = self.folder / self.case.saves
        if dist.get_rank() == 0:
            path.mkdir()
        dist.barrier()
        dist_checkpointing.save(self.state(loading=False), str(path))

    def load(self) -> None:
        from megatron.core import dist_checkpointing

        found = dist_checkpointing.load(self.state(loading=True), str(self.folder / self.case.loads))
        self.model.module.load_state_dict(found["model"])
        self.optimizer.load_state_dict(found["optimizer"])


def batches(step: int) -> list[Tensor]:
    """The micro-batches of a step, of a language that can be learned: the next token is 5 x + 3."""
    draw = torch.Generator().manual_seed(step)
    out = []
    for _ in range(MICRO_BATCHES):
        tokens = [torch.randint(0, VOCABULARY, (BATCH, 1), generator=draw)]
        for _ in range(LENGTH):
            tokens.append((5 * tokens[-1] + 3) % VOCABULARY)
        out.append(torch.cat(tokens, 1))
    return out


def _forward(iterator: Any, model: Any) -> Any:
    tokens = next(iterator)
    positions = torch.arange(LENGTH).expand(BATCH, LENGTH)
    mask = torch.triu(torch.ones(LENGTH, LENGTH, dtype=torch.bool), 1)[None, None]
    out = model(tokens[:, :-1], positions, mask, labels=tokens[:, 1:])

    def loss(x: Tensor) -> Any:
        mean = x.float().mean()
        return mean, {"loss": mean.detach()}

    return out, loss


def main() -> None:
    rank, store, chosen = int(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
    serve_on_cpu()
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", store=dist.FileStore(store, RANKS), rank=rank, world_size=RANKS, timeout=timedelta(seconds=100)
    )
    from megatron.core.tensor_parallel import random as generators

    import core.megatron  # noqa: F401  # that is all that a script of one's own has to do

    # The generators of CUDA devices become the CPU's.
    generators._get_cuda_rng_state = torch.cuda.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    generators._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    torch.cuda.manual_seed = torch.default_generator.manual_seed

    folder = Path(store).parent
    for name in chosen:
        case = CASES[name]
        job = Job(case, folder)
        if case.loads:
            job.load()
        losses = job.train()
        if case.saves:
            job.save()
        dist.barrier()
        if rank == 0:
            print(json.dumps({"name": name, "losses": losses, **asdict(case)}), flush=True)
    dist.destroy_process_group()


# Megatron-Core starts processes of its own when it saves, and they import this file.
if __name__ == "__main__":
    main()
