"""A program of four ranks in which the real Megatron-Core trains a tiny GPT on one layout after another.

See test_megatron_layouts.py. Every layout trains the same weights on the same sequences, which its data-parallel ranks divide
among them.
"""

import gc
import json
import math
import re
import sys
import time
import zlib
from dataclasses import asdict, fields
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tests.megatron.by_hand import ByHand
from tests.megatron.cases import CASES, MORE_CASES, RANKS, Case, Outcome
from tests.megatron.layers import latent_attention, let_norms_be_sequence_parallel
from tools.compare_megatron.on_cpu import serve_on_cpu

VOCABULARY, LENGTH, BATCH, STEPS, MICRO_BATCHES = 64, 16, 2, 3, 4


class Job:
    """One case on this rank.

    Attributes:
        gloo: Whether Megatron-Core makes groups of gloo's beside its own, which its distributed optimizer saves over.
    """

    gloo = False

    def __init__(self, case: Case, folder: Path) -> None:
        from megatron.core import parallel_state

        self.case, self.folder = case, folder
        parallel_state.destroy_model_parallel()
        parallel_state.initialize_model_parallel(
            case.tp, case.pp, expert_model_parallel_size=case.ep, expert_tensor_parallel_size=case.etp or None
        )
        self.model = self._model()
        self.optimizer = self._optimizer()
        self.norms: list[float] = []
        self.by_hand: dict[str, float] = {}

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
        from megatron.core.transformer import MLATransformerConfig, TransformerConfig
        from megatron.core.transformer.module import Float16Module

        case = self.case
        dtype = torch.bfloat16 if case.bf16 else torch.float32
        latent = {
            "q_lora_rank": 16 if case.latent == "full" else None,
            "kv_lora_rank": 16,
            "qk_head_dim": 8,
            "qk_pos_emb_head_dim": 4,
            "v_head_dim": 8,
            "rope_type": "rope",
        }
        experts = {
            "num_moe_experts": case.experts,
            "moe_router_load_balancing_type": "none",
            "moe_token_dispatcher_type": "allgather",
            "expert_model_parallel_size": case.ep,
            "expert_tensor_parallel_size": case.etp or case.tp,
            "sequence_parallel": case.tp > 1,
        }
        make: Any = MLATransformerConfig if case.latent else TransformerConfig
        config = make(
            **(latent if case.latent else {"num_query_groups": 2}),
            **(experts if case.experts else {}),
            attention_output_gate=case.gate,
            num_layers=2,
            hidden_size=32,
            num_attention_heads=4,
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
        layer = get_gpt_layer_local_spec(
            num_experts=case.experts or None, multi_latent_attention=bool(case.latent), normalization="LayerNorm"
        )
        if case.latent:
            layer.submodules.self_attention.submodules.core_attention = latent_attention()
        model = GPTModel(
            config,
            layer,
            VOCABULARY,
            LENGTH,
            pre_process=parallel_state.is_pipeline_first_stage(),
            post_process=parallel_state.is_pipeline_last_stage(),
            share_embeddings_and_output_weights=case.tied,
            position_embedding_type="learned_absolute" if case.learned else "rope",
        )
        draw_weights(model, case)
        model = Float16Module(config, model) if case.bf16 else model
        ddp, extra = DistributedDataParallelConfig(grad_reduce_in_fp32=True), {}
        ddp.overlap_grad_reduce = ddp.overlap_param_gather = case.overlap
        if case.layer_wise:
            extra = self._layer_wise(model, ddp)
        wrapped = DistributedDataParallel(config, ddp, model, **extra)
        if case.overlap:
            config.no_sync_func = wrapped.no_sync
        return wrapped

    def _layer_wise(self, model: Any, ddp: Any) -> dict[str, Any]:
        from megatron.core import parallel_state
        from megatron.core.optimizer import layer_wise_optimizer

        from core.megatron import tag_whole
        from core.megatron.registration import name_of

        ddp.use_distributed_optimizer = True
        layer_wise_optimizer.tag_params_for_buffer_routing([model])
        if name := name_of(self.case.optimizer):
            tag_whole(name, [model])
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

        given, known = self.settings(), {field.name for field in fields(OptimizerConfig)}
        config = OptimizerConfig(optimizer=self.case.optimizer, **{k: v for k, v in given.items() if k in known})
        for name in given.keys() - known:  # of ours, which the class has no field for
            setattr(config, name, given[name])
        return get_megatron_optimizer(config, [self.model], use_gloo_process_groups=self.gloo)

    def settings(self) -> dict[str, Any]:
        """Of the optimizer."""
        case = self.case
        return {
            "lr": 0.01,
            "min_lr": 0.0,
            "weight_decay": 0.01,
            "bf16": case.bf16,
            "params_dtype": torch.bfloat16 if case.bf16 else torch.float32,
            "muon_fp32_matmul_prec": "highest",
            "muon_tp_mode": "duplicated",
            "adaptive_muon_moment2_method": case.moment2,
            "use_layer_wise_distributed_optimizer": case.layer_wise,
            "overlap_param_gather": case.overlap,
            "clip_grad": case.clip,
            "grad_norm_skip_threshold": case.skip or math.inf,
            "soap_eps": 1e-2,
            "shardstep_split_heads": case.heads,
        }

    def train(self) -> list[float]:
        """The loss before each step, the same on all ranks."""
        from megatron.core import parallel_state
        from megatron.core.pipeline_parallel import get_forward_backward_func

        run, losses = get_forward_backward_func(), []
        dp, data = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
        for step in range(STEPS, 2 * STEPS) if self.case.loads else range(STEPS):
            self.model.zero_grad_buffer()
            self.optimizer.zero_grad()
            found = run(
                forward_step_func=_forward,
                data_iterator=iter(batches(step)[dp::data]),
                model=[self.model],
                num_microbatches=MICRO_BATCHES // data,
                seq_length=LENGTH,
                micro_batch_size=BATCH,
                forward_only=False,
            )
            by_hand = ByHand(self.model, self.case) if self.case.by_hand and not step else None
            stepped, norm, _ = self.optimizer.step()
            assert stepped is not (self.case.skip > 0)
            self.norms.append(float(norm))
            if by_hand:
                self.by_hand = by_hand.errors()
            loss = torch.stack([x["loss"] for x in found]).mean() / data if found else torch.zeros(())
            for group in (
                parallel_state.get_pipeline_model_parallel_group(),
                parallel_state.get_data_parallel_group(),
            ):
                dist.all_reduce(loss, group=group)
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


def draw_weights(model: Any, case: Case) -> None:
    """The same first weights on every layout: by the name that a weight has in the whole model."""
    from megatron.core import parallel_state

    first = {name: layer.layer_number - 1 for name, layer in model.named_modules() if hasattr(layer, "layer_number")}
    for name, p in model.named_parameters():
        if p.ndim != 2:
            continue
        layer = re.match(r"decoder\.layers\.\d+", name)
        whole_name = re.sub(r"layers\.\d+", f"layers.{first[layer[0]]}", name, count=1) if layer else name
        expert = re.search(r"local_experts\.(\d+)", name)
        if expert:
            at = int(expert[1]) + parallel_state.get_expert_model_parallel_rank() * case.experts // case.ep
            whole_name = whole_name.replace(expert[0], f"local_experts.{at}")
        if case.tied:
            whole_name = whole_name.replace("output_layer", "embedding.word_embeddings")
        group = parallel_state.get_tensor_model_parallel_group()
        if expert:
            group = parallel_state.get_expert_tensor_parallel_group()
        dim, cut, stride, rank = 0, 1, 1, 0
        if getattr(p, "tensor_model_parallel", False):
            dim, cut, stride, rank = p.partition_dim, group.size(), p.partition_stride, group.rank()
        draw = torch.Generator().manual_seed(zlib.crc32(whole_name.encode()))
        shape = [size * cut if d == dim else size for d, size in enumerate(p.shape)]
        whole = torch.randn(shape, generator=draw) * 0.1
        p.data.copy_(torch.cat([some.chunk(cut, dim)[rank] for some in whole.chunk(stride, dim)], dim))


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
        return mean, {"loss": mean.detach().clone()}  # Megatron-Core divides what it gets

    return out, loss


def main() -> None:
    rank, store, chosen = int(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
    serve_on_cpu()
    torch.set_num_threads(1)
    let_norms_be_sequence_parallel()
    import core.megatron  # noqa: F401  # that is all that a script of one's own has to do

    for at, name in enumerate(chosen):
        case, started = {**CASES, **MORE_CASES}[name], time.monotonic()
        # Every group has threads that look for work all the time, so that a case must leave none.
        dist.init_process_group(
            "gloo",
            store=dist.FileStore(f"{store} {at}", RANKS),
            rank=rank,
            world_size=RANKS,
            timeout=timedelta(seconds=100),
        )
        ranks = outcomes(case, Path(store).parent)
        if rank == 0:
            seconds = round(time.monotonic() - started, 1)
            print(json.dumps({"name": name, "ranks": ranks, "seconds": seconds, **asdict(case)}), flush=True)
        dist.barrier()
        dist.destroy_process_group()
        gc.collect()


def outcomes(case: Case, folder: Path) -> list[Outcome]:
    """What came of ``case``, on each rank."""
    job = Job(case, folder)
    if case.loads:
        job.load()
    before = [p.detach().clone() for p in job.model.parameters()]
    losses = job.train()
    moved = not all(map(torch.equal, before, job.model.parameters()))
    if case.saves:
        job.save()
    found: list[Any] = [None] * RANKS
    dist.all_gather_object(found, Outcome(losses, job.norms, job.by_hand, moved))
    return found


# Megatron-Core starts processes of its own when it saves, and they import this file.
if __name__ == "__main__":
    main()
