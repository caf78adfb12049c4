"""Muon's first update of Megatron's weights, made by hand with emerging-optimizers' Newton-Schulz on whole matrices."""

import re
from typing import Any

import torch
import torch.distributed as dist
from emerging_optimizers.orthogonalized_optimizers import get_muon_scale_factor
from emerging_optimizers.orthogonalized_optimizers.muon_utils import newton_schulz
from torch import Tensor

HEADS, GROUPS, CHANNELS, NOPE, ROPE, VALUE, LORA = 4, 2, 8, 8, 4, 8, 16
LR, DECAY = 0.01, 0.01


class ByHand:
    """Weights and gradients before a step, to be compared with what is there after it.

    Args:
        model: With the gradients of the first step.
        case: That it trains, a ``Case`` of megatron_cases.
    """

    def __init__(self, model: Any, case: Any) -> None:
        self.case = case
        self.weights = {
            name.removeprefix("module."): p
            for name, p in model.named_parameters()
            if re.search(r"decoder.*linear_\w+\.weight$", name)
        }
        self.before = {name: self._whole(name, p, p.detach()) for name, p in self.weights.items()}
        self.gradients = {name: self._whole(name, p, p.main_grad) for name, p in self.weights.items()}

    def errors(self) -> dict[str, float]:
        """Of each weight, the difference of the two updates over the update."""
        found = {}
        for name, p in self.weights.items():
            before, after = self.before[name], self._whole(name, p, p.detach())
            expected = before * (1 - LR * DECAY)
            for rows in self._parts(name.split(".")[-2], before.shape[0]):
                x = newton_schulz(self.gradients[name][rows], 5)
                expected[rows] -= LR * get_muon_scale_factor(*x.shape, mode="spectral") * x
            found[name] = float((after - expected).norm() / (expected - before).norm())
        return found

    def _whole(self, name: str, p: Any, x: Tensor) -> Tensor:
        from megatron.core import parallel_state

        group = parallel_state.get_tensor_model_parallel_group()
        if ".experts." in name:
            group = parallel_state.get_expert_tensor_parallel_group()
        if not p.tensor_model_parallel or group.size() == 1:
            return x.clone()
        shards = [torch.empty_like(x) for _ in range(group.size())]
        dist.all_gather(shards, x.contiguous(), group=group)
        blocks = zip(*(shard.chunk(p.partition_stride, p.partition_dim) for shard in shards), strict=True)
        return torch.cat([shard for block in blocks for shard in block], p.partition_dim)

    def _parts(self, layer: str, rows: int) -> list[Tensor]:
        """Rows of each matrix that the weight of ``layer`` is made of."""
        index = torch.arange(rows)
        if layer == "linear_fc1" and self.case.swiglu:
            return list(index.chunk(2))
        kinds = _kinds(layer, index, HEADS // GROUPS)
        if self.case.heads:
            return [head for kind in kinds for head in kind.reshape(-1, kind.shape[-1])]
        return [kind.reshape(-1) for kind in kinds]


def _kinds(layer: str, index: Tensor, queries: int) -> list[Tensor]:
    """``index`` cut as attention cuts what the layer puts out; the last dim is that of one head."""
    if layer == "linear_qkv":
        heads = index.view(GROUPS, -1, CHANNELS)
        kinds = [heads[:, :queries], heads[:, queries:-2], heads[:, -2], heads[:, -1]]
        return [kind for kind in kinds if kind.numel()]
    if layer in ("linear_q_proj", "linear_q_up_proj"):
        return list(index.view(HEADS, -1).split([NOPE, ROPE], -1))
    if layer == "linear_kv_up_proj":
        return list(index.view(HEADS, -1).split([NOPE, VALUE], -1))
    if layer == "linear_kv_down_proj":
        return list(index.split([LORA, ROPE]))
    return [index]
