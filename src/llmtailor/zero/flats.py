"""Flat tensors and their partitions, as torch tensors by parameter name. Knows nothing of engines.

A *flat* is what DeepSpeed makes of the parameters of a group: they lie end to end, and each rank has a partition of
it, in the optimizer's type (*master*) and in the model's (*weights*). ``formats.deepspeed.partitions`` says where.
Everything is cut at the borders of parameters: views of the partitions, in the same memory.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from ..errors import UnsupportedError
from ..formats.deepspeed.partitions import FlatLayout, Piece
from ..local_parts import LocalPart
from ..optimizer_values import flatten_state
from ..shards import Shard, whole_shard
from ..state_tree import Note

__all__ = ["Flat", "FlatState", "cut", "describe", "holds_start", "place", "read_state"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Flat:
    """The parameters of one flat tensor, and this rank's partition of it."""

    group: int
    """Index of the optimizer's group."""
    shapes: Mapping[str, tuple[int, ...]]
    """Of its parameters, by fqn, in its order."""
    paddings: Sequence[int]
    """Elements of alignment after each parameter; those at the end of the partition are not among them."""
    layout: FlatLayout
    rank: int
    master: torch.Tensor
    """[P], what the optimizer updates: the key of its state."""
    weights: torch.Tensor
    """[P], in the type of the model; may be the same memory."""

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """What lies on this rank, in order."""
        return self.layout.pieces[self.rank]

    @property
    def has_masters(self) -> bool:
        """False if the masters say nothing that the weights do not."""
        return self.master.dtype != self.weights.dtype


@dataclass(frozen=True, slots=True, kw_only=True)
class FlatState:
    """What an optimizer remembers of one flat."""

    tensors: Mapping[str, torch.Tensor]
    """By leaf: an element for each of the partition, with or without the padding at its end."""
    numbers: Mapping[str, torch.Tensor]
    """By leaf: 0-dim, of the whole flat, so of each of its parameters."""
    notes: Mapping[str, Note]
    """By leaf, for numbers that are Python's; see ``optimizer_values``."""


def cut(flat: Flat, tensor: torch.Tensor) -> dict[str, LocalPart]:
    """The parameters in a tensor that lies as the partition does.

    Args:
        flat: How the parameters lie.
        tensor: [P], or shorter by some of the padding at its end.

    Returns:
        fqn -> its elements here, a run; views. On a rank that is alone: the parameters, whole.
    """
    return {piece.fqn: place(tensor, piece.at, _shard(flat, piece), flat.layout.ranks) for piece in flat.pieces}


def place(tensor: torch.Tensor, at: int, shard: Shard, ranks: int) -> LocalPart:
    """A run of a parameter that starts at element ``at`` of a 1-dim tensor; whole if there is one rank only."""
    view = tensor.detach().narrow(0, at, shard.numel)
    if ranks > 1:
        return LocalPart(tensor=view, shard=shard, is_sharded=True, is_first=True)
    return LocalPart(tensor=view.view(shard.shape), shard=whole_shard(shard.shape), is_sharded=False, is_first=True)


def _shard(flat: Flat, piece: Piece) -> Shard:
    return Shard(shape=flat.shapes[piece.fqn], offsets=(piece.start,), sizes=(piece.numel,), is_run=True)


def holds_start(flat: Flat) -> list[str]:
    """The parameters whose first element is on this rank: it keeps what there is once for a parameter."""
    return [piece.fqn for piece in flat.pieces if piece.start == 0]


def read_state(flat: Flat, values: Mapping[str, object]) -> FlatState:
    """Tell the tensors in an optimizer's state from the numbers.

    Args:
        flat: The flat.
        values: ``optimizer.state[flat.master]``; empty before the first step.

    Raises:
        UnsupportedError: State that does not lie element by element as the parameters do, or is no plain tensor.
    """
    tensors, rest = {}, {}
    for leaf, value in values.items():
        if isinstance(value, torch.Tensor) and value.shape != ():
            if not _fits(flat, value):
                raise _refuse(flat, leaf, f"a tensor {value.dtype}{list(value.shape)}")
            tensors[leaf] = value.detach()
        elif value is not None:  # torch's SGD writes None for a momentum it has not begun
            rest[leaf] = value
    numbers, notes = flatten_state(rest, next(iter(flat.shapes)))
    for leaf, value in rest.items():
        if leaf not in numbers:
            raise _refuse(flat, leaf, type(value).__name__)
    return FlatState(tensors=tensors, numbers=numbers, notes=notes)


def _fits(flat: Flat, tensor: torch.Tensor) -> bool:
    return tensor.dim() == 1 and flat.layout.filled[flat.rank] <= tensor.numel() <= flat.layout.partition


def _refuse(flat: Flat, leaf: str, found: str) -> UnsupportedError:
    return UnsupportedError(
        f"the optimizer state {leaf!r} cannot be told apart by parameters",
        kind="flat-state",
        fqn=next(iter(flat.shapes)),
        expected=f"one element for each of the {flat.layout.partition} of the partition, or a number",
        found=found,
        hint="optimizers with block-wise or factored state mix the parameters of a DeepSpeed partition",
    )


def describe(flats: Sequence[Flat]) -> str:
    """How all flats are cut, the same on every rank: two worlds of one text have every element in the same place."""
    lines = []
    for flat in flats:
        sizes = (
            f"{fqn}:{math.prod(shape)}+{padding}"
            for (fqn, shape), padding in zip(flat.shapes.items(), flat.paddings, strict=True)
        )
        lines.append(f"{flat.layout.ranks}*{flat.layout.partition} {' '.join(sizes)}")
    return "\n".join(lines)
