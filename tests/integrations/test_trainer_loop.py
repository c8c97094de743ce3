"""What the Trainer's own loop does between saves: other modes of an optimizer, a new start, no saves at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainerCallback

from llmtailor.checkpoint import open_checkpoint
from llmtailor.checkpointer import Checkpointer
from llmtailor.integrations.transformers import tailor
from llmtailor.verify import verify_checkpoint
from tiny_models import assert_same, build_llama, build_trainer, snapshot_model, token_examples


class TwoModes(torch.optim.SGD):
    """As schedule-free optimizers: the weights are others while it evaluates."""

    is_training = True

    def train(self) -> None:
        self._switch(True)

    def eval(self) -> None:
        self._switch(False)

    def _switch(self, is_training: bool) -> None:
        if self.is_training != is_training:
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.data.mul_(2.0 if is_training else 0.5)
        self.is_training = is_training


class Noting(Trainer):
    """Copies the weights when a save begins."""

    saved: dict[int, Any]

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        self.saved = {**getattr(self, "saved", {}), self.state.global_step: snapshot_model(model)}


@pytest.mark.parametrize(
    "options",
    [
        {"save_steps": 2, "eval_strategy": "steps", "eval_steps": 2},
        {"save_steps": 3, "eval_strategy": "epoch", "per_device_train_batch_size": 16},
    ],
    ids=["after-an-evaluation", "before-one"],
)
def test_optimizer_that_has_modes(options: dict[str, Any], tmp_path: Path) -> None:
    model = build_llama(num_layers=6, width=256)
    optimizer = TwoModes(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
    trainer: Any = build_trainer(
        tmp_path,
        trainer_class=Noting,
        model=model,
        extra={"eval_dataset": token_examples(4), "optimizers": (optimizer, schedule)},
        max_steps=6,
        **options,
    )
    tailor(trainer, pool_nbytes=1 << 20).train()  # most of a save is captured while training goes on

    assert len(trainer.saved) == 6 // options["save_steps"]
    for step, expected in trainer.saved.items():
        found = build_llama(num_layers=6, width=256, seed=1).from_pretrained(tmp_path / f"checkpoint-{step}")
        assert_same(snapshot_model(found), expected)


class OutOfMemory(Trainer):
    """Once, at step 7."""

    has_failed = False

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 7 and not self.has_failed:
            self.has_failed = True
            raise RuntimeError("CUDA out of memory. Tried to allocate")
        return super().training_step(*args, **kwargs)


@pytest.mark.filterwarnings("ignore::llmtailor.errors.SupersededWarning")
@pytest.mark.parametrize("begun", [0, 3])
def test_loop_that_starts_over_with_smaller_batches(begun: int, tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "trainer_class": OutOfMemory,
        "max_steps": 12,
        "save_steps": 3,
        "auto_find_batch_size": True,
        "per_device_train_batch_size": 4,
    }
    if begun:
        tailor(build_trainer(tmp_path, stop=begun, **options)).train()
    trainer = tailor(build_trainer(tmp_path, **options), strategy="parity")
    trainer.train(resume_from_checkpoint=bool(begun))

    assert trainer.state.global_step == 12
    assert (tmp_path / "_checkpoint-6.superseded").is_dir()
    for step in (3, 6, 9, 12):
        assert verify_checkpoint(tmp_path / f"checkpoint-{step}").is_good
    parent = open_checkpoint(tmp_path / f"checkpoint-{begun + 3}").manifest.parent
    assert (parent.step if parent else 0) == begun


class SaveAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_save = state.global_step == self.step


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, False),
        ({"interval": "auto"}, True),
        ({"strategy": 'budget_per_step("100MB")'}, True),
        ({"on_sigterm": "save"}, True),
    ],
    ids=["no-saves", "interval", "budget", "sigterm"],
)
def test_memory_for_saves_is_only_taken_if_one_may_come(
    options: dict[str, Any], expected: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    prepare = Checkpointer.prepare

    def counted(self: Checkpointer, *args: Any, **kwargs: Any) -> None:
        calls.append(1)
        prepare(self, *args, **kwargs)

    monkeypatch.setattr(Checkpointer, "prepare", counted)
    tailor(build_trainer(tmp_path, max_steps=2, save_strategy="no"), **options).train()
    assert bool(calls) == expected


def test_save_that_nobody_expected(tmp_path: Path) -> None:
    trainer = tailor(build_trainer(tmp_path, max_steps=4, save_strategy="no", callbacks=[SaveAt(3)]))
    trainer.train()
    assert verify_checkpoint(tmp_path / "checkpoint-3").is_good
