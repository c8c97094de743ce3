"""How layers move, as numbers: what a measurement of a live training says of each layer.

The records and the arithmetic; measuring is ``monitor``'s.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["LayerDrift"]


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
