"""transformers' Trainer, and every subclass of it (TRL's too): whole, verified, selectively saved checkpoints.

The stock ``_save_checkpoint`` still runs, with what subclasses add to it; it only writes into our staging directory,
and leaves weights and optimizer to us. So scheduler, random numbers, scaler, callbacks' state, ``trainer_state.json``,
configuration and tokenizer are exactly what transformers writes, and resume reads them exactly as it always does.

    stock order of a save           here (see ``trainer_floor`` for the first two)
    save_model                      configuration, tokenizer, training_args.bin; no weights
    _save_optimizer_and_scheduler   the scheduler
    _save_scaler, _save_rng_state   stock
    trainer_state.json              stock, with the published path of the best model
    _push_from_checkpoint           after publishing
    rotate_checkpoints              finds one directory in staging and does nothing; ours comes after publishing
    on_save of the callbacks        stock; if one has an ``on_save``, the save is waited for first

All of that is small and happens at once. The layers are captured while training goes on, and the checkpoint is
published some steps later; ``save_ended`` says when.

Source: transformers 5.23, trainer.py (_save_checkpoint, train, _maybe_log_save_evaluate, _finalize_training).
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import weakref
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeVar, Unpack

from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import SaveStrategy

from ..checkpoint import Checkpoint, describe_layers, open_checkpoint, require_optimizer
from ..checkpointer import Checkpointer
from ..drift_log import curves_of
from ..engine_options import EngineOptions, check_options, engine_options, refuse_unknown
from ..errors import (
    FormatError,
    InvalidInputError,
    NotFoundError,
    TailorError,
    UnsupportedError,
    WriteError,
)
from ..meeting import Meeting, Outcome
from ..ranks import join_ranks
from ..resume import ResumeLimits, check_staleness, open_resumable, resume_limits
from ..retention import Keep, parse_keep
from ..save_plan import Contents
from ..storage import checkpoint_name
from ..strategies import SaveContext, Strategy, parse_strategy
from ..writer import SaveHandle
from .preemption import Preemption, PreemptionOptions, check_on_ranks, preemption_options
from .trainer_callback import StepCallback, find_readers, has_modes, module_of
from .trainer_deepspeed import EngineOfTrainer
from .trainer_files import is_ours, is_stock, make_writable, require_trainer
from .trainer_floor import put_floor_under

__all__ = ["TailorMixin", "TailorOptions", "tailor"]

logger = logging.getLogger(__name__)

TrainerT = TypeVar("TrainerT", bound=Trainer)


class TailorOptions(EngineOptions, PreemptionOptions, ResumeLimits, total=False):
    """What ``tailor`` and ``TailorMixin`` take, beside the Trainer's own arguments."""

    strategy: str | Strategy | Callable[[SaveContext], Collection[str]]
    """Which layers a save writes; "full" by default."""
    keep: Keep | int | str | None
    """Which checkpoints to keep: ``llmtailor.Keep``, or its text (``"last=3, every=1000"``); by default as many as
    ``save_total_limit`` says."""
    keep_consistent: bool
    """Never remove the newest checkpoint whose layers are all of one step, exactly; True by default. It counts towards
    ``save_total_limit``."""
    split_experts: bool
    """Every expert of a block is a layer of its own; False by default."""
    layer_overrides: Mapping[str, Sequence[str]] | None
    """Layers of your own: name -> globs over parameter names."""


if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object


