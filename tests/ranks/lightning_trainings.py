"""Real trainings with Lightning's Trainer and ``TailorCallback``: one process, DDP and FSDP2 on gloo ranks.

python lightning_trainings.py begin DIRECTORY CASE...     trains each case with the stock Trainer; again, saving; dies
python lightning_trainings.py resume DIRECTORY CASE...    resumes each from last.ckpt and trains to the end
python lightning_trainings.py reshard DIRECTORY CASE...   loads each, whatever the number of ranks was, in one process

python lightning_trainings.py elsewhere DIRECTORY CASE... saves each by Lightning's own means, beside a run; goes on

A case is ``<framework>-<strategy>``. Rank 0 writes digests of the gathered state, as JSON.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from loop_trainings import Model, digests, gather
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader

from llmtailor.integrations.lightning import TailorCallback

EPOCHS = 4
NUM_SAMPLES = 20
SAVE_STEPS = 3
STOP = 8


class Module(LightningModule):
    def __init__(self, *, is_sharded: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = Model()
        self.is_sharded = is_sharded
        self.losses: list[float] = []
        self.truth: dict[int, Any] = {}

    def configure_model(self) -> None:
        if self.is_sharded:
            mesh = self.device_mesh["data_parallel"]
            for layer in self.model.layers:
                fully_shard(layer, mesh=mesh)
            fully_shard(self.model, mesh=mesh)

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        loss = nn.functional.cross_entropy(self.model(batch).flatten(0, 1), batch.flatten())
        self.losses.append(float(loss.detach()))
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2, foreach=False)
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=30)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def state(self) -> dict[str, Any]:
        optimizer = self.trainer.optimizers[0]
        return digests(gather(self, optimizer)) | {"lr": optimizer.param_groups[0]["lr"]}


class Watch(Callback):
    """Notes the state where it is saved and at the end, and kills the training if it is to."""

    def __init__(self, tailor: TailorCallback | None = None, stop: int | None = None) -> None:
        self.tailor = tailor
        self.stop = stop

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pl_module.truth[trainer.global_step] = pl_module.state()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.global_step % SAVE_STEPS == 0:
            pl_module.truth[trainer.global_step] = pl_module.state()
        if trainer.global_step == self.stop:
            assert self.tailor is not None
            assert self.tailor.last_save is not None
            self.tailor.last_save.result(60)
            # So that its name is there, whatever of the two came first.
            self.tailor.on_train_batch_end(trainer, pl_module, None, None, 0)
            raise Stopped

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pl_module.truth["final"] = pl_module.state()


class Stopped(Exception):  # noqa: N818
    """Killed in the middle."""


def make_trainer(framework: str, callbacks: list[Callback], directory: Path, **options: Any) -> Trainer:
    if framework == "ddp":
        options |= {"strategy": "ddp", "devices": 2}
    elif framework == "fsdp":
        options |= {"strategy": ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1), "devices": 2}
    else:
        options |= {"devices": 1}
    return Trainer(
        accelerator="cpu",
        callbacks=callbacks,
        max_epochs=EPOCHS,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=any(isinstance(each, ModelCheckpoint) for each in callbacks),
        default_root_dir=directory,
        **options,
    )


def make_loader() -> DataLoader[Any]:
    data = torch.arange(NUM_SAMPLES * 7).reshape(NUM_SAMPLES, 7) % 23
    return DataLoader(data, batch_size=2, shuffle=True)  # type: ignore[arg-type]


def tailored(directory: Path, case: str, stop: int | None = None) -> list[Callback]:
    strategy = case.split("-")[1]
    tailor = TailorCallback(strategy=strategy, commit_timeout_secs=60)
    saves = ModelCheckpoint(directory / case, every_n_train_steps=SAVE_STEPS, save_top_k=-1, save_last=True)
    return [tailor, Watch(tailor, stop), saves]


def seed() -> None:
    torch.manual_seed(100 + int(os.environ.get("RANK", "0")))


def report(path: Path, module: Module) -> None:
    if int(os.environ.get("RANK", "0")) == 0:
        path.write_text(json.dumps({"losses": module.losses, "truth": module.truth}))


def begin(directory: Path, case: str) -> None:
    framework = case.split("-")[0]
    module = Module(is_sharded=framework == "fsdp")
    seed()
    make_trainer(framework, [Watch()], directory).fit(module, make_loader())
    report(directory / f"{case}.straight.json", module)
    module = Module(is_sharded=framework == "fsdp")
    seed()
    try:
        make_trainer(framework, tailored(directory, case, STOP), directory).fit(module, make_loader())
    except Stopped:
        pass
    else:
        raise AssertionError("was to stop")


def resume(directory: Path, case: str) -> None:
    framework = case.split("-")[0]
    module = Module(is_sharded=framework == "fsdp")
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    torch.manual_seed(7)
    make_trainer(framework, tailored(directory, case), directory).fit(module, make_loader(), ckpt_path="last")
    report(directory / f"{case}.resumed.json", module)


def reshard(directory: Path, case: str) -> None:
    """Of the checkpoint at step 6; a run of its own comes of it."""
    module = Module()
    tailor = TailorCallback(directory / f"{case}.resharded", random_state=False)
    trainer = make_trainer("single", [tailor, Watch()], directory, max_steps=7)
    trainer.fit(module, make_loader(), ckpt_path=directory / case / "checkpoint-6")
    report(directory / f"{case}.resharded.json", module)


def elsewhere(directory: Path, case: str) -> None:
    """At step 5, between two checkpoints of the run; then two steps more, which save step 6."""
    framework = case.split("-")[0]
    module, path = Module(is_sharded=framework == "fsdp"), directory / f"{case}.ckpt"
    trainer = make_trainer(framework, [*tailored(directory, case), SaveElsewhere(path)], directory, max_steps=5)
    trainer.fit(module, make_loader())
    write_truth(directory / f"{case}.saved.json", module, 5)
    module = Module(is_sharded=framework == "fsdp")
    trainer = make_trainer(framework, [*tailored(directory, case)], directory, max_steps=7)
    trainer.fit(module, make_loader(), ckpt_path=path)
    write_truth(directory / f"{case}.loaded.json", module, 5)


class SaveElsewhere(Callback):
    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pl_module.truth[trainer.global_step] = pl_module.state()
        trainer.save_checkpoint(self.path)


def write_truth(path: Path, module: Module, step: int) -> None:
    if int(os.environ.get("RANK", "0")) == 0:
        path.write_text(json.dumps(module.truth[step]))


def main() -> None:
    verb, directory, cases = sys.argv[1], Path(sys.argv[2]), sys.argv[3:]
    warnings.simplefilter("ignore")
    for case in cases:
        {"begin": begin, "resume": resume, "reshard": reshard, "elsewhere": elsewhere}[verb](directory, case)
    if dist.is_initialized():
        dist.barrier()
    if verb == "begin":
        os.kill(os.getpid(), signal.SIGKILL)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
