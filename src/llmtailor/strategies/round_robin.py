"""One of n groups of layers at every save, in turn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ..layers import LayerKind
from .arguments import check_number, format_call
from .context import LayerStatus, SaveContext, Strategy

__all__ = ["RoundRobin"]


@dataclass(frozen=True)
class RoundRobin(Strategy):
    """Write one of ``n`` groups of layers, group ``save_index % n``; layers of kind OTHER (norms) always.

    The groups are about equally large: the heaviest exceeds the lightest by one layer at most. As long as the layers
    and their sizes stay, no layer misses more than ``n - 1`` saves in a row. Where there are more groups than layers
    some saves write the OTHER layers alone.
    """

    n: int = 10
    """Groups; each layer is written at every n-th save."""
    max_age: int | None = field(default=None, kw_only=True)
    """In optimizer steps."""

    def __post_init__(self) -> None:
        check_number("round_robin", "n", self.n, least=1)
        check_number("round_robin", "max_age", self.max_age, least=1, optional=True)

    def select(self, context: SaveContext) -> frozenset[str]:
        """The group whose turn it is, and the layers that take no turns."""
        turn = context.save_index % self.n
        groups = _assign_groups(context.layers, self.n)
        return frozenset(layer.name for layer in context.layers if groups.get(layer.name, turn) == turn)

    @property
    def text(self) -> str:
        """``round_robin(n=10)``, with ``max_age`` if there is one."""
        return format_call("round_robin", n=self.n, max_age=self.max_age)


def _assign_groups(layers: Sequence[LayerStatus], n: int) -> dict[str, int]:
    """Layer -> group, of those that take turns: largest first, each to the group that is lightest so far.

    Ties go by the order of the layers and of the groups.
    """
    turning = [layer for layer in layers if layer.kind is not LayerKind.OTHER]
    # Groups beyond the number of layers stay empty anyhow.
    loads = [0] * min(n, len(turning))
    groups: dict[str, int] = {}
    # sorted() keeps the order of equals, and min() takes the first of them.
    for layer in sorted(turning, key=lambda layer: layer.nbytes, reverse=True):
        group = min(range(len(loads)), key=loads.__getitem__)
        loads[group] += layer.nbytes
        groups[layer.name] = group
    return groups
