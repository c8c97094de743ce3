"""Half of the layers at every save."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..layers import LayerKind
from .arguments import check_number, format_call
from .context import LayerStatus, SaveContext, Strategy

__all__ = ["Parity", "is_turn"]


@dataclass(frozen=True)
class Parity(Strategy):
    """Write odd blocks and embeddings at odd saves, even blocks and heads at even ones, all else always.

    Odd is the block's own number and the save's ``save_index``. A model with a tied head has no head layer; its
    embedding simply goes with the odd blocks. Without ``max_age`` no layer misses more than one save in a row, so
    a layer is at most as stale as the last save is old.

    Source:
        Sun et al., LLMTailor, PDSW'25 (arXiv 2602.22158), use case 1: odd layers and embed_tokens from one
        checkpoint, even layers and lm_head from the next.
    """

    max_age: int | None = field(default=None, kw_only=True)
    """In optimizer steps."""

    def __post_init__(self) -> None:
        check_number("parity", "max_age", self.max_age, least=1, optional=True)

    def select(self, context: SaveContext) -> frozenset[str]:
        """The layers whose turn it is, and those that take no turns."""
        return frozenset(layer.name for layer in context.layers if is_turn(layer, context.save_index))

    @property
    def text(self) -> str:
        """``parity()`` or ``parity(max_age=500)``."""
        return format_call("parity", max_age=self.max_age)


def is_turn(layer: LayerStatus, turn: int) -> bool:
    """True if the layer is of the half that goes at this turn, or takes no turns at all."""
    if layer.kind is LayerKind.BLOCK:
        assert layer.index is not None, layer.name
        return layer.index % 2 == turn % 2
    if layer.kind is LayerKind.OTHER:
        return True
    return (layer.kind is LayerKind.EMBEDDING) == (turn % 2 == 1)
