"""Training on disks that are really full or really read-only: it goes on, and nobody is left in the dark."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

import pytest
import torch

from llmtailor import Run
from llmtailor.errors import SaveFailedWarning, WriteError
from llmtailor.integrations.transformers import tailor
from llmtailor.storage import list_checkpoints
from llmtailor.verify import verify_checkpoint
from mounts import Mounts
from tiny_models import build_llama, build_trainer, token_rows


class Loop:
    """A plain loop of one step at a time."""

    def __init__(self, directory: Path) -> None:
        self.model = build_llama(num_layers=2)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        self.directory = directory
        self.run = Run(directory, self.model, self.optimizer, strategy="full")
        self.step = 0

    def train(self) -> float:
        batch = token_rows(4)
        loss = self.model(input_ids=batch, labels=batch).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        return loss.item()

    def train_until_a_save_fails(self) -> None:
        for _ in range(100):
            self.train()
            handle = self.run.save(self.step)
            with contextlib.suppress(WriteError):
                handle.result()
            if handle.error is not None:
                self.run.step(self.step + 1)  # the run warns when it is asked next
                return
        raise AssertionError("the disk never filled up")


def assert_older_are_whole(run: Path, *, at_least: int) -> None:
    entries = list_checkpoints(run)
    assert len(entries) >= at_least
    assert all(verify_checkpoint(entry.path).is_good for entry in entries)


def test_plain_loop_on_a_full_disk(mounts: Mounts) -> None:
    loop = Loop(mounts.mount("tmpfs", "size=3m") / "run")
    with pytest.warns(SaveFailedWarning, match="training goes on"):
        loop.train_until_a_save_fails()
    assert_older_are_whole(loop.directory, at_least=1)
    loss = loop.train()
    with pytest.warns(SaveFailedWarning), pytest.raises(WriteError) as caught:
        loop.run.save(loop.step)
    assert caught.value.kind == "no-space"
    assert loop.train() != loss, "training stopped"
    assert_older_are_whole(loop.directory, at_least=1)

    for entry in list_checkpoints(loop.directory)[:2]:
        shutil.rmtree(entry.path)
    with contextlib.suppress(WriteError):  # of the save before, as long as this one has not ended
        loop.run.save(loop.step)
    loop.train()
    assert loop.run.save(loop.step).result().is_dir()
    with pytest.warns(SaveFailedWarning):
        loop.train_until_a_save_fails()
    with pytest.raises(WriteError):
        loop.run.close()
    assert_older_are_whole(loop.directory, at_least=1)


def test_plain_loop_in_a_directory_that_becomes_read_only(mounts: Mounts) -> None:
    disk = mounts.mount("tmpfs", "size=64m")
    loop = Loop(disk / "run")
    loop.train()
    loop.run.save(loop.step).result()
    mounts.cover_read_only(loop.directory)
    loop.train()
    with pytest.warns(SaveFailedWarning):
        handle = loop.run.save(loop.step)
    assert handle.error is not None
    assert handle.error.kind == "read-only"
    loop.train()
    with pytest.warns(SaveFailedWarning), pytest.raises(WriteError):
        loop.run.save(loop.step)
    with pytest.raises(WriteError):
        loop.run.close()
    assert_older_are_whole(loop.directory, at_least=1)


def test_trainer_on_a_full_disk_reaches_its_last_step(mounts: Mounts) -> None:
    disk = mounts.mount("tmpfs", "size=3m")
    trainer = tailor(build_trainer(disk / "run", model=build_llama(num_layers=2), max_steps=20, save_steps=1))
    with pytest.warns(SaveFailedWarning), pytest.raises(WriteError) as caught:
        trainer.train()
    assert caught.value.kind == "no-space"
    assert trainer.state.global_step == 20
    assert_older_are_whole(disk / "run", at_least=1)
