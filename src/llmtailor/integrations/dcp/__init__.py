"""Three objects for ``torch.distributed.checkpoint``: selective, linked, verified checkpoints by ``dcp.save`` itself.

planner = TailorPlanner("parity", model=model, optimizers=optimizer)
reader = TailorReader("runs/a")
writer = TailorWriter("runs/a", planner, reader=reader)

dcp.load(state_dict, storage_reader=reader)
dcp.save(state_dict, checkpoint_id="step-400", storage_writer=writer, planner=planner)
"""

from .planner import TailorPlanner
from .reader import TailorReader
from .writer import TailorWriter

__all__ = ["TailorPlanner", "TailorReader", "TailorWriter"]
