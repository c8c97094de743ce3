"""transformers' Trainer, and every subclass of it (TRL's too): whole, verified, selectively saved checkpoints.

The stock ``_save_checkpoint`` still runs, with what subclasses add to it; it only writes into our staging directory,
and leaves weights and optimizer to us. So scheduler, random numbers, scaler, callbacks' state, ``trainer_state.json``,
configuration and tokenizer are exactly what transformers writes, and resume reads them exactly as it always does.

    stock order of a save           here
    save_model                      configuration, tokenizer, training_args.bin; no weights
    _save_optimizer_and_scheduler   the scheduler
    _save_scaler, _save_rng_state   stock
    trainer_state.json              stock, with the published path of the best model
    _push_from_checkpoint           after publishing
    rotate_checkpoints              finds one directory in staging and does nothing; ours comes after publishing

Source: transformers 5.23, trainer.py (_save_checkpoint, save_model, train, _load_from_checkpoint, _load_best_model).
"""

from __future__ import annotations

import contextlib
import logging
import os
import stat
import sys
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, TypeVar, Unpack

import torch
from transformers import Trainer
from transformers.trainer import SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.utils import SAFE_WEIGHTS_NAME, WEIGHTS_NAME
from transformers.utils import logging as transformers_logging

from ..checkpoint import Checkpoint, describe_layers, open_checkpoint, require_optimizer
from ..checkpointer import Checkpointer
from ..errors import (
    FormatError,
    IncompleteError,
    InvalidInputError,
    NotFoundError,
    TailorError,
    UnsupportedError,
    WriteError,
)
from ..load import load_model, load_optimizers
from ..manifest import MANIFEST_NAME
from ..model_state import is_adapted, read_model
from ..resume import open_resumable
from ..storage import checkpoint_name
from ..strategies import SaveContext, Strategy, parse_strategy
from ..writer import SaveHandle

__all__ = ["TailorMixin", "TailorOptions", "tailor"]

logger = logging.getLogger(__name__)

TrainerT = TypeVar("TrainerT", bound=Trainer)


class TailorOptions(TypedDict, total=False):
    """What ``tailor`` and ``TailorMixin`` take, beside the Trainer's own arguments."""

    strategy: str | Strategy | Callable[[SaveContext], Collection[str]]
    """Which layers a save writes; "full" by default."""
    keep_consistent: bool
    """Never remove the newest checkpoint whose layers are all of one step; True by default. It counts towards
    ``save_total_limit``."""
    consistent: bool
    """Resume only from a checkpoint whose layers are all of one step; False by default."""
    max_rollback_steps: int | None
    """Refuse to resume from further back than this; None by default."""
    split_experts: bool
    """Every expert of a block is a layer of its own; False by default."""
    layer_overrides: Mapping[str, Sequence[str]] | None
    """Layers of your own: name -> globs over parameter names."""


if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object


