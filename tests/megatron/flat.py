"""A program of several ranks in which Megatron-Core's distributed optimizers step with ours; see test_megatron_flat.py.

``python -m tests.megatron.flat RANKS FOLDER CASES [RANK]``: ``CASES`` is a JSON object of :class:`FlatCase` by name. Without
``RANK`` it starts the ranks as copies of itself: importing takes ten seconds, once is enough. A copy cannot save.
"""

import argparse
import json
import os
import sys
import traceback
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tests.megatron.gpt import Case, Job
from tools.compare_megatron.on_cpu import serve_on_cpu


@dataclass(frozen=True)
class FlatCase(Case):
    """One training run.

    Attributes:
        how: ``plain``: every rank steps everything; ``flat``: ranges of the distributed optimizer; ``layout`` and ``dealt``: the
            layer-wise optimizer, with and without a layout of the buffers.
        settings: Of the optimizer.
        sharding: Form of the checkpoint.
        on: Train for as many steps once more.
        resets: Clear the state of the optimizers before that.
        like: The case whose weights these are compared with.
    """

    how: str = "plain"
    settings: dict[str, Any] = field(default_factory=dict)
    sharding: str = "fully_reshardable"
    on: bool = False
    resets: bool = False
    like: str = ""


class FlatJob(Job):
    """One case on this rank."""

    case: FlatCase
    gloo = True

    def _layer_wise(self, model: Any, ddp: Any) -> dict[str, Any]:
        if self.case.how == "layout":
            return super()._layer_wise(model, ddp)
        ddp.use_distributed_optimizer = self.case.how == "flat"
        return {}

    def settings(self) -> dict[str, Any]:
        how = self.case.how
        return {
            **super().settings(),
            "muon_tp_mode": "blockwise",  # Megatron's default, of which ours makes owner
            "use_distributed_optimizer": how == "flat",
            "use_layer_wise_distributed_optimizer": how in ("layout", "dealt"),
            **self.case.settings,
        }

    def state(self, *, loading: bool) -> dict[str, Any]:
        inner = self.model.module.module if self.case.bf16 else self.model.module
        metadata = {"chained_optim_avoid_prefix": True, "distrib_optim_sharding_type": self.case.sharding}
        of_model = inner.sharded_state_dict(metadata=metadata)
        of_optimizer = self.optimizer.sharded_state_dict({"model": of_model}, is_loading=loading, metadata=metadata)
        return {"model": of_model, "optimizer": of_optimizer}

    def weights(self) -> list[Tensor]:
        """Of this rank, in model order."""
        if self.case.overlap:  # what the next forward pass would gather
            self.model.disable_forward_pre_hook(param_sync=True)
        return [p.detach().float().clone() for p in self.model.parameters()]


def ranks_differ(weights: list[Tensor]) -> bool:
    """Whether some data-parallel rank has other weights than the first."""
    from megatron.core import parallel_state

    mine = torch.cat([w.flatten() for w in weights])
    first, group = mine.clone(), parallel_state.get_data_parallel_group()
    dist.broadcast(first, dist.get_process_group_ranks(group)[0], group=group)
    differs = torch.tensor(float(not torch.equal(first, mine)))
    dist.all_reduce(differs)
    return bool(differs)


def unlike(a: list[Tensor], b: list[Tensor]) -> float:
    """The largest difference of an entry, over the largest entry."""
    return max(float((x - y).abs().max()) for x, y in zip(a, b, strict=True)) / max(float(y.abs().max()) for y in b)


def outcome(case: FlatCase, folder: Path, weights: dict[str, list[Tensor]], name: str) -> dict[str, Any]:
    """What came of ``case``; a refusal is that too. Adds to ``weights``."""
    from megatron.training import global_vars

    global_vars._GLOBAL_ARGS = argparse.Namespace(optimizer=case.optimizer)  # as the command line names it
    try:
        job = FlatJob(case, folder)
    except ValueError as error:
        return {"name": name, "error": str(error)}
    if case.loads:
        job.load()
    found: dict[str, Any] = {"name": name, "losses": job.train()}
    if case.saves:
        job.save()
    if case.resets:
        for member in job.optimizer.chained_optimizers:
            member.optimizer.state.clear()
    if case.on:
        job.case = replace(case, loads="itself")
        found["losses on"] = job.train()
    weights[name] = job.weights()
    compared = {"unlike": unlike(weights[name], weights[case.like])} if case.like else {}
    return found | compared | {"norms": job.norms, "ranks differ": ranks_differ(weights[name])}


def start(rank: int, ranks: int, folder: Path, cases: Mapping[str, FlatCase]) -> None:
    """One rank of the program."""
    torch.set_num_threads(1)
    weights: dict[str, list[Tensor]] = {}
    for at, (name, case) in enumerate(cases.items()):
        # Groups have threads that look for work all the time, so that a case must leave none.
        store = dist.FileStore(str(folder / f"store {at}"), ranks)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=100))
        found = outcome(case, folder, weights, name)
        if rank == 0:
            print(json.dumps(found), flush=True)
        dist.barrier()
        dist.destroy_process_group()


def fork(rank: int, *args: Any) -> int:
    """Start a rank as a copy of this process; its id."""
    child = os.fork()
    if not child:
        code = 1
        try:
            start(rank, *args)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)  # others may wait for this one: nothing of theirs is to be torn down
    return child


def as_json(cases: Mapping[str, FlatCase]) -> str:
    """For the command line."""
    return json.dumps({name: asdict(case) for name, case in cases.items()})


def main() -> None:
    ranks, folder = int(sys.argv[1]), Path(sys.argv[2])
    cases = {name: FlatCase(**case) for name, case in json.loads(sys.argv[3]).items()}
    serve_on_cpu()
    import megatron.training.global_vars  # noqa: F401
    from megatron.core.optimizer.layer_wise_optimizer import LayerWiseDistributedOptimizer

    import core.megatron  # noqa: F401

    # Gloo gathers only parts of one size. Megatron-Core has this in its place, as a reference.
    LayerWiseDistributedOptimizer.allgather_params = LayerWiseDistributedOptimizer.broadcast_params
    if sys.argv[4:]:
        start(int(sys.argv[4]), ranks, folder, cases)
        return
    children = [fork(rank, ranks, folder, cases) for rank in range(ranks)]
    sys.exit(max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children))


# Megatron-Core starts processes of its own when it saves, and they import this file.
if __name__ == "__main__":
    main()
