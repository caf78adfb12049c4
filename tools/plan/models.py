"""Models and clusters for the planner: which matrices a rank has shards of, and over which links they travel."""

from dataclasses import dataclass
from math import ceil, lcm

from core.cost.model import Link, Machine, Matrices

from ..usage import UsageError


@dataclass(frozen=True)
class Model:
    """A decoder-only transformer, in Megatron's terms.

    Attributes:
        hidden_size: Width.
        num_layers: Layers.
        ffn_hidden_size: Inner width of a dense layer's MLP, or of the shared expert; 0 for none.
        num_attention_heads: Heads.
        num_query_groups: Key and value heads.
        kv_channels: Width of a head.
        vocab_size: Rows of the embedding, and of the output layer, which is not tied to it.
        swiglu: Whether the first matrix of an MLP holds gate and up together.
        num_experts: Routed experts of each layer; 0 for a dense model.
        moe_ffn_hidden_size: Inner width of one of them.
        moe_router_topk: Experts that a token goes to.
    """

    hidden_size: int
    num_layers: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    vocab_size: int
    swiglu: bool = True
    num_experts: int = 0
    moe_ffn_hidden_size: int = 0
    moe_router_topk: int = 1

    @property
    def dense(self) -> list[tuple[int, int, bool]]:
        """Rows and columns of a layer's matrices outside of experts, and whether rows are cut."""
        h, gates = self.hidden_size, 2 if self.swiglu else 1
        heads = self.num_attention_heads * self.kv_channels
        qkv = heads + 2 * self.num_query_groups * self.kv_channels
        attention = [(qkv, h, True), (h, heads, False)]
        f = self.ffn_hidden_size
        return [*attention, *([(gates * f, h, True), (h, f, False)] if f else [])]

    @property
    def expert(self) -> list[tuple[int, int, bool]]:
        """Rows and columns of one expert's matrices, and whether rows are cut."""
        if not self.num_experts:
            return []
        f, gates = self.moe_ffn_hidden_size, 2 if self.swiglu else 1
        return [(gates * f, self.hidden_size, True), (self.hidden_size, f, False)]

    @property
    def parameters(self) -> int:
        """Number of parameters in all matrices, the embedding and the output layer."""
        return self._count(self.num_experts)

    @property
    def active(self) -> int:
        """Number of parameters that a token meets, without the embedding."""
        return self._count(self.moe_router_topk) - self.vocab_size * self.hidden_size

    def _count(self, experts: int) -> int:
        layer = _entries(self.dense) + experts * _entries(self.expert)
        return self.num_layers * layer + 2 * self.vocab_size * self.hidden_size


def _entries(matrices: list[tuple[int, int, bool]]) -> int:
    return sum(rows * cols for rows, cols, _ in matrices)


PRESETS = {
    "1B": Model(2048, 16, 8192, 32, 8, 64, 128256),
    "8B": Model(4096, 32, 14336, 32, 8, 128, 128256),
    "70B": Model(8192, 80, 28672, 64, 8, 128, 128256),
    "405B": Model(16384, 126, 53248, 128, 8, 128, 128256),
    "1T-moe": Model(7168, 61, 2048, 64, 8, 128, 163840, num_experts=384, moe_ffn_hidden_size=2048, moe_router_topk=8),
}
"""The dense ones have the shapes of Llama 3, https://arxiv.org/abs/2407.21783; the last has Kimi K2's experts (arXiv 2507.20534)
and grouped attention."""


@dataclass(frozen=True)
class Cluster:
    """Ranks and the links between them, in Megatron's order: tensor-parallel ranks are neighbours, pipeline stages far apart.

    Attributes:
        world_size: Number of ranks.
        tp: Tensor-parallel size.
        pp: Pipeline-parallel size.
        ep: Expert-parallel size.
        etp: Tensor-parallel size of experts.
        ranks_per_node: Number of ranks that the intra-node link joins.
        intra: Link in a node.
        inter: Link between nodes.
        flops: Operations a second of products in the dtype that matrices travel in.
        gram_flops: Operations a second of products for float32 Gram matrices.
        memory: Bytes a second of memory.
    """

    world_size: int
    tp: int
    pp: int
    ep: int
    etp: int
    ranks_per_node: int
    intra: Link
    inter: Link
    flops: float
    gram_flops: float
    memory: float

    @property
    def dp(self) -> int:
        """Number of ranks that hold the same shard of a parameter outside of experts."""
        return self.world_size // (self.tp * self.pp)

    @property
    def expert_dp(self) -> int:
        """Number of ranks that hold the same shard of an expert."""
        return self.world_size // (self.etp * self.ep * self.pp)

    def smallest(self, *, experts: bool) -> int:
        """The least number of ranks that the model fits: one copy of it, and a multiple of what its experts take."""
        return self.pp * (lcm(self.tp, self.etp * self.ep) if experts else self.tp)

    def machine(self, tp: int, joint: int) -> Machine:
        """One rank's rates, when ``tp`` neighbours split a matrix and ``joint`` neighbours span all of its copies."""
        near, far = (self.intra if span <= self.ranks_per_node else self.inter for span in (tp, joint))
        return Machine(self.flops, self.memory, near, self.gram_flops, far)


