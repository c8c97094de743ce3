"""When a run saves next, where it is not told: the strategy decides, or the cost of its saves."""

from __future__ import annotations

import time
from collections.abc import Sequence

from .interval import FIRST_STEPS, Interval, SaveCosts, choose_interval
from .meeting import Meeting
from .retention import Keep
from .strategies import LayerStatus, Strategy
from .writer import SaveHandle

__all__ = ["Pace"]


class Pace:
    """Called by the training thread; on every rank at the same steps.

    Args:
        strategy: May have an interval of its own.
        interval: What the interval is chosen for; None leaves it to the strategy, or to the caller.
        meeting: The ranks; the coordinator's measurements count.
        keep: Which checkpoints stay on the disk.
        timeout_secs: How long ranks wait for the coordinator at a save.
    """

    def __init__(
        self,
        strategy: Strategy,
        interval: Interval | None,
        meeting: Meeting,
        keep: Keep,
        timeout_secs: float,
    ) -> None:
        self._strategy = strategy
        self._interval = interval
        self._meeting = meeting
        self._has_growth = keep.removes_nothing
        self._timeout_secs = timeout_secs
        self._last_step: int | None = None
        self._resumed_at = time.perf_counter()
        """When training went on after the last save."""
        self._steps: int | None = FIRST_STEPS if interval is not None else None
        """Between saves; None if that is not decided here, or not yet."""

    def begin(self, step: int) -> None:
        """Training starts, or goes on, after this many steps."""
        self._last_step = step
        self._resumed_at = time.perf_counter()

    def is_due(self, step: int) -> bool | None:
        """Whether a save is due; None if that is the caller's to know."""
        if self._steps is None:
            return None
        return step - (self._last_step or 0) >= self._steps

    def note_sizes(self, layers: Sequence[LayerStatus]) -> None:
        """What there is to save is known, or is another than before."""
        if self._interval is None:
            self._steps = self._strategy.interval(layers)

    def note_save(self, step: int, last: SaveHandle | None, free_nbytes: int | None, called: float) -> None:
        """A save was begun.

        Args:
            step: Its.
            last: The newest save before it that has ended well; None if there is none.
            free_nbytes: What is left of the disk.
            called: When it began, by ``time.perf_counter``.
        """
        begun, self._last_step = self._last_step, step
        num_steps = step - (begun or 0)
        step_secs = max(called - self._resumed_at, 1e-6) / max(num_steps, 1)
        self._resumed_at = time.perf_counter()
        if self._interval is None:
            return
        stats = None if last is None else last.stats
        chosen = self._steps or FIRST_STEPS
        if stats is not None:
            costs = SaveCosts(
                step_secs=step_secs,
                stall_secs=stats.stall_secs,
                busy_secs=stats.total_secs,
                growth_nbytes=stats.written_nbytes if self._has_growth else 0,
                free_nbytes=free_nbytes,
            )
            chosen = choose_interval(self._interval, costs)
        self._steps = int(self._meeting.tell({"steps": chosen}, self._timeout_secs)["steps"])
