"""Callbacks that look at a checkpoint in ``on_save`` find it, and only for them a save is waited for."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from transformers import Trainer, TrainerCallback
from transformers.integrations import TrackioCallback, WandbCallback
from transformers.integrations.integration_utils import WandbLogModel

from llmtailor.integrations.trainer_callback import find_readers
from llmtailor.integrations.transformers import tailor
from llmtailor.verify import verify_checkpoint
from tiny_models import assert_same, build_llama, build_trainer, snapshot_model


class Adding(TrainerCallback):
    """Lists what it finds, as one that uploads does, and adds a file of its own."""

    def __init__(self) -> None:
        self.found: list[set[str]] = []

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        directory = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        self.found.append({path.name for path in directory.iterdir()})
        (directory / "mine.txt").write_text("mine")


def test_on_save_finds_the_checkpoint_and_may_add_to_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    adding = Adding()
    # Large enough that a save is still under way when it returns.
    trainer = tailor(build_trainer(tmp_path, model=build_llama(width=256), max_steps=10, callbacks=[adding]))
    with caplog.at_level(logging.WARNING, "llmtailor"):
        trainer.train()

    assert len(adding.found) == 2
    assert all("tailor.json" in found for found in adding.found)
    said = [record.getMessage() for record in caplog.records if "waited for" in record.getMessage()]
    assert said == ["each save is waited for, because of on_save of Adding"]
    for step in (5, 10):
        assert (tmp_path / f"checkpoint-{step}/mine.txt").read_text() == "mine"
        assert verify_checkpoint(tmp_path / f"checkpoint-{step}").is_good

    resumed = tailor(build_trainer(tmp_path, model=build_llama(width=256, seed=1), max_steps=10))
    resumed.train(resume_from_checkpoint=True)
    assert_same(snapshot_model(resumed.model), snapshot_model(trainer.model))


def test_nothing_is_waited_for_without_need(tmp_path: Path) -> None:
    trainer = tailor(build_trainer(tmp_path, max_steps=10))
    assert find_readers(trainer.callback_handler.callbacks) == []


@pytest.mark.parametrize(("log_model", "readers"), [("false", []), ("end", []), ("checkpoint", ["WandbCallback"])])
def test_tracker_is_waited_for_if_it_uploads(log_model: str, readers: list[str]) -> None:
    tracker = WandbCallback.__new__(WandbCallback)  # the tracker itself is not installed
    tracker._log_model = WandbLogModel(log_model)
    assert find_readers([tracker, TrackioCallback.__new__(TrackioCallback)]) == readers


def test_on_save_of_an_object_counts() -> None:
    callback: Any = TrainerCallback()
    callback.on_save = lambda *args, **kwargs: None
    assert find_readers([callback]) == ["TrainerCallback"]


def test_log_of_a_subclass_hears_of_steps_alone(tmp_path: Path) -> None:
    """TRL's trainers average what they gathered since the last log, and clear it."""

    class Averaging(Trainer):
        steps: tuple[int, ...] = ()

        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            self.steps += (self.state.global_step,)
            return super().compute_loss(*args, **kwargs)

        def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
            mean = {"mean": sum(self.steps) / len(self.steps)} if self.steps else {}
            super().log({**logs, **mean}, start_time)
            self.steps = ()

    trainer = tailor(
        build_trainer(tmp_path, trainer_class=Averaging, max_steps=20, save_steps=4, logging_steps=10), monitor=True
    )
    trainer.train()

    assert [each["mean"] for each in trainer.state.log_history if "mean" in each] == [4.5, 14.5]
    assert len([each for each in trainer.state.log_history if "checkpoint_step" in each]) == 5
    assert [each for each in trainer.state.log_history if any(key.startswith("drift/") for key in each)]
