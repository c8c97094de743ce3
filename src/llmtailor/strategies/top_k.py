"""A fixed number of layers at every save: those that need it most."""

from __future__ import annotations

from dataclasses import dataclass

from .adaptive import Ranking
from .arguments import check_number, format_call
from .context import SaveContext

__all__ = ["TopK"]


@dataclass(frozen=True)
class TopK(Ranking):
    """Write the ``k`` layers with the highest score, beside those that every save writes.

    Fewer where fewer have moved. ``k`` layers may be few bytes or many; ``Budget`` counts bytes.
    """

    k: int
    """Layers beside those that every save writes."""

    def __post_init__(self) -> None:
        check_number("top_k", "k", self.k, least=1)
        self.check_common("top_k")

    def select(self, context: SaveContext) -> frozenset[str]:
        """The layers that every save writes, and the first ``k`` of the others.

        Raises:
            InvalidInputError: Kind ``no-drift`` or ``no-importance``; see ``Ranking.rank``.
        """
        return self.always(context.layers) | {layer.name for layer in self.rank(context)[: self.k]}

    @property
    def text(self) -> str:
        """``top_k(k=4, by="importance", first=1, last=1, auxiliary=True, max_age=1000)``."""
        return format_call("top_k", k=self.k, **self.common())
