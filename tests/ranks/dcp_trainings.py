"""Trainings that save and load by ``torch.distributed.checkpoint`` and our three objects. One process per rank.

python dcp_trainings.py save DIRECTORY     trains and saves: the runs below DIRECTORY, and truth.json
python dcp_trainings.py load DIRECTORY     loads their newest checkpoints, on any number of ranks: loaded-<ranks>.json
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from loop_trainings import build, digests, gather, report, seed_rank, train_step
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)

from llmtailor import Run
from llmtailor.integrations.dcp import TailorPlanner, TailorReader, TailorWriter

FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


class Training:
    """A model, its optimizer and what else a trainer has."""

    def __init__(self, seed: int = 0, framework: str = "fsdp") -> None:
        seed_rank(framework)
        self.model, self.optimizer = build(framework, "fp32")
        self.scheduler = torch.optim.lr_scheduler.LinearLR(self.optimizer, total_iters=10)
        torch.manual_seed(100 + seed + dist.get_rank())
        self.num_steps = 0

    def step(self) -> float:
        self.num_steps += 1
        return train_step(self.model, self.optimizer, self.scheduler)

    def zero(self) -> None:
        """Spoil the weights and the state, as nothing that is loaded may depend on."""
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.zero_()
            for state in self.optimizer.state.values():
                for value in state.values():
                    value.zero_()

    def state(self) -> dict[str, Any]:
        model, optim = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optim": optim, **self.rest()}

    def rest(self) -> dict[str, Any]:
        rank = dist.get_rank()
        return {
            "lr_scheduler": self.scheduler.state_dict(),
            "dataloader": {f"dp_rank_{rank}": {"position": 10 * self.num_steps + rank, "raw": b"\x00\xff"}},
            "rng": {f"rank_{rank}": torch.get_rng_state()},
            "average": {"loss": torch.tensor([1.5, float(self.num_steps)])},
        }

    def load(self, reader: TailorReader) -> None:
        state = self.state()
        dcp.load(state, storage_reader=reader)
        set_state_dict(self.model, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optim"])
        self.scheduler.load_state_dict(state["lr_scheduler"])
        rank = dist.get_rank()
        torch.set_rng_state(state["rng"][f"rank_{rank}"])
        self.num_steps = int(state["average"]["loss"][1])
        assert state["dataloader"][f"dp_rank_{rank}"] == {"position": 10 * self.num_steps + rank, "raw": b"\x00\xff"}

    def gathered(self) -> dict[str, str]:
        return digests(gather(self.model, self.optimizer))


class Titan:
    """The state dict of torchtitan: the model's tensors at the top, the optimizer flat below ``optimizer``.

    Source: torchtitan, components/checkpointer/base.py (BaseCheckpointManager._flattened_model_states_sd) and
        dcp.py (CheckpointManager.dcp_save), 2026-10.
    """

    def __init__(self, training: Training) -> None:
        self.training = training

    def state(self) -> dict[str, Any]:
        return {
            **get_model_state_dict(self.training.model),
            "optimizer": _FlatOptimizer(self.training),
            "lr_scheduler": self.training.scheduler,
            "train_state": _TrainState(self.training),
        }


class _FlatOptimizer:
    def __init__(self, training: Training) -> None:
        self.training = training

    def state_dict(self) -> dict[str, Any]:
        return get_optimizer_state_dict(self.training.model, self.training.optimizer, options=FLAT)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        set_optimizer_state_dict(self.training.model, self.training.optimizer, state, options=FLAT)


class _TrainState:
    def __init__(self, training: Training) -> None:
        self.training = training

    def state_dict(self) -> dict[str, Any]:
        return {"step": torch.tensor(self.training.num_steps), "ntokens_seen": torch.tensor(12)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.training.num_steps = int(state["step"])


class FailingPlanner(TailorPlanner):
    """Fails on one rank in the middle of writing."""

    is_broken = False

    def resolve_data(self, write_item: Any) -> Any:
        if self.is_broken and dist.get_rank() == 1:
            raise OSError(5, "a disk that fails")
        return super().resolve_data(write_item)


def save_parity(directory: Path, truth: dict[str, Any]) -> None:
    """Steps 2 and 4 by ``save``, 6 by ``async_save`` while the model is changed, 8 fails on a rank, 10 goes well."""
    training = Training()
    run = directory / "parity"
    planner = FailingPlanner("parity", model=training.model, optimizers=training.optimizer)
    writer = TailorWriter(run, planner)
    # DCP's thread must not use the group that trains meanwhile.
    group = dist.new_group(backend="gloo")
    for step in (2, 4):
        training.step(), training.step()
        truth["parity"][step] = training.gathered()
        dcp.save(training.state(), checkpoint_id=f"{run}/step-{step}", storage_writer=writer, planner=planner)
    training.step(), training.step()
    truth["parity"][6] = training.gathered()
    writer.step = 6
    future = dcp.async_save(
        training.state(), storage_writer=writer, planner=planner, async_stager=writer, process_group=group
    )
    training.step()
    training.zero()
    future.result()
    planner.is_broken = True
    listed = names_of(run)
    training = Training()
    for _ in range(8):
        training.step()
    try:
        dcp.save(training.state(), checkpoint_id="step-8", storage_writer=writer, planner=planner)
        failure = "none"
    except CheckpointException as err:
        failure = {rank: str(pair[0]) for rank, pair in err.failures.items()}  # type: ignore[assignment]
    dist.barrier()
    truth["failure"] = failure
    truth["after_failure"] = [listed, names_of(run)]
    planner.is_broken = False
    training.step(), training.step()
    truth["parity"][10] = training.gathered()
    dcp.save(training.state(), checkpoint_id="step-10", storage_writer=writer, planner=planner)
    dist.barrier()
    truth["after_next"] = names_of(run)
    training.step(), training.step()
    truth["parity"][12] = training.gathered()
    dcp.save(training.state(), checkpoint_id="step-12", storage_writer=writer, planner=planner)
    dist.barrier()
    truth["staging"] = sorted(path.name for path in (run / "_staging").iterdir())
    writer.close()


def names_of(run: Path) -> list[str]:
    return sorted(path.name for path in run.iterdir())


def save_full(directory: Path, truth: dict[str, Any]) -> None:
    """Straight to step 6; and again in a new training that begins with the checkpoint of step 3, and follows it."""
    training = Training()
    run = directory / "full"
    planner = TailorPlanner()
    writer = TailorWriter(run, planner)
    losses = []
    for step in range(1, 7):
        losses.append(training.step())
        if step == 3:
            dcp.save(training.state(), checkpoint_id="step-3", storage_writer=writer, planner=planner)
    truth["straight"] = [losses[3:], training.gathered()]
    writer.close()
    training = Training(seed=7)
    training.step()
    training.zero()
    reader = TailorReader(run)
    training.load(reader)
    assert training.num_steps == 3
    planner = TailorPlanner("parity")
    writer = TailorWriter(run, planner, reader=reader)
    truth["resumed"] = [[training.step() for _ in range(3)], training.gathered()]
    writer.step = 6
    dcp.save(training.state(), storage_writer=writer, planner=planner)
    writer.close()


def save_titan(directory: Path, truth: dict[str, Any]) -> None:
    """The calls that torchtitan makes, with its kind of state dict."""
    training = Training()
    run = directory / "titan"
    planner, group = TailorPlanner("parity"), dist.new_group(backend="gloo")
    writer = TailorWriter(run, planner, process_group=group)
    for step in (1, 2):
        training.step()
        truth["titan"][step] = training.gathered()
        future = dcp.async_save(
            Titan(training).state(),
            storage_writer=writer,
            checkpoint_id=f"{run}/step-{step}",
            process_group=group,
            planner=planner,
        )
        future.result()
    writer.close()


def save_replicas(directory: Path, truth: dict[str, Any]) -> None:
    """DistributedDataParallel: every rank holds all."""
    training = Training(framework="ddp")
    planner = TailorPlanner("parity")
    writer = TailorWriter(directory / "ddp", planner)
    for step in (1, 2):
        training.step()
        truth["ddp"][step] = training.gathered()
        dcp.save(training.state(), checkpoint_id=f"step-{step}", storage_writer=writer, planner=planner)
    writer.close()


def save_by_run(directory: Path, truth: dict[str, Any]) -> None:
    training = Training()
    with Run(directory / "by-run", training.model, training.optimizer, strategy="parity", save_steps=1) as run:
        for step in (1, 2):
            training.step()
            truth["by-run"][step] = training.gathered()
            run.step(step)


def save(directory: Path) -> None:
    truth: dict[str, Any] = {"parity": {}, "titan": {}, "ddp": {}, "by-run": {}}
    save_parity(directory, truth)
    save_full(directory, truth)
    save_titan(directory, truth)
    save_replicas(directory, truth)
    save_by_run(directory, truth)
    report(directory / "truth.json", truth)


def load(directory: Path) -> None:
    found: dict[str, Any] = {}
    for name in ("parity", "ddp", "by-run"):
        training = Training(seed=5)
        training.step()
        training.zero()
        state = dict(zip(("model", "optim"), get_state_dict(training.model, training.optimizer), strict=True))
        dcp.load(state, storage_reader=TailorReader(directory / name))
        set_state_dict(
            training.model, training.optimizer, model_state_dict=state["model"], optim_state_dict=state["optim"]
        )
        found[name] = training.gathered()
    training = Training(seed=5)
    training.step()
    training.zero()
    run = directory / "titan"
    titan = Titan(training).state()
    dcp.load(titan, storage_reader=TailorReader(run), checkpoint_id=f"{run}/step-2")
    set_model_state_dict(training.model, {key: value for key, value in titan.items() if key not in _OTHERS})
    found["titan"] = training.gathered()
    found["titan-steps"] = [training.num_steps, training.scheduler.last_epoch]
    report(directory / f"loaded-{dist.get_world_size()}.json", found)


_OTHERS = ("optimizer", "lr_scheduler", "train_state")


def main() -> None:
    verb, directory = sys.argv[1], Path(sys.argv[2])
    warnings.filterwarnings("error", module="llmtailor")
    dist.init_process_group("gloo")
    {"save": save, "load": load}[verb](directory)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
