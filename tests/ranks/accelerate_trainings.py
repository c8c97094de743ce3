"""Real trainings with an ``Accelerator`` and ``TailorCheckpointer``: one process, DDP and FSDP2 on gloo ranks.

python accelerate_trainings.py begin DIRECTORY CASE...     trains each case to the end; again with saves; then dies
python accelerate_trainings.py resume DIRECTORY CASE...    resumes each and trains to the end

A case is ``<framework>-<strategy>-<data>``; data is "batches" (``TailorCheckpointer.batches``) or "skip"
(``accelerate.skip_first_batches`` with a seedable sampler). Rank 0 writes digests of the gathered state, as JSON.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import accelerate.state
import torch
import torch.distributed as dist
from accelerate import Accelerator, DataLoaderConfiguration, FullyShardedDataParallelPlugin, skip_first_batches
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DistributedType, ProjectConfiguration
from loop_trainings import Model, digests, gather
from torch import nn
from torch.utils.data import DataLoader

from llmtailor.integrations.accelerate import TailorCheckpointer

STEPS = 14
SAVES = (4, 8, 12)
STOP = 9
NUM_SAMPLES = 20


class Counter:
    """An object of the user's own, registered for checkpointing."""

    def __init__(self) -> None:
        self.tokens = torch.zeros(2)

    def state_dict(self) -> dict[str, Any]:
        return {"tokens": self.tokens}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.tokens = state_dict["tokens"]


def allow_fsdp_on_cpu() -> None:
    """Accelerate 1.15 takes DDP where FSDP2 is asked for on a CPU; torch's own FSDP2 works there.

    Source: accelerate 1.15, state.py (AcceleratorState.__init__).
    """
    stock = AcceleratorState.__init__

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        stock(self, *args, **kwargs)
        shared = accelerate.state.PartialState._shared_state
        if shared.get("distributed_type") == DistributedType.MULTI_CPU and kwargs.get("fsdp_plugin") is not None:
            self.distributed_type = shared["distributed_type"] = DistributedType.FSDP
            self.fsdp_plugin = kwargs["fsdp_plugin"]

    AcceleratorState.__init__ = init


class Training:
    """One case, prepared anew."""

    def __init__(self, case: str, directory: Path) -> None:
        self.framework, self.strategy, self.data = case.split("-")
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        plugin = None
        if self.framework == "fsdp":
            plugin = FullyShardedDataParallelPlugin(
                fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=["Block"]
            )
        self.accelerator = Accelerator(
            cpu=True,
            fsdp_plugin=plugin,
            project_config=ProjectConfiguration(
                project_dir=str(directory / case), total_limit=2 if self.strategy == "full" else None
            ),
            dataloader_config=DataLoaderConfiguration(use_seedable_sampler=self.data == "skip"),
            gradient_accumulation_steps=2 if self.data == "batches" else 1,
        )
        if self.framework == "single":
            self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=3)
        torch.manual_seed(0)
        model = Model()
        if self.data == "skip":
            # A loader draws from the global generator when it begins, so after a resume it draws once more.
            for layer in model.layers:
                layer.dropout.p = 0.0
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, foreach=False)
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=30)
        data = torch.arange(NUM_SAMPLES * 7).reshape(NUM_SAMPLES, 7) % 23
        torch.manual_seed(100 if self.data == "skip" else 100 + self.accelerator.process_index)
        loader = DataLoader(data, batch_size=2, shuffle=True)
        prepared = self.accelerator.prepare(model, optimizer, loader, scheduler)
        self.model, self.optimizer, self.loader, self.scheduler = prepared
        self.counter = Counter()
        self.accelerator.register_for_checkpointing(self.counter)

    def make_checkpointer(self) -> TailorCheckpointer:
        return TailorCheckpointer(self.accelerator, strategy=self.strategy, commit_timeout_secs=60)

    def batches(self, checkpointer: TailorCheckpointer | None, num_steps: int) -> Iterator[torch.Tensor]:
        """Epoch after epoch, from the right place on."""
        if self.data == "batches" and checkpointer is not None:
            batches = checkpointer.batches(self.loader)
            checkpointer.resume()
            while True:
                yield from batches
        per_epoch = len(self.loader)
        epoch, used = divmod(num_steps, per_epoch)
        while True:
            self.loader.set_epoch(epoch)
            yield from skip_first_batches(self.loader, used) if used else self.loader
            epoch, used = epoch + 1, 0

    def step(self, batch: torch.Tensor) -> float:
        with self.accelerator.accumulate(self.model):
            logits = self.model(batch)
            loss = nn.functional.cross_entropy(logits.float().flatten(0, 1), batch.flatten())
            self.accelerator.backward(loss)
            self.optimizer.step()
            self.scheduler.step()
            self.optimizer.zero_grad()
        self.counter.tokens += 1
        return float(loss.detach())

    def final(self) -> dict[str, Any]:
        state = gather(self.model, self.optimizer.optimizer)
        return digests(state) | {"lr": self.scheduler.get_last_lr(), "counter": self.counter.tokens.tolist()}


def report(path: Path, content: Any) -> None:
    if not dist.is_initialized() or dist.get_rank() == 0:
        path.write_text(json.dumps(content))


def train(training: Training, checkpointer: TailorCheckpointer | None, stop: int) -> tuple[list[float], dict[int, Any]]:
    """Train up to a number of optimizer steps; losses of all batches, and the state at each save."""
    done, losses, truth = 0, [], {}
    if training.data == "skip" and checkpointer is not None:
        done = checkpointer.resume()
    stream = training.batches(checkpointer, done)
    per_step = training.accelerator.gradient_accumulation_steps
    while done < stop:
        batch = next(stream)
        if not losses and checkpointer is not None:
            done = checkpointer.num_steps  # known once the first batch was asked for
            truth[done] = training.final()
        losses.append(training.step(batch))
        if not training.accelerator.sync_gradients:
            continue
        done += 1
        if done in SAVES:
            truth[done] = training.final()
            if checkpointer is not None:
                handle = checkpointer.save_state(step=done if per_step == 1 else None)
                assert handle.step == done
    return losses, truth


def begin(directory: Path, case: str) -> None:
    training = Training(case, directory)
    losses, truth = train(training, None, STEPS)
    report(directory / f"{case}.straight.json", {"losses": losses, "final": training.final(), "truth": truth})
    training = Training(case, directory)
    checkpointer = training.make_checkpointer()
    train(training, checkpointer, STOP)
    checkpointer.wait()
    dist_barrier()


def resume(directory: Path, case: str) -> None:
    training = Training(case, directory)
    with torch.no_grad():
        for parameter in training.model.parameters():
            parameter.zero_()
    torch.manual_seed(7)
    with training.make_checkpointer() as checkpointer:
        losses, truth = train(training, checkpointer, STEPS)
        iteration = training.accelerator.save_iteration
    report(
        directory / f"{case}.resumed.json",
        {"losses": losses, "final": training.final(), "iteration": iteration, "loaded": truth[8]},
    )


def dist_barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def main() -> None:
    verb, directory, cases = sys.argv[1], Path(sys.argv[2]), sys.argv[3:]
    allow_fsdp_on_cpu()
    for case in cases:
        if verb == "begin":
            begin(directory, case)
        else:
            resume(directory, case)
    dist_barrier()
    if verb == "begin":
        os.kill(os.getpid(), signal.SIGKILL)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
