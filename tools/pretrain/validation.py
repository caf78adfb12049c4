"""Checks of the flags against each other, the launch and the machine, before a process group or a model exists."""

import tempfile
from dataclasses import dataclass
from pathlib import Path

from ..usage import UsageError
from .arguments import Arguments, flag_of
from .launch import Launch, Machine
from .model import GPTConfig
from .parallel import check_layout
from .schedule import check_schedule


@dataclass(frozen=True)
class Plan:
    """What follows from the flags, the number of processes and the machine.

    Args:
        data_parallel: Number of ranks that hold the same shard.
        micro_batches: Number of micro-batches of a step on each rank.
        schedule: Order of the pipeline's work.
        backend: ``gloo`` or ``nccl``.
    """

    data_parallel: int
    micro_batches: int
    schedule: str
    backend: str

    @property
    def device_type(self) -> str:
        """Type of the device that holds the parameters."""
        return "cuda" if self.backend == "nccl" else "cpu"


def validate(args: Arguments, launch: Launch, machine: Machine) -> Plan:
    """Check the flags against each other, the launch and the machine; makes the directories that rank 0 writes to.

    Raises:
        UsageError: Two flags, or a flag and the launch or the machine, do not fit; names the first such flag.
    """
    backend = _check_machine(args, launch, machine)
    check_schedule(args)
    _check_files(args)
    _check_faults(args)
    plan = _check_layout(args, launch, backend)
    launch.check_restarts()
    launch.check_port()
    if launch.rank == 0:
        _check_writable("--save", args.save)
        _check_writable("--log-dir", args.log_dir)
        _check_writable("--trace", str(Path(args.trace).parent) if args.trace else None)
    return plan


def gpt_config(args: Arguments, vocab_size: int) -> GPTConfig:
    """The model that the flags describe.

    Raises:
        UsageError: The sizes do not fit each other.
    """
    return GPTConfig(
        num_layers=args.num_layers,
        hidden_size=args.hidden_size,
        num_attention_heads=args.num_attention_heads,
        vocab_size=vocab_size,
        seq_length=args.seq_length,
        num_query_groups=args.num_query_groups or 0,
        kv_channels=args.kv_channels or 0,
        ffn_hidden_size=args.ffn_hidden_size or 0,
        swiglu=args.swiglu,
        normalization=args.normalization,
        untie_embeddings_and_output_weights=args.untie_embeddings_and_output_weights,
    )


def check_device(device_type: str, backend: str) -> None:
    """Raise UsageError if tensors on ``device_type`` (``cuda``, ``cpu``) cannot go through ``backend``."""
    flag = "--distributed-backend"
    if (device_type, backend) == ("cuda", "gloo"):
        raise UsageError(flag, backend, "the model is on a GPU", possible="nccl", hint="or keep the model on the CPU")
    if (device_type, backend) == ("cpu", "nccl"):
        raise UsageError(flag, backend, "the model is on the CPU", possible="gloo", hint="or move the model to a GPU")


def _check_machine(args: Arguments, launch: Launch, machine: Machine) -> str:
    if args.fp16:
        problem = "there is no loss scaler, and without one small gradients vanish"
        raise UsageError("--fp16", None, problem, possible="--bf16, or neither for fp32", hint="use --bf16")
    flag = "--overlap-optimizer-with-backward"
    if args.overlap_optimizer_with_backward and args.clip_grad:
        problem = f"--clip-grad {args.clip_grad} needs the norm of all gradients before the first parameter moves"
        raise UsageError(flag, None, problem, possible="with --clip-grad 0", hint="leave one of the two out")
    if args.overlap_optimizer_with_backward and args.pipeline_model_parallel_size > 1:
        problem = "the pipeline schedule does not say which backward is a parameter's last"
        raise UsageError(flag, None, problem, possible="--pipeline-model-parallel-size 1", hint="leave it out")
    if args.overlap_optimizer_with_bubble and args.pipeline_model_parallel_size == 1:
        flag, problem = "--overlap-optimizer-with-bubble", "without a pipeline there is no bubble"
        raise UsageError(flag, None, problem, possible="--pipeline-model-parallel-size 2 or more", hint="leave it out")
    for name in ("overlap_optimizer_with_backward", "overlap_optimizer_with_bubble"):
        if args.probe_first_step and getattr(args, name):
            problem = f"with {flag_of(name)} the ranks do not take the step together"
            raise UsageError("--probe-first-step", None, problem, hint="leave one of the two out")
    if args.use_triton and not machine.gpus:
        problem = "Triton kernels run on a GPU, and torch sees none"
        raise UsageError("--use-triton", None, problem, hint="leave it out: torch's own kernels serve the CPU")
    if args.use_triton:
        raise UsageError("--use-triton", None, "there are no Triton kernels in this version", hint="leave it out")

    backend = args.distributed_backend or ("nccl" if machine.gpus else "gloo")
    if backend == "gloo":
        return backend
    flag = "--distributed-backend"
    if not machine.gpus:
        raise UsageError(
            flag, backend, "it moves GPU tensors, and torch sees no GPU", possible="gloo", hint="leave it out"
        )
    if launch.local_size > machine.gpus:
        problem = f"each of the {launch.local_size} processes of this host needs a GPU, and it has {machine.gpus}"
        hint = f"torchrun --nproc-per-node {machine.gpus}, or --distributed-backend gloo to train on the CPU"
        raise UsageError(flag, backend, problem, possible=f"at most {machine.gpus} processes a host", hint=hint)
    if args.bf16 and machine.capability is not None and machine.capability < (8, 0):
        problem = "this GPU has no bfloat16 arithmetic: its compute capability is {}.{}".format(*machine.capability)
        raise UsageError("--bf16", None, problem, possible="compute capability >= 8.0", hint="leave it out to use fp32")
    return backend


