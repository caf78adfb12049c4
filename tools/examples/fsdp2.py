"""FSDP2: shard a model with ``fully_shard``, then build its optimizer. That is all.

torchrun --nproc-per-node 2 -m tools.examples.fsdp2
torchrun --nproc-per-node 4 -m tools.examples.fsdp2 --replicas 2 --bf16 --optimizer soap
python -m tools.examples.fsdp2                    # the same run, unsharded: the same losses
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from core.optimizer.emerging_optimizers import get_optimizer
from core.optimizer.optimizer_config import OptimizerConfig

from ..pretrain.model import GPT, build_gpt
from .common import arguments, batches, gpt_config, leave, report, start


def shard(model: GPT, device: torch.device, *, replicas: int, bf16: bool) -> None:
    """Shard ``model`` in place over all ranks, or over those of one of several ``replicas``."""
    mesh = init_device_mesh(
        device.type, (replicas, dist.get_world_size() // replicas), mesh_dim_names=("replicate", "shard")
    )
    mesh = mesh if replicas > 1 else mesh["shard"]
    # Parameters stay float32 where the optimizer sees them; only their gathered copies are bfloat16.
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if bf16 else MixedPrecisionPolicy()
    for layer in model.decoder.layers.values():
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)


def main(argv: Sequence[str] | None = None) -> None:
    """Train and print the losses."""
    parser = arguments("fsdp2", "Train a small GPT under FSDP2.")
    parser.add_argument("--replicas", type=int, default=1, help="HSDP: copies of the model, each on its own ranks")
    parser.add_argument(
        "--bf16", action="store_true", help="compute in bfloat16; parameters and optimizer stay float32"
    )
    args = parser.parse_args(argv)

    device = start()
    model = build_gpt(gpt_config(tied=True), seed=0, device=device)
    part, parts = 0, 1
    if dist.is_initialized():
        shard(model, device, replicas=args.replicas, bf16=args.bf16)
        part, parts = dist.get_rank(), dist.get_world_size()

    config = OptimizerConfig(optimizer=args.optimizer, lr=args.lr, muon_fp32_matmul_prec=args.precision)
    optimizer = get_optimizer(config, model)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=args.steps)
    for step, (x, y) in enumerate(batches(args.data_path, range(args.steps), device, part=part, parts=parts)):
        loss = F.cross_entropy(model(x).float().flatten(0, 1), y.flatten())
        loss.backward()
        optimizer.clip_grad_norm_(1.0)  # of the whole model, one collective
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        report(step + 1, loss)
    leave()


if __name__ == "__main__":
    main()
