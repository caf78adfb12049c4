"""What megatron_gpt.py trains: one tiny GPT after another, each on a layout of its own."""

from dataclasses import dataclass
from typing import NamedTuple

RANKS = 4


@dataclass(frozen=True)
class Case:
    """One training run. What is left of the ranks is data-parallel.

    Attributes:
        optimizer: Megatron-Core's name of it.
        tp: Ranks of tensor parallelism; above one, a mixture of experts has sequence parallelism too.
        pp: Stages.
        ep: Ranks that divide the experts.
        etp: Ranks of tensor parallelism of an expert; 0: as many as ``tp``.
        bf16: Weights are bfloat16, with float32 copies.
        layer_wise: Megatron-Core's layer-wise optimizer, with its layout of the gradient buffers.
        overlap: Gradients are reduced during backward, and weights gathered during forward.
        swiglu: The MLP is gated.
        gate: Attention is gated.
        latent: Multi-head latent attention: ``full``, or ``small`` without a projection of queries down.
        heads: Orthogonalize attention head by head.
        experts: Number of experts, of which a token goes to two.
        tied: The embedding is the output layer too.
        learned: Position embeddings are learned.
        clip: Largest norm of the gradient.
        skip: Norm of the gradient above which nothing is stepped; 0 for none.
        moment2: Of adaptive Muon.
        by_hand: Compare the first update with one made by hand.
        saves: Checkpoint to write.
        loads: Checkpoint to go on from.
    """

    optimizer: str
    tp: int = 1
    pp: int = 1
    ep: int = 1
    etp: int = 0
    bf16: bool = False
    layer_wise: bool = False
    overlap: bool = False
    swiglu: bool = False
    gate: bool = False
    latent: str = ""
    heads: bool = False
    experts: int = 0
    tied: bool = False
    learned: bool = False
    clip: float = 1.0
    skip: float = 0.0
    moment2: str = "adamuon"
    by_hand: bool = False
    saves: str = ""
    loads: str = ""


class Outcome(NamedTuple):
    """What came of a case on one rank.

    Attributes:
        losses: Before each step.
        norms: Of the gradient, in each step.
        by_hand: For each weight, how far its first update is from one made by hand.
        moved: Whether any weight changed.
    """

    losses: list[float]
    norms: list[float]
    by_hand: dict[str, float]
    moved: bool


MUON, ADAPTIVE, SOAP = "shardstep_muon", "shardstep_adaptive_muon", "shardstep_soap"
CASES = {
    "1": Case(MUON, saves="whole", by_hand=True),
    "theirs": Case("muon"),
    "tp2": Case(MUON, tp=2, saves="tp2", by_hand=True),
    "tp4, 2 query groups": Case(MUON, tp=4, by_hand=True),
    "pp2": Case(MUON, pp=2),
    "tp2 pp2": Case(MUON, tp=2, pp=2),
    "swiglu 1": Case(MUON, swiglu=True, by_hand=True),
    "swiglu tp2": Case(MUON, tp=2, swiglu=True, by_hand=True),
    "bf16 1": Case(MUON, bf16=True),
    "on from tp2": Case(MUON, loads="tp2"),
    "on from 1, tp2": Case(MUON, tp=2, loads="whole"),
    "on from tp2, pp2": Case(MUON, pp=2, loads="tp2"),
    "latent 1": Case(MUON, latent="full", by_hand=True),
    "latent tp2": Case(MUON, tp=2, latent="full", by_hand=True),
    "experts 1": Case(MUON, experts=4, swiglu=True, by_hand=True),
    "experts tp2 ep2": Case(MUON, experts=4, swiglu=True, tp=2, ep=2, by_hand=True),
    "bf16 tp2": Case(MUON, tp=2, bf16=True),
    "bf16 tp2 layer-wise overlap": Case(MUON, tp=2, bf16=True, layer_wise=True, overlap=True),
    "tied 1": Case(MUON, tied=True),
    "tied tp2 pp2": Case(MUON, tied=True, tp=2, pp=2),
}
"""Cases of every day."""

MORE_CASES = {
    "normuon 1": Case(ADAPTIVE, moment2="normuon"),
    "normuon tp2": Case(ADAPTIVE, tp=2, moment2="normuon", saves="normuon"),
    "normuon on from tp2": Case(ADAPTIVE, moment2="normuon", loads="normuon"),
    "normuon on from tp2, pp2": Case(ADAPTIVE, pp=2, moment2="normuon", loads="normuon"),
    "soap tp2": Case(SOAP, tp=2, saves="soap"),
    "soap on from tp2": Case(SOAP, loads="soap"),
    "soap on from tp2, tp2": Case(SOAP, tp=2, loads="soap"),
    "bf16 tp2": Case(MUON, tp=2, bf16=True),
    "bf16 tp2 layer-wise": Case(MUON, tp=2, bf16=True, layer_wise=True),
    "heads 1": Case(MUON, heads=True, by_hand=True),
    "heads tp4, 2 query groups": Case(MUON, tp=4, heads=True, by_hand=True),
    "gate 1": Case(MUON, gate=True, by_hand=True),
    "gate tp2": Case(MUON, tp=2, gate=True, by_hand=True),
    "gate tp4, 2 query groups": Case(MUON, tp=4, gate=True, by_hand=True),
    "gate heads tp2": Case(MUON, tp=2, gate=True, heads=True, by_hand=True),
    "small latent 1": Case(MUON, latent="small", by_hand=True),
    "small latent tp2": Case(MUON, tp=2, latent="small", by_hand=True),
    "latent heads 1": Case(MUON, latent="full", heads=True, by_hand=True),
    "latent heads tp2": Case(MUON, tp=2, latent="full", heads=True, by_hand=True),
    "experts ep2": Case(MUON, experts=4, swiglu=True, ep=2, by_hand=True),
    "experts tp2": Case(MUON, experts=4, swiglu=True, tp=2, by_hand=True),
    "experts tp2 ep4, etp1": Case(MUON, experts=4, swiglu=True, tp=2, ep=4, etp=1, by_hand=True),
    "experts soap 1": Case(SOAP, experts=4),
    "experts soap tp2 ep2": Case(SOAP, experts=4, tp=2, ep=2),
    "bf16 experts ep2": Case(MUON, experts=4, ep=2, bf16=True),
    "bf16 experts ep2 layer-wise": Case(MUON, experts=4, ep=2, bf16=True, layer_wise=True),
    "bf16 soap tp2": Case(SOAP, tp=2, bf16=True),
    "bf16 soap tp2 layer-wise overlap": Case(SOAP, tp=2, bf16=True, layer_wise=True, overlap=True),
    "bf16 learned tp2": Case(MUON, tp=2, bf16=True, learned=True),
    "bf16 learned tp2 layer-wise": Case(MUON, tp=2, bf16=True, learned=True, layer_wise=True),
    "clip 1": Case("shardstep_sgd", clip=0.05),
    "clip tp2 pp2": Case("shardstep_sgd", clip=0.05, tp=2, pp=2),
    "clip theirs": Case("muon", clip=0.05),
    "clip muon 1": Case(MUON, clip=0.05),
    "clip muon tp2": Case(MUON, clip=0.05, tp=2),
    "skip": Case(MUON, skip=1e-3, tp=2),
    "skip layer-wise": Case(MUON, skip=1e-3, tp=2, bf16=True, layer_wise=True),
}
"""What takes longer to go through."""
