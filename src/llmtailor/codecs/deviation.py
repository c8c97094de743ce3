"""How far codes are from what they stand for."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

__all__ = ["Deviation"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Deviation:
    """Sums over some tensors; pure numbers, so that parts can be added up."""

    error_sq: float = 0.0
    """Sum of squared errors."""
    norm_sq: float = 0.0
    """Sum of squares of the true values."""
    largest: float = 0.0
    """Largest error of an element: relative to the largest magnitude of its tensor; of logarithmic codes, relative to
    the element itself (an upper bound)."""

    @property
    def l2(self) -> float:
        """Relative L2 error; infinite where the true values are all zero and the codes are not."""
        if not self.error_sq:
            return 0.0
        return math.sqrt(self.error_sq / self.norm_sq) if self.norm_sq else math.inf

    @property
    def is_exact(self) -> bool:
        return not self.error_sq

    @staticmethod
    def of(parts: Iterable[Deviation]) -> Deviation:
        """The deviation of all parts together."""
        parts = list(parts)
        return Deviation(
            error_sq=sum(part.error_sq for part in parts),
            norm_sq=sum(part.norm_sq for part in parts),
            largest=max((part.largest for part in parts), default=0.0),
        )
