"""Run by scripts/check_wheel.sh outside the checkout, in clean environments: what was installed is whole and takes a step.

    python wheel_smoke.py FOLDER

FOLDER is where the package must come from.
"""

import sys
import time
from pathlib import Path

began = time.perf_counter()
import shardstep  # noqa: E402

took = time.perf_counter() - began
if took > 0.2 or "torch" in sys.modules:
    sys.exit(f"import shardstep took {took:.2f} s (at most 0.2), torch imported: {'torch' in sys.modules}")

import shardstep.core.optimizer.emerging_optimizers as registry  # noqa: E402
import torch  # noqa: E402

from shardstep import OptimizerConfig, TensorParallelMuon, get_optimizer, on_whole_tensors  # noqa: E402

for module in (shardstep, registry):
    if not Path(str(module.__file__)).resolve().is_relative_to(Path(sys.argv[1]).resolve()):
        sys.exit(f"{module.__name__} comes from {module.__file__}, not from {sys.argv[1]}")
for package in (shardstep, shardstep.core):
    if not Path(str(package.__file__)).with_name("py.typed").exists():
        sys.exit(f"{package.__name__} has no py.typed: type checkers would see nothing")
for name in shardstep.__all__:
    if name not in dir(shardstep) or getattr(shardstep, name) is not getattr(shardstep.core, name):
        sys.exit(f"shardstep.{name} is not shardstep.core's, or dir() does not list it")

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.Linear(4, 8))
weights = [p for p in model.parameters() if p.ndim == 2]
whole_muon = on_whole_tensors(torch.optim.Muon, initialise=lambda _, p: {"momentum_buffer": torch.zeros_like(p)})
optimizers = [
    TensorParallelMuon(weights, lr=0.1),
    get_optimizer(OptimizerConfig(optimizer="soap", lr=0.1), model),
    whole_muon(weights, lr=0.1),
]
for optimizer in optimizers:
    before = [w.detach().clone() for w in weights]
    for _ in range(2):  # the first step of SOAP only looks at the gradient
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        optimizer.step()
    if any(torch.equal(w, b) or not w.isfinite().all() for w, b in zip(weights, before, strict=True)):
        sys.exit(f"{type(optimizer).__name__} made no sound step")
print(f"shardstep {shardstep.__version__} from {sys.argv[1]} works:", *shardstep.list_optimizers())
