"""Which layers are written at a save.

Pure: a strategy is told what there is and when it was last saved, and answers with layer names. No bytes, no clock, no
torch. ``choose_layers`` adds the rules that hold for every strategy.
"""

from __future__ import annotations

from .choose import Choice, choose_layers
from .context import LayerStatus, SaveContext, Strategy
from .custom import Custom
from .filter import Filter
from .full import Full
from .parity import Parity
from .text import parse_strategy

__all__ = [
    "Choice",
    "Custom",
    "Filter",
    "Full",
    "LayerStatus",
    "Parity",
    "SaveContext",
    "Strategy",
    "choose_layers",
    "parse_strategy",
]
