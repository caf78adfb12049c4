"""The layout of a parameter, from its DTensor placements or from Megatron's attributes on a plain tensor."""

from collections.abc import Sequence
from math import prod

from torch import Tensor
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from ..process_groups_config import Axis, ProcessGroupCollection, world_size
from .layout import Layout, Split
from .ranges import Ranges, chunk, merge, repeat


def local(x: Tensor) -> Tensor:
    """This rank's shard of ``x``, sharing its memory."""
    return x.to_local() if isinstance(x, DTensor) else x


def is_expert(p: Tensor) -> bool:
    """Whether Megatron's attributes say that ``p`` is sharded and copied over the process groups of experts."""
    return bool(getattr(p, "expert_tp", False)) or not getattr(p, "allreduce", True)


def check_gradient(p: Tensor) -> None:
    """Raise ValueError for a gradient that no rule can use: sparse or complex."""
    g = p.grad
    if g is not None and (g.is_sparse or g.is_complex()):
        kind = "sparse" if g.is_sparse else "complex"
        raise ValueError(
            f"a gradient of shape {tuple(g.shape)} is {kind}; nothing was changed. Make it a dense real tensor."
        )


def local_gradient(p: Tensor) -> Tensor:
    """This rank's shard of ``p.grad``, laid out as ``p``.

    A DTensor gradient with other placements (partial sums of sequence parallelism or of a vocabulary-parallel embedding) is
    redistributed first, and ``p.grad`` is replaced; that may communicate.
    """
    g = p.grad
    assert g is not None
    if isinstance(g, DTensor) and isinstance(p, DTensor) and g.placements != p.placements:
        g = p.grad = g.redistribute(p.device_mesh, p.placements)
    return local(g)


def layout_of(
    p: Tensor, groups: ProcessGroupCollection, *, part_sizes: Sequence[int] | None = None, name: str = ""
) -> Layout:
    """The layout of the parameter ``p``.

    Args:
        p: A DTensor, or a plain tensor with Megatron's attributes ``tensor_model_parallel``, ``partition_dim``,
            ``partition_stride`` and ``expert_tp``.
        groups: Process groups that the attributes refer to; the ranks of ``dp`` hold copies.
        part_sizes: Sizes of the row blocks, repeating along dim -2, that are matrices of their own.
        name: Name of the parameter in errors.

    Raises:
        ValueError: when ``p`` is sharded in a way that no layout describes, or ``part_sizes`` do not fit.
    """
    layout = _from_dtensor(p, groups, name) if isinstance(p, DTensor) else _from_attributes(p, groups, name)
    if not part_sizes or len(part_sizes) == 1:
        return layout
    return Layout(layout.shape, layout.splits, layout.copies, _parts(layout.shape, part_sizes, name))


def _from_attributes(p: Tensor, groups: ProcessGroupCollection, name: str) -> Layout:
    expert = "expt_" if is_expert(p) else ""
    tp, dp = groups.axis(f"{expert}tp"), groups.axis(f"{expert}dp")
    dim = getattr(p, "partition_dim", -1)
    if (
        dim >= 0
        and tp.group is None
        and getattr(p, "tensor_model_parallel", False)
        and dp.size * groups.axis("pp").size < world_size()
    ):
        raise ValueError(
            f"{name}: a parameter of shape {tuple(p.shape)} says that it is tensor-parallel, but no tensor-parallel group was "
            f"given; pass pg_collection=ProcessGroupCollection({expert}tp=…), or its single-rank group."
        )
    if dim < 0 or tp.size == 1 or not getattr(p, "tensor_model_parallel", True):
        return Layout(tuple(p.shape), (None,) * p.ndim, copies=(tp, dp))
    if dim >= p.ndim:
        raise ValueError(
            f"{name}: partition_dim {dim} is not a dim of shape {tuple(p.shape)}; set it to 0..{p.ndim - 1} or -1."
        )
    stride = getattr(p, "partition_stride", 1)
    size = p.shape[dim] * tp.size
    splits = tuple(Split.even(tp, size, stride=stride) if d == dim else None for d in range(p.ndim))
    layout = Layout(tuple(size if d == dim else n for d, n in enumerate(p.shape)), splits, copies=(dp,))
    if layout.local_shape != tuple(p.shape):
        raise ValueError(
            f"{name}: {p.shape[dim]} rows or columns on this rank cannot be {stride} pieces (partition_stride) of a dim that is "
            f"cut over {tp.size} ranks; pad the dim, or correct partition_stride."
        )
    return layout


