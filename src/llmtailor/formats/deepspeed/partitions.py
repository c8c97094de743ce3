"""Which elements of which parameter lie where in the flat partitions of the ranks. Arithmetic alone.

DeepSpeed lays the parameters of a group end to end in one *flat* tensor and gives each rank a *partition* of it. At
stages 1 and 2 the flat tensor is cut evenly, so that a parameter may start on one rank and end on another:

    flat   | q q q q q k k k 0 | v v v v n n . . . |        0: alignment of a parameter, .: padding at the end
    rank   |         0         |         1         |

At stage 3 each parameter is cut evenly, and a rank's partition is the concatenation of its pieces:

    rank 0 | q q q k k v v n |    rank 1 | q q . k . v v n |

Everything follows from the order of the parameters (``param_shapes``). ``param_slice_mappings`` says the same, but
DeepSpeed 0.19.8 writes it wrong where gradients go round-robin, so nobody reads it here.

Source:
    DeepSpeed 0.19.8, runtime/zero/stage_1_and_2.py (__init__, nccl_start_alignment_factor, _round_robin_reorder,
    get_partition_info), runtime/zero/partition_parameters.py (_partition_param), runtime/zero/stage3.py
    (_create_fp16_sub_groups), utils/zero_to_fp32.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

__all__ = [
    "FlatLayout",
    "Piece",
    "align_parameters",
    "cut_each",
    "cut_evenly",
    "deal",
    "keep_whole",
    "split_sub_groups",
    "undeal",
]

_Item = TypeVar("_Item")

# The flat tensor of stages 1 and 2 is a multiple of this many elements for each rank.
_ELEMENTS_ALIGNMENT = 2
# With ``parameter_alignment``, parameters start at a multiple of this many bytes, in the model's element type.
_PARAMETER_ALIGNMENT = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """Elements of a parameter that lie end to end in a rank's partition."""

    fqn: str
    start: int
    """Number of the first one in the parameter."""
    numel: int
    at: int
    """Element of the partition at which it starts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FlatLayout:
    """How the parameters of one flat tensor lie on the ranks."""

    partition: int
    """Elements of a rank's partition; for ``keep_whole`` of the largest."""
    filled: tuple[int, ...]
    """By rank: elements up to the padding at its end."""
    pieces: tuple[tuple[Piece, ...], ...]
    """By rank, in order of ``at``; none is empty."""

    @property
    def ranks(self) -> int:
        return len(self.filled)

    def padding(self, rank: int) -> int:
        """Elements at the end of a rank's partition that belong to no parameter."""
        return self.partition - self.filled[rank]


def cut_evenly(parameters: Sequence[tuple[str, int]], paddings: Sequence[int], ranks: int) -> FlatLayout:
    """Stages 1 and 2.

    Args:
        parameters: fqn and numel, in the order of the flat tensor.
        paddings: Elements of alignment after each parameter.
        ranks: Number of ranks.
    """
    assert len(parameters) == len(paddings), (len(parameters), len(paddings))
    total = sum(numel for _, numel in parameters) + sum(paddings)
    unit = _ELEMENTS_ALIGNMENT * ranks
    partition = -(-total // unit) * unit // ranks
    pieces: list[list[Piece]] = [[] for _ in range(ranks)]
    position = 0
    for (fqn, numel), padding in zip(parameters, paddings, strict=True):
        start = 0
        while start < numel:
            rank, at = divmod(position + start, partition)
            count = min(numel - start, partition - at)
            pieces[rank].append(Piece(fqn=fqn, start=start, numel=count, at=at))
            start += count
        position += numel + padding
    filled = tuple(max(0, min(partition, total - rank * partition)) for rank in range(ranks))
    return FlatLayout(partition=partition, filled=filled, pieces=tuple(tuple(each) for each in pieces))


def cut_each(parameters: Sequence[tuple[str, int]], ranks: int) -> FlatLayout:
    """Stage 3. The last piece of a parameter is followed by padding to the size of the others.

    Args:
        parameters: fqn and numel, in the order of the flat tensor.
        ranks: Number of ranks.
    """
    pieces: list[list[Piece]] = [[] for _ in range(ranks)]
    at = 0
    for fqn, numel in parameters:
        share = -(-numel // ranks)
        for rank in range(ranks):
            count = min(share, numel - rank * share)
            if count > 0:
                pieces[rank].append(Piece(fqn=fqn, start=rank * share, numel=count, at=at))
        at += share
    return FlatLayout(partition=at, filled=(at,) * ranks, pieces=tuple(tuple(each) for each in pieces))


def keep_whole(parameters: Sequence[tuple[str, int]], layout: FlatLayout) -> FlatLayout:
    """Muon's momentum at stages 1 and 2: whole every parameter of which a rank has at least one element.

    Such a parameter lies on each of those ranks; the first of them counts.

    Args:
        parameters: fqn and numel, in the order of the flat tensor.
        layout: Of the parameters themselves.

    Source: DeepSpeed 0.19.8, runtime/zero/stage_1_and_2.py (_muon_momentum_buffer, _get_flat_partition_unpadded).
    """
    numels = dict(parameters)
    filled, pieces = [], []
    for own in layout.pieces:
        at, whole = 0, []
        for fqn in dict.fromkeys(piece.fqn for piece in own):
            whole.append(Piece(fqn=fqn, start=0, numel=numels[fqn], at=at))
            at += numels[fqn]
        filled.append(at)
        pieces.append(tuple(whole))
    return FlatLayout(partition=max(filled), filled=tuple(filled), pieces=tuple(pieces))


def deal(items: Sequence[_Item], ranks: int) -> list[_Item]:
    """The order of a group's parameters where gradients go round-robin: dealt out like cards, hand after hand."""
    return [item for rank in range(ranks) for item in items[rank::ranks]]


def undeal(items: Sequence[_Item], ranks: int) -> list[_Item]:
    """The order they had before; inverse of ``deal``."""
    places = deal(range(len(items)), ranks)
    return [item for _, item in sorted(zip(places, items, strict=True), key=lambda pair: pair[0])]


def align_parameters(numels: Sequence[int], itemsize: int) -> list[int]:
    """Elements of alignment after each parameter with ``parameter_alignment``; none after the last.

    Args:
        numels: In the order of the flat tensor.
        itemsize: Bytes per element of the model's weights.
    """
    unit = max(1, _PARAMETER_ALIGNMENT // itemsize)
    paddings, position = [], 0
    for index, numel in enumerate(numels):
        padding = 0 if index == len(numels) - 1 else -(position + numel) % unit
        paddings.append(padding)
        position += numel + padding
    return paddings


def split_sub_groups(
    parameters: Sequence[tuple[str, int]], ranks: int, sub_group_size: int
) -> Iterator[list[tuple[str, int]]]:
    """Cut a group of stage 3 into the sub-groups that get a flat tensor each.

    Args:
        parameters: fqn and numel, in the group's order.
        ranks: Number of ranks.
        sub_group_size: Elements of a rank's partition at which a sub-group is full; it is exceeded by the last one.
    """
    held: list[tuple[str, int]] = []
    size = 0
    for fqn, numel in parameters:
        held.append((fqn, numel))
        size += -(-numel // ranks)
        if size >= sub_group_size:
            yield held
            held, size = [], 0
    if held:
        yield held
