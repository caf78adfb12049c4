"""Checkpoints of the main job: what they hold besides tensors, and which flags changed when a run is resumed."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from core import checkpoint
from core.optimizer.chained import ChainedOptimizer

from .arguments import Arguments, flag_of
from .data import Corpus

# Paths and logging do not influence the training, and the checkpoint reports a change of layout itself.
_NOT_COMPARED = {
    *("save", "load", "save_interval", "log_dir", "log_interval", "trace", "config", "eval_interval", "eval_iters"),
    *(
        "async_save",
        "keep_checkpoints",
        "ckpt_step",
        "load_optim",
        "load_rng",
        "load_only",
        "finetune",
        "verify_checkpoint",
    ),
    *("exit_signal_handler", "exit_duration_in_mins", "exit_interval"),
    *("check_state_interval", "distributed_timeout_minutes"),
    *("tensor_model_parallel_size", "pipeline_model_parallel_size"),
    "settings",  # compared one by one
}


@dataclass(frozen=True)
class Start:
    """Where a run begins.

    Args:
        done: Number of finished steps.
        consumed: Position in the data, in sequences.
        notes: Lines to print.
        faults: Saved state of the guard: steps left out, running medians.
        schedule: Saved state of the schedule; None if the run begins at step 0.
    """

    done: int = 0
    consumed: int = 0
    notes: tuple[str, ...] = ()
    faults: Mapping[str, Any] | None = None
    schedule: Mapping[str, Any] | None = None


def save(
    args: Arguments,
    corpus: Corpus,
    model_chunks: Sequence[nn.Module],
    optimizer: ChainedOptimizer,
    done: int,
    consumed: int,
    faults: Mapping[str, Any],
    decay: Mapping[str, int],
    background: checkpoint.Background | None = None,
) -> Path:
    """Write a checkpoint to ``--save``, in the ``background`` if one is given; all ranks call it.

    The schedule follows from the step, from the flags, which are saved too, and from the step at which a ``decay`` began.

    Raises:
        CheckpointError: The checkpoint cannot be written; earlier ones stay as they are.
    """
    assert args.save is not None
    flags = dataclasses.asdict(args)
    return checkpoint.save(
        args.save,
        step=done,
        consumed_samples=consumed,
        model_chunks=model_chunks,
        optimizer=optimizer,
        schedule={name: value for name, value in flags.items() if name.startswith("lr_")} | dict(decay),
        extra={"flags": flags, "text": corpus.digest, "faults": faults},
        keep=args.keep_checkpoints,
        background=background,
    )


def load(args: Arguments, corpus: Corpus, model_chunks: Sequence[nn.Module], optimizer: ChainedOptimizer) -> Start:
    """Load the newest checkpoint of ``--load`` into model and optimizer; all ranks call it.

    Weights, state, step and data position come from the checkpoint, settings from the command line. If ``--load`` and
    ``--save`` name one directory without a checkpoint, the run begins at step 0: it is the first of a job that restarts itself.

    Raises:
        CheckpointError: There is no checkpoint, or it does not fit.
    """
    if args.load is None:
        return Start()
    if args.load == args.save and checkpoint.latest_step(args.load) is None:
        return Start(notes=(f"no checkpoint in {args.load} yet: starting at step 0",))
    fresh = args.finetune or bool(args.load_only)
    loaded = checkpoint.load(
        args.load,
        model_chunks=model_chunks,
        optimizer=optimizer,
        step=args.ckpt_step,
        load_optimizer=args.load_optim and not args.finetune,
        load_rng=args.load_rng and not fresh,
        only=args.load_only,
        verify=args.verify_checkpoint,
    )
    if fresh:
        counted = f"loaded {len(loaded.keys)} tensors of {loaded.path}; starting at step 0"
        return Start(notes=(*(f"passed over: {problem}" for problem in loaded.skipped), counted))
    changed = changed_flags(loaded.extra.get("flags", {}), args)
    notes = [*loaded.notes(), *changed]
    if changed or loaded.differences:
        notes.append("the command line wins over the checkpoint")
    if loaded.extra.get("text") != corpus.digest:
        notes.append("the text is not the one that was saved: the position in the data counts in the new one")
    return Start(loaded.step, loaded.consumed_samples, tuple(notes), loaded.extra.get("faults"), loaded.schedule or {})


def changed_flags(saved: Mapping[str, Any], args: Arguments) -> list[str]:
    """A line for each flag that influences the training and has another value than in the ``saved`` flags."""
    now = json.loads(json.dumps(dataclasses.asdict(args)))
    lines = [
        f"{flag_of(name)} was {saved[name]} and is now {value}"
        for name, value in now.items()
        if name not in _NOT_COMPARED and name in saved and saved[name] != value
    ]
    before, after = saved.get("settings", {}), now["settings"]
    for name in sorted({*before, *after}):
        was, is_now = (settings.get(name, "left out") for settings in (before, after))
        if was != is_now:
            lines.append(f"{flag_of(name)} was {was} and is now {is_now}")
    return lines
