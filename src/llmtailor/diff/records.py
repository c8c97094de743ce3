"""What a comparison of two checkpoints, A and B, has to say. Pure."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Final

from ..tensors import TensorMeta

__all__ = [
    "MASTER",
    "OPTIMIZER",
    "WEIGHTS",
    "Difference",
    "Distance",
    "LayerDifference",
    "Side",
    "TensorDifference",
    "Unmatched",
]

WEIGHTS: Final = "weights"
"""The component that is the model; the others are the optimizer's, by leaf: ``exp_avg``, ``step``."""
OPTIMIZER: Final = "optimizer"
"""Stands for all components of the optimizer where none is known, since its files are the same and were not opened."""
MASTER: Final = "master"
"""The component of fp32 masters, whatever their format calls them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Distance:
    """How far numbers of B are from those of A, as sums; they add up over tensors.

    An element that is no number in A or B (NaN, infinity) is counted and left out of the sums. A complex number is two
    elements.
    """

    numel: int = 0
    num_equal: int = 0
    """Elements of the same bits; where the types differ, of the same value, one NaN being as good as another."""
    num_unread: int = 0
    """Elements that both checkpoints have from the same bytes, so they were not read. They are among ``num_equal``."""
    square_a: float = 0.0
    """Sum of squares, as those below; of what was read."""
    square_b: float = 0.0
    square_difference: float = 0.0
    product: float = 0.0
    """Sum of products of A's and B's."""
    max_abs: float = 0.0
    """Largest difference of an element."""
    nan_a: int = 0
    """Elements that are NaN."""
    nan_b: int = 0
    inf_a: int = 0
    """Elements that are infinite."""
    inf_b: int = 0

    def __add__(self, other: Distance) -> Distance:
        sums = {name: getattr(self, name) + getattr(other, name) for name in _FIELDS}
        return Distance(**{**sums, "max_abs": max(self.max_abs, other.max_abs)})

    @property
    def is_equal(self) -> bool:
        return self.num_equal == self.numel

    @property
    def unchanged(self) -> float:
        """Share of elements that are equal."""
        return self.num_equal / self.numel if self.numel else 1.0

    @property
    def l2(self) -> float:
        """``|B - A|``."""
        return math.sqrt(self.square_difference)

    @property
    def norm_a(self) -> float:
        """``|A|`` of what was read."""
        return math.sqrt(self.square_a)

    @property
    def norm_b(self) -> float:
        return math.sqrt(self.square_b)

    @property
    def relative(self) -> float:
        """``|B - A| / |A|`` of what was read; something of nothing is infinitely much, and nothing of nothing is 0."""
        if not self.square_difference:
            return 0.0
        return self.l2 / self.norm_a if self.square_a else math.inf

    @property
    def cosine(self) -> float | None:
        """Of the angle between A and B, of what was read; None if either is all zeros."""
        norms = self.norm_a * self.norm_b
        # More than the largest number squared cannot be compared.
        return max(-1.0, min(1.0, self.product / norms)) if 0 < norms < math.inf else None

    @property
    def num_not_finite(self) -> int:
        """NaN and infinities of both."""
        return self.nan_a + self.nan_b + self.inf_a + self.inf_b


_FIELDS = tuple(field.name for field in fields(Distance))


def _sum(distances: Iterable[Distance]) -> Distance:
    return functools.reduce(operator.add, distances, Distance())


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorDifference:
    """A tensor that both checkpoints have, in one shape."""

    layer: str
    component: str
    """``weights``, ``master``, or the leaf of the optimizer state."""
    fqn: str
    """Of the parameter or buffer, as A calls it."""
    a: TensorMeta
    b: TensorMeta
    distance: Distance


@dataclass(frozen=True, slots=True, kw_only=True)
class Unmatched:
    """A tensor that one checkpoint does not have, or that has another shape there."""

    layer: str
    component: str
    fqn: str
    a: TensorMeta | None
    """None if only B has it."""
    b: TensorMeta | None
    """None if only A has it."""


@dataclass(frozen=True, kw_only=True)
class LayerDifference:
    """A layer."""

    name: str
    step_a: int | None
    """Step at which A's was saved; None if A has no such layer, or does not say."""
    step_b: int | None
    same_files: tuple[str, ...]
    """``weights``, ``optimizer``: what lies in the same files by both manifests. None of them was opened, so what they
    hold is not among ``tensors``, and of the optimizer's not among ``distances``."""
    same_numel: int
    """Elements of the weights in such files."""
    tensors: tuple[TensorDifference, ...]
    unmatched: tuple[Unmatched, ...]

    @cached_property
    def distances(self) -> Mapping[str, Distance]:
        """By component; the weights first."""
        found: dict[str, Distance] = {}
        if self.same_numel:
            found[WEIGHTS] = Distance(numel=self.same_numel, num_equal=self.same_numel, num_unread=self.same_numel)
        for tensor in self.tensors:
            found[tensor.component] = found.get(tensor.component, Distance()) + tensor.distance
        return found

    def find_distance(self, component: str) -> Distance | None:
        """Of a component; what lies in the same files is equal, even where nothing else is known of it."""
        is_unopened = component != WEIGHTS and OPTIMIZER in self.same_files
        return self.distances.get(component, Distance() if is_unopened else None)

    @property
    def is_identical(self) -> bool:
        return not self.unmatched and all(distance.is_equal for distance in self.distances.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """One of the two checkpoints."""

    path: Path
    format: str
    """One of ``formats.FORMATS``."""
    step: int | None
    has_optimizer: bool


@dataclass(frozen=True, kw_only=True)
class Difference:
    """How checkpoint B differs from checkpoint A."""

    a: Side
    b: Side
    layers: tuple[LayerDifference, ...]
    """In A's order; then those that only B has."""

    @property
    def is_identical(self) -> bool:
        """True if both have the same tensors, and every element is equal."""
        return all(layer.is_identical for layer in self.layers)

    @property
    def tensors(self) -> tuple[TensorDifference, ...]:
        """All that were compared, in the order of the layers."""
        return tuple(tensor for layer in self.layers for tensor in layer.tensors)

    @property
    def unmatched(self) -> tuple[Unmatched, ...]:
        return tuple(each for layer in self.layers for each in layer.unmatched)

    @cached_property
    def components(self) -> tuple[str, ...]:
        """The weights, then the optimizer's, by name; ``optimizer`` where no optimizer file had to be opened."""
        found = {name for layer in self.layers for name in layer.distances}
        if found <= {WEIGHTS} and any(OPTIMIZER in layer.same_files for layer in self.layers):
            found.add(OPTIMIZER)
        return tuple(sorted(found, key=lambda name: (name != WEIGHTS, name)))

    @cached_property
    def totals(self) -> Mapping[str, Distance]:
        """By component, over all layers."""
        return {
            name: _sum(each for layer in self.layers if (each := layer.find_distance(name)) is not None)
            for name in self.components
        }
