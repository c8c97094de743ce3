"""A tied head that stands in the file beside its embedding, as older writers left it there.

Two copies would go their own ways in a merge, and stock readers take a head that differs for an untied one.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping

from ...tensor_refs import Extent, FileTensor, TensorRef
from ...tensors import DTYPE_BITS
from ..source_files import open_source
from .config import HEAD_NAME, ModelConfig, find_ties
from .weights import Weights

__all__ = ["join_tied_head"]

_CHUNK_NBYTES = 1 << 22


def join_tied_head(weights: Weights, config: ModelConfig | None, *, is_tied_by_default: bool | None) -> Weights:
    """The weights with a tied head as a further name of its embedding, if every byte of the two is the same.

    Where they differ at the first bytes, as those of two tensors do, no more is read.

    Args:
        weights: As in the files.
        config: None where there is no ``config.json``: then nothing is known to be tied.
        is_tied_by_default: ``tie_word_embeddings`` where the configuration does not say; None: two that are equal are
            tied.

    Raises:
        NotFoundError: A file is gone.
        FormatError: A file is no longer one.

    Source:
        transformers 5.23, modeling_utils.py (tie_weights): two that are there are tied only if they are equal.
    """
    head = weights.tensors.get(HEAD_NAME)
    others = {name: tensor for name, tensor in weights.tensors.items() if name != HEAD_NAME}
    embedding = find_ties(config, others, is_tied_by_default=is_tied_by_default).get(HEAD_NAME)
    if head is None or embedding is None or not _are_equal(head, others[embedding]):
        return weights
    return Weights(tensors=others, ties=_point_to(embedding, weights.ties))


def _point_to(embedding: str, ties: Mapping[str, str]) -> dict[str, str]:
    moved = {name: embedding if first == HEAD_NAME else first for name, first in ties.items()}
    return moved | {HEAD_NAME: embedding}


def _are_equal(one: TensorRef, other: TensorRef) -> bool:
    if one.meta != other.meta or not isinstance(one, FileTensor) or not isinstance(other, FileTensor):
        return False
    if not one.extents or [each.numel for each in one.extents] != [each.numel for each in other.extents]:
        return False
    bits = DTYPE_BITS[one.meta.dtype]
    pairs = zip(one.extents, other.extents, strict=True)
    return all(
        mine == theirs
        for ours, others in pairs
        for mine, theirs in zip(_chunks(ours, bits), _chunks(others, bits), strict=True)
    )


def _chunks(extent: Extent, bits: int) -> Iterator[bytes]:
    nbytes = extent.numel * bits // 8
    descriptor = open_source(extent.path)
    try:
        for start in range(0, nbytes, _CHUNK_NBYTES):
            yield os.pread(descriptor, min(_CHUNK_NBYTES, nbytes - start), extent.offset + start)
    finally:
        os.close(descriptor)
