"""What a Trainer that saves our checkpoints does around its steps, and what the other callbacks do at a save."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from transformers import Trainer, TrainerCallback

__all__ = ["StepCallback", "find_readers", "has_modes", "module_of"]

# Whether an ``on_save`` that comes with transformers reads the checkpoint: most do only if told to upload it. An
# attribute that is not there says yes. Source: transformers 5.23, integrations/integration_utils.py.
_TRACKERS: dict[str, Callable[[Any], bool]] = {
    "ClearMLCallback.on_save": lambda callback: bool(getattr(callback, "_log_model", True)),
    "MLflowCallback.on_save": lambda callback: bool(getattr(callback, "_log_artifacts", True)),
    "SwanLabCallback.on_save": lambda callback: False,
    "TrackioCallback.on_save": lambda callback: False,
    "WandbCallback.on_save": lambda callback: getattr(callback, "_log_model", "checkpoint") == "checkpoint",
}


def find_readers(callbacks: Iterable[Any]) -> list[str]:
    """Class names of the callbacks that may look at a checkpoint in ``on_save``."""
    return [type(callback).__name__ for callback in callbacks if _may_read(callback)]


def _may_read(callback: Any) -> bool:
    on_save = getattr(callback.on_save, "__func__", callback.on_save)
    if on_save is TrainerCallback.on_save:
        return False
    comes_along = getattr(on_save, "__module__", "") == "transformers.integrations.integration_utils"
    reads = _TRACKERS.get(on_save.__qualname__) if comes_along else None
    return reads is None or reads(callback)


def has_modes(optimizer: Any) -> bool:
    """True for an optimizer whose ``train`` and ``eval`` stock code calls: schedule-free ones then change all weights.

    Source: transformers 5.23, trainer.py (training_step, evaluation_loop); accelerate 1.15, optimizer.py (train, whose
        wrapper has both, and hands them on).
    """
    while getattr(optimizer, "optimizer", None) is not None and optimizer.optimizer is not optimizer:
        optimizer = optimizer.optimizer
    return callable(getattr(optimizer, "train", None)) or callable(getattr(optimizer, "eval", None))


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
            trainer._tailor_begin_loop(trainer._tailor_checkpointer)

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