def _from_dtensor(p: DTensor, groups: ProcessGroupCollection, name: str) -> Layout:
    mesh = p.device_mesh
    names = mesh.mesh_dim_names or tuple(f"mesh{i}" for i in range(mesh.ndim))
    cuts: list[list[tuple[Axis, Placement]]] = [[] for _ in range(p.ndim)]
    copies: list[Axis] = []
    for i, placement in enumerate(p.placements):
        axis = Axis.of(names[i], mesh.get_group(i))
        if type(placement) is Replicate or axis.size == 1:
            copies.append(axis)
        elif isinstance(placement, Shard | _StridedShard):
            cuts[placement.dim].append((axis, placement))
        else:
            raise _no_layout(p, name)
    splits = [_split(p, dim, cut, groups, name) if cut else None for dim, cut in enumerate(cuts)]
    dp = groups.axis("dp")
    if dp.ranks not in [Axis.of(axis_name, mesh.get_group(i)).ranks for i, axis_name in enumerate(names)]:
        copies.append(dp)
    layout = Layout(tuple(p.shape), tuple(splits), tuple(copies))
    if layout.local_shape != tuple(local(p).shape):
        raise _no_layout(p, name)
    return layout


def _split(
    p: DTensor, dim: int, cut: Sequence[tuple[Axis, Placement]], groups: ProcessGroupCollection, name: str
) -> Split:
    """How ``dim`` is cut by the axes and placements in ``cut``, which are in mesh order."""
    if len(cut) == 1 and type(cut[0][1]) is Shard:
        return Split.even(cut[0][0], p.shape[dim])
    order: list[Axis] = []  # the axes in the order in which they cut, each what those before it left
    for axis, placement in reversed(cut):
        # FSDP2 marks a dim that was cut before with the number of pieces that it was cut into.
        pieces = placement.split_factor if isinstance(placement, _StridedShard) else 1
        place = next((k for k in range(len(order) + 1) if prod(other.size for other in order[:k]) == pieces), None)
        if place is None:
            raise _no_layout(p, name)
        order.insert(place, axis)
    axes = tuple(axis for axis, _ in cut)
    domain = groups.domain(axes)
    sizes = [axis.size for axis in order]
    positions = [[coord[axes.index(axis)] for axis in order] for coord in domain.coords]
    joint = Axis("+".join(domain.axes), domain.ranks, domain.index, domain.group, axes)
    return Split(joint, tuple(_nested(p.shape[dim], sizes, position) for position in positions))


def _nested(size: int, counts: Sequence[int], position: Sequence[int]) -> Ranges:
    """The indices at ``position`` when ``size`` indices are cut into ``counts[0]`` chunks, each of them into ``counts[1]``, …"""
    lo, hi = 0, size
    for count, i in zip(counts, position, strict=True):
        ((a, b),) = chunk(hi - lo, count, i) or ((0, 0),)
        lo, hi = lo + a, lo + b
    return merge([(lo, hi)])


def _no_layout(p: DTensor, name: str) -> ValueError:
    return ValueError(
        f"{name}: a DTensor of shape {tuple(p.shape)} with placements {p.placements} on a mesh of shape "
        f"{tuple(p.device_mesh.shape)}, of which this rank has {tuple(local(p).shape)}, has no layout that shardstep knows. "
        f"Replicate and Shard are possible, also several Shards of one dim, as parallelize_module and then fully_shard make them."
    )


def _parts(shape: Sequence[int], sizes: Sequence[int], name: str) -> tuple[Ranges, ...]:
    if len(shape) != 2 or min(sizes) <= 0 or shape[0] % sum(sizes):
        raise ValueError(
            f"{name}: row blocks {tuple(sizes)} sum to {sum(sizes)}, which does not divide the {shape[0]} rows of the "
            f"whole matrix {tuple(shape)}; give positive sizes per query group (or per gate/up pair) that do."
        )
    return repeat(tuple(sizes), shape[0])
