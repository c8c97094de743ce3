"""How often to save, from what saves cost and how often training fails. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .errors import InvalidInputError

__all__ = ["FIRST_STEPS", "Interval", "SaveCosts", "choose_interval", "parse_interval"]

FIRST_STEPS = 20
"""Steps before the first save, whose cost nobody knows yet."""


@dataclass(frozen=True, kw_only=True)
class Interval:
    """What the time between two saves is chosen for.

    The optimum between work lost and work held up; but no more of the time is spent on saves than ``max_overhead``, a
    save is done before the next begins, and the free space of the disk lasts for ``disk_hours``, if checkpoints are not
    removed (``keep``).
    """

    mtbf_hours: float = 24.0
    """Mean time between failures of the whole job. 1,000 GPUs of which each fails every 5 years: 44 hours."""
    max_overhead: float = 0.01
    """Share of the training time that saves may hold it up."""
    disk_hours: float = 24.0
    """How long the free space has to last."""

    def __post_init__(self) -> None:
        for name, value in (
            ("mtbf_hours", self.mtbf_hours),
            ("max_overhead", self.max_overhead),
            ("disk_hours", self.disk_hours),
        ):
            if type(value) not in (int, float) or not 0 < value < math.inf or (name == "max_overhead" and value > 1):
                raise InvalidInputError(
                    f"{name} makes no sense",
                    kind="interval",
                    expected="a share, more than 0 and up to 1" if name == "max_overhead" else "hours, more than 0",
                    found=repr(value),
                )


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveCosts:
    """What the last save cost."""

    step_secs: float
    """A step of training takes so long."""
    stall_secs: float
    """Training was held up so long."""
    busy_secs: float
    """From the call until the checkpoint was published."""
    growth_nbytes: int
    """What it takes of the disk for good; 0 where an old checkpoint goes for each new one."""
    free_nbytes: int | None
    """What is left of the disk; None if unknown."""


def parse_interval(value: object) -> Interval | None:
    """``"auto"`` or an ``Interval``; None for None.

    Raises:
        InvalidInputError: Anything else.
    """
    if value is None or isinstance(value, Interval):
        return value
    if value == "auto":
        return Interval()
    raise InvalidInputError(
        "interval makes no sense",
        kind="interval",
        expected='"auto", or llmtailor.Interval(mtbf_hours=..., max_overhead=...)',
        found=repr(value),
        hint="a fixed number of steps goes to save_steps",
    )


def choose_interval(interval: Interval, costs: SaveCosts) -> int:
    """Steps between two saves; at least 1.

    Source: Young, CACM 17 (1974), 530; Daly, FGCS 22 (2006), 303, equation 37: with the cost ``C`` of a save and the
        mean time ``M`` between failures, the least time is lost at ``sqrt(2CM) (1 + sqrt(C/2M)/3 + (C/2M)/9) - C``
        if ``C < 2M``, else at ``M``.
    """
    failure_secs, cost = interval.mtbf_hours * 3600, max(costs.stall_secs, 1e-6)
    ratio = cost / (2 * failure_secs)
    best = math.sqrt(2 * cost * failure_secs) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - cost
    secs = max(
        best if ratio < 1 else failure_secs,
        costs.stall_secs / interval.max_overhead,
        costs.busy_secs,
        _disk_secs(interval, costs),
    )
    return max(1, math.ceil(secs / max(costs.step_secs, 1e-6)))


def _disk_secs(interval: Interval, costs: SaveCosts) -> float:
    if costs.free_nbytes is None or not costs.growth_nbytes:
        return 0.0
    num_saves = max(1.0, costs.free_nbytes / costs.growth_nbytes)
    return interval.disk_hours * 3600 / num_saves
