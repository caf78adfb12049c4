"""A program of several ranks in which the real Megatron-Core saves and resumes; see test_megatron_checkpoint.py.

``python -m tests.megatron.checkpoints RANK RANKS STORE RUNS``: ``RUNS`` is a JSON object of :class:`Run` by name. Rank 0
prints what came of each, a line of JSON. It saves and loads as ``megatron.training.checkpointing`` does.
"""

import json
import sys
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.megatron.gpt import Case, Job
from tools.compare_megatron.on_cpu import serve_on_cpu


@dataclass(frozen=True)
class Run(Case):
    """Three steps, a save, and three more steps; a run that loads makes the latter three alone.

    Attributes:
        lr: Learning rate.
        min_lr: Where it ends.
        then_lr: Set by hand after the save.
        distributed: Adam in Megatron-Core's distributed optimizer. Its buffers are those that ``layer_wise`` asks for.
        sharding: How that is to save its state.
        idle: Take no step.
        schedule: What Megatron's scheduler is to do about another learning rate: ``override`` it, or take the ``checkpoint``'s.
    """

    lr: float = 0.01
    min_lr: float = 0.0
    then_lr: float = 0.0
    distributed: bool = False
    sharding: str = "fully_reshardable"
    idle: bool = False
    schedule: str = ""


class Resumed(Job):
    """One run on this rank."""

    case: Run

    def _layer_wise(self, model: Any, ddp: Any) -> dict[str, Any]:
        if not self.case.distributed:
            return super()._layer_wise(model, ddp)
        from megatron.core import parallel_state
        from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

        ddp.use_distributed_optimizer = True
        ranks = parallel_state.get_data_parallel_world_size(with_context_parallel=True)
        params = [p for p in model.parameters() if p.requires_grad]
        layout = DistributedOptimizer.compute_full_param_layout(
            params, ddp.bucket_size, ranks, ddp, expert_data_parallel_world_size=ranks
        )
        return {"full_param_layout": layout}

    def settings(self) -> dict[str, Any]:
        case = self.case
        return {
            **super().settings(),
            "lr": case.lr,
            "min_lr": case.min_lr,
            "muon_momentum": 0.9,
            "use_distributed_optimizer": case.distributed,
            "use_layer_wise_distributed_optimizer": case.layer_wise and not case.distributed,
        }

    @property
    def path(self) -> Path:
        return self.folder / (self.case.loads or self.case.saves)

    def state(self, *, loading: bool) -> dict[str, Any]:
        from megatron.core import dist_checkpointing

        if loading:
            common = dist_checkpointing.load_common_state_dict(str(self.path))
            metadata = dist_checkpointing.load_content_metadata(preloaded_state_dict=common) or {}
        else:
            metadata = self.metadata()
        inner = self.model.module.module if self.case.bf16 else self.model.module
        of_model = inner.sharded_state_dict(metadata=metadata)
        of_optimizer = self.optimizer.sharded_state_dict({"model": of_model}, is_loading=loading, metadata=metadata)
        return {"model": of_model, "optimizer": of_optimizer}

    def metadata(self) -> dict[str, Any]:
        """As Megatron's own for the same flags."""
        sharding = {"distrib_optim_sharding_type": self.case.sharding} if self.case.layer_wise else {}
        return {**sharding, "singleton_local_shards": False, "chained_optim_avoid_prefix": True}

    def save(self) -> None:
        from megatron.core import dist_checkpointing

        path = self.folder / self.case.saves
        if dist.get_rank() == 0:
            path.mkdir()
        dist.barrier()
        dist_checkpointing.save(self.state(loading=False), str(path), content_metadata=self.metadata())

    def scheduler(self, lr: float) -> Any:
        """Megatron's, from ``lr`` down to 0 in 100 steps."""
        from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

        takes = {"override_opt_param_scheduler": True, "use_checkpoint_opt_param_scheduler": False}
        if self.case.schedule == "checkpoint":
            takes = {name: not value for name, value in takes.items()}
        return OptimizerParamScheduler(
            self.optimizer, 0.0, lr, 0.0, 0, 100, "linear", 0.01, 0.01, 100, "constant", **takes
        )

    def go(self) -> dict[str, Any]:
        """What came of it."""
        case = self.case
        if case.loads:
            before = [p.detach().clone() for p in self.model.parameters()]
            try:
                self.load()
                if case.schedule:
                    self.scheduler(case.lr).load_state_dict(self.scheduler(Run.lr).state_dict() | {"num_steps": 20})
            except Exception as error:
                same = all(map(torch.equal, before, self.model.parameters()))
                return {"error": f"{type(error).__name__}: {error}", "unchanged": same}
        losses = [] if case.idle else self.train()
        if case.saves:
            self.save()
        found = {"losses": losses, "lr": sorted({group["lr"] for group in self.optimizer.param_groups})}
        if case.saves and not case.loads and not case.idle:
            for group in self.optimizer.param_groups:
                group["lr"] = case.then_lr or group["lr"]
            self.case = replace(case, loads="no more than itself")
            found["then"] = self.train()
        return found


def let_torch_adam_be_distributed() -> None:
    """Megatron-Core's distributed optimizer expects Transformer Engine's Adam, which keeps ``step`` with its groups.

    torch's keeps it with each parameter, from the first step on. Here there is one from the start, it is no shard, and after
    a load each parameter has one of its own.
    """
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    cls: Any = DistributedOptimizer

    def before(method: Any) -> Any:
        def made(self: Any, *args: Any, **kwargs: Any) -> Any:
            for group in self.optimizer.param_groups:
                for p in group["params"]:
                    fresh = {name: torch.zeros_like(p) for name in ("exp_avg", "exp_avg_sq")}
                    self.optimizer.state[p] = {**fresh, "step": torch.zeros(()), **self.optimizer.state[p]}
            return method(self, *args, **kwargs)

        return made

    def hiding(method: Any) -> Any:
        def hidden(self: Any, model_param: Any, *args: Any) -> Any:
            group, at = self.model_param_group_index_map[model_param]
            state = self.optimizer.state[self.optimizer.param_groups[group]["params"][at]]
            step = state.pop("step")
            try:
                return method(self, model_param, *args)
            finally:
                state["step"] = step

        return hidden

    def load(self: Any, state_dict: Any, method: Any = cls.load_state_dict) -> None:
        method(self, state_dict)
        for state in self.optimizer.state.values():
            state["step"] = state["step"].clone()

    cls.state_dict, cls.load_state_dict = before(cls.state_dict), load
    for name in ("_get_main_param_and_optimizer_states", "_set_main_param_and_optimizer_states"):
        setattr(cls, name, hiding(getattr(cls, name)))


def main() -> None:
    rank, ranks, store, runs = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], json.loads(sys.argv[4])
    serve_on_cpu()
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", store=dist.FileStore(store, ranks), rank=rank, world_size=ranks, timeout=timedelta(seconds=100)
    )
    import core.megatron  # noqa: F401  # that is all that a script of one's own has to do
    from core.megatron import resume

    let_torch_adam_be_distributed()
    for name, settings in runs.items():
        # The command line of a script that has one.
        given = {"use_checkpoint_opt_param_scheduler": settings.get("schedule") == "checkpoint"}
        resume.flags = lambda given=given: given
        found = Resumed(Run(**settings), Path(store).parent).go()
        dist.barrier()
        if rank == 0:
            print(json.dumps({"name": name, **found}), flush=True)
    dist.destroy_process_group()


# Megatron-Core starts processes of its own when it saves, and they import this file.
if __name__ == "__main__":
    main()
