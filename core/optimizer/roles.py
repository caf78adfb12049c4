"""Weights that a matrix optimizer must not get, found by how the model is built: embeddings, output layers and routers.

A table, an output layer or a router is a list of vectors, one for each token, class or expert, and no map between two spaces.
Orthogonalizing it changes the vectors of rare tokens as much as those of common ones.

The rules, in their order; a weight that none of them names stays a matrix:

* The weight of an embedding module (``nn.Embedding``, or any module with ``num_embeddings`` and ``embedding_dim``) is a table,
  also where an output layer shares it.
* A linear layer that stands outside of the layer stacks, and has as many outputs as an embedding of the model has rows, is an
  output layer. Square weights do not count, nor does a number of rows that is also the width of an embedding.
* A linear layer beside a collection of experts, with one output for each expert, is a router.
* A linear layer that is called like an output layer (:data:`HEADS`, :data:`HEAD_MODULES`) is one outside of the layer stacks.
  Inside of a stack it is one if it also has as many outputs as an embedding has rows.
* A linear layer called ``gate`` with fewer outputs than inputs is a router, unless a layer beside it has the same shape: that
  is the gate of a gated MLP.

A layer stack is a container with numbered modules that have modules of their own (``layers.0.…``); a ``Sequential`` of unlike
modules is none. Layers whose path says attention are never output layers or routers.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..module_names import unwrapped
from ..process_groups_config import ProcessGroupCollection
from ..sharding.parameter_layout import layout_of
from .param_key import ParamKey, ParamWithNamePredicate
from .registry import unless_asked_for

HEADS = (
    "head",
    "lm_head",
    "output",
    "output_layer",
    "embed_out",
    "ff_out",
    "classifier",
    "score",
    "unembed",
    "unembedding",
    "logits",
)
"""Names of linear layers that are output layers."""

HEAD_MODULES = ("head", "heads", "classifier", "lm_head")
"""Names of modules whose last linear layer is an output layer."""

_EXPERT_COUNTS = ("num_experts", "n_routed_experts", "num_local_experts", "n_experts", "moe_num_experts")
"""Attributes in which modules of mixtures of experts say how many experts there are, on all ranks together."""


@dataclass(frozen=True)
class _Linear:
    """A module with a 2-D weight that is no table.

    Attributes:
        path: Names from the model down to the module.
        module: The module.
        shape: Outputs and inputs of the whole weight.
    """

    path: tuple[str, ...]
    module: nn.Module
    shape: tuple[int, ...]

    @property
    def name(self) -> str:
        return self.path[-1] if self.path else ""


def structural_overrides(
    model_chunks: Sequence[nn.Module], groups: ProcessGroupCollection
) -> dict[ParamKey, dict[str, Any]]:
    """Overrides that route the weights of embeddings, output layers and routers to Adam; each key says why.

    All pipeline stages must call this together: an output layer is known by the embedding, which is on another stage.

    Args:
        model_chunks: This rank's modules.
        groups: Process groups of the model.
    """
    overrides: dict[ParamKey, dict[str, Any]] = {}
    for why, params in _found(model_chunks, groups).items():
        test = ParamWithNamePredicate(why, _among({id(p) for p in params}))
        overrides[ParamKey(with_name_predicate=test)] = {"optimizer": "adam"}
    return overrides


def _among(ids: set[int]) -> Any:
    return lambda param, name: unless_asked_for(lambda p, _: id(p) in ids, param, name)


def _found(model_chunks: Sequence[nn.Module], groups: ProcessGroupCollection) -> dict[str, list[Tensor]]:
    """Why → the parameters of this rank; a parameter may stand in several."""
    tables = [m for chunk in model_chunks for m in chunk.modules() if _is_table(m)]
    shapes = [_shape(m, groups) for m in tables]
    everywhere = [shape for stage in groups.domain((groups.axis("pp"),)).gather(shapes) for shape in stage if shape]
    vocabularies = {shape[0] for shape in everywhere} - {shape[1] for shape in everywhere}
    found: dict[str, list[Tensor]] = {"it is an embedding": [p for m in tables for p in _weights(m)]}
    for chunk in model_chunks:
        others = [(_path(chunk, name), m) for name, m in chunk.named_modules() if not _is_table(m)]
        linears = [_Linear(path, m, shape) for path, m in others if (shape := _shape(m, groups))]
        for linear, why in _heads_and_routers(chunk, linears, vocabularies):
            found.setdefault(why, []).extend(_weights(linear.module))
    return found


def _heads_and_routers(
    chunk: nn.Module, linears: list[_Linear], vocabularies: set[int]
) -> Iterator[tuple[_Linear, str]]:
    stacks, experts = _stacks(chunk), dict(_expert_counts(chunk))
    named = {id(linear) for linear in _named_heads(linears)}
    for linear in linears:
        if any("attn" in part or "attention" in part for part in map(str.lower, linear.path)):
            continue
        outputs, inputs = linear.shape
        inside = any(linear.path[:n] in stacks for n in range(1, len(linear.path)))
        to_vocabulary = outputs in vocabularies and outputs != inputs
        if to_vocabulary and (not inside or id(linear) in named):
            yield linear, f"output layer: {outputs} outputs, as many as an embedding has rows"
        elif outputs in _counts_above(linear, experts):
            yield linear, f"router: one output for each of {outputs} experts"
        elif id(linear) in named and not inside:
            yield linear, "output layer, by its name"
        elif _is_gate(linear, linears):
            yield linear, "router, by its name"


def _is_table(module: nn.Module) -> bool:
    counts = (getattr(module, "num_embeddings", None), getattr(module, "embedding_dim", None))
    return isinstance(module, nn.Embedding | nn.EmbeddingBag) or all(isinstance(count, int) for count in counts)


def _path(chunk: nn.Module, name: str) -> tuple[str, ...]:
    """Names from ``chunk`` down to its module ``name``, without those that wrappers add."""
    return tuple(unwrapped(chunk, f"{name}.weight").split(".")[:-1]) if name else ()


def _weights(module: nn.Module) -> list[Tensor]:
    """The 2-D parameters of ``module`` itself, and those that its weight is computed from."""
    own = list(module.parameters(recurse=False))
    if parametrize.is_parametrized(module):
        own += module.parametrizations.parameters()  # type: ignore[union-attr]
    return [p for p in own if p.ndim == 2]


def _shape(module: nn.Module, groups: ProcessGroupCollection) -> tuple[int, ...] | None:
    """Shape of the whole 2-D weight of ``module``; None when it has none."""
    if parametrize.is_parametrized(module, "weight"):
        # Reading the weight would compute it, and some parametrizations change buffers then.
        return (module.out_features, module.in_features) if isinstance(module, nn.Linear) else None
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2:
        return None
    return layout_of(weight, groups).shape


def _stacks(chunk: nn.Module) -> set[tuple[str, ...]]:
    """Paths of the layers of all layer stacks."""
    paths = set()
    for name, module in chunk.named_modules():
        numbered = {key: child for key, child in module.named_children() if key.isdigit()}
        unlike = isinstance(module, nn.Sequential) and len({type(child) for child in numbered.values()}) > 1
        for key, child in numbered.items():
            if not unlike and any(True for _ in child.children()):
                paths.add((*_path(chunk, name), key))
    return paths


def _expert_counts(chunk: nn.Module) -> Iterator[tuple[tuple[str, ...], set[int]]]:
    """Path of a module that has a collection of experts → the number of experts, as told by each sign of it."""
    for name, module in chunk.named_modules():
        collections = [child for key, child in module.named_children() if _are_experts(key, child)]
        if collections:
            told = (getattr(m, count, None) for m in (module, *collections) for count in _EXPERT_COUNTS)
            counts = {n for n in told if isinstance(n, int)} | {n for child in collections for n in _held(child)}
            yield _path(chunk, name), {n for n in counts if n > 1}


def _are_experts(name: str, module: nn.Module) -> bool:
    said = name.lower(), type(module).__name__.lower()
    return any("expert" in text for text in said) and "shared" not in said[0] and not hasattr(module, "out_features")


def _held(experts: nn.Module) -> Iterator[int]:
    """Numbers of experts that a collection of experts holds: as numbered modules, or along the first dim of its parameters."""
    for module in (experts, *experts.children()):
        yield sum(key.isdigit() for key, _ in module.named_children())
    yield from (p.shape[0] for p in experts.parameters(recurse=False) if p.ndim == 3)


def _counts_above(linear: _Linear, experts: Mapping[tuple[str, ...], set[int]]) -> set[int]:
    """Numbers of experts in the two modules around ``linear``, unless it belongs to an expert itself."""
    if any("expert" in part.lower() for part in linear.path[:-1]):
        return set()
    return {n for depth in (1, 2) if len(linear.path) >= depth for n in experts.get(linear.path[:-depth], ())}


def _named_heads(linears: Iterable[_Linear]) -> Iterator[_Linear]:
    last: dict[tuple[str, ...], _Linear] = {}
    for linear in linears:
        if linear.name in HEADS:
            yield linear
        for n, part in enumerate(linear.path[:-1], 1):
            if part in HEAD_MODULES:
                last[linear.path[:n]] = linear
    yield from last.values()


def _is_gate(linear: _Linear, linears: Iterable[_Linear]) -> bool:
    """Whether ``linear`` is called ``gate``, or is all that a module called so has, and is not the gate of a gated MLP."""
    gate = linear.path if linear.name == "gate" else linear.path[:-1]
    if gate[-1:] != ("gate",) or linear.shape[0] >= linear.shape[1]:
        return False
    others = [other for other in linears if other is not linear]
    within = [other for other in others if other.path[: len(gate)] == gate]
    beside = [other for other in others if other.path[:-1] == gate[:-1]]
    return not within and all(other.shape != linear.shape for other in beside)
