"""What a Trainer that saves our checkpoints does around its steps."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from transformers import Trainer, TrainerCallback

__all__ = ["StepCallback", "module_of"]


def module_of(trainer: Trainer) -> torch.nn.Module:
    """The bare model."""
    assert trainer.model is not None
    return trainer.model


class StepCallback(TrainerCallback):
    """Has the optimizer wait for the state to be captured, also where it is none of torch's; and saves when due."""

    def __init__(self, trainer: weakref.ref[Any]) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self._trainer()
        if trainer is not None and trainer._tailor_checkpointer is not None:
            trainer._tailor_checkpointer.watch(module_of(trainer), [trainer.optimizer])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self._trainer()
        if trainer is None or trainer._tailor_checkpointer is None:
            return
        is_due = trainer._tailor_checkpointer.pace.is_due(state.global_step)
        if is_due is not None:
            control.should_save = is_due

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self._trainer()
        if trainer is not None and trainer._tailor_checkpointer is not None:
            trainer._tailor_checkpointer.wait_until_captured()
