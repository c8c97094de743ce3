"""How two checkpoints differ: every tensor of weights and optimizer state, element by element, of any two formats.

    two directories --open--> catalogs --pair by name--> DiffPlan --read, sum up--> Difference

``plan_diff`` does all but the last step and reads no tensor; ``compare`` does the last. ``diff_checkpoints`` is both.
Not for saying how a training moves its layers while it runs: that is ``monitor``.
"""

from .comparing import compare, diff_checkpoints
from .pairing import DiffPlan, plan_diff
from .records import Difference, Distance, LayerDifference, Side, TensorDifference, Unmatched

__all__ = [
    "DiffPlan",
    "Difference",
    "Distance",
    "LayerDifference",
    "Side",
    "TensorDifference",
    "Unmatched",
    "compare",
    "diff_checkpoints",
    "plan_diff",
]
