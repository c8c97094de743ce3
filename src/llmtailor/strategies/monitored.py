"""The layers whose updates are large by a threshold that decays: LLMTailor's update-monitored policy."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from ..errors import InvalidInputError
from .adaptive import Adaptive, measured
from .arguments import check_positive, format_call
from .context import SaveContext

__all__ = ["Monitored"]


@dataclass(frozen=True)
class Monitored(Adaptive):
    """Write the layers whose next update, relative to their weights, exceeds ``threshold_at`` the step.

    The threshold falls as updates do, if it is told how. Unlike drift, an update does not grow with the age of a
    layer: one whose updates are small waits until ``max_age``. NaN exceeds every threshold.

    Source: that updates per layer are compared with a decaying threshold, down to 1e-5 with a constant of 100, is seen
        in the arguments of an optimizer that LLMTailor's examples name (0db721c, examples/trainLLM.py:
        ``AdamX(K=100.0, threshold_end=1e-5)``). Its law is not public; an exponential decay is our choice.
    """

    start: float
    """Threshold at step 0."""
    end: float = field(default=1e-5, kw_only=True)
    """What the threshold falls to."""
    decay: float = field(default=100, kw_only=True)
    """Steps in which what it is above ``end`` falls to 1/e."""

    def __post_init__(self) -> None:
        check_positive("monitored", "start", self.start, example=0.01)
        check_positive("monitored", "end", self.end, example=1e-5)
        check_positive("monitored", "decay", self.decay, example=100)
        if self.start < self.end:
            raise InvalidInputError(
                "argument 'start' of strategy 'monitored' is below 'end'",
                kind="argument-range",
                expected=f"at least {self.end}",
                found=repr(self.start),
                hint=f"write for example start={self.end * 10}",
            )
        self.check_common("monitored")

    def threshold_at(self, step: int) -> float:
        """``end + (start - end) * exp(-step / decay)``."""
        return self.end + (self.start - self.end) * math.exp(-step / self.decay)

    def select(self, context: SaveContext) -> frozenset[str]:
        """The layers that every save writes, and those with an update above the threshold.

        Raises:
            InvalidInputError: Kind ``no-drift`` (nobody measures) or ``no-update`` (the optimizer does not tell).
        """
        hint = "write for example drift(0.02), which asks nothing of the optimizer"
        updates = measured(self.others(context.layers), "update", hint=hint)
        threshold = self.threshold_at(context.step)
        # Not ">": that is false of NaN.
        return self.always(context.layers) | {name for name, update in updates.items() if not update <= threshold}

    @property
    def text(self) -> str:
        """``monitored(start=0.01, end=1e-05, decay=100, first=1, last=1, auxiliary=True, max_age=1000)``."""
        return format_call("monitored", start=self.start, end=self.end, decay=self.decay, **self.common())
