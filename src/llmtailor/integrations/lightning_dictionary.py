"""The dictionary that Lightning's Trainer makes of its state, without weights and optimizer state: what of it is kept.

Source: lightning 2.6, pytorch/trainer/connectors/checkpoint_connector.py (dump_checkpoint, restore),
pytorch/callbacks/model_checkpoint.py (_save_last_checkpoint, load_state_dict).
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from ..errors import TailorWarning, UnsupportedError
from .small_files import check_objects

__all__ = ["Fixed", "HyperParameters", "check_hooks", "check_state", "name_last"]

logger = logging.getLogger(__name__)


class Fixed:
    """State that is there already."""

    def __init__(self, state: dict[str, Any]) -> None:
        self._state = state

    def state_dict(self) -> dict[str, Any]:
        return self._state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        raise NotImplementedError


class HyperParameters:
    """Those of the module and the data module, which resuming does not need: what cannot be read back is left out.

    Looked at once, for one of them may be as large as a model.

    Args:
        trainer: Its module and data module are known.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._lost: dict[str, list[str] | None] = {}
        """By the key in the Trainer's dictionary, which of them; None for all."""
        self._reasons: list[str] = []
        owners = (trainer.lightning_module, trainer.datamodule)  # type: ignore[attr-defined]  # its connector sets it
        for owner in owners:
            if owner is not None and owner.hparams:
                self._look_at(owner)

    def _look_at(self, owner: Any) -> None:
        key = owner.CHECKPOINT_HYPER_PARAMS_KEY
        if not isinstance(owner.hparams, dict):  # OmegaConf's, which the Trainer saves as they are, with their type
            self._lost |= {key: None, owner.CHECKPOINT_HYPER_PARAMS_TYPE: None}
            self._reasons.append(f"{key}: {type(owner.hparams).__qualname__}")
            return
        lost = []
        for name, value in owner.hparams.items():
            try:
                check_objects({key: Fixed({name: value})})
            except UnsupportedError as err:
                lost.append(name)
                self._reasons.append(f"{key}{err.found}")
        if lost:
            self._lost[key] = lost

    def warn(self) -> None:
        """Say what is left out."""
        if self._reasons:
            warnings.warn(
                f"hyper-parameters that are not in the checkpoints: {', '.join(self._reasons)}. Only tensors, numbers, "
                "text and containers are; resuming does not need them",
                TailorWarning,
                stacklevel=2,
            )

    def leave_out(self, checkpoint: Mapping[str, Any]) -> dict[str, Any]:
        """The Trainer's dictionary without those that are lost."""
        kept = {key: value for key, value in checkpoint.items() if self._lost.get(key, ()) is not None}
        for key, names in self._lost.items():
            if names is not None and key in kept:
                kept[key] = {name: value for name, value in kept[key].items() if name not in names}
        return kept


def check_state(trainer: Trainer) -> None:
    """Refuse schedules and callbacks whose state could be saved and not be read back.

    Raises:
        UnsupportedError: It names the one, and what of it.
    """
    check_objects({f"lr_scheduler {config.name or ''}".rstrip(): config.scheduler for config in _schedules(trainer)})
    for callback in trainer.callbacks:  # type: ignore[attr-defined]  # its connector sets it
        try:
            state = callback.state_dict()
        except Exception:  # it may have none before training begins: what is wrong then shows at the first save
            logger.debug("%s has no state before training begins", callback.state_key, exc_info=True)
            continue
        check_objects({callback.state_key: Fixed(state)})


def _schedules(trainer: Trainer) -> list[Any]:
    return [config for config in trainer.lr_scheduler_configs if hasattr(config.scheduler, "state_dict")]


def check_hooks(checkpoint: Mapping[str, Any]) -> None:
    """Refuse what a hook has put among the weights.

    Raises:
        UnsupportedError: Kind ``changed-weights``.
    """
    if checkpoint.get("state_dict"):
        raise UnsupportedError(
            "a hook has put weights into the checkpoint, which would be lost",
            kind="changed-weights",
            found=", ".join(list(checkpoint["state_dict"])[:3]),
            hint="on_save_checkpoint may add keys of its own to the checkpoint, and leave state_dict alone",
        )


def name_last(state: Mapping[str, Any], trainer: Trainer, checkpoint: Path) -> None:
    """Tell each ``ModelCheckpoint`` which last name leads to the checkpoint that is loaded, so that it moves that on.

    A step is saved once, and ``last.ckpt`` is the second name that it gets: the state of callbacks is from before it.

    Args:
        state: The Trainer's dictionary; changed.
        trainer: Its callbacks are set up.
        checkpoint: Its directory, resolved.
    """
    states = state.get("callbacks", {})
    callbacks = [each for each in trainer.checkpoint_callbacks if isinstance(each, ModelCheckpoint) and each.save_last]
    # Of another directory a ModelCheckpoint takes nothing but the best.
    mine = [each for each in callbacks if states.get(each.state_key, {}).get("dirpath") == each.dirpath]
    leading = {each.state_key: _last_names(each, trainer, checkpoint) for each in mine}
    taken = {states[key]["last_model_path"] for key, names in leading.items()}
    for key, names in leading.items():
        free = [name for name in names if name not in taken]
        if free and states[key]["last_model_path"] not in names:
            states[key]["last_model_path"] = free[0]
            taken.add(free[0])


def _last_names(callback: ModelCheckpoint, trainer: Trainer, checkpoint: Path) -> list[str]:
    """``last.ckpt``, ``last-v1.ckpt`` and so on, as far as they lead there."""
    names = sorted(callback._find_last_checkpoints(trainer), key=lambda name: (len(name), name))
    return [name for name in names if Path(name).resolve() == checkpoint]
