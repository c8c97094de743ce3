"""What of a tensor is in this process: all of it, or the shard that a ``DTensor`` keeps here."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from .errors import UnsupportedError
from .shards import Shard, whole_shard

__all__ = ["LocalPart", "Seat", "describe_cut", "local_part", "make_like"]


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


def local_part(tensor: torch.Tensor) -> LocalPart:
    """What of a tensor is here; called on any rank, talks to none.

    Args:
        tensor: Plain, or a ``DTensor`` whose placements are shards and replicas.

    Raises:
        UnsupportedError: A ``DTensor`` that is a partial sum, or whose elements here are no box of it.

    Source: torch 2.13, distributed/tensor/_utils.py (compute_local_shape_and_global_offset, which
        distributed/checkpoint/planner_helpers.py uses for the same end).
    """
    if not _is_dtensor(tensor):
        return LocalPart(tensor=tensor, shard=whole_shard(tensor.shape), is_sharded=False, is_first=True)
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
    # The memory itself: ``to_local`` would make a view with a history, and a new one each time.
    local = tensor._local_tensor
    coordinate = tensor.device_mesh.get_coordinate()
    shape = tuple(tensor.shape)
    sizes, offsets = compute_local_shape_and_global_offset(shape, tensor.device_mesh, tensor.placements)
    is_here = coordinate is not None and tuple(sizes) == tuple(local.shape)
    if math.prod(local.shape) and not is_here:
        raise UnsupportedError(
            "what a rank holds of a sharded tensor is no box of it",
            kind="tensor-kind",
            expected=f"{tuple(sizes)} of {shape}",
            found=f"{tuple(local.shape)}, by {tensor.placements} over {tensor.device_mesh}",
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
        is_sharded=any(not placement.is_replicate() for placement in tensor.placements),
        is_first=is_first,
    )


def describe_cut(tensor: torch.Tensor) -> str | None:
    """How a tensor is cut, in words that are the same on every rank; None if it is not."""
    if not _is_dtensor(tensor):
        return None
    from torch.distributed.tensor import DTensor

    assert isinstance(tensor, DTensor)
    return f"{tuple(tensor.device_mesh.shape)} {tensor.placements}"


def make_like(model: torch.Tensor, local: torch.Tensor) -> torch.Tensor:
    """A tensor cut as another of the same shape is, with this as its part here; ``local`` itself if that is plain.

    Talks to no other rank, so it says nothing of what those hold.
    """
    if not _is_dtensor(model):
        return local
    from torch.distributed.tensor import DTensor

    assert isinstance(model, DTensor)
    return DTensor.from_local(
        local, model.device_mesh, model.placements, run_check=False, shape=model.shape, stride=model.stride()
    )


def _is_dtensor(tensor: torch.Tensor) -> bool:
    # Training without torch.distributed must not import what a DTensor needs.
    return any(each.__name__ == "DTensor" for each in type(tensor).__mro__)
