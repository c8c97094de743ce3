"""How layers move, as numbers: what a measurement of a live training says of each layer.

The records and the arithmetic; measuring is ``monitor``'s.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

__all__ = ["LayerDrift", "LayerSums", "mean_age", "shares_of_progress", "to_drift"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerDrift:
    """How one layer moves; None where its optimizer, or the moment, does not tell."""

    relative: float | None
    """Relative L2 distance of its weights from what they were at its last save; before its first save, at the start."""
    importance: float | None
    """Sum over its weights of ``sqrt(v) * dw**2``, ``dw`` since its last save: about what the loss loses by taking the
    layer from that save. None unless the optimizer keeps second moments ``v`` of all of its trainable weights."""
    update: float | None
    """Size of the optimizer's next update by its own state, relative to the weights: ``|lr * m / (sqrt(v) + eps)| /
    |w|``."""
    momentum: float | None
    """L2 norm of the first moments."""
    rate: float | None
    """Sum over its weights of ``sqrt(v) * u**2``, ``u`` the update: how much a step of training matters to the layer,
    whenever it was saved. None where ``importance`` is."""
    gradient: float | None = None
    """L2 norm of the gradient, if asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSums:
    """What one rank contributes to the numbers of a layer: sums over its entries. They add up over ranks."""

    trainable: float = 0.0
    """Entries that train. Without those of parameters that have not moved and have no state yet, as of an expert that
    got no token: their moments are 0."""
    with_second: float = 0.0
    """Of those: entries with a second moment, counted by the weights that it was seen beside."""
    with_first: float = 0.0
    with_update: float = 0.0
    with_gradient: float = 0.0
    weights: float = 0.0
    """Sum of squares, as those below."""
    saved: float = 0.0
    moved: float = 0.0
    moved_trainable: float = 0.0
    first: float = 0.0
    update: float = 0.0
    gradient: float = 0.0
    importance: float = 0.0
    rate: float = 0.0

    def values(self) -> list[float]:
        """In the order of the fields."""
        return [getattr(self, field.name) for field in fields(self)]

    @classmethod
    def of_values(cls, values: Sequence[float]) -> LayerSums:
        """Inverse of ``values``."""
        return cls(**{field.name: float(value) for field, value in zip(fields(cls), values, strict=True)})


def to_drift(sums: LayerSums) -> LayerDrift:
    """The numbers of a layer from the sums of all ranks."""
    # Counts are estimates too where tensors are sampled, so they are compared with room for rounding.
    enough = sums.trainable * (1 - 1e-6)
    has_second = sums.with_second >= enough or not sums.moved_trainable
    has_rate = sums.with_second >= enough and sums.with_update >= enough
    return LayerDrift(
        relative=_ratio(sums.moved, sums.saved),
        importance=sums.importance if has_second else None,
        update=_ratio(sums.update, sums.weights) if sums.with_update >= enough else None,
        momentum=math.sqrt(sums.first) if sums.with_first and sums.with_first >= enough else None,
        rate=sums.rate if has_rate else None,
        gradient=math.sqrt(sums.gradient) if sums.with_gradient else None,
    )


def _ratio(square: float, of_square: float) -> float:
    """Of two norms; something of nothing is infinitely much."""
    if math.isnan(square) or math.isnan(of_square):
        return math.nan
    if not of_square:
        return math.inf if square else 0.0
    return math.sqrt(square / of_square)


def shares_of_progress(drifts: Mapping[str, LayerDrift], sizes: Mapping[str, int]) -> dict[str, float]:
    """Layer -> its share of what a step of training achieves; they add up to 1.

    By ``rate`` where every layer has one that is finite, else by size.

    Args:
        drifts: By layer.
        sizes: Of the same layers, in bytes.
    """
    rates = {layer: drift.rate for layer, drift in drifts.items()}
    known = {layer: rate for layer, rate in rates.items() if rate is not None and math.isfinite(rate)}
    weights: Mapping[str, float] = known if len(known) == len(rates) and sum(known.values()) > 0 else sizes
    total = sum(weights[layer] for layer in drifts)
    return {layer: weights[layer] / total if total else 0.0 for layer in drifts}


def mean_age(ages: Mapping[str, int], shares: Mapping[str, float]) -> float:
    """Steps of training that a composite has lost, about: the mean age of its layers, weighted by what they matter.

    Source: measured on models of half a million parameters, the loss of a composite is that of a whole state which is
    as old as the mean age of its layers (docs/strategies/index.md).
    """
    return sum(age * shares[layer] for layer, age in ages.items())
