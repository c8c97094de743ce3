"""The update monitor: how every layer of a live training moves, measured at saves without a copy of the model.

picks     which entries are looked at
reading   their values, and sums over them
monitor   what they were when each layer was saved
watch     all of it for a run, on one rank or several
"""

from __future__ import annotations

from .gradients import GradientNorms
from .monitor import START, AddUp, Look, Monitor
from .watch import DRIFT_NAME, Watch

__all__ = ["DRIFT_NAME", "START", "AddUp", "GradientNorms", "Look", "Monitor", "Watch"]
