"""A disk that is full: training goes on, nothing older is touched, and nobody is left in the dark."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from transformers import TrainerCallback

from llmtailor import Run
from llmtailor.errors import SaveFailedWarning, WriteError
from llmtailor.integrations.transformers import tailor
from llmtailor.storage import LocalFileSystem
from llmtailor.verify import verify_checkpoint
from tiny_models import (
    assert_same,
    build_llama,
    build_trainer,
    losses,
    scripted_trainer,
    snapshot_model,
    snapshot_optimizer,
    token_rows,
)


class Disk:
    """Full or not; ``fails_late`` has room for the files, but not for the name of the checkpoint."""

    def __init__(self) -> None:
        self.is_full = False
        self.fails_late = False

    def write_at(self, filesystem: LocalFileSystem, descriptor: int, buffer: memoryview, offset: int) -> None:
        if self.is_full and not self.fails_late:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        assert os.pwrite(descriptor, buffer, offset) == buffer.nbytes

    def rename(self, filesystem: LocalFileSystem, source: Path, target: Path) -> None:
        if self.is_full and self.fails_late:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.rename(source, target)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    disk = Disk()
    monkeypatch.setattr(LocalFileSystem, "write_at", lambda *args: disk.write_at(*args))
    monkeypatch.setattr(LocalFileSystem, "rename", lambda *args: disk.rename(*args))
    return disk


class FullBetween(TrainerCallback):
    """The disk is full after step ``first`` and has room again after step ``last``, for the saves of these steps."""

    def __init__(self, disk: Disk, first: int, last: int) -> None:
        self.disk, self.first, self.last = disk, first, last
        self.trainer: Any = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert self.trainer._tailor_checkpointer.drain(60)
        self.disk.is_full = self.first <= state.global_step < self.last


def tailor_with(callback: FullBetween, trainer: Any, **options: Any) -> Any:
    callback.trainer = tailor(trainer, **options)
    callback.trainer.add_callback(callback)
    return callback.trainer


class Loop:
    def __init__(self, directory: Path) -> None:
        self.model = build_llama(num_layers=2)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        self.run = Run(directory, self.model, self.optimizer, save_steps=1000)
        self.step = 0

    def train(self, num_steps: int) -> None:
        for _ in range(num_steps):
            batch = token_rows()[self.step : self.step + 2]
            self.model(input_ids=batch, labels=batch).loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.step += 1

    def state(self) -> dict[str, Any]:
        rng = {"rng": torch.get_rng_state()}
        return snapshot_model(self.model) | snapshot_optimizer(self.model, self.optimizer) | rng


def test_failed_save_leaves_training_as_it_was(disk: Disk, tmp_path: Path) -> None:
    loop = Loop(tmp_path)
    loop.train(2)
    loop.run.save(2).result()
    loop.train(2)
    before = loop.state()

    disk.is_full = True
    handle = loop.run.save(4)

    assert_same(loop.state(), before)
    with pytest.raises(WriteError) as caught:
        handle.result()
    assert caught.value.kind == "no-space"
    with pytest.warns(SaveFailedWarning, match="checkpoint-4 was not saved"):
        assert loop.run.step(5) is None
    assert verify_checkpoint(tmp_path / "checkpoint-2").is_good
    assert not (tmp_path / "checkpoint-4").exists()
    with pytest.raises(WriteError):
        loop.run.close()


def test_second_failure_in_a_row_raises_and_training_may_go_on(disk: Disk, tmp_path: Path) -> None:
    loop = Loop(tmp_path)
    loop.train(1)
    loop.run.save(1).result()
    disk.is_full = True
    loop.run.save(2)
    with pytest.warns(SaveFailedWarning, match="checkpoint-2"):
        loop.run.save(3)
    with pytest.warns(SaveFailedWarning, match="checkpoint-3"), pytest.raises(WriteError) as caught:
        loop.run.save(4)
    assert caught.value.kind == "no-space"

    assert loop.run._checkpointer.drain(60)
    disk.is_full = False
    loop.train(3)
    with pytest.warns(SaveFailedWarning, match="checkpoint-4"), pytest.raises(WriteError):
        loop.run.save(5)
    assert loop.run.save(6).result() == tmp_path / "checkpoint-6"
    loop.run.close()
    assert verify_checkpoint(tmp_path / "checkpoint-1").is_good
    assert verify_checkpoint(tmp_path / "checkpoint-5").is_good
    assert sorted(os.listdir(tmp_path)) == ["_staging", "checkpoint-1", "checkpoint-5", "checkpoint-6"]
    assert os.listdir(tmp_path / "_staging") == ["lock"]

    resumed = Loop(tmp_path)
    assert resumed.run.resume() == 6
    resumed.run.close()
    assert_same(snapshot_model(resumed.model), snapshot_model(loop.model))


def test_close_is_silent_once_a_later_save_worked(disk: Disk, tmp_path: Path) -> None:
    loop = Loop(tmp_path)
    disk.is_full = True
    handle = loop.run.save(1)
    with pytest.raises(WriteError):
        handle.result()
    disk.is_full = False
    with pytest.warns(SaveFailedWarning):
        loop.run.save(2)
    loop.run.close()


def test_what_stopped_the_loop_is_not_hidden_by_a_failed_save(disk: Disk, tmp_path: Path) -> None:
    loop = Loop(tmp_path)
    disk.is_full = True

    def crash() -> None:
        with loop.run:
            loop.run.save(1)
            raise KeyError("mine")

    with pytest.warns(SaveFailedWarning), pytest.raises(KeyError, match="mine"):
        crash()


def test_trainer_reaches_its_last_step_and_raises_then(disk: Disk, tmp_path: Path) -> None:
    expected = tailor(build_trainer(tmp_path / "good"))
    expected.train()

    trainer = tailor_with(FullBetween(disk, 12, 99), build_trainer(tmp_path / "bad"))
    with pytest.warns(SaveFailedWarning) as warned, pytest.raises(WriteError) as caught:
        trainer.train()

    assert caught.value.kind == "no-space"
    assert trainer.state.global_step == 30
    assert losses(trainer) == losses(expected)
    assert_same(snapshot_model(trainer.model), snapshot_model(expected.model))
    assert len(warned) == 4, "one for each of steps 15, 20, 25 and 30"
    assert trainer.last_save.step == 30
    assert trainer.last_save.error is not None
    assert all(verify_checkpoint(tmp_path / f"bad/checkpoint-{step}").is_good for step in (5, 10))

    disk.is_full = False
    resumed = tailor(build_trainer(tmp_path / "bad"))
    resumed.train(resume_from_checkpoint=True)
    assert losses(resumed) == losses(expected)


def test_trainer_saves_again_once_there_is_room(disk: Disk, tmp_path: Path) -> None:
    trainer = tailor_with(FullBetween(disk, 8, 22), build_trainer(tmp_path), strategy="parity")
    with pytest.warns(SaveFailedWarning):
        trainer.train()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == [
        "checkpoint-25",
        "checkpoint-30",
        "checkpoint-5",
    ]
    assert all(verify_checkpoint(path).is_good for path in tmp_path.glob("checkpoint-*"))


@pytest.mark.parametrize("fails_late", [False, True])
@pytest.mark.parametrize("limit", [None, 1])
def test_best_model_is_the_best_that_was_saved(limit: int | None, fails_late: bool, disk: Disk, tmp_path: Path) -> None:
    disk.fails_late = fails_late
    trainer = scripted_trainer(tmp_path, [2.0, 1.0, 3.0, 4.0], save_total_limit=limit)
    trainer = tailor_with(FullBetween(disk, 8, 12), trainer)
    with pytest.warns(SaveFailedWarning, match="checkpoint-10"):
        trainer.train()
    assert trainer.state.best_global_step == 10
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-5")
    loaded = build_llama(seed=3).from_pretrained(tmp_path / "checkpoint-5")
    assert_same(snapshot_model(loaded), snapshot_model(trainer.model))


def test_error_that_is_no_failure_of_the_disk_stops_training(tmp_path: Path) -> None:
    class Unserializable(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            state.log_history.append({"step": 1, "what": object()})

    trainer = tailor(build_trainer(tmp_path, callbacks=[Unserializable()]))
    with pytest.raises(TypeError, match="not JSON serializable"):
        trainer.train()
    assert os.listdir(tmp_path / "_staging") == ["lock"]


def test_adapter_file_on_a_full_disk_is_a_failed_save(tmp_path: Path) -> None:
    class Adapted(torch.nn.Linear):
        peft_config = None

        def get_base_model(self) -> None: ...

        def save_pretrained(self, directory: Path) -> None:
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    model = Adapted(2, 2)
    run = Run(tmp_path, model, torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.warns(SaveFailedWarning):
        run.save(1)
    with pytest.raises(WriteError):
        run.close()
