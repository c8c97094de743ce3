"""Fills in the files of a new checkpoint, from the plan of any format, at the speed of the disk. No torch.

CheckpointPlan --segments--> chunks of files --transfer--> filled, summed, written --execute--> published
"""

from .execute import execute, read_paths
from .published import check_published

__all__ = ["check_published", "execute", "read_paths"]
