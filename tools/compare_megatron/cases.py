"""What is compared: for each weak point of Megatron-Core's optimizers a model, a layout, and how either side is asked for."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

MATRICES = r"\.(linear_qkv|linear_proj|linear_fc1|linear_fc2)\.weight$"
UNFUSED = r"\.(linear_proj|linear_fc1|linear_fc2)\.weight$"
HOW = Literal["error", "size", "resumed", "names"]


@dataclass(frozen=True)
class Side:
    """How one side is asked for.

    Attributes:
        optimizer: Name in ``OptimizerConfig``.
        settings: Further fields of it, or attributes that its class does not have.
        repairs: Lines of Megatron-Core that are corrected first, so that what comes after them can be seen: keys of
            ``REPAIRS`` in :mod:`tools.compare_megatron.measure`.
    """

    optimizer: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    repairs: tuple[str, ...] = ()


EXACT = {"muon_tp_mode": "duplicated", "shardstep_tp_mode": "owner"}
"""Either side takes the setting that is its own."""
THEIRS, OURS = Side("muon", EXACT), Side("shardstep_muon", EXACT)


@dataclass(frozen=True)
class Case:
    """One row of the table.

    Attributes:
        name: For ``--cases``.
        about: What Megatron-Core does not get right.
        measured: What the columns of either side say.
        theirs: Megatron-Core's optimizer.
        ours: This package's.
        how: What is measured: the error of the weights after some steps, the size of the first update, the error after a
            checkpoint was loaded, or how many names can be constructed.
        truth: The unsharded run that both are held against: a key of ``TRUTHS`` in :mod:`tools.compare_megatron.job`.
        weights: Pattern of the names of the weights that are looked at.
        tp: Tensor-parallel ranks.
        dp: Data-parallel ranks, each with another gradient.
        model: Fields of ``TransformerConfig``, and arguments of ``GPTModel``.
        gradient: Size of its entries.
        distributed: Whether ``DistributedDataParallel`` scatters gradients, as it does for a distributed optimizer.
        next_lr: Learning rate of the job that loads the checkpoint, over that of the one that saved it.
    """

    name: str
    about: str
    measured: str
    theirs: Side = THEIRS
    ours: Side = OURS
    how: HOW = "error"
    truth: str = "muon"
    weights: str = MATRICES
    tp: int = 1
    dp: int = 1
    model: Mapping[str, Any] = field(default_factory=dict)
    gradient: float = 1.0
    distributed: bool = False
    next_lr: float = 1.0


def _adaptive(method: str, *repairs: str) -> dict[str, Any]:
    settings = {**EXACT, "adaptive_muon_moment2_method": method}
    return {
        "theirs": Side("adaptive_muon", settings, repairs),
        "ours": Side("shardstep_adaptive_muon", settings),
        "truth": method,
        # What a norm is of, where q, k and v are split, is not said anywhere.
        "weights": UNFUSED,
    }


def _both(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {"theirs": Side("muon", {**EXACT, **settings}), "ours": Side("shardstep_muon", {**EXACT, **settings})}


ERROR = "error of the update"
SAVED = "error of the update after a resumed step"
# The same class of emerging-optimizers on both sides, with the settings that Megatron-Core has for it.
_SOAP: dict[str, Any] = {
    "theirs": Side("soap"),
    "ours": Side("shardstep_eo_soap", {"eo_soap_use_kl_shampoo": True, "eo_soap_shampoo_beta": 0.95}),
}
_TABLES = r"position_embeddings\.weight$|\.router\.weight$"
_MOE = {"num_moe_experts": 4, "moe_grouped_gemm": False, "position_embedding_type": "learned_absolute"}

CASES = (
    Case("adaptive", "NorMuon as installed", ERROR, **_adaptive("normuon")),
    Case(
        "adaptive-scale",
        "NorMuon, missing attributes added: scaled twice",
        ERROR,
        **_adaptive("normuon", "attributes"),
    ),
    Case(
        "adamuon-tp",
        "AdaMuon on 2 ranks, missing attributes added: scale of the shard",
        ERROR,
        **_adaptive("adamuon", "attributes"),
        tp=2,
    ),
    Case(
        "normuon-tp",
        "NorMuon on 2 ranks, attributes and scale corrected: statistics of the shard",
        ERROR,
        **_adaptive("normuon", "attributes", "scale once"),
        tp=2,
    ),
    Case(
        "adamuon-size",
        "AdaMuon, missing attributes added: update not brought to Muon's size (ours: align_rms)",
        "RMS of the first update / Muon's",
        **_adaptive("adamuon", "attributes")
        | {"ours": Side("shardstep_adaptive_muon", {**EXACT, "adaptive_muon_align_rms": True})},
        how="size",
    ),
    Case("names", "names that cannot be constructed", "names that took a step", how="names"),
    Case(
        "qkv",
        "4 ranks, 2 query groups: QKV not split",
        ERROR,
        weights=r"\.linear_qkv\.weight$",
        tp=4,
    ),
    Case("soap-tp", "SOAP on 2 ranks: of the shard", ERROR, **_SOAP, truth="soap", tp=2),
    Case(
        "lion",
        "Lion takes Adam's betas",
        ERROR,
        theirs=Side("lion"),
        ours=Side("shardstep_lion"),
        truth="lion",
    ),
    Case(
        "l2",
        "Muon ignores decoupled_weight_decay=False",
        ERROR,
        **_both({"decoupled_weight_decay": False, "weight_decay": 1.0}),
        truth="muon, L2 decay",
    ),
    Case(
        "save-normuon",
        "NorMuon's state in torch_dist, missing attributes added",
        SAVED,
        **_adaptive("normuon", "attributes", "scale once"),
        how="resumed",
    ),
    Case(
        "save-soap",
        "SOAP's state in torch_dist",
        SAVED,
        **_SOAP,
        how="resumed",
        truth="soap",
    ),
    Case(
        "save-adam",
        "Adam in the distributed optimizer, without Apex and Transformer Engine",
        SAVED,
        theirs=Side("adam", {"use_distributed_optimizer": True}),
        ours=Side("shardstep_adamw", {"use_distributed_optimizer": True}),
        how="resumed",
        truth="adam",
        dp=2,
        distributed=True,
    ),
    Case(
        "distributed-optimizer",
        "Muon with use_distributed_optimizer",
        ERROR,
        **_both({"use_distributed_optimizer": True}),
        dp=2,
        distributed=True,
    ),
    Case(
        "tables",
        "router and learned positions go to Muon",
        "error of their update, against Adam's",
        truth="adam",
        weights=_TABLES,
        model=_MOE,
    ),
    Case(
        "gate-up",
        "2 ranks: gate and up as one matrix",
        ERROR,
        weights=r"\.linear_fc1\.weight$",
        tp=2,
        model={"gated_linear_unit": True},
    ),
    Case("small-gradients", "gradients of 1e-10: norm below an epsilon", ERROR, gradient=1e-10),
    Case("tiny-gradients", "gradients of 1e-23: squares are zero", ERROR, gradient=1e-23),
    Case(
        "defaults",
        "2 ranks, default mode",
        ERROR,
        theirs=Side("muon"),
        ours=Side("shardstep_muon"),
        tp=2,
    ),
    Case("other-lr", "resumed with another lr", SAVED, how="resumed", next_lr=0.5),
    Case(
        "short-side",
        "2 ranks, distributed mode, fc1 and fc2 cut on their short side",
        ERROR,
        theirs=Side("muon", {"muon_tp_mode": "distributed"}),
        weights=r"\.linear_fc[12]\.weight$",
        tp=2,
        model={"hidden_size": 512, "ffn_hidden_size": 64, "num_layers": 1},
    ),
    Case("one-rank", "1 rank: collectives all the same", ERROR),
)
