"""Bytes by the step: how many layers a save writes, and when it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import InvalidInputError
from .arguments import format_call
from .budget import Budgeted, bytes_of
from .context import LayerStatus, SaveContext

__all__ = ["BudgetPerStep"]

_ROUNDS = 10
"""A save is worth its while once it holds this part of the layers that not every save writes."""


@dataclass(frozen=True)
class BudgetPerStep(Budgeted):
    """Write no more than so many bytes per optimizer step, and save whenever that is enough for some layers.

    A save may write what has accrued since the one before, so a save between two that are due writes little, and leaves
    less to the next. As with ``Budget``, layers that are too old are written whatever it costs.
    """

    rate: int | str
    """Bytes per optimizer step: whole, or text such as ``50MB``."""

    def __post_init__(self) -> None:
        bytes_of("budget_per_step", "rate", self.rate)
        self.check_common("budget_per_step")

    def interval(self, layers: Sequence[LayerStatus]) -> int:
        """Steps until the budget holds the layers that every save writes, and of the rest a tenth or the largest one.

        Raises:
            InvalidInputError: Kind ``budget-too-small``: they are more than ``max_age``, so every save would be full.
        """
        others = [layer.nbytes for layer in self.others(layers)]
        needed = self.steady_nbytes(layers) + max(-(-sum(others) // _ROUNDS), *others, 0)
        steps = max(1, -(-needed // self._nbytes))
        if steps > self.max_age:
            raise InvalidInputError(
                "the budget is too small: every layer would be too old before it holds a save",
                kind="budget-too-small",
                expected=f"at least {-(-needed // self.max_age):,} bytes per step: a save takes {needed:,} within "
                f"max_age={self.max_age} steps",
                found=f"{self._nbytes:,} bytes per step, enough after {steps:,} steps",
                hint=f"{self.way_out(layers)}; or a higher max_age",
            )
        return steps

    def select(self, context: SaveContext) -> frozenset[str]:
        """What fits into what has accrued; see ``Budgeted.fill``.

        Raises:
            InvalidInputError: Kind ``budget-too-small``, as ``interval``; ``no-drift`` or ``no-importance``.
        """
        self.interval(context.layers)
        return self.fill(context, self._nbytes * (context.step - (context.previous_step or 0)))

    @property
    def text(self) -> str:
        """``budget_per_step(rate="50MB", by="importance", first=1, last=1, auxiliary=True, max_age=1000)``."""
        return format_call("budget_per_step", rate=self.rate, **self.common())

    @property
    def _nbytes(self) -> int:
        return bytes_of("budget_per_step", "rate", self.rate)
