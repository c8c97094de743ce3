"""``dcp.save`` and ``dcp.load`` by a process group that is not of all ranks, one of which sees storage late.

python dcp_groups.py DIRECTORY     three ranks, of which two save; writes told-<rank>.json
"""

from __future__ import annotations

import errno
import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from llmtailor.errors import NotFoundError
from llmtailor.integrations.dcp import TailorPlanner, TailorReader, TailorWriter
from llmtailor.integrations.dcp import lineage as lineage_module

MEMBERS = (1, 2)
LATE, STALE = 2, 6
"""Steps whose checkpoint the last rank does not find when it looks, and cannot look for."""


def trip(error: Exception, step: int) -> None:
    """Have the next look for a checkpoint of this step fail once."""
    look = lineage_module.open_checkpoint

    def fail_once(path: Path) -> Any:
        if path.name != f"checkpoint-{step}":
            return look(path)
        lineage_module.open_checkpoint = look
        raise error

    lineage_module.open_checkpoint = fail_once


def state_of(step: int) -> dict[str, Any]:
    return {f"layers.{layer}.w": torch.full((4,), float(10 * step + layer)) for layer in range(3)}


def save_all(run: Path, group: dist.ProcessGroup) -> list[str]:
    planner = TailorPlanner("parity")
    writer = TailorWriter(run, planner, process_group=group)
    told = []
    for step in range(1, 10):
        if dist.get_rank() == MEMBERS[-1] and step == LATE + 1:
            trip(NotFoundError("not seen yet", kind="missing-checkpoint"), LATE)
        if dist.get_rank() == MEMBERS[-1] and step == STALE + 1:
            trip(OSError(errno.ESTALE, "Stale file handle"), STALE)
        try:
            dcp.save(
                {"model": state_of(step)},
                checkpoint_id=f"step-{step}",
                storage_writer=writer,
                planner=planner,
                process_group=group,
            )
            told.append("saved")
        except CheckpointException as err:
            told.append("; ".join(str(failure[0]) for failure in err.failures.values()))
    writer.close()
    return told


def main(directory: Path) -> None:
    dist.init_process_group("gloo")
    group = dist.new_group([*MEMBERS])
    if dist.get_rank() in MEMBERS:
        assert isinstance(group, dist.ProcessGroup)
        saves = save_all(directory / "run", group)
        state = {"model": state_of(0)}
        dcp.load(state, storage_reader=TailorReader(directory / "run", process_group=group), process_group=group)
        found = {"saves": saves, "loaded": {name: tensor[0].item() for name, tensor in state["model"].items()}}
        (directory / f"told-{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