def _check_files(args: Arguments) -> None:
    if args.save_interval and not args.save:
        raise UsageError("--save-interval", args.save_interval, "there is nowhere to save", hint="add --save DIRECTORY")
    for name in ("async_save", "keep_checkpoints", "exit_signal_handler"):
        if getattr(args, name) and not args.save:
            raise UsageError(flag_of(name), None, "there is nowhere to save", hint="add --save DIRECTORY")
    for name in ("ckpt_step", "load_only", "finetune", "start_decay", "start_annealing"):
        if getattr(args, name) not in (None, (), False) and not args.load:
            raise UsageError(flag_of(name), None, "there is nothing to load from", hint="add --load DIRECTORY")
    if args.finetune and args.load_only:
        raise UsageError("--load-only", None, "--finetune loads all weights", hint="leave one of the two out")


def _check_faults(args: Arguments) -> None:
    for name in ("skip_loss_spike", "skip_grad_norm_spike"):
        factor = getattr(args, name)
        if 0 < factor <= 1:
            problem = "every second step is above the median"
            raise UsageError(flag_of(name), factor, problem, possible="0, or a number > 1", hint="3 is a start")
    if not args.overlap_optimizer_with_backward:
        return
    flag = "--overlap-optimizer-with-backward"
    conflicts = {"on_non_finite": args.on_non_finite == "skip"} | {
        name: getattr(args, name) > 0 for name in ("skip_loss_spike", "skip_grad_norm_spike")
    }
    for name in (name for name, conflicting in conflicts.items() if conflicting):
        problem = f"weights change before {flag_of(name)} could leave the step out"
        raise UsageError(flag, None, problem, possible="--on-non-finite error", hint="leave one of the two out")


def _check_writable(flag: str, directory: str | None) -> None:
    if directory is None:
        return
    try:
        Path(directory).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise UsageError(
            flag,
            directory,
            f"cannot be written to: {error.strerror or error}",
            possible="a directory that is yours, or a new one",
            hint="give another one",
        ) from None


def _check_layout(args: Arguments, launch: Launch, backend: str) -> Plan:
    tp, pp = args.tensor_model_parallel_size, args.pipeline_model_parallel_size
    chunk = args.num_layers_per_virtual_pipeline_stage
    # Where tp x pp does not divide the processes, check_layout says so below, whatever the batch.
    data_parallel = max(1, launch.world_size // (tp * pp))
    batch, each = args.global_batch_size, args.micro_batch_size * data_parallel
    if launch.world_size % (tp * pp) == 0 and batch % each:
        problem = (
            f"is not a multiple of --micro-batch-size {args.micro_batch_size} x data-parallel size {data_parallel}"
        )
        raise UsageError("--global-batch-size", batch, problem, possible=f"multiples of {each}")
    plan = Plan(data_parallel, batch // each, args.pipeline_schedule or ("interleaved" if chunk else "1f1b"), backend)
    check_layout(
        gpt_config(args, vocab_size=tp),  # the text decides on the real size; it is made a multiple of tp
        world_size=launch.world_size,
        tp=tp,
        pp=pp,
        micro_batches=plan.micro_batches,
        schedule=plan.schedule,
        layers_per_virtual_stage=chunk,
    )
    return plan
