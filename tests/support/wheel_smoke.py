"""Run by scripts/check_wheel.sh in a clean environment, outside the checkout: the installed wheel takes one Muon step."""

import sys

import torch
from shardstep.core.optimizer import emerging_optimizers as registry

if not registry.__file__.startswith(sys.prefix):
    sys.exit(f"shardstep.core comes from {registry.__file__}, not from the wheel installed in {sys.prefix}")

torch.manual_seed(0)
weight = torch.nn.Parameter(torch.randn(8, 4))
before = weight.detach().clone()
weight.grad = torch.randn_like(weight)
registry.TensorParallelMuon([weight], lr=0.1).step()
if torch.equal(weight, before) or not weight.isfinite().all():
    sys.exit(f"TensorParallelMuon made no sound step:\n{before}\n{weight}")
print("the wheel works as shardstep.core:", *registry.list_optimizers())
