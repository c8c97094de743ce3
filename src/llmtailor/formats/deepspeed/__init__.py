"""DeepSpeed's ZeRO checkpoints, stages 1 to 3, as a source and as a target of a merge.

files of the ranks --reading--> trees and flat partitions --partitions--> Catalog
Catalog --steps, partitions--> flat partitions --templates--> files of the ranks
"""

from .planning import plan_deepspeed
from .reading import open_deepspeed

__all__ = ["open_deepspeed", "plan_deepspeed"]
