"""From a strategy's answer to a decision with a reason for each layer."""

from __future__ import annotations

from dataclasses import dataclass

from .context import LayerStatus, SaveContext, Strategy, check_names

__all__ = [
    "CODED",
    "ERROR_LIMIT",
    "FIRST_SAVE",
    "KEPT",
    "MAX_AGE",
    "NO_BASE",
    "NO_GAIN",
    "STRATEGY",
    "Choice",
    "choose_layers",
]

# Reasons; they stand in manifests, so they are only ever added to.
FIRST_SAVE = "first save"
STRATEGY = "strategy"
MAX_AGE = "max age"
KEPT = "kept"
# Of layers that were not chosen, where those are to be written as codes (``rest``).
CODED = "coded"
NO_GAIN = "no gain"
"""Written exactly, since codes would be hardly smaller."""
NO_BASE = "no base"
"""Written exactly, since no exact version was there that codes could be relative to."""
ERROR_LIMIT = "error limit"
"""Written exactly, since codes would have been too far from the truth."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What a save does with a layer, and why."""

    layer: str
    is_saved: bool
    """False: its earlier files are kept."""
    reason: str
    """``first save``, ``strategy``, ``max age`` or ``kept``; the first that holds."""


def choose_layers(strategy: Strategy, context: SaveContext) -> tuple[Choice, ...]:
    """Decide for each layer, in the context's order, whether this save writes it.

    Written are: at the first save, all; later those never written, those the strategy selects, and those that would
    be more than ``max_age`` steps old. So after any save no layer's staleness exceeds ``max_age``.

    Raises:
        InvalidInputError: The strategy chose what is not a layer.
    """
    selected = check_names(strategy.select(context), context)
    reasons = ((layer.name, _reason_for(layer, strategy, selected, context)) for layer in context.layers)
    return tuple(Choice(layer=name, is_saved=reason != KEPT, reason=reason) for name, reason in reasons)


def _reason_for(layer: LayerStatus, strategy: Strategy, selected: frozenset[str], context: SaveContext) -> str:
    if context.is_first(layer):
        return FIRST_SAVE
    if layer.name in selected:
        return STRATEGY
    return MAX_AGE if strategy.must_write(layer, context) else KEPT
