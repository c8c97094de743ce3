"""Where the elements of a tensor come from: files, a few inline bytes, or arithmetic on other tensors.

A ``TensorRef`` stands for a tensor that nobody has read yet. Planning cuts and combines them; only the writer, at the
very end, turns the pieces into bytes. All arithmetic here is element by element, so a piece of a result needs only the
same piece of its operands (of codes: the blocks or frames it is in). Elements are numbered row-major in the whole
tensor, bytes are little-endian.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from .errors import IncompleteError
from .tensors import DTYPE_BITS, TensorMeta

__all__ = [
    "AveragedTensor",
    "CastTensor",
    "CodedTensor",
    "Extent",
    "FileTensor",
    "InlineTensor",
    "ScaledTensor",
    "TensorRef",
    "TensorSlice",
    "file_tensor",
    "files_of",
    "whole",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Extent:
    """Elements of a tensor that lie end to end in a file."""

    path: Path
    offset: int
    """Byte of the file at which the first of them starts."""
    start: int
    """Number of the first element."""
    numel: int


@dataclass(frozen=True, slots=True, kw_only=True)
class FileTensor:
    """A tensor whose elements lie in files; built by ``file_tensor``."""

    meta: TensorMeta
    extents: tuple[Extent, ...]
    """In order of ``start``; every element exactly once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class InlineTensor:
    """A small tensor that is known already: a step count, a number."""

    meta: TensorMeta
    data: bytes

    def __post_init__(self) -> None:
        assert len(self.data) == self.meta.nbytes, (len(self.data), self.meta)


@dataclass(frozen=True, slots=True, kw_only=True)
class CastTensor:
    """A tensor in another element type, rounded to nearest even; between F64, F32, F16 and BF16 only."""

    meta: TensorMeta
    source: TensorRef


@dataclass(frozen=True, slots=True, kw_only=True)
class ScaledTensor:
    """A tensor times a number, computed in F64 and rounded once; floating-point types only."""

    source: TensorRef
    factor: float

    @property
    def meta(self) -> TensorMeta:
        return self.source.meta


@dataclass(frozen=True, slots=True, kw_only=True)
class AveragedTensor:
    """A weighted sum of tensors of one shape, computed in F64 and rounded once; the weights are used as they are."""

    meta: TensorMeta
    sources: tuple[TensorRef, ...]
    weights: tuple[float, ...]

    def __post_init__(self) -> None:
        assert len(self.sources) == len(self.weights) > 0
        assert all(source.meta.shape == self.meta.shape for source in self.sources)


@dataclass(frozen=True, slots=True, kw_only=True)
class CodedTensor:
    """A tensor that files hold as codes: small, and near its values. Not hashable."""

    meta: TensorMeta
    """Of what the codes stand for."""
    codec: str
    """As in ``codecs.stored``, any but ``exact``."""
    arrays: Mapping[str, FileTensor]
    """By name: ``codes``, ``scales``; flat, each as the codec needs it."""
    base: TensorRef | None
    """What the codes are relative to; None if to nothing. As many elements as the tensor."""

    def __post_init__(self) -> None:
        assert self.base is None or self.base.meta.numel == self.meta.numel


TensorRef: TypeAlias = FileTensor | InlineTensor | CastTensor | ScaledTensor | AveragedTensor | CodedTensor


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSlice:
    """The elements ``start`` to ``stop`` of a tensor."""

    tensor: TensorRef
    start: int
    stop: int
    """Exclusive."""

    def __post_init__(self) -> None:
        assert 0 <= self.start <= self.stop <= self.tensor.meta.numel, (self.start, self.stop, self.tensor.meta)

    @property
    def nbytes(self) -> int:
        return (self.stop - self.start) * DTYPE_BITS[self.tensor.meta.dtype] // 8


def whole(tensor: TensorRef) -> TensorSlice:
    """All elements of a tensor."""
    return TensorSlice(tensor=tensor, start=0, stop=tensor.meta.numel)


def file_tensor(meta: TensorMeta, extents: Sequence[Extent], *, name: str, path: Path) -> FileTensor:
    """Put a tensor together from extents in any order; empty ones are dropped.

    Args:
        meta: Its type and shape.
        extents: Where its elements are.
        name: Of the tensor, for the error.
        path: The checkpoint, for the error.

    Raises:
        IncompleteError: Some element is nowhere, or twice.
    """
    ordered = sorted((extent for extent in extents if extent.numel), key=lambda extent: extent.start)
    position = 0
    for extent in ordered:
        if extent.start != position:
            what = "is missing" if extent.start > position else "is there twice"
            raise _incomplete(what, meta, extent.start, position, name, path)
        position += extent.numel
    if position != meta.numel:
        raise _incomplete("is missing", meta, meta.numel, position, name, path)
    return FileTensor(meta=meta, extents=tuple(ordered))


def _incomplete(what: str, meta: TensorMeta, seen: int, position: int, name: str, path: Path) -> IncompleteError:
    return IncompleteError(
        f"a part of a tensor {what}",
        kind="tensor-parts",
        path=path,
        fqn=name,
        expected=f"each of the {meta.numel} elements of {meta} once",
        found=f"a part that starts or ends at element {seen}, after {position} elements",
        hint="a shard is missing or of another checkpoint; copy the source again",
    )


def files_of(tensor: TensorRef) -> Iterator[Path]:
    """Every file that has to be read for a tensor; some may come twice."""
    match tensor:
        case FileTensor():
            yield from (extent.path for extent in tensor.extents)
        case CastTensor() | ScaledTensor():
            yield from files_of(tensor.source)
        case AveragedTensor():
            for source in tensor.sources:
                yield from files_of(source)
        case CodedTensor():
            for array in tensor.arrays.values():
                yield from files_of(array)
            if tensor.base is not None:
                yield from files_of(tensor.base)
        case InlineTensor():
            pass
