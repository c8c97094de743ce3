"""What strategies share that look at how layers move: layers that every save writes, and an order of the others."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ..errors import InvalidInputError
from ..layers import LayerKind
from .arguments import check_flag, check_number, check_word
from .context import DEFAULT_MAX_AGE, LayerStatus, SaveContext, Strategy
from .filter import outer_blocks

__all__ = ["Adaptive", "Ranking", "measured"]

_FIELDS = {"importance": "importance", "drift": "relative", "update": "update"}
"""What is measured of a layer -> field of ``LayerDrift``."""
_WORDS = ("importance", "drift", "age")
_MAX_SHOWN = 5
_BY_AGE = 'take a strategy that needs no measurement, as budget(0.5, by="age") or parity'


@dataclass(frozen=True, kw_only=True)
class Adaptive(Strategy):
    """Some layers at every save, others as they need it.

    Written always are the outer blocks of each stack, embeddings and heads, and layers that are neither (norms,
    projectors). Nothing but ``max_age`` bounds how long the others may wait, so it is not optional.

    Source: with one layer 40 steps stale, the loss rises most for head, embedding and the first or the last block
        (models of half a million parameters; docs/strategies/index.md).
    """

    first: int = 1
    """Blocks at the front of each stack that every save writes."""
    last: int = 1
    """Blocks at the end of each stack that every save writes."""
    auxiliary: bool = True
    """Every save writes embeddings and heads; False: they take part like other layers. Norms it writes anyhow."""
    max_age: int = DEFAULT_MAX_AGE
    """In optimizer steps."""

    def check_common(self, name: str) -> None:
        """Raises if an argument makes no sense.

        Raises:
            InvalidInputError: Kind ``argument-type`` or ``argument-range``.
        """
        check_number(name, "first", self.first, least=0)
        check_number(name, "last", self.last, least=0)
        check_flag(name, "auxiliary", self.auxiliary)
        check_number(name, "max_age", self.max_age, least=1)

    @property
    def needs_drift(self) -> bool:
        """How layers move has to be measured."""
        return True

    def always(self, layers: Iterable[LayerStatus]) -> frozenset[str]:
        """The layers that every save writes."""
        known = tuple(layers)
        inner = {LayerKind.BLOCK} if self.auxiliary else {LayerKind.BLOCK, LayerKind.EMBEDDING, LayerKind.HEAD}
        return outer_blocks(known, self.first, self.last) | {each.name for each in known if each.kind not in inner}

    def others(self, layers: Iterable[LayerStatus]) -> tuple[LayerStatus, ...]:
        """The layers among which is chosen, in their order."""
        known = tuple(layers)
        always = self.always(known)
        return tuple(layer for layer in known if layer.name not in always)

    def common(self) -> dict[str, object]:
        """The arguments that all have, for ``text``."""
        return {"first": self.first, "last": self.last, "auxiliary": self.auxiliary, "max_age": self.max_age}


@dataclass(frozen=True, kw_only=True)
class Ranking(Adaptive):
    """Chooses among the others in an order: by importance, by drift or by age."""

    by: str = "importance"
    """``importance``: what the loss would lose without them, ``LayerDrift.importance``; ``drift``: how far they moved,
    ``LayerDrift.relative``; ``age``: steps since they were saved, which takes no measurement."""

    def check_common(self, name: str) -> None:
        """As ``Adaptive``, and ``by``."""
        super().check_common(name)
        check_word(name, "by", self.by, _WORDS)

    @property
    def needs_drift(self) -> bool:
        """Unless by age."""
        return self.by != "age"

    def rank(self, context: SaveContext, *, per_byte: bool = False) -> list[LayerStatus]:
        """The layers among which is chosen, highest score first; those of score 0, which did not move, are left out.

        Of equal scores the oldest is first, then the order of the model. A layer with NaN among its numbers has the
        highest score, one with an infinite number the next: it is written as it is, and what it was remains in the
        earlier checkpoints.

        Args:
            context: The save.
            per_byte: The score counts per byte of the layer.

        Raises:
            InvalidInputError: Kind ``no-drift`` or ``no-importance``: layers whose score nobody knows.
        """
        others = self.others(context.layers)
        scores: Mapping[str, float] = {layer.name: context.age_of(layer) for layer in others}
        if self.needs_drift:
            scores = measured(others, self.by, hint='write by="drift", which asks nothing of the optimizer')
        if per_byte:
            scores = {layer.name: scores[layer.name] / max(layer.nbytes, 1) for layer in others}
        # The score of a diverged layer compares with nothing; sorted() keeps the order of equals.
        moved = [layer for layer in others if math.isnan(scores[layer.name]) or scores[layer.name] > 0]
        return sorted(moved, key=lambda layer: (*_descending(scores[layer.name]), -context.age_of(layer)))

    def common(self) -> dict[str, object]:
        """As ``Adaptive``, after ``by``."""
        return {"by": self.by, **super().common()}


def _descending(score: float) -> tuple[bool, float]:
    return (False, 0.0) if math.isnan(score) else (True, -score)


def measured(layers: Sequence[LayerStatus], measure: str, *, hint: str = _BY_AGE) -> Mapping[str, float]:
    """Layer -> one number of how it moved.

    Args:
        layers: Those that count.
        measure: ``importance``, ``drift`` or ``update``.
        hint: What else the user may do if the optimizer does not tell it.

    Raises:
        InvalidInputError: Kind ``no-drift``: layers that nobody measured; ``no-importance`` or ``no-update``: layers
            whose optimizer does not tell it, or is not saved.
    """
    unseen = [layer.name for layer in layers if layer.drift is None or layer.drift.relative is None]
    if unseen:
        raise InvalidInputError(
            "this strategy needs to know how layers move, and nobody measures that here",
            kind="no-drift",
            layer=unseen[0],
            expected=f"a measurement of each of {len(layers)} layers",
            found=f"none of {_names_of(unseen)}",
            hint=_BY_AGE,
        )
    values = {layer.name: _value(layer, measure) for layer in layers}
    unknown = [name for name, value in values.items() if value is None]
    if unknown:
        raise InvalidInputError(
            f"this strategy needs the {measure} of layers, and the optimizer state that is saved does not tell it",
            kind=f"no-{measure}",
            layer=unknown[0],
            expected="an optimizer that keeps moments of every weight, as AdamW does, and is saved with the weights",
            found=f"no moments of {_names_of(unknown)}",
            hint=hint,
        )
    return {name: value for name, value in values.items() if value is not None}


def _value(layer: LayerStatus, measure: str) -> float | None:
    assert layer.drift is not None
    value: float | None = getattr(layer.drift, _FIELDS[measure])
    # Before its first step an optimizer keeps nothing, and of weights without gradients it never does.
    return 0.0 if value is None and layer.drift.relative == 0 else value


def _names_of(names: Sequence[str]) -> str:
    """``layers.0, layers.1``; the first few, and how many more there are."""
    more = f" and {len(names) - _MAX_SHOWN:,} more" if len(names) > _MAX_SHOWN else ""
    return ", ".join(names[:_MAX_SHOWN]) + more
