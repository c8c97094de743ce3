"""Which layers are written at a save.

Pure: a strategy is told what there is, when it was last saved and how it moved since, and answers with layer names. No
bytes, no clock, no torch. ``choose_layers`` adds the rules that hold for every strategy.
"""

from __future__ import annotations

from .budget import Budget
from .budget_per_step import BudgetPerStep
from .choose import CODED, ERROR_LIMIT, NO_BASE, NO_GAIN, Choice, choose_layers
from .context import DEFAULT_MAX_AGE, LayerStatus, SaveContext, Strategy
from .custom import Custom
from .drift import Drift
from .filter import Filter
from .full import Full
from .monitored import Monitored
from .parity import Parity
from .round_robin import RoundRobin
from .text import parse_strategy
from .top_k import TopK

__all__ = [
    "CODED",
    "DEFAULT_MAX_AGE",
    "ERROR_LIMIT",
    "NO_BASE",
    "NO_GAIN",
    "Budget",
    "BudgetPerStep",
    "Choice",
    "Custom",
    "Drift",
    "Filter",
    "Full",
    "LayerStatus",
    "Monitored",
    "Parity",
    "RoundRobin",
    "SaveContext",
    "Strategy",
    "TopK",
    "choose_layers",
    "parse_strategy",
]
