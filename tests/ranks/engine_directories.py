"""A real DeepSpeed engine that saves to two directories in turn, and under several tags. One process per rank.

python engine_directories.py DIRECTORY     writes what is seen on the way to DIRECTORY/seen.json, on rank 0
"""

from __future__ import annotations

import json
import shutil
import sys
import unittest.mock
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import deepspeed
import deepspeed.comm.torch
import torch
import torch.distributed as dist

from llmtailor.checkpoint import open_checkpoint
from llmtailor.errors import SaveFailedWarning, SupersededWarning, UnsupportedError
from llmtailor.integrations.deepspeed import DeepSpeedRun, install
from llmtailor.integrations.deepspeed_tags import find_tag
from ranks.engine_trainings import build, train_step


class Training:
    """One engine, and its steps."""

    def __init__(self, directory: Path) -> None:
        self.runs = directory / "runs", directory / "best"
        self.engine = build("zero2-parity-bf16")
        self.engine.save_checkpoint(str(directory / "stock"))
        self.run = install(self.engine, strategy="parity", keep=2, monitor=True, commit_timeout_secs=60)
        self.seen: dict[str, Any] = {}

    def step(self) -> int:
        train_step(self.engine, int(self.engine.global_steps))
        return int(self.engine.global_steps)

    def save(self, place: int = 0, **options: Any) -> bool:
        return bool(self.engine.save_checkpoint(str(self.runs[place]), **options))

    def look(self, name: str) -> None:
        """Note what is in both directories, and how old the layers of the newest checkpoint of the first are."""
        settle(self.run)
        names = [sorted(path.name for path in run.glob("*checkpoint-*")) for run in self.runs]
        newest = max((int(each.rpartition("-")[2]) for each in names[0] if each[0] == "c"), default=0)
        layers = open_checkpoint(self.runs[0] / f"checkpoint-{newest}").manifest.layers
        latest = (self.runs[0] / "latest").read_text().strip()
        self.seen[name] = {
            "runs": names[0],
            "best": names[1],
            "latest": latest,
            "steps": sorted({layer.step for layer in layers}),
            "drifts": [layer.drift for layer in layers if layer.step < newest],
        }


def settle(run: DeepSpeedRun) -> None:
    """Nothing is under way on any rank, and no checkpoint is still to be removed."""
    assert run._checkpointer is not None
    run._checkpointer.drain()
    dist.barrier()


def go_there_and_back(training: Training) -> None:
    assert training.engine.load_checkpoint(str(training.runs[0])) == (None, None)
    for _ in range(6):
        step = training.step()
        training.save()
        if step % 3 == 0:
            training.save(1)
    training.step()
    training.save()  # after the other directory
    training.look("there and back")
    training.run.close()
    training.step()
    training.save()
    training.look("after close")


def name_twice(training: Training) -> None:
    step, state = training.step(), {"weights": torch.arange(3.0), "epoch": 1}
    results = [training.save(client_state=state, save_latest=False), training.save(tag="best", client_state=state)]
    try:
        training.save(tag="other", client_state={**state, "epoch": 2})
    except UnsupportedError as err:
        results.append(err.kind)
    training.look("named twice")
    path, client_state = training.engine.load_checkpoint(str(training.runs[0]), tag="best")
    assert path == str(training.runs[0] / f"checkpoint-{step}")
    assert client_state is not None
    assert torch.equal(client_state["weights"], state["weights"])
    training.seen["named twice"]["results"] = results
    training.step()
    training.save()
    training.look("after loading by tag")


def fail_once(training: Training) -> None:
    """The first save of a step fails on rank 0; what comes under a tag then is a save."""
    step, state = training.step(), {"epoch": 2}
    with unittest.mock.patch("llmtailor.integrations.deepspeed.write_engine_state", side_effect=OSError(28, "full")):
        result = training.save(client_state=state)
    assert result == (dist.get_rank() != 0)  # which no other rank knows yet
    assert training.save(tag="again", client_state=state)
    settle(training.run)
    training.seen["failed once"] = {"found": find_tag(training.runs[0], "again").name, "step": step}


def lose_it(training: Training) -> None:
    training.run.close()
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(training.runs[0] / f"checkpoint-{training.engine.global_steps}")
    dist.barrier()
    training.step()
    training.save()
    training.look("gone")


def go_on_from_elsewhere(training: Training) -> None:
    path, _ = training.engine.load_checkpoint(str(training.runs[1]), tag="checkpoint-6")
    assert path is not None
    training.step()
    training.save()
    training.look("from the other directory")
    path, _ = training.engine.load_checkpoint(str(training.runs[0].parent / "stock"))  # step 0
    assert path is not None
    training.step()
    training.save()
    training.look("from stock")


def main(directory: Path) -> None:
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # it would be compiled, see merge/
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", SupersededWarning)
    warnings.simplefilter("ignore", SaveFailedWarning)
    deepspeed.init_distributed(dist_backend="gloo")
    training = Training(directory)
    go_there_and_back(training)
    name_twice(training)
    fail_once(training)
    lose_it(training)
    go_on_from_elsewhere(training)
    training.run.close()
    if dist.get_rank() == 0:
        (directory / "seen.json").write_text(json.dumps(training.seen))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
