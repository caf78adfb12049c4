"""As torchtitan trains: tensor parallelism, then FSDP2, on one mesh; torch's own checkpoints, which load on any other layout.

torchrun --nproc-per-node 4 -m tools.examples.torchtitan_style --tp 2 --steps 5 --save saved
torchrun --nproc-per-node 2 -m tools.examples.torchtitan_style --tp 2 --steps 5 --load saved
python -m tools.examples.torchtitan_style --steps 10     # the same run, unsharded: the same losses

An optimizer that keeps its state with one rank (soap, shampoo and others in `owner` mode) needs core.checkpoint instead, or the
setting `soap_tp_mode="duplicated"`: torch would take that state for replicated.
"""

from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.optim import Optimizer

from core.optimizer.emerging_optimizers import get_optimizer
from core.optimizer.optimizer_config import OptimizerConfig

from ..pretrain.model import GPT, build_gpt
from ..pretrain.parallel import tensor_parallel
from .common import arguments, batches, gpt_config, leave, report, start


def parallelize(model: GPT, mesh: DeviceMesh) -> None:
    """Cut ``model`` over ``tp`` by ``parallelize_module``, and what that leaves over ``dp`` by ``fully_shard``, in place."""
    if mesh["tp"].size() > 1:
        tensor_parallel(model, mesh["tp"])
    for layer in model.decoder.layers.values():
        fully_shard(layer, mesh=mesh["dp"])
    fully_shard(model, mesh=mesh["dp"])


class Training:
    """What a checkpoint holds, in the form that ``torch.distributed.checkpoint`` asks for."""

    def __init__(self, model: nn.Module, optimizer: Optimizer) -> None:
        self.model, self.optimizer, self.step = model, optimizer, 0

    def state_dict(self) -> dict[str, Any]:
        """Model and optimizer by parameter names, as DTensors."""
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer, "step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse."""
        set_state_dict(self.model, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        self.step = state["step"]


def main(argv: Sequence[str] | None = None) -> None:
    """Train, print the losses, save."""
    parser = arguments("torchtitan_style", "Train a small GPT under tensor parallelism and FSDP2.")
    parser.add_argument("--tp", type=int, default=1, help="ranks that cut each matrix; the others are data-parallel")
    parser.add_argument("--save", help="directory for a checkpoint after the last step")
    parser.add_argument("--load", help="directory to go on from")
    args = parser.parse_args(argv)

    device = start()
    model = build_gpt(gpt_config(tied=False), seed=0, device=device)
    part, parts = 0, 1
    if dist.is_initialized():
        mesh = init_device_mesh(device.type, (dist.get_world_size() // args.tp, args.tp), mesh_dim_names=("dp", "tp"))
        parallelize(model, mesh)
        part, parts = mesh["dp"].get_local_rank(), mesh["dp"].size()

    config = OptimizerConfig(optimizer=args.optimizer, lr=args.lr, muon_fp32_matmul_prec=args.precision)
    optimizer = get_optimizer(config, model)
    training = Training(model, optimizer)
    if args.load:
        load({"training": training}, checkpoint_id=args.load)
    steps = range(training.step, training.step + args.steps)
    for x, y in batches(args.data_path, steps, device, part=part, parts=parts):
        loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
        loss.backward()
        optimizer.clip_grad_norm_(1.0)
        optimizer.step()
        optimizer.zero_grad()
        training.step += 1
        report(training.step, loss)
    if args.save:
        save({"training": training}, checkpoint_id=args.save)
    leave()


if __name__ == "__main__":
    main()
