"""Which layers are written at a save.

Pure: a strategy is told what there is and when it was last saved, and answers with layer names. No bytes, no clock, no
torch. ``choose_layers`` adds the rules that hold for every strategy.
"""

from __future__ import annotations

from .choose import CODED, ERROR_LIMIT, NO_BASE, NO_GAIN, Choice, choose_layers
from .context import LayerStatus, SaveContext, Strategy
from .custom import Custom
from .filter import Filter
from .full import Full
from .parity import Parity
from .round_robin import RoundRobin
from .text import parse_strategy

__all__ = [
    "CODED",
    "ERROR_LIMIT",
    "NO_BASE",
    "NO_GAIN",
    "Choice",
    "Custom",
    "Filter",
    "Full",
    "LayerStatus",
    "Parity",
    "RoundRobin",
    "SaveContext",
    "Strategy",
    "choose_layers",
    "parse_strategy",
]
