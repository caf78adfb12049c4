"""Trains a GPT on a mesh of tensor-parallel, data-parallel and pipeline ranks, with torch's own parallelism.

Every layout computes the same loss and the same gradients up to rounding: a weight is a function of seed and name, a
batch is cut into the same sequences, and the loss is the mean over all tokens of the global batch.
"""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe, ScheduleInterleaved1F1B
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module

from ..usage import UsageError
from .model import GPT, GPTConfig, build_gpt, pipeline_stages, tag_parameters

type Schedule = Schedule1F1B | ScheduleGPipe | ScheduleInterleaved1F1B

AXES = ("pp", "dp", "tp")  # tp varies fastest with the rank, as in Megatron
SCHEDULES = ("1f1b", "gpipe", "interleaved")


def check_layout(
    config: GPTConfig,
    *,
    world_size: int,
    tp: int,
    pp: int,
    micro_batches: int,
    schedule: str = "1f1b",
    layers_per_virtual_stage: int | None = None,
) -> int:
    """Check that the model can be sharded in this way; needs no process group.

    Returns:
        The data-parallel size.

    Raises:
        UsageError: The layout does not fit; names the flag, what is possible and what to do.
    """
    if tp < 1 or pp < 1 or world_size % (tp * pp):
        raise UsageError(
            "--tensor-model-parallel-size", f"{tp} and --pipeline-model-parallel-size {pp}",
            f"{tp} x {pp} x data-parallel size must be the number of processes, which is {world_size}",
            possible=f"sizes whose product divides {world_size}",
            hint=f"start torchrun --nproc-per-node {max(1, tp * pp)}",
        )  # fmt: skip
    for what, size in (
        ("--num-query-groups", config.num_query_groups),
        ("--ffn-hidden-size", config.ffn_hidden_size),
        ("the padded vocabulary of", config.vocab_size),
    ):
        if size % tp:
            raise UsageError(
                "--tensor-model-parallel-size", tp, f"does not divide {what} {size}",
                possible=f"divisors of {size}", hint=f"lower it, or make {what} {size} a multiple of {tp}",
            )  # fmt: skip
    stages = count_stages(config.num_layers, pp, schedule, layers_per_virtual_stage)
    if stages > config.num_layers:
        raise UsageError(
            "--pipeline-model-parallel-size", pp, f"makes {stages} stages, but --num-layers is {config.num_layers}",
            possible="at least one layer a stage", hint=f"lower it, or train with --num-layers {stages}",
        )  # fmt: skip
    if pp > 1 and schedule != "gpipe" and micro_batches < pp:
        raise UsageError(
            "--global-batch-size", None,
            f"it makes {micro_batches} micro-batches a step, fewer than the {pp} pipeline stages",
            possible=f"at least {pp}", hint="raise --global-batch-size, or lower --micro-batch-size",
        )  # fmt: skip
    if schedule == "interleaved" and micro_batches % max(1, micro_batches // pp):
        raise UsageError(
            "--global-batch-size", None,
            f"the interleaved schedule cannot deal {micro_batches} micro-batches to {pp} ranks",
            possible=f"a multiple of {pp} micro-batches", hint="change --global-batch-size or --micro-batch-size",
        )  # fmt: skip
    return world_size // (tp * pp)


def count_stages(num_layers: int, pp: int, schedule: str, layers_per_virtual_stage: int | None) -> int:
    """Number of pipeline stages: one per rank, or enough that none has more than ``layers_per_virtual_stage`` layers.

    Raises:
        UsageError: The schedule is unknown, or does not fit the number of ranks or of stages per rank.
    """
    flag = "--num-layers-per-virtual-pipeline-stage"
    if schedule not in SCHEDULES:
        raise UsageError("--pipeline-schedule", schedule, "unknown", possible=", ".join(SCHEDULES))
    if (schedule == "interleaved") != (layers_per_virtual_stage is not None):
        raise UsageError(
            "--pipeline-schedule", schedule, f"{flag} goes with the interleaved schedule, and only with it"
        )
    if layers_per_virtual_stage is None:
        return pp
    if pp == 1:
        raise UsageError(
            flag, layers_per_virtual_stage, "there is no pipeline", hint="set --pipeline-model-parallel-size"
        )
    chunks = -(-num_layers // (pp * max(1, layers_per_virtual_stage)))
    if chunks < 2 or layers_per_virtual_stage < 1:
        possible = f"1 to {(num_layers - 1) // pp}" if num_layers > pp else ""
        raise UsageError(flag, layers_per_virtual_stage, "leaves one stage a rank", possible=possible)
    return pp * chunks


def build_mesh(device_type: str, *, pp: int, dp: int, tp: int) -> DeviceMesh:
    """The mesh of all ranks with axes ``pp``, ``dp``, ``tp``; the default process group must exist."""
    return init_device_mesh(device_type, (pp, dp, tp), mesh_dim_names=AXES)


def tensor_parallel(model: GPT, mesh: DeviceMesh) -> GPT:
    """Shard the linear layers and the token embedding of ``model`` over the one-axis ``mesh``, in place.

    QKV and the first MLP weight are sharded by rows, so that a rank holds whole query groups and whole gate/value pairs;
    the weights after them by columns; token embedding and output layer by rows, that is by vocabulary. Logits are
    gathered. Norms and positions stay whole plain tensors, whose gradients are complete and the same on every rank.
    Between modules all activations are plain tensors.
    """
    # Every rank has drawn the same whole weights, so sharding needs no communication (src_data_rank=None).
    plan: dict[str, ParallelStyle] = {}
    if hasattr(model, "embedding"):
        plan["embedding.word_embeddings"] = RowwiseParallel(input_layouts=Replicate(), output_layouts=Replicate())
    if hasattr(model, "output_layer"):
        plan["output_layer"] = ColwiseParallel(output_layouts=Replicate())
    for i in model.stage.layers:
        layer = f"decoder.layers.{i}"
        plan[f"{layer}.self_attention.linear_qkv"] = ColwiseParallel()
        plan[f"{layer}.self_attention.linear_proj"] = RowwiseParallel()
        plan[f"{layer}.mlp.linear_fc1"] = ColwiseParallel()
        plan[f"{layer}.mlp.linear_fc2"] = RowwiseParallel()
    parallelize_module(model, mesh, plan, src_data_rank=None)
    model.tie_weights()
    return model


class Engine:
    """One rank's part of the training of a GPT: forward, backward and gradient reduction, but no optimizer.

    Args:
        config: Shape of the whole model.
        mesh: Mesh from :func:`build_mesh`, or one with the same axis names; None trains in this process alone, without
            torch.distributed.
        device: Device of the parameters; its type must be the mesh's.
        seed: Seed of the weights.
        micro_batches: Number of micro-batches of a step on each data-parallel rank.
        schedule: Order of the pipeline's work, one of ``SCHEDULES``; not used without a pipeline.
        layers_per_virtual_stage: Largest number of layers of a stage under the interleaved schedule.
        dtype: Type of the parameters, and of all computation outside ``autocast``.
        autocast: Precision of the matrix multiplications (torch.autocast), with parameters and gradients in ``dtype``.
        split_gate_up: Let the optimizer treat gate and value of a SwiGLU as two matrices.

    Attributes:
        model_chunks: This rank's pipeline stages, one unless the schedule is interleaved. Parameters have global names
            and the attributes of :func:`tag_parameters`; sharded ones are DTensors.
        stages: Pipeline stages of ``model_chunks``; empty without a pipeline.
        tell: Called with ``gradients`` and ``loss`` when their reduction begins.

    Raises:
        UsageError: The layout does not fit, as :func:`check_layout` says.
    """

    def __init__(
        self,
        config: GPTConfig,
        mesh: DeviceMesh | None = None,
        *,
        device: torch.device | str = "cpu",
        seed: int = 1234,
        micro_batches: int = 1,
        schedule: str = "1f1b",
        layers_per_virtual_stage: int | None = None,
        dtype: torch.dtype = torch.float32,
        autocast: torch.dtype | None = None,
        split_gate_up: bool = True,
    ) -> None:
        self.config, self.mesh, self.device, self.micro_batches = config, mesh, torch.device(device), micro_batches
        self.pp, self.dp, self.tp = (mesh[axis].size() if mesh is not None else 1 for axis in AXES)
        check_layout(
            config, world_size=self.pp * self.dp * self.tp, tp=self.tp, pp=self.pp, micro_batches=micro_batches,
            schedule=schedule, layers_per_virtual_stage=layers_per_virtual_stage,
        )  # fmt: skip
        num_stages = count_stages(config.num_layers, self.pp, schedule, layers_per_virtual_stage)
        stages = list(pipeline_stages(config.num_layers, num_stages))
        self._dp_rank = mesh["dp"].get_local_rank() if mesh is not None else 0
        pp_rank = mesh["pp"].get_local_rank() if mesh is not None else 0
        indices = range(pp_rank, num_stages, self.pp)
        self._is_first, self._is_last = 0 in indices, num_stages - 1 in indices
        self.model_chunks: list[GPT] = []
        for index in indices:
            model = build_gpt(
                config, seed=seed, stage=stages[index], device=self.device, dtype=dtype, autocast=autocast
            )
            if mesh is not None and self.tp > 1:
                tensor_parallel(model, mesh["tp"])
            tag_parameters(model, split_gate_up=split_gate_up)
            self.model_chunks.append(model)
        self._schedule: Schedule | None = None
        self.stages: list[PipelineStage] = []
        self._tied_group: ProcessGroup | None = None
        if mesh is not None and self.pp > 1:
            pipeline = mesh["pp"].get_group()
            self._schedule = self._build_schedule(schedule, indices, num_stages, pipeline)
            if not config.untie_embeddings_and_output_weights:
                self._tied_group = _ends(pipeline)
        self._batch_shape: torch.Size | None = None
        self.tell: Callable[[str], None] = lambda phase: None

    def train_step(
        self,
        batch: Tensor,
        last: AbstractContextManager[Any] | None = None,
        then: Callable[[], None] | None = None,
    ) -> float:
        """Run forward and backward of the global batch; ``.grad`` becomes the gradient of its mean loss.

        Args:
            batch: Token ids (global batch, sequence + 1), the same on every rank.
            last: Context of the last micro-batch's backward, without a pipeline. It makes gradients final itself, by
                :meth:`make_final`.
            then: Called when this rank's gradients are final, before it waits for the other stages' losses.

        Returns:
            Mean loss over all tokens of the global batch in nats, the same on every rank.

        Raises:
            ValueError: The batch does not divide into micro-batches, is too wide for the model, or differs in shape from
                the batches before it.
        """
        for model in self.model_chunks:
            model.zero_grad(set_to_none=True)
        losses = self._run(batch, backward=True, last=last)
        if last is None:
            self.tell("gradients")
            self._reduce_gradients()
        total = self._begin_sum(losses)
        if then is not None:
            then()
        self.tell("loss")
        return total()

    def make_final(self, param: Tensor) -> None:
        """Sum the gradient of ``param`` over data-parallel ranks, in place."""
        assert isinstance(param, nn.Parameter)
        _lay_out_gradient(param)
        if self.mesh is not None and self.dp > 1:
            dist.all_reduce(_local_grad(param), group=self.mesh["dp"].get_group())

    def sampled_step(self, batch: Tensor, seed: int) -> None:
        """Do what :meth:`train_step` does, for targets drawn from the model's predictions, the same on every layout.

        Args:
            batch: Token ids (global batch, sequence + 1); the last column is not used.
            seed: Seed of the draws.
        """
        for model in self.model_chunks:
            model.zero_grad(set_to_none=True)
        generator = torch.Generator().manual_seed(seed)
        draws = torch.rand(batch.shape[0], batch.shape[1] - 1, generator=generator, dtype=torch.float64)
        self._run(batch, backward=True, draws=draws)
        self._reduce_gradients()

    def eval_step(self, batch: Tensor) -> float:
        """Mean loss of ``batch``, as :meth:`train_step` returns it; leaves gradients as they are."""
        with torch.no_grad():
            return self._begin_sum(self._run(batch, backward=False))()

    def _run(
        self,
        batch: Tensor,
        *,
        backward: bool,
        draws: Tensor | None = None,
        last: AbstractContextManager[Any] | None = None,
    ) -> list[Tensor]:
        """The losses of this rank's micro-batches; none if another rank holds the last stage.

        ``draws`` in [0, 1) (global batch, sequence) take the place of the targets: each picks one by its probability.
        """
        tokens, targets = self._my_sequences(batch)
        if draws is not None:
            targets = draws.chunk(self.dp)[self._dp_rank].to(self.device)
        losses: list[Tensor] = []
        if self._schedule is not None:
            assert last is None
            run = self._schedule.step if backward else self._schedule.eval
            ends: dict[str, Any] = {"target": targets, "losses": losses} if self._is_last else {}
            run(*([tokens] if self._is_first else []), return_outputs=False, **ends)
            return losses
        pieces = zip(tokens.chunk(self.micro_batches), targets.chunk(self.micro_batches), strict=True)
        for i, (x, y) in enumerate(pieces, 1):
            loss = self._loss(self.model_chunks[0](x), y)
            if backward:
                with (last if last is not None and i == self.micro_batches else None) or nullcontext():
                    loss.backward()
            losses.append(loss.detach())
        return losses

    def _build_schedule(self, name: str, indices: Iterable[int], num_stages: int, group: ProcessGroup) -> Schedule:
        self.stages = stages = [
            PipelineStage(cast(nn.Module, model), index, num_stages, self.device, group=group)
            for model, index in zip(self.model_chunks, indices, strict=True)
        ]
        if name == "interleaved":
            return ScheduleInterleaved1F1B(list(stages), self.micro_batches, loss_fn=self._loss, scale_grads=False)
        cls = ScheduleGPipe if name == "gpipe" else Schedule1F1B
        return cls(stages[0], self.micro_batches, loss_fn=self._loss, scale_grads=False)

    def _loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """This micro-batch's share of the mean loss: shares and gradients add up over micro-batches and dp ranks."""
        logits = logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
        if targets.is_floating_point():
            targets = _pick(logits.detach(), targets)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten()) / (self.micro_batches * self.dp)

    def _my_sequences(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        """This data-parallel rank's inputs and targets, each (global batch / dp, sequence)."""
        pieces = self.dp * self.micro_batches
        if batch.ndim != 2 or batch.shape[0] % pieces or not 1 < batch.shape[1] <= self.config.seq_length + 1:
            raise ValueError(
                f"batch of shape {tuple(batch.shape)}: it must have rows divisible by {self.dp} data-parallel ranks x "
                f"{self.micro_batches} micro-batches = {pieces}, and 2 to {self.config.seq_length + 1} columns."
            )
        if batch.shape != (self._batch_shape or batch.shape):
            raise ValueError(
                f"batch of shape {tuple(batch.shape)}: the pipeline's buffers were made for the first batch, of shape "
                f"{tuple(self._batch_shape or ())}. Give every batch that shape."
            )
        self._batch_shape = batch.shape
        sequences = batch.chunk(self.dp)[self._dp_rank].to(self.device)
        return sequences[:, :-1].contiguous(), sequences[:, 1:].contiguous()

    def _begin_sum(self, losses: list[Tensor]) -> Callable[[], float]:
        """Begin the sum over all ranks; the function that is returned waits for the other stages and returns the sum."""
        total = sum((x.detach() for x in losses), torch.zeros((), dtype=torch.float64, device=self.device))
        work = None
        for axis in ("dp", "pp"):
            if self.mesh is not None and self.mesh[axis].size() > 1:
                work = dist.all_reduce(total, group=self.mesh[axis].get_group(), async_op=axis == "pp")

        def arrive() -> float:
            if work is not None:
                work.wait()
            return total.item()

        return arrive

    def _reduce_gradients(self) -> None:
        params = [p for model in self.model_chunks for p in model.parameters()]
        for param in params:
            _lay_out_gradient(param)
        if self.mesh is not None and self.dp > 1:
            _all_reduce([_local_grad(p) for p in params], self.mesh["dp"].get_group())
        if self._tied_group is not None:
            tied = [m.embedding.word_embeddings for m in self.model_chunks if hasattr(m, "embedding")]
            _all_reduce([_local_grad(cast(nn.Parameter, word.weight)) for word in tied], self._tied_group)


def _ends(pipeline: ProcessGroup) -> ProcessGroup | None:
    """The group of a pipeline's first and last rank; None on the ranks between them."""
    ranks = dist.get_process_group_ranks(pipeline)
    if len(ranks) == 2:
        return pipeline
    ends = [ranks[0], ranks[-1]]
    # Ranks outside the pair, or outside the mesh, take no part in making it.
    return dist.new_group(ends, use_local_synchronization=True) if dist.get_rank() in ends else None


def _pick(logits: Tensor, draws: Tensor) -> Tensor:
    """For each draw in [0, 1) (batch, sequence), the class whose share of the cumulated probabilities holds it."""
    shares = logits.double().softmax(-1).cumsum(-1)
    classes = torch.searchsorted(shares, draws.unsqueeze(-1), right=True).squeeze(-1)
    return classes.clamp_max(logits.shape[-1] - 1)  # the last share may end just below 1


def _lay_out_gradient(param: nn.Parameter) -> None:
    """Lay the gradient out as the parameter: DTensor leaves that of an embedding sharded by vocabulary replicated."""
    if isinstance(param, DTensor) and isinstance(param.grad, DTensor) and param.grad.placements != param.placements:
        param.grad = param.grad.redistribute(placements=param.placements)


def _local_grad(param: nn.Parameter) -> Tensor:
    """The gradient's own storage on this rank."""
    assert param.grad is not None
    return param.grad.to_local() if isinstance(param.grad, DTensor) else param.grad


def _all_reduce(tensors: list[Tensor], group: ProcessGroup) -> None:
    """Sum each tensor over the group, in place, with one collective for each dtype."""
    for dtype in {t.dtype: None for t in tensors}:
        same = [t for t in tensors if t.dtype == dtype]
        flat = torch.cat([t.flatten() for t in same])
        dist.all_reduce(flat, group=group)
        for tensor, total in zip(same, flat.split([t.numel() for t in same]), strict=True):
            tensor.copy_(total.view_as(tensor))
