"""The layers that have moved far enough."""

from __future__ import annotations

from dataclasses import dataclass

from .adaptive import Adaptive, measured
from .arguments import check_positive, format_call
from .context import SaveContext

__all__ = ["Drift"]


@dataclass(frozen=True)
class Drift(Adaptive):
    """Write the layers whose relative drift since their last save exceeds a threshold.

    A promise about each layer, none about bytes: while the learning rate is high all layers may exceed it at every
    save, and once it is low none for long. NaN exceeds every threshold.

    Source: at equal bytes a fixed threshold lost two to five times as many steps as half of the layers by drift
        (models of half a million parameters; docs/strategies/index.md).
    """

    threshold: float
    """Of ``LayerDrift.relative``, exclusive."""

    def __post_init__(self) -> None:
        check_positive("drift", "threshold", self.threshold, example=0.02)
        self.check_common("drift")

    def select(self, context: SaveContext) -> frozenset[str]:
        """The layers that every save writes, and those that moved further than the threshold.

        Raises:
            InvalidInputError: Kind ``no-drift``: nobody measures how layers move.
        """
        drifts = measured(self.others(context.layers), "drift")
        # Not ">": that is false of NaN.
        return self.always(context.layers) | {name for name, value in drifts.items() if not value <= self.threshold}

    @property
    def text(self) -> str:
        """``drift(threshold=0.02, first=1, last=1, auxiliary=True, max_age=1000)``."""
        return format_call("drift", threshold=self.threshold, **self.common())