class TailorMixin(EngineOfTrainer, _Base):
    """Put it before a Trainer class: ``class Mine(TailorMixin, SFTTrainer)``; then ``Mine(..., strategy="parity")``.

    ``save_steps``, ``save_total_limit``, ``save_only_model``, ``load_best_model_at_end`` and
    ``resume_from_checkpoint`` keep their meaning. A save that fails never stops training: it warns, and ``train``
    raises at the end if nothing was saved since.
    """

    last_save: SaveHandle | None = None
    """The newest save of this process, failed or not."""

    _tailor_options: TailorOptions = TailorOptions()
    _tailor_checkpointer: Checkpointer | None = None
    _tailor_preemption: Preemption | None = None
    _tailor_staged: Path | None = None
    _tailor_push_is_due: bool = False
    _tailor_saves: Mapping[SaveHandle, str | None] = MappingProxyType({})
    """Saves that may be under way -> the best model's checkpoint before them."""
    _tailor_parent: Checkpoint | None = None
    """What ``train`` goes on from, if that is ours."""
    _tailor_loaded: frozenset[str] = frozenset()
    """What of it was loaded: weights, optimizer."""
    _tailor_has_begun: bool = False
    """The loop inside of ``train`` has."""
    _tailor_waits: bool = False
    """It was said that saves are waited for."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        put_floor_under(cls)

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
        self._tailor_preemption = Preemption(checkpointer.unfinished, preemption_options(self._tailor_options))
        # Stock code has a way of its own to save at SIGTERM, which waits for the end of training as we do.
        if not self.args.enable_jit_checkpoint:
            self._tailor_preemption.install()
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
            self._tailor_preemption.remove()
        try:
            checkpointer.close()
        finally:
            self._tailor_collect()
        return result

    def _tailor_open(self, trial: Any) -> Checkpointer:
        _refuse_sharding(self)
        options, ranks = self._tailor_options, join_ranks()
        check_on_ranks(preemption_options(options), ranks)
        self._tailor_checkpointer = Checkpointer(
            Path(super()._get_output_dir(trial)),
            strategy=options.get("strategy", "full"),
            keep=options.get("keep", self.args.save_total_limit),
            keep_consistent=options.get("keep_consistent", True),
            split_experts=options.get("split_experts", False),
            layer_overrides=options.get("layer_overrides"),
            ranks=ranks,
            **engine_options(options),
        )
        self._tailor_bind_engine()
        return self._tailor_checkpointer

    def _tailor_find(self, checkpointer: Checkpointer, wanted: str | bool | None) -> str | None:
        """The path stock code is to resume from; None if it is to start anew."""
        self._tailor_parent, self._tailor_loaded, self._tailor_has_begun = None, frozenset(), False
        if wanted is None or wanted is False:
            checkpointer.begin(None)
            return None
        if wanted is True:
            found = checkpointer.find(**resume_limits(self._tailor_options))
            if found is None:
                raise NotFoundError(
                    "nothing to resume: the run has no checkpoint of LLMTailor",
                    kind="empty-run",
                    path=checkpointer.directory,
                    hint="train without resume_from_checkpoint, or give the path of a checkpoint of transformers",
                )
        elif is_ours(wanted) or not is_stock(wanted):
            found = open_resumable(Path(wanted), checkpointer.meeting)
            require_optimizer(found)
            check_staleness(found, self._tailor_options.get("max_staleness"))
        else:
            # A checkpoint of stock transformers: stock code loads it, and our first save is full.
            checkpointer.begin(None)
            return wanted
        require_trainer(found)
        if self.is_world_process_zero():
            sys.stderr.write(describe_layers(found) + "\n")
        checkpointer.begin(found)
        self._tailor_parent = found
        return str(found.path)

    def _tailor_begin_loop(self, checkpointer: Checkpointer) -> None:
        """All is loaded, and the first step comes."""
        if self._tailor_has_begun:
            # Again: with ``auto_find_batch_size`` the loop starts over when it runs out of memory.
            checkpointer.begin(self._tailor_parent)
        self._tailor_has_begun = True
        missing = {"weights", "optimizer"} - self._tailor_loaded
        if self._tailor_parent is not None and missing and not self.is_deepspeed_enabled:
            logger.warning(
                "%s does not load the %s of %s: its own code does not call the Trainer's",
                type(self).__name__,
                " and the ".join(sorted(missing)),
                self._tailor_parent.path,
            )
        assert self.optimizer is not None
        checkpointer.watch(module_of(self), [self.optimizer])

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers."""
        self._tailor_wait_for_capture()
        return super().training_step(*args, **kwargs)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers."""
        self._tailor_wait_for_capture()
        return super().evaluation_loop(*args, **kwargs)

    def _tailor_wait_for_capture(self) -> None:
        """Stock code is about to put an optimizer into another mode, which may change all weights."""
        if self._tailor_checkpointer is not None and has_modes(self.optimizer):
            self._tailor_checkpointer.wait_until_captured()

    # ---- Saving ----

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        if self._tailor_checkpointer is not None:
            self._tailor_save(self._tailor_checkpointer, model, trial)
            self._tailor_wait_for_readers()
            return
        # By hand, outside of ``train``.
        checkpointer = self._tailor_open(trial)
        try:
            if self.last_save is not None and self.last_save.path is not None:
                checkpointer.begin(open_checkpoint(self.last_save.path))
            self._tailor_save(checkpointer, model, trial)
        finally:
            self._tailor_checkpointer = None
            try:
                checkpointer.close()
            finally:
                self._tailor_collect()

    def _tailor_save(self, checkpointer: Checkpointer, model: Any, trial: Any) -> None:
        last_best = self.state.best_model_checkpoint
        self._tailor_push_is_due = False

        def write_small_files(directory: Path) -> None:
            # The save before may have ended meanwhile, and changed what the best model is.
            self._tailor_collect()
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
                module_of(self),
                [self.optimizer],
                write_small_files,
                contents=self._tailor_contents,
                pinned=self._tailor_best_steps(last_best),
            )
        except (WriteError, FormatError, NotFoundError) as err:
            # The second failure in a row. It was logged and warned about; training goes on and ``train`` raises last.
            handle = SaveHandle(self.state.global_step, error=err)
        self.last_save = handle
        self._tailor_saves = {**self._tailor_saves, handle: last_best}
        if curves := curves_of(checkpointer.metrics):
            Trainer.log(self, curves)  # a subclass's own would take it for a log of steps: TRL's clears its averages
        if self._tailor_push_is_due and handle.error is None:
            self._tailor_push(handle)

    @property
    def _tailor_contents(self) -> Contents:
        return "weights" if self.args.save_only_model else "full"

    def _tailor_wait_for_readers(self) -> None:
        """Stock code calls the callbacks' ``on_save`` next; one that looks at the checkpoint is to find it."""
        readers = find_readers(self.callback_handler.callbacks)
        if not readers or self.last_save is None or self.last_save.error is not None:
            return
        if not self._tailor_waits and self.is_world_process_zero():
            logger.warning("each save is waited for, because of on_save of %s", ", ".join(readers))
        self._tailor_waits = True
        with contextlib.suppress(TailorError):  # it is warned about where all failures are
            self.last_save.result()

    def _tailor_push(self, handle: SaveHandle) -> None:
        """The hub gets what is published; so a push, which takes its time anyhow, waits for the disk."""
        try:
            path = handle.result()
        except TailorError:
            return  # it is warned about where all failures are
        try:
            super()._push_from_checkpoint(str(path))
        finally:
            make_writable(path, Path(self.args.output_dir or "."))

    def _tailor_collect(self) -> None:
        """Say which saves ended since the last call."""
        if self._tailor_checkpointer is not None:
            self._tailor_checkpointer.collect()
        for handle in [handle for handle in self._tailor_saves if handle.has_ended]:
            last_best = self._tailor_saves[handle]
            self._tailor_saves = {each: best for each, best in self._tailor_saves.items() if each is not handle}
            best = self.state.best_model_checkpoint
            if handle.error is not None and best is not None and Path(best).name == checkpoint_name(handle.step):
                self.state.best_model_checkpoint = last_best
            self.save_ended(handle)

    def save_ended(self, handle: SaveHandle) -> None:
        """A save was published, or failed. Called on the training thread, at the end of a step or of training.

        Logs what the save cost, so that every tracker gets it; extend it to do more.
        """
        stats = handle.stats
        if stats is None:
            return
        Trainer.log(
            self,
            {
                "checkpoint_step": handle.step,
                "checkpoint_stall_secs": round(stats.stall_secs, 4),
                "checkpoint_capture_secs": round(stats.capture_secs, 4),
                "checkpoint_write_secs": round(stats.write_secs, 4),
                "checkpoint_commit_secs": round(stats.commit_secs, 4),
                "checkpoint_gb": round(stats.written_nbytes / 1e9, 4),
                "checkpoint_gb_per_sec": round(stats.write_rate / 1e9, 3),
            },
        )

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        super()._maybe_log_save_evaluate(*args, **kwargs)
        checkpointer = self._tailor_checkpointer
        if checkpointer is not None and self.optimizer is not None:
            # Not from a callback: a log inside of one would take back the Trainer's own wish to log.
            self._tailor_collect()
            if self._tailor_may_save(checkpointer):
                checkpointer.prepare(module_of(self), [self.optimizer], contents=self._tailor_contents)
            if self._tailor_preemption is not None and self._tailor_preemption.wants_save:
                checkpointer.drain(self._tailor_preemption.left_secs)
                self._save_checkpoint(self.model, None)
                self._tailor_preemption.end()

    def _tailor_may_save(self, checkpointer: Checkpointer) -> bool:
        """False if no save is to be expected: with ``save_strategy="no"``, unless somebody else decides."""
        options = self._tailor_options
        strategy = options.get("strategy")
        decides = isinstance(strategy, Strategy) and type(strategy).interval is not Strategy.interval
        is_timed = checkpointer.pace.is_due(self.state.global_step) is not None
        wants_last = options.get("on_sigterm") == "save"
        return decides or is_timed or wants_last or self.args.save_strategy != SaveStrategy.NO

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        # What comes now looks at the run's directory: the best model is loaded, old checkpoints are removed.
        if self._tailor_checkpointer is not None:
            self._tailor_checkpointer.drain()
            self._tailor_collect()
        return super()._finalize_training(*args, **kwargs)  # type: ignore[no-untyped-call]

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
                if self.args.should_save:
                    self.state.save_to_json(str(staged / TRAINER_STATE_NAME))

    def _get_output_dir(self, trial: Any) -> str:
        if self._tailor_staged is not None:
            return str(self._tailor_staged.parent)
        return super()._get_output_dir(trial)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._tailor_staged is None:
            super()._push_from_checkpoint(checkpoint_folder)
        else:
            self._tailor_push_is_due = True

    # ---- Loading ----

    def _tailor_together(self, load: Callable[[], None]) -> None:
        """Load on all ranks; if one cannot, none goes on to a collective that the others never come to."""
        meeting = Meeting(None) if self._tailor_checkpointer is None else self._tailor_checkpointer.meeting
        error: BaseException | None = None
        try:
            load()
        except BaseException as err:
            error = err
        meeting.agree(Outcome(error=error))


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
        UnsupportedError: It trains under FSDP version 1.
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
    refuse_unknown(options, TailorOptions.__annotations__)
    _refuse_sharding(trainer)
    check_options(engine_options(options))
    parse_keep(options.get("keep"))
    Preemption(list, preemption_options(options))
    trainer.pop_callback(StepCallback)
    trainer.add_callback(StepCallback(weakref.ref(trainer)))
    # Parsed here so that a misspelt strategy is said before the model trains.
    trainer._tailor_options = {**options, "strategy": parse_strategy(options.get("strategy", "full"))}


def _refuse_sharding(trainer: Trainer) -> None:
    if trainer.is_fsdp_enabled and getattr(trainer.accelerator.state.fsdp_plugin, "fsdp_version", 1) != 2:
        raise UnsupportedError(
            "FSDP version 1 is not supported",
            kind="fsdp1",
            expected="one process, DDP, FSDP version 2, or DeepSpeed",
            found="FSDP version 1",
            hint='FSDP version 2 is chosen with fsdp_config={"fsdp_version": 2}',
        )
