"""Averages of a layer over several sources: what has one, and how weights and masters come to agree.

Pure: names, types and shapes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from .catalog import Catalog
from .errors import UnsupportedError
from .tensor_refs import AveragedTensor, CastTensor, TensorRef
from .tensors import TensorMeta

__all__ = ["Share", "average", "refuse_codes"]

_FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
# Masks, and indices (position_ids, relative_position_index): torch's indices are I64, and nothing packs codes into it.
_SAME_IN_ALL = frozenset({"BOOL", "I64"})
_MAX_SHOWN = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """A layer of a source, and how much of it goes into the average."""

    source: Catalog
    names: Mapping[str, str]
    """fqn in the new checkpoint -> its name in the source."""
    weight: float


def average(fqn: str, shares: Sequence[Share], newest: Share) -> tuple[TensorRef, TensorRef | None]:
    """A weight and its master.

    The optimizer goes on from the master and sets the weight to what it rounds to, so the masters are what is averaged,
    and the weight is the rounding of that.

    Args:
        fqn: In the new checkpoint.
        shares: All that goes in.
        newest: The one of them whose optimizer state is taken.

    Returns:
        The weight, and the master where ``newest`` has one.
    """
    name = newest.names[fqn]
    weight, master = newest.source.weights[name], newest.source.masters.get(name)
    if weight.meta.dtype not in _FLOATS or (len(shares) == 1 and shares[0].weight == 1.0):
        return weight, master
    # Of a parameter that was never updated there is no master yet; it would be its weight.
    operands = [each.source.masters.get(each.names[fqn], each.source.weights[each.names[fqn]]) for each in shares]
    mean = AveragedTensor(
        meta=(master or weight).meta, sources=tuple(operands), weights=tuple(each.weight for each in shares)
    )
    if master is None or master.meta == weight.meta:
        return mean, None if master is None else mean
    return CastTensor(meta=weight.meta, source=mean), mean


def refuse_codes(layers: Mapping[str, Sequence[Share]]) -> None:
    """Refuse to average tensors that hold codes: the numbers are those times scales that lie elsewhere.

    Args:
        layers: What goes into each layer.

    Raises:
        UnsupportedError: Some would have to be; lists the first few of all.
    """
    found = [line for shares in layers.values() for line in _codes_in(shares)]
    if not found:
        return
    shown = [*found[:_MAX_SHOWN], *([f"and {len(found) - _MAX_SHOWN} more"] if len(found) > _MAX_SHOWN else [])]
    raise UnsupportedError(
        "tensors of these element types have no average: they hold codes, as of a quantized model",
        kind="no-average",
        expected=f"{', '.join(sorted(_FLOATS))}; counts, masks and I64 indices are the newest source's",
        found="\n            ".join(shown),
        hint="average the models before they are quantized, or take these layers from one source as they are",
    )


def _codes_in(shares: Sequence[Share]) -> Iterator[str]:
    first = shares[0]
    if len(shares) == 1 and first.weight == 1.0:
        return
    for fqn, name in first.names.items():
        meta = first.source.weights[name].meta
        if not _can_be_averaged(meta):
            yield f"{fqn}: {meta}"


def _can_be_averaged(meta: TensorMeta) -> bool:
    is_count = meta.dtype[0] in "IU" and meta.numel <= 1
    return meta.dtype in _FLOATS or meta.dtype in _SAME_IN_ALL or is_count
