"""What of a tensor is in this process: all of it, or the shard that a ``DTensor`` keeps here."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from .errors import UnsupportedError
from .shards import Shard, whole_shard

__all__ = [
    "LocalPart",
    "Seat",
    "describe_cut",
    "detach_part",
    "is_dtensor",
    "local_part",
    "make_like",
    "memory_of",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Seat:
    """Which of the processes of a training this one is, and what it writes of what all of them hold."""

    rank: int = 0
    size: int = 1
    spread: bool = False
    """Layers that all ranks hold are dealt out to them; otherwise rank 0 writes all."""

    def owns(self, layer: int) -> bool:
        """True if this rank writes what all ranks hold of the layer with that number, in model order."""
        return self.rank == (layer % self.size if self.spread else 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalPart:
    """A plain tensor, and which part of the whole one it is."""

    tensor: torch.Tensor
    """Shares memory with what the training uses."""
    shard: Shard
    is_sharded: bool
    """The whole tensor is spread over ranks: known to be so on every rank, also where this one holds all or none."""
    is_first: bool
    """This rank is the first of those that hold these elements. Of a tensor that is not sharded: always."""


def is_dtensor(tensor: torch.Tensor) -> bool:
    """True for a tensor that ``torch.distributed`` spreads over ranks, or knows to be the same on all."""
    # By name: training without torch.distributed must not import what a DTensor needs. What a subclass adds is unknown.
    kind = type(tensor)
    return kind.__name__ == "DTensor" and kind.__module__.startswith("torch.distributed.tensor")


def memory_of(tensor: torch.Tensor) -> torch.Tensor:
    """What of a tensor lies in this process, as a plain tensor in the same memory; itself if it is plain.

    Cheap, and checks nothing; which elements these are says ``local_part``.
    """
    if not is_dtensor(tensor):
        return tensor
    # The memory itself: ``to_local`` would make a view with a history, and a new one each time.
    local: torch.Tensor = tensor._local_tensor  # type: ignore[attr-defined]
    # Of a tensor without elements no rank holds a shard, so all hold the whole.
    return local if tensor.numel() else local.detach().reshape(tensor.shape)


def detach_part(tensor: torch.Tensor) -> torch.Tensor:
    """As ``tensor.detach()``: shares memory with the tensor, and what counts its changes.

    Of a ``DTensor`` torch shares the counter of the whole alone, which its own operations raise; what writes to the
    part here raises the part's.
    """
    view = tensor.detach()
    if is_dtensor(tensor):
        view._local_tensor = tensor._local_tensor.detach()  # type: ignore[attr-defined]
    return view


def local_part(tensor: torch.Tensor) -> LocalPart:
    """What of a tensor is here; called on any rank, talks to none.

    All ranks are taken to hold the same tensors, so that those outside of a tensor's mesh have replicas of it: of norms
    that are sharded over the ``dp`` dim of a ``dp`` x ``tp`` mesh each ``tp`` rank has a copy. The mesh that rank 0 is
    in holds the first.

    Args:
        tensor: Plain, or a ``DTensor`` whose placements are shards and replicas.

    Raises:
        UnsupportedError: A ``DTensor`` that is a partial sum, or whose elements here are no box of it.

    Source: torch 2.13, distributed/tensor/_utils.py (compute_local_shape_and_global_offset, which
        distributed/checkpoint/planner_helpers.py uses for the same end).
    """
    if not is_dtensor(tensor) or not tensor.numel():
        return LocalPart(tensor=memory_of(tensor), shard=whole_shard(tensor.shape), is_sharded=False, is_first=True)
    from torch.distributed.tensor import DTensor, Replicate
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    assert isinstance(tensor, DTensor)
    if any(placement.is_partial() for placement in tensor.placements):
        raise UnsupportedError(
            "a tensor that is a partial sum on each rank cannot be saved",
            kind="tensor-kind",
            expected="placements Shard and Replicate",
            found=str(tensor.placements),
        )
    local = memory_of(tensor)
    mesh = tensor.device_mesh
    coordinate = mesh.get_coordinate()
    shape = tuple(tensor.shape)
    sizes, offsets = compute_local_shape_and_global_offset(shape, mesh, tensor.placements)
    cuts = zip(mesh.shape, tensor.placements, strict=True)
    is_sharded = any(size > 1 and not placement.is_replicate() for size, placement in cuts)
    # FSDP2 cuts what tensor parallelism has cut before; where neither divides the dim, torch 2.13 does not know where
    # the pieces are, and its sizes are wrong on some of the ranks. A rank outside of the mesh holds nothing.
    is_fit = is_sharded if coordinate is None else tuple(sizes) == tuple(local.shape)
    if not is_fit:
        raise UnsupportedError(
            "what a rank holds of a sharded tensor is no box of it",
            kind="tensor-kind",
            expected=f"{tuple(sizes)} of {shape}",
            found=f"{tuple(local.shape)}, by {tensor.placements} over {mesh}",
        )
    if not math.prod(local.shape):  # an offset past the end is what torch says of a rank that holds nothing
        sizes, offsets = (0,) * len(shape), (0,) * len(shape)
        local = local.reshape(sizes) if len(shape) else local
    is_first = coordinate is not None and not any(
        index
        for index, placement in zip(coordinate, tensor.placements, strict=True)
        if isinstance(placement, Replicate)
    )
    return LocalPart(
        tensor=local,
        shard=Shard(shape=shape, offsets=tuple(offsets), sizes=tuple(sizes)),
        is_sharded=is_sharded,
        is_first=not is_sharded or (is_first and bool((mesh.mesh == 0).any())),
    )


def describe_cut(tensor: torch.Tensor) -> str | None:
    """How a tensor lies over its mesh, in words that are the same on every rank; None if it is plain."""
    if not is_dtensor(tensor):
        return None
    from torch.distributed.tensor import DTensor

    assert isinstance(tensor, DTensor)
    return f"{tuple(tensor.device_mesh.shape)} {tensor.placements}"


def make_like(model: torch.Tensor, local: torch.Tensor) -> torch.Tensor:
    """A tensor cut as another of the same shape is, with this as its part here; ``local`` itself if that is plain.

    Talks to no other rank, so it says nothing of what those hold.
    """
    if not is_dtensor(model):
        return local
    from torch.distributed.tensor import DTensor

    assert isinstance(model, DTensor)
    return DTensor.from_local(
        local, model.device_mesh, model.placements, run_check=False, shape=model.shape, stride=model.stride()
    )