class TailorMixin(_Base):
    """Put it before a Trainer class: ``class Mine(TailorMixin, SFTTrainer)``; then ``Mine(..., strategy="parity")``.

    ``save_steps``, ``save_total_limit``, ``save_only_model``, ``load_best_model_at_end`` and
    ``resume_from_checkpoint`` keep their meaning. A save that fails never stops training: it warns, and ``train``
    raises at the end if nothing was saved since.
    """

    last_save: SaveHandle | None = None
    """The newest save of this process, failed or not."""

    _tailor_options: TailorOptions = TailorOptions()
    _tailor_checkpointer: Checkpointer | None = None
    _tailor_staged: Path | None = None
    _tailor_push_is_due: bool = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        options = {key: kwargs.pop(key) for key in TailorOptions.__annotations__ if key in kwargs}
        super().__init__(*args, **kwargs)
        _attach(self, options)

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> Any:
        """Train, as the Trainer does; the run is locked meanwhile.

        Args:
            resume_from_checkpoint: True takes the newest checkpoint that verifies; a path takes that one.
            trial: As in transformers.
            ignore_keys_for_eval: As in transformers.

        Raises:
            NotFoundError: There is nothing to resume.
            IntegrityError: No checkpoint verifies, or the given one does not.
            IncompatibleError: It is of another model or optimizer.
            LockedError: Another process writes this run.
            WriteError: The last save failed, and nothing was saved since; training did finish.
        """
        checkpointer = self._tailor_open(trial)
        try:
            resume_path = self._tailor_find(checkpointer, resume_from_checkpoint)
            result = super().train(resume_path, trial, ignore_keys_for_eval)
        except BaseException:
            try:
                checkpointer.close()
            except TailorError:
                logger.exception("the last save had failed, too")
            raise
        finally:
            self._tailor_checkpointer = None
        checkpointer.close()
        return result

    def _tailor_open(self, trial: Any) -> Checkpointer:
        _refuse_sharding(self)
        options = self._tailor_options
        self._tailor_checkpointer = Checkpointer(
            Path(super()._get_output_dir(trial)),
            strategy=options.get("strategy", "full"),
            keep=self.args.save_total_limit,
            keep_consistent=options.get("keep_consistent", True),
            split_experts=options.get("split_experts", False),
            layer_overrides=options.get("layer_overrides"),
        )
        return self._tailor_checkpointer

    def _tailor_find(self, checkpointer: Checkpointer, wanted: str | bool | None) -> str | None:
        """The path stock code is to resume from; None if it is to start anew."""
        if wanted is None or wanted is False:
            checkpointer.begin(None)
            return None
        if wanted is True:
            options = self._tailor_options
            found = checkpointer.find(
                consistent=options.get("consistent", False), max_rollback_steps=options.get("max_rollback_steps")
            )
            if found is None:
                raise NotFoundError(
                    "nothing to resume: the run has no checkpoint of LLMTailor",
                    kind="empty-run",
                    path=checkpointer.directory,
                    hint="train without resume_from_checkpoint, or give the path of a checkpoint of transformers",
                )
        elif _is_ours(wanted) or not _is_stock(wanted):
            found = open_resumable(Path(wanted))
            require_optimizer(found)
        else:
            # A checkpoint of stock transformers: stock code loads it, and our first save is full.
            checkpointer.begin(None)
            return wanted
        _require_trainer(found)
        sys.stderr.write(describe_layers(found) + "\n")
        checkpointer.begin(found)
        return str(found.path)

    # ---- Saving ----

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        if self._tailor_checkpointer is not None:
            self._tailor_save(self._tailor_checkpointer, model, trial)
            return
        # By hand, outside of ``train``.
        checkpointer = self._tailor_open(trial)
        try:
            if self.last_save is not None and self.last_save.path is not None:
                checkpointer.begin(open_checkpoint(self.last_save.path))
            self._tailor_save(checkpointer, model, trial)
        finally:
            self._tailor_checkpointer = None
            checkpointer.close()

    def _tailor_save(self, checkpointer: Checkpointer, model: Any, trial: Any) -> None:
        last_best = self.state.best_model_checkpoint
        self._tailor_push_is_due = False

        def write_small_files(directory: Path) -> None:
            self._tailor_staged = directory
            try:
                super(TailorMixin, self)._save_checkpoint(model, trial)
            finally:
                self._tailor_staged = None
            self._tailor_note_best(directory, trial)

        assert self.optimizer is not None
        try:
            handle = checkpointer.save(
                self.state.global_step,
                _module(self),
                [self.optimizer],
                write_small_files,
                contents="weights" if self.args.save_only_model else "full",
                pinned=self._tailor_best_steps(last_best),
            )
        except (WriteError, FormatError, NotFoundError) as err:
            # The second failure in a row. It was logged and warned about; training goes on and ``train`` raises last.
            handle = SaveHandle(self.state.global_step, error=err)
        self.last_save = handle
        if handle.path is None:
            self.state.best_model_checkpoint = last_best
        elif self._tailor_push_is_due:
            try:
                super()._push_from_checkpoint(str(handle.path))
            finally:
                _make_writable(handle.path, Path(self.args.output_dir or "."))

    def _tailor_best_steps(self, last_best: str | None) -> set[int]:
        """Step of the best model; if that was not saved, or its save failed, of the best one that was, too."""
        best = self.state.best_global_step
        steps = {best} if best else set()
        if last_best is not None and best != self.state.global_step:
            number = Path(last_best).name.rpartition("-")[2]
            steps |= {int(number)} if number.isdecimal() else set()
        return steps

    def _tailor_note_best(self, staged: Path, trial: Any) -> None:
        """The best model's directory by the name it is or will be published under, not by that in staging."""
        best = self.state.best_global_step
        if best:
            directory = os.path.join(super()._get_output_dir(trial), checkpoint_name(best))
            if best == self.state.global_step or os.path.isdir(directory):
                self.state.best_model_checkpoint = directory
                self.state.save_to_json(str(staged / TRAINER_STATE_NAME))

    def _get_output_dir(self, trial: Any) -> str:
        if self._tailor_staged is not None:
            return str(self._tailor_staged.parent)
        return super()._get_output_dir(trial)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As in transformers; during a checkpoint everything but the weights, which are saved by layer."""
        if self._tailor_staged is None or is_adapted(_module(self)):
            super().save_model(output_dir, _internal_call)
            return
        # An empty state dict makes stock code write everything else, and an empty weights file that has to go:
        # transformers does the same under DeepSpeed. Source: transformers 5.23, trainer.py (save_model).
        with _without_progress_bars():
            self._save(str(self._tailor_staged), state_dict={})
        for name in (SAFE_WEIGHTS_NAME, WEIGHTS_NAME):
            (self._tailor_staged / name).unlink(missing_ok=True)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self._tailor_staged is None:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        assert self.lr_scheduler is not None
        with warnings.catch_warnings():
            # torch tells people to save the optimizer as well; we do, elsewhere.
            warnings.filterwarnings("ignore", message="Please also save or load the state of the optimizer")
            torch.save(self.lr_scheduler.state_dict(), self._tailor_staged / SCHEDULER_NAME)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._tailor_staged is None:
            super()._push_from_checkpoint(checkpoint_folder)
        else:
            self._tailor_push_is_due = True

    # ---- Loading ----

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if not _is_ours(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        _load_model(resume_from_checkpoint, _module(self) if model is None else model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not _is_ours(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        path = Path(checkpoint)
        assert self.optimizer is not None
        assert self.lr_scheduler is not None
        load_optimizers(open_checkpoint(path), read_model(_module(self)), [self.optimizer])
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Please also save or load the state of the optimizer")
            self.lr_scheduler.load_state_dict(torch.load(path / SCHEDULER_NAME, map_location="cpu", weights_only=True))

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        if best is None or not _is_ours(best):
            super()._load_best_model()
            return
        logger.info("loading the best model from %s (score: %s)", best, self.state.best_metric)
        _load_model(best, _module(self))


def tailor(trainer: TrainerT, **options: Unpack[TailorOptions]) -> TrainerT:
    """Give a Trainer that exists our checkpoints, in place.

    ::

        tailor(trainer, strategy="parity")
        trainer.train(resume_from_checkpoint=True)    # newest checkpoint that verifies

    Args:
        trainer: A ``transformers.Trainer`` or an instance of any subclass.
        **options: See ``TailorOptions``.

    Returns:
        The same object.

    Raises:
        InvalidInputError: It is no Trainer, or an option makes no sense.
        UnsupportedError: It trains on several processes, or under FSDP or DeepSpeed.
    """
    if not isinstance(trainer, Trainer):
        raise InvalidInputError(
            "not a Trainer", kind="not-a-trainer", expected="transformers.Trainer", found=type(trainer).__qualname__
        )
    if not isinstance(trainer, TailorMixin):
        stock = type(trainer)
        # A subclass made on the spot, so that super() still reaches whatever the trainer's own class overrides.
        trainer.__class__ = type(stock.__name__, (TailorMixin, stock), {"__module__": stock.__module__})
    _attach(trainer, options)
    return trainer


def _attach(trainer: Any, options: Mapping[str, Any]) -> None:
    if unknown := sorted(set(options) - set(TailorOptions.__annotations__)):
        raise InvalidInputError(
            "unknown option", kind="option", expected=", ".join(TailorOptions.__annotations__), found=", ".join(unknown)
        )
    _refuse_sharding(trainer)
    # Parsed here so that a misspelt strategy is said before the model trains.
    trainer._tailor_options = {**options, "strategy": parse_strategy(options.get("strategy", "full"))}


def _refuse_sharding(trainer: Trainer) -> None:
    found = None
    if trainer.is_deepspeed_enabled:
        found = "DeepSpeed"
    elif trainer.is_fsdp_enabled:
        found = "FSDP"
    elif trainer.args.world_size > 1:
        found = f"{trainer.args.world_size} processes"
    if found is not None:
        raise UnsupportedError(
            "training on several processes is not supported yet",
            kind="world-size",
            expected="one process",
            found=found,
        )


def _module(trainer: Trainer) -> torch.nn.Module:
    assert trainer.model is not None
    return trainer.model


def _is_ours(path: str) -> bool:
    return os.path.isfile(os.path.join(path, MANIFEST_NAME))


def _is_stock(path: str) -> bool:
    """True for a directory that may be a checkpoint of transformers, and is no half of ours."""
    return os.path.isfile(os.path.join(path, TRAINER_STATE_NAME)) and not os.path.isdir(os.path.join(path, "optimizer"))


def _load_model(path: str, model: torch.nn.Module) -> None:
    load_model(open_checkpoint(path), read_model(model))


@contextlib.contextmanager
def _without_progress_bars() -> Iterator[None]:
    """Stock ``save_pretrained`` shows a bar, even for no weights at all."""
    bars: Any = transformers_logging  # its functions have no annotations
    were_enabled = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        yield
    finally:
        if were_enabled:
            bars.enable_progress_bar()


def _require_trainer(checkpoint: Checkpoint) -> None:
    missing = [name for name in (TRAINER_STATE_NAME, SCHEDULER_NAME) if not (checkpoint.path / name).is_file()]
    if missing:
        raise IncompleteError(
            "the checkpoint was not saved by a Trainer",
            kind="other-trainer",
            path=checkpoint.path,
            expected=f"{TRAINER_STATE_NAME} and {SCHEDULER_NAME}",
            found=f"no {' and no '.join(missing)}",
            hint="resume it with the loop that saved it",
        )


def _make_writable(checkpoint: Path, output_dir: Path) -> None:
    """Let stock code write again what the push copied: copies of our read-only files are read-only, too."""
    for name in os.listdir(checkpoint):
        copy = output_dir / name
        if copy.is_file() and not copy.is_symlink():
            copy.chmod(copy.stat().st_mode | stat.S_IWUSR)
