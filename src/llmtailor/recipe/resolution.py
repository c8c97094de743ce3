"""What a recipe and the layers of its sources come to: for every layer of the target, where it comes from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ..layers import LayerMap
from .records import Output
from .sources import SourceLayers

__all__ = ["Contribution", "Resolution", "TargetLayer", "make_target", "method_of", "whole_checkpoint"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Contribution:
    """A layer of a source, and how much of it goes into one of the target."""

    source: str
    """Path as the recipe has it."""
    layer: str
    """Its name in the source."""
    weight: float = 1.0
    """Factor of its weights, to be used as it is: where a sum of 1 was asked for, they have it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetLayer:
    """A layer of the target."""

    name: str
    contributions: tuple[Contribution, ...]
    """Never empty; one for a copy."""
    optimizer_from: Contribution
    """The newest of them (the first of equal ones): moments and update count come from it alone."""

    @property
    def is_copy(self) -> bool:
        """True if the bytes are those of one source."""
        return len(self.contributions) == 1 and self.contributions[0].weight == 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolution:
    """A recipe, granted: what the plan needs to know."""

    layers: tuple[TargetLayer, ...]
    """In model order."""
    base: str
    """Whose configuration and other small files are taken."""
    state_from: str
    """Whose step, scheduler, random numbers and trainer state are taken."""
    method: str
    """``passthrough`` or ``linear``."""
    output: Output
    tokenizer_from: str | None = None
    """Where the recipe says the tokenizer comes from; None where it does not."""
    stack: str | None = None
    """The main stack; None if there is none, or several are equal."""
    num_blocks: int | None = None
    """Of the target's main stack."""
    base_depth: int | None = None
    """Of the base's main stack, whether or not the base holds all of its blocks; None if the recipe keeps it."""

    @property
    def new_depth(self) -> int | None:
        """Blocks of the target's main stack, where the configuration has to change; None where it holds."""
        return None if self.base_depth in (None, self.num_blocks) else self.num_blocks


def make_target(name: str, parts: Sequence[tuple[str, str, float]], sources: Mapping[str, SourceLayers]) -> TargetLayer:
    """A layer of the target from (source, layer there, weight); what counts nothing is left out.

    Args:
        name: In the target.
        parts: Not empty; not all weights are 0.
        sources: For their steps.
    """
    contributions = tuple(
        Contribution(source=source, layer=layer, weight=weight) for source, layer, weight in parts if weight != 0
    )
    newest = max(contributions, key=lambda each: sources[each.source].step_of(each.layer))
    return TargetLayer(name=name, contributions=contributions, optimizer_from=newest)


def method_of(layers: Iterable[TargetLayer]) -> str:
    """``passthrough`` if every layer is a copy."""
    return "passthrough" if all(layer.is_copy for layer in layers) else "linear"


def whole_checkpoint(source: str, layers: LayerMap) -> Resolution:
    """All of one checkpoint, as it is: what a recipe of ``base: PATH`` comes to."""
    copies = (Contribution(source=source, layer=layer.name) for layer in layers)
    return Resolution(
        layers=tuple(TargetLayer(name=copy.layer, contributions=(copy,), optimizer_from=copy) for copy in copies),
        base=source,
        state_from=source,
        method="passthrough",
        output=Output(),
    )
