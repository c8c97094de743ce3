"""What stands below a Trainer's subclasses: where their ``super()`` would reach the Trainer, it reaches us.

    ours           TailorMixin     opens the run, saves through the checkpointer
    the user's     SFTTrainer ...  runs as it would without us
    ours           TrainerFloor    weights and optimizer: here instead of in stock code
    transformers'  Trainer

So whatever a subclass saves or restores beside the model, before or after it calls ``super()``, it still does. What it
does not hand on to the Trainer, the Trainer does not do either; of what was then not loaded we tell.

Source: transformers 5.23, trainer.py (save_model, _save, _save_optimizer_and_scheduler, _load_from_checkpoint,
_load_optimizer_and_scheduler, _load_best_model).
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer
from transformers.trainer import SCHEDULER_NAME
from transformers.utils import SAFE_WEIGHTS_NAME, WEIGHTS_NAME

from ..checkpoint import open_checkpoint
from ..load import load_model, load_optimizers
from ..model_state import is_adapted, read_model
from .trainer_callback import module_of
from .trainer_deepspeed import save_engine
from .trainer_files import is_ours, without_progress_bars

__all__ = ["TrainerFloor", "put_floor_under"]

logger = logging.getLogger(__name__)


class TrainerFloor(Trainer):
    """The Trainer, but during a checkpoint it leaves weights and optimizer to us, and loads ours from ours."""

    _tailor_staged: Path | None
    _tailor_together: Callable[[Callable[[], None]], None]
    _tailor_loaded: frozenset[str]

    def _tailor_leaves_weights(self, output_dir: str | None) -> bool:
        """True for the directory of a checkpoint whose weights are saved by layer."""
        is_staged = output_dir is not None and Path(output_dir) == self._tailor_staged
        return is_staged and not is_adapted(module_of(self))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As in transformers; during a checkpoint everything but the weights, which are saved by layer."""
        if self._tailor_leaves_weights(output_dir) and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            # Stock code would gather what is sharded first, or write nothing at all.
            self._save(output_dir, state_dict={})
        else:
            super().save_model(output_dir, _internal_call)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if not self._tailor_leaves_weights(output_dir):
            super()._save(output_dir, state_dict)
            return
        # An empty state dict makes stock code write everything else, and an empty weights file that has to go:
        # transformers does the same under DeepSpeed. Source: transformers 5.23, trainer.py (save_model).
        if not self.args.should_save:
            return
        with without_progress_bars():
            super()._save(output_dir, state_dict={})
        for name in (SAFE_WEIGHTS_NAME, WEIGHTS_NAME):
            (Path(output_dir or "") / name).unlink(missing_ok=True)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        staged = Path(output_dir)
        if staged != self._tailor_staged:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        if not self.args.should_save:
            return
        if self.is_deepspeed_enabled and save_engine(self.deepspeed, staged):
            return
        assert self.lr_scheduler is not None
        with warnings.catch_warnings():
            # torch tells people to save the optimizer as well; we do, elsewhere.
            warnings.filterwarnings("ignore", message="Please also save or load the state of the optimizer")
            torch.save(self.lr_scheduler.state_dict(), staged / SCHEDULER_NAME)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if not is_ours(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        module = module_of(self) if model is None else model
        self._tailor_together(lambda: _load_model(resume_from_checkpoint, module))
        self._tailor_loaded |= {"weights"}

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        # Under DeepSpeed the engine has loaded all but a scheduler of the Trainer's own.
        if checkpoint is None or not is_ours(checkpoint) or self.is_deepspeed_enabled:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        path, optimizer = Path(checkpoint), self.optimizer
        assert optimizer is not None
        assert self.lr_scheduler is not None
        self._tailor_together(lambda: load_optimizers(open_checkpoint(path), read_model(module_of(self)), [optimizer]))
        self._tailor_loaded |= {"optimizer"}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Please also save or load the state of the optimizer")
            self.lr_scheduler.load_state_dict(torch.load(path / SCHEDULER_NAME, map_location="cpu", weights_only=True))

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        if best is None or not is_ours(best) or self.is_deepspeed_enabled:
            super()._load_best_model()
            return
        logger.info("loading the best model from %s (score: %s)", best, self.state.best_metric)
        self._tailor_together(lambda: _load_model(best, module_of(self)))


def put_floor_under(cls: type) -> None:
    """Have a class derive from ``TrainerFloor`` where it would derive from the Trainer itself.

    Args:
        cls: Just made, no instance yet; one that is no Trainer is left alone.
    """
    if issubclass(cls, Trainer) and not issubclass(cls, TrainerFloor):
        bases = tuple(TrainerFloor if base is Trainer else base for base in cls.__bases__)
        cls.__bases__ = bases if TrainerFloor in bases else (*bases, TrainerFloor)


def _load_model(path: str, model: torch.nn.Module) -> None:
    load_model(open_checkpoint(path), read_model(model))
