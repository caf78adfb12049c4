"""The main job: pretrain a GPT on text with any optimizer of the registry, on any TP x PP x DP layout.

``python -m tools.pretrain`` trains in one process, ``torchrun --nproc-per-node N -m tools.pretrain ...`` in N. See
``--help`` for the flags and ``configs/`` for whole jobs.
"""

import math
import os
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Literal, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.elastic.multiprocessing.errors import record
from torch.distributed.rendezvous import rendezvous

from core.checkpoint import Background, CheckpointError
from core.checkpoint.together import joined
from core.faults import FaultError, Guard, Verdict, check_state
from core.optimizer.early_step import EarlyStep
from core.optimizer.probe import ProbeError, probe
from core.optimizer.rules.sophia import Sophia
from core.optimizer.steps.global_norm import global_norm
from core.process_groups_config import ProcessGroupCollection

from ..usage import EXIT_CODE, UsageError, refuse
from . import resume
from .arguments import Arguments, flag_of, parse_arguments
from .bubble_step import BubbleStep
from .data import Corpus, load_corpus, split_samples
from .exits import SIGNALS, Exits
from .heartbeat import GRACE_S, Heartbeat, LostRankError, meet
from .launch import Launch, Machine
from .parallel import Engine, build_mesh
from .param_rules import build_optimizer, check_rules
from .report import Progress, Record, RunLog, startup_table
from .schedule import begun, decay_start, make_scheduler, tell_decay
from .trace import Trace
from .validation import Plan, check_device, gpt_config, validate

START = timedelta(minutes=5)
"""Time in which all processes must have started; it does not depend on the time-out of collectives."""


