"""Which entries of a layer are looked at: a few thousand, the same ones at every measurement.

Of a tensor that this rank holds ``n`` entries of, ``k`` are picked: one at random in each of ``k`` equal stretches, all
if ``n`` is no more. Every entry is as likely as any other, so that ``n / k`` times a sum over the picks estimates the
sum over all without a bias, about 1 % off for a layer. Each tensor has picks of its own: gains of a norm are few and
may weigh as much as the matrices beside them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import xxhash

from ..codecs import Component, component_of
from ..local_parts import memory_of
from ..manifest import TensorRecord
from ..state_keys import split_state_key, state_key
from ..writer import FileImage, LayerImage

__all__ = ["NUM_PICKS", "Chooser", "Factors", "LayerPicks", "ParameterPicks", "pick_entries"]

NUM_PICKS = 4096
"""Of a layer, over all ranks, about."""
_LEAST_PICKS = 64
"""Of a tensor on a rank that holds as many of its entries."""

# Source: transformers 5.23, optimization.py (Adafactor); torch 2.13, optim/_adafactor.py.
_MORE_SECOND = frozenset({"variance"})
_FACTORS = (("exp_avg_sq_row", "exp_avg_sq_col"), ("row_var", "col_var"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Factors:
    """Second moments as a product: of an entry's row and column, over the mean of the rows."""

    rows: torch.Tensor
    """Shape ``[batch, R]``."""
    columns: torch.Tensor
    """Shape ``[batch, C]``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterPicks:
    """The picked entries of one tensor of weights, and what an optimizer keeps of the same entries."""

    fqn: str
    is_trainable: bool
    indices: torch.Tensor
    """Ascending, on the device of the weights: into their elements in row-major order. Of as few bytes as will do."""
    scale: float
    """Entries here for one that was picked."""
    weights: torch.Tensor
    """Live: a parameter, or its master; the part of it that is here."""
    first: torch.Tensor | None
    second: torch.Tensor | Factors | None
    step: torch.Tensor | None


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerPicks:
    """The picked entries of a layer on this rank.

    Weights and fp32 masters may be spread over the ranks in different ways, so both are looked at, and the masters
    count if some rank has any. Weights that have their master here are left out.
    """

    weights: tuple[ParameterPicks, ...] = ()
    masters: tuple[ParameterPicks, ...] = ()

    @property
    def all(self) -> tuple[ParameterPicks, ...]:
        """Of the weights, then of the masters."""
        return self.weights + self.masters


class Chooser:
    """Chooses entries of tensors; what it chose of a parameter before is at hand, on its device."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[tuple[int, int, torch.device], torch.Tensor]] = {}

    def choose(self, fqn: str, numel: int, count: int, device: torch.device) -> torch.Tensor:
        """Indices of ``count`` of so many entries, ascending; the same whenever and wherever they are chosen."""
        wanted = numel, count, device
        known = self._known.get(fqn)
        if known is None or known[0] != wanted:
            indices = _choose(fqn, numel, count)
            tensor = torch.from_numpy(indices.astype(np.int32) if numel <= 2**31 else indices).to(device)
            self._known[fqn] = known = wanted, tensor
        return known[1]


def pick_entries(
    image: LayerImage | None, records: Mapping[str, TensorRecord], num_entries: int, chooser: Chooser
) -> LayerPicks:
    """Pick entries of what this rank writes of a layer.

    Args:
        image: Live, not held; None if this rank writes nothing of it.
        records: Of the model's tensors, by fqn.
        num_entries: Of the layer's parameters, on all ranks; not 0.
        chooser: Of this rank's entries.
    """
    if image is None:
        return LayerPicks()
    state: dict[str, dict[str, torch.Tensor]] = {}
    masters: dict[str, torch.Tensor] = {}
    for key, tensor in _named(image.optimizer):
        fqn, leaf = split_state_key(key)
        state.setdefault(fqn, {})[leaf] = tensor
        if component_of(key) is Component.MASTER:
            masters[fqn] = tensor
    weights = {fqn: tensor for fqn, tensor in _named(image.weights) if fqn not in masters}

    def pick(tensors: Mapping[str, torch.Tensor]) -> tuple[ParameterPicks, ...]:
        return tuple(
            _pick(fqn, local, state.get(fqn, {}), chooser, NUM_PICKS / num_entries, is_trainable=records[fqn].trainable)
            for fqn, tensor in tensors.items()
            if _is_weight(records.get(fqn), tensor) and (local := memory_of(tensor).detach()).numel()
        )

    return LayerPicks(weights=pick(weights), masters=pick(masters))


def _pick(
    fqn: str,
    weights: torch.Tensor,
    state: Mapping[str, torch.Tensor],
    chooser: Chooser,
    share: float,
    *,
    is_trainable: bool,
) -> ParameterPicks:
    numel = weights.numel()
    count = min(numel, max(_LEAST_PICKS, round(share * numel)))
    of_component: dict[Component, list[torch.Tensor]] = {}
    for leaf, tensor in state.items():
        local = memory_of(tensor)
        # What is cut otherwise, or kept as codes, says nothing of single entries.
        if local.shape == weights.shape and local.is_floating_point() and local.device == weights.device:
            component = Component.SECOND if leaf in _MORE_SECOND else component_of(state_key(fqn, leaf))
            of_component.setdefault(component, []).append(local.detach())
    first, second = (of_component.get(each, [None])[0] for each in (Component.FIRST, Component.SECOND))
    step = state.get("step")
    return ParameterPicks(
        fqn=fqn,
        is_trainable=is_trainable,
        indices=chooser.choose(fqn, numel, count, weights.device),
        scale=numel / count,
        weights=weights,
        first=first,
        second=_find_factors(state, weights) if second is None else second,
        step=step if step is not None and step.numel() == 1 else None,
    )


def _choose(fqn: str, numel: int, count: int) -> npt.NDArray[np.int64]:
    if count == numel:
        return np.arange(numel, dtype=np.int64)
    generator = np.random.Generator(np.random.PCG64(xxhash.xxh64_intdigest(f"{fqn}/{numel}/{count}".encode())))
    stretch = numel / count
    picks = ((np.arange(count) + generator.random(count)) * stretch).astype(np.int64)
    return np.minimum(picks, numel - 1)


def _is_weight(record: TensorRecord | None, tensor: torch.Tensor) -> bool:
    return record is not None and record.kind == "parameter" and tensor.is_floating_point()


def _named(image: FileImage | None) -> Sequence[tuple[str, torch.Tensor]]:
    if image is None:
        return ()
    return [(stored.name, tensor) for stored, tensor in zip(image.layout.tensors, image.tensors, strict=True)]


def _find_factors(state: Mapping[str, torch.Tensor], weights: torch.Tensor) -> Factors | None:
    if weights.ndim < 2:
        return None
    num_rows, num_columns = weights.shape[-2:]
    batch = weights.numel() // (num_rows * num_columns)
    for row_leaf, column_leaf in _FACTORS:
        if row_leaf in state and column_leaf in state:
            rows, columns = (memory_of(state[leaf]).detach() for leaf in (row_leaf, column_leaf))
            if rows.numel() == batch * num_rows and columns.numel() == batch * num_columns:
                return Factors(rows=rows.reshape(batch, num_rows), columns=columns.reshape(batch, num_columns))
    return None