Part = tuple[Machine, list[Matrices]]
"""Kinds of matrices that live on the same ranks, and the rates of such a rank."""


def parts(model: Model, cluster: Cluster, itemsize: int) -> list[Part]:
    """The matrices of a rank on the fullest pipeline stage: those outside of experts, then those of experts."""
    layers = ceil(model.num_layers / cluster.pp)
    stage = cluster.world_size // cluster.pp
    made = [
        (
            cluster.machine(cluster.tp, stage),
            [_matrices(layers, m, cluster.tp, cluster.dp, itemsize) for m in model.dense],
        )
    ]
    if model.num_experts:
        count = layers * (model.num_experts // cluster.ep)
        # The ranks that hold copies of an expert lie as far apart as the stage is wide.
        machine = cluster.machine(cluster.etp, stage if cluster.expert_dp > 1 else cluster.etp)
        made.append((machine, [_matrices(count, m, cluster.etp, cluster.expert_dp, itemsize) for m in model.expert]))
    return made


def _matrices(count: int, matrix: tuple[int, int, bool], tp: int, copies: int, itemsize: int) -> Matrices:
    rows, cols, cuts_rows = matrix
    splits_short = tp > 1 and rows != cols and cuts_rows == (rows < cols)
    return Matrices(count, rows, cols, tp, copies, splits_short, itemsize)


def other_parameters(model: Model, cluster: Cluster) -> float:
    """Number of entries on a rank that AdamW updates: embedding or output layer, which lie on different stages, and routers."""
    tables = 2 if cluster.pp == 1 else 1
    routers = ceil(model.num_layers / cluster.pp) * model.num_experts * model.hidden_size
    return tables * model.vocab_size * model.hidden_size / cluster.tp + routers


def check(model: Model, cluster: Cluster) -> None:
    """Raise UsageError for parallel sizes that do not fit the model or the number of ranks."""
    dense = ("hidden_size", "num_attention_heads", "ffn_hidden_size")
    cuts = [("--tp", cluster.tp, name) for name in dense]
    if model.num_experts:
        cuts += [("--etp", cluster.etp, "moe_ffn_hidden_size")]
    for flag, size, name in cuts:
        if (value := getattr(model, name)) % size:
            option = f"--{name.replace('_', '-')} {value}"
            raise UsageError(flag, size, f"does not divide {option}", possible=_divisors(value))
    if cluster.pp > model.num_layers:
        raise UsageError(
            "--pp", cluster.pp, "stages need a layer each", possible=f"1 to --num-layers {model.num_layers}"
        )
    if not model.num_experts and cluster.ep > 1:
        raise UsageError("--ep", cluster.ep, "needs experts", hint="--num-experts, or leave it out")
    if model.num_experts % cluster.ep:
        problem = f"cannot share out --num-experts {model.num_experts}"
        raise UsageError("--ep", cluster.ep, problem, possible=_divisors(model.num_experts))
    ranks = cluster.tp * cluster.pp
    if cluster.world_size % ranks:
        problem = f"is not divisible by --tp {cluster.tp} times --pp {cluster.pp}"
        raise UsageError("--world-size", cluster.world_size, problem, possible=f"multiples of {ranks}")
    ranks = cluster.etp * cluster.ep * cluster.pp
    if model.num_experts and cluster.world_size % ranks:
        problem = f"is not divisible by --etp {cluster.etp} times --ep {cluster.ep} times --pp {cluster.pp}"
        raise UsageError("--world-size", cluster.world_size, problem, possible=f"multiples of {ranks}")


def _divisors(value: int) -> str:
    return " ".join(str(n) for n in range(1, value + 1) if value % n == 0 and n <= 1024)