@record
def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line; when a flag does not fit or the run cannot go on, print one line and exit with code 2."""
    launch = Launch()
    try:
        launch = Launch.from_environ(os.environ)
        args, plan, corpus = prepare(argv, launch)
        signals = SIGNALS if args.exit_signal_handler else ()
        with (
            Exits(signals=signals, minutes=args.exit_duration_in_mins, interval=args.exit_interval) as exits,
            process_group(args, launch, plan) as (mesh, heartbeat),
        ):
            Job(args, plan, corpus, mesh, launch, heartbeat).run(exits)
    except (UsageError, CheckpointError, FaultError, ProbeError) as error:
        refuse(error, rank=launch.rank)
    except LostRankError as error:
        if launch.rank != error.speaker:
            # The message is the same on all ranks; a launcher that sees one rank end stops the others, so the speaker ends first.
            time.sleep(GRACE_S)
            sys.exit(EXIT_CODE)
        refuse(error, rank=0)


def prepare(argv: Sequence[str] | None, launch: Launch) -> tuple[Arguments, Plan, Corpus]:
    """Parse and check the flags and load the text, before process groups are made and memory is allocated.

    Raises:
        UsageError: A flag, the text or the launch does not fit.
    """
    args = parse_arguments(argv)
    plan = validate(args, launch, Machine.here())
    corpus = load_corpus(args.data_path)
    check_rules(args, gpt_config(args, corpus.padded_vocab_size()))
    return args, plan, corpus


@contextmanager
def process_group(args: Arguments, launch: Launch, plan: Plan) -> Iterator[tuple[DeviceMesh | None, Heartbeat | None]]:
    """The mesh of all ranks and this rank's heartbeat, while the job runs; None and None for a single process.

    Raises:
        LostRankError: A rank is missing from a collective.
    """
    if plan.device_type == "cuda":
        torch.cuda.set_device(launch.local_rank)
    if launch.world_size == 1:
        yield None, None
        return
    timeout = timedelta(minutes=args.distributed_timeout_minutes)
    (store, rank, size), (beats, _, _) = (
        next(rendezvous("env://", launch.rank, launch.world_size, timeout=START)) for _ in range(2)
    )
    meet(store, rank, size, START)
    with Heartbeat(beats, rank, size, timeout) as heartbeat, heartbeat.watch():
        groups = PrefixStore("groups", store)
        dist.init_process_group(plan.backend, store=groups, rank=rank, world_size=size, timeout=timeout)
        mesh = build_mesh(
            plan.device_type,
            pp=args.pipeline_model_parallel_size,
            dp=plan.data_parallel,
            tp=args.tensor_model_parallel_size,
        )
        yield mesh, heartbeat
        # After an error there is no barrier: the others may wait in a collective, and the error must be shown first.
        dist.barrier()
    dist.barrier()  # from here on no rank writes to the store, so rank 0, which may hold it, can end
    dist.destroy_process_group()


class Job:
    """One rank of a training run.

    Args:
        args: Flags of the job.
        plan: What follows from the flags and the launch.
        corpus: Text to train on.
        mesh: Mesh of all ranks; None for one process.
        launch: This process's place among all processes.
        heartbeat: Heartbeat that is told each phase; None for one process.

    Attributes:
        done: Number of finished steps.
        consumed: Sequences consumed by these steps, over all ranks; the position in the data.

    Raises:
        UsageError: The flags do not fit the model, or the text is too short.
        CheckpointError: ``--load`` names no checkpoint that fits.
    """

    def __init__(
        self,
        args: Arguments,
        plan: Plan,
        corpus: Corpus,
        mesh: DeviceMesh | None,
        launch: Launch,
        heartbeat: Heartbeat | None = None,
    ) -> None:
        self.args, self.plan, self.corpus = args, plan, corpus
        self.first = launch.rank == 0
        self._heartbeat = heartbeat
        self._trace: Trace | None = None
        self.train, self.valid = split_samples(corpus, seq_length=args.seq_length, seed=args.seed)
        self.engine = Engine(
            gpt_config(args, corpus.padded_vocab_size()),
            mesh,
            device=torch.device(plan.device_type, launch.local_rank) if plan.device_type == "cuda" else "cpu",
            seed=args.seed,
            micro_batches=plan.micro_batches,
            schedule=plan.schedule,
            layers_per_virtual_stage=args.num_layers_per_virtual_pipeline_stage,
            autocast=torch.bfloat16 if args.bf16 else None,
            split_gate_up=args.split_gate_up,
        )
        check_device(self.engine.device.type, plan.backend)
        groups = ProcessGroupCollection.from_mesh(mesh) if mesh else ProcessGroupCollection()
        self.optimizer = build_optimizer(args, self.engine.model_chunks, groups)
        self._describe()
        self.guard = Guard(
            self.optimizer,
            on_non_finite=cast(Literal["error", "skip"], args.on_non_finite),
            max_skipped=args.max_skipped_steps,
            loss_spike=args.skip_loss_spike or None,
            norm_spike=args.skip_grad_norm_spike or None,
            window=args.spike_window,
        )
        self._at("load")
        start = resume.load(args, corpus, self.engine.model_chunks, self.optimizer)
        self.done, self.consumed = start.done, start.consumed
        if start.faults:
            self.guard.load_state_dict(start.faults)
        self._say(*start.notes)
        self.optimizer.train()
        if args.probe_first_step:
            probe(self.optimizer, tell=self._say)
        members = self.optimizer.members.items()
        local_curvatures = [(name, m.estimator, m.hessian_interval) for name, m in members if isinstance(m, Sophia)]
        self._curvatures = list(dict.fromkeys(joined(local_curvatures)))
        for name in ("overlap_optimizer_with_backward", "overlap_optimizer_with_bubble"):
            if self._curvatures and getattr(args, name):
                problem = "Sophia estimates curvature between backward and step"
                raise UsageError(flag_of(name), None, problem, hint="leave it out")
        self._decay_start = decay_start(args, self.done, start.schedule)
        self._say(*tell_decay(args, self._decay_start))
        self.scheduler = make_scheduler(args, self.optimizer, self.done, self._decay_start)
        self.engine.tell = self._at
        if heartbeat:
            for model in self.engine.model_chunks:
                heartbeat.follow(model)
        stage = mesh["pp"].get_local_rank() if mesh else 0
        if args.trace:
            self._trace = Trace(launch.rank, stage, self.engine.device)
            self._trace.follow(self.engine.stages)
        self._bubble = self._bubble_step(has_bubble=stage > 0) if args.overlap_optimizer_with_bubble else None

    def run(self, exits: Exits | None = None) -> None:
        """Train to ``--train-iters``, or until ``exits`` says to leave.

        Raises:
            FaultError: A gradient, the loss or state is not finite, or too many steps were left out; on all ranks.
        ProbeError: With ``--probe-first-step``, when the first step is not the unsharded one; on all ranks.
            CheckpointError: A checkpoint cannot be written; earlier ones stay as they are.
        """
        args = self.args
        if self.done >= args.train_iters:
            self._say(f"nothing to train: step {self.done} of --train-iters {args.train_iters} is done")
        log = RunLog(Path(args.log_dir) if args.log_dir and self.first else None, self.done)
        tokens = args.global_batch_size * args.seq_length
        progress = Progress(args.train_iters, self.done, tokens, enabled=self.first)
        background = Background() if args.async_save else None
        try:
            self._train(exits or Exits(), log, progress, background)
        except FaultError:
            # All ranks raise it, and the state that is being saved was good, so the save can be finished.
            if background:
                background.wait()
            raise
        if background and (path := background.wait()):
            progress.say(f"saved {path}")
        progress.close()

    def _train(self, exits: Exits, log: RunLog, progress: Progress, background: Background | None) -> None:
        args = self.args
        while self.done < args.train_iters:
            lr = float(self.scheduler.get_last_lr()[0])
            loss, verdict = self._step()
            progress.tick(self.done)
            if not verdict.take:
                progress.say(f"left out {verdict.reason} ({self.guard.skipped} so far)")
            validates = self._is_due(args.eval_interval)
            if validates or self._is_due(args.log_interval):
                val_loss = self._validate() if validates else None
                speed, skipped = progress.speed(), self.guard.skipped
                row = Record(self.done, self.consumed, loss, lr, verdict.norm, speed, val_loss, skipped)
                progress.show(row)
                log.write(row)
            why = exits.due(self.done, self.engine.device)
            if args.save and (why or self._is_due(args.save_interval or args.train_iters)):
                path = self._save(background)
                progress.say(f"saving {path} in the background" if background else f"saved {path}")
            if why:
                progress.say(f"leaving after step {self.done}: {why}")
                break
        if self._trace:
            self._trace.write(Path(args.trace or ""))

    def _bubble_step(self, *, has_bubble: bool) -> BubbleStep:
        try:
            return BubbleStep(self.optimizer, self.guard, has_bubble=has_bubble, tell=self._at)
        except ValueError as error:
            raise UsageError("--overlap-optimizer-with-bubble", None, str(error), hint="leave it out") from None

    def _at(self, phase: str, step: int | None = None) -> None:
        if self._heartbeat:
            self._heartbeat.at(phase, step)
        if self._trace:
            self._trace.at(phase, self.done + 1)

    def _save(self, background: Background | None) -> Path:
        self._at("save")
        check_state(self.optimizer, self.done)
        with self._evaluating():
            return resume.save(
                self.args,
                self.corpus,
                self.engine.model_chunks,
                self.optimizer,
                self.done,
                self.consumed,
                self.guard.state_dict(),
                begun(self._decay_start, self.done),
                background,
            )

    def _step(self) -> tuple[float, Verdict]:
        """Take one step; returns the loss before it, and the verdict whether it was taken."""
        args = self.args
        self._at("check", self.done + 1)
        if args.check_state_interval and self.done % args.check_state_interval == 0:
            check_state(self.optimizer, self.done)
        batch = self.train.batch(self.consumed, args.global_batch_size)
        early = args.overlap_optimizer_with_backward
        last = EarlyStep(self.optimizer, reduce=self.engine.make_final) if early else None
        self._at("forward")
        loss = self.engine.train_step(batch, last, self._bubble.begin if self._bubble else None)
        self._at("clip")
        if early:
            verdict = Verdict(True, self._early_norm())
        elif self._bubble:
            verdict = self._bubble.settle(self.done + 1, loss, args.clip_grad)
        else:
            verdict = self.guard.judge(self.done + 1, loss, max_norm=args.clip_grad)
            self._at("optimizer")
            if verdict.take:
                self._estimate_curvature(batch)
                self.optimizer.step()
        self._at("log")
        with warnings.catch_warnings():
            # torch warns when the first step is left out, for the schedule counts that step.
            warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
            self.scheduler.step()
        self.done += 1
        self.consumed += args.global_batch_size
        return loss, verdict

    def _early_norm(self) -> float:
        """The norm of the gradients of a step that was taken during backward."""
        norm = float(global_norm(self.optimizer.entries(), self.optimizer.pg_collection))
        if not math.isfinite(norm):
            raise FaultError(
                f"step {self.done + 1}: the gradient norm is {norm}, and the step was taken during backward: weights have "
                f"changed. Resume from the last checkpoint, without --overlap-optimizer-with-backward to learn which gradient "
                f"it is."
            )
        return norm

    def _validate(self) -> float:
        """Mean loss of the same ``--eval-iters`` batches every time."""
        size = self.args.global_batch_size
        self._at("eval")
        with self._evaluating():
            losses = [self.engine.eval_step(self.valid.batch(i * size, size)) for i in range(self.args.eval_iters)]
        return sum(losses) / len(losses)

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Put the weights for evaluation in place, and afterwards those for training; schedule-free optimizers keep both."""
        self.optimizer.eval()
        yield
        self.optimizer.train()

    def _estimate_curvature(self, batch: Tensor) -> None:
        """Let Sophia estimate the Hessian's diagonal on ``batch`` if that is due; leaves gradients as they are."""
        args = self.args
        params = [p for model in self.engine.model_chunks for p in model.parameters()]
        for name, estimator, interval in self._curvatures:
            if self.done % interval:
                continue
            # A pipeline stage without a parameter for it takes part in the others' passes.
            member = self.optimizer.members.get(name)
            assert member is None or isinstance(member, Sophia)
            gradients = [p.grad for p in params]
            if estimator == "gnb":
                self.engine.sampled_step(batch, seed=(args.seed << 32) + self.done)
                if member:
                    member.update_hessian(batch_size=args.global_batch_size * args.seq_length)
            elif member:
                member.update_hessian(lambda: self.engine.train_step(batch))
            else:
                for _ in range(2):
                    self.engine.train_step(batch)
            for p, gradient in zip(params, gradients, strict=True):
                p.grad = gradient

    def _is_due(self, interval: int) -> bool:
        """Whether an action is due that is taken every ``interval`` steps and after the last one; 0 for never."""
        return interval > 0 and (self.done % interval == 0 or self.done == self.args.train_iters)

    def _say(self, *lines: str) -> None:
        for line in lines if self.first else ():
            print(line, flush=True)

    def _describe(self) -> None:
        """Print the job and the start-up table."""
        assignments = joined(self.optimizer.assignments())
        args, plan, corpus = self.args, self.plan, self.corpus
        weights = sum(math.prod(shape) for shape in {a.name: a.shape for a in assignments}.values())
        self._say(
            f"text: {corpus.source}: {len(corpus.tokens):,} tokens, {len(self.train):,} training sequences",
            f"layout: tensor {args.tensor_model_parallel_size} x pipeline {args.pipeline_model_parallel_size} "
            f"({plan.schedule}) x data {plan.data_parallel}, {plan.micro_batches} micro-batches of "
            f"{args.micro_batch_size} sequences, {plan.backend}",
            f"model: {weights:,} weights",
            f"\n{startup_table(assignments)}\n",
        )
