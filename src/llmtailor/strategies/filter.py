"""The ends of each stack at every save, the middle seldom."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

from ..layers import LayerKind
from .arguments import check_number, format_call
from .context import LayerStatus, SaveContext, Strategy
from .parity import is_turn

__all__ = ["Filter", "outer_blocks"]


@dataclass(frozen=True)
class Filter(Strategy):
    """Write the outer blocks of each stack always, the rest by halves at every ``every``-th save.

    Blocks are counted in order of their index, so numbering may have gaps. The rest are middle blocks, embeddings and
    heads; its halves alternate as those of ``Parity``: even blocks and heads first. Layers that are neither (norms,
    projectors) are written always. Without ``max_age`` no layer misses more than ``2 * every - 1`` saves in a row.

    Source:
        Sun et al., LLMTailor, PDSW'25 (arXiv 2602.22158), use case 2: first 2 and last 2 layers at every interval,
        half of the others at every fifth.
    """

    first: int = 2
    """Blocks at the front of each stack that every save writes."""
    last: int = 2
    """Blocks at the end of each stack that every save writes."""
    every: int = 5
    """Half of the rest goes at saves whose ``save_index`` is a multiple of this."""
    max_age: int | None = field(default=None, kw_only=True)
    """In optimizer steps."""

    def __post_init__(self) -> None:
        check_number("filter", "first", self.first, least=0)
        check_number("filter", "last", self.last, least=0)
        check_number("filter", "every", self.every, least=1)
        check_number("filter", "max_age", self.max_age, least=1, optional=True)

    def select(self, context: SaveContext) -> frozenset[str]:
        """Outer blocks and layers of kind OTHER, and one half of the rest when it is due."""
        outer = outer_blocks(context.layers, self.first, self.last)
        always = outer | {layer.name for layer in context.layers if layer.kind is LayerKind.OTHER}
        turn, remainder = divmod(context.save_index, self.every)
        if remainder:
            return always
        return always | {layer.name for layer in context.layers if is_turn(layer, turn)}

    @property
    def text(self) -> str:
        """``filter(first=2, last=2, every=5)``, with ``max_age`` if there is one."""
        return format_call("filter", first=self.first, last=self.last, every=self.every, max_age=self.max_age)


def outer_blocks(layers: Iterable[LayerStatus], first: int, last: int) -> frozenset[str]:
    """The first and last so many blocks of each stack, in order of their index."""
    stacks: dict[str | None, list[LayerStatus]] = defaultdict(list)
    for layer in layers:
        if layer.kind is LayerKind.BLOCK:
            stacks[layer.stack].append(layer)
    outer: set[str] = set()
    for stack in stacks.values():
        names = [block.name for block in sorted(stack, key=lambda block: block.index or 0)]
        outer |= {*names[:first], *names[max(len(names) - last, 0) :]}
    return frozenset(outer)
