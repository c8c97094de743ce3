"""One ``fit`` of a Lightning Trainer: its checkpoints are saved and loaded here.

``lightning`` says when and puts it in the Trainer's way; the facts about what a checkpoint of the Trainer has to hold,
and in which order things are restored, are here.

Source: lightning 2.6, pytorch/trainer/connectors/checkpoint_connector.py (dump_checkpoint), pytorch/loops/fit_loop.py
(on_save_checkpoint, setup_data, on_run_start).
"""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from ..checkpoint import Checkpoint, describe_layers, open_checkpoint
from ..checkpointer import Checkpointer
from ..drift_log import curves_of
from ..errors import (
    FormatError,
    IncompatibleError,
    IncompleteError,
    NotFoundError,
    TailorError,
    UnsupportedError,
    WriteError,
)
from ..load import plan_load, plan_model
from ..meeting import Outcome
from ..model_state import read_model
from ..resume import Fill, load_named
from ..save_plan import Contents
from ..storage import list_checkpoints
from ..writer import SaveHandle
from .checkpoint_names import CheckpointNames
from .lightning_dictionary import Fixed, HyperParameters, check_hooks, check_state, name_last
from .lightning_loader import TrainLoader
from .small_files import capture_rng, load_rng, read_objects, restore_rng, save_objects, save_rng, write_progress

__all__ = ["LightningSession", "SessionOptions", "load_weights"]

logger = logging.getLogger(__name__)

_SMALL = "lightning"
"""The Trainer's dictionary, without weights and optimizer state, is ``lightning.pt``."""
_RUN_ID = "llmtailor_run_id"
"""In files of Lightning's own, of which run they are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionOptions:
    """What is saved and loaded how, beside what the checkpointer knows."""

    is_one_at_a_time: bool = True
    """A save waits for the one before to end."""

    consistent: bool = False
    """Of the run's checkpoints, take only one whose layers are all of one step, exactly."""
    max_rollback_steps: int | None = None
    max_staleness: int | None = None
    """Refuse to fall back further than this."""
    random_state: bool = True
    """Restore random numbers and the position in the data."""


class LightningSession:
    """One ``fit``: holds the run from ``on_fit_start`` to ``teardown``. Every rank has one, and calls the same methods.

    Args:
        trainer: Its strategy is set up.
        checkpointer: The run, held; it is closed here.
        options: See there.
        previous: The ``fit`` before, if this process had one.
    """

    def __init__(
        self,
        trainer: Trainer,
        checkpointer: Checkpointer,
        options: SessionOptions,
        previous: LightningSession | None = None,
    ) -> None:
        self.trainer = trainer
        self._module = trainer.lightning_module
        self.checkpointer = checkpointer
        self.is_interrupted = False
        """Whether training ended by an error."""
        self.last_save: SaveHandle | None = None
        self._options = options
        self._ranks = self.checkpointer.meeting.ranks
        self._rank = None if self._ranks is None else self._ranks.rank
        self.names = CheckpointNames(checkpointer.directory, is_writer=not self._rank)
        self._last: tuple[int, Contents] | None = None
        """Step and contents of the newest checkpoint: saved by this process, or loaded."""
        self._loaded: Checkpoint | None = None
        """What training goes on from."""
        self._published: Path | None = None
        """The newest of the saves before ``last_save`` that is known to be there."""
        self._rng: dict[str, Any] | None = None
        self._loader_states: list[dict[str, Any]] = []
        self._savers = [each for each in trainer.checkpoint_callbacks if isinstance(each, ModelCheckpoint)]
        try:
            # What cannot be saved is said before the first step, not at the first save.
            for saver in self._savers:
                self.names.check(Path(saver.dirpath or checkpointer.directory, "a.ckpt"))
            checkpointer.read_model(trainer.lightning_module)
            check_state(trainer)
            self._hyper_parameters = HyperParameters(trainer)
            if not self._rank:
                self._hyper_parameters.warn()
            self._begin(None if previous is None else self._follow(previous))
        except BaseException:
            checkpointer.close()
            raise
        for saver in self._savers:
            saver.file_exists = partial(self._is_taken, saver.file_exists)  # type: ignore[method-assign]

    def _begin(self, parent: Checkpoint | None) -> None:
        """Go on from a checkpoint that is not loaded, or from none."""
        self.checkpointer.begin(parent)
        self._loaded = parent
        self._last = None if parent is None else (parent.manifest.step, parent.manifest.contents)

    def _follow(self, previous: LightningSession) -> Checkpoint | None:
        """What a ``fit`` goes on from that loads nothing, for the Trainer counts its steps on."""
        is_same = (
            previous.trainer is self.trainer
            and previous._module is self._module
            and previous.checkpointer.directory.resolve() == self.checkpointer.directory.resolve()
        )
        return self._find_own(previous._find_run_id(), self.trainer.global_step) if is_same else None

    def _find_run_id(self) -> str | None:
        """Of the checkpoints that this ``fit`` made or goes on from."""
        newest = None if self.last_save is None else self.last_save.path
        for path in (newest, self._published):
            if path is not None:
                with contextlib.suppress(TailorError, OSError):  # it was set aside, or is damaged
                    return open_checkpoint(path).manifest.run_id
        return self._loaded.manifest.run_id if self._loaded is not None and self._is_own(self._loaded) else None

    def _find_own(self, run_id: str | None, step: int) -> Checkpoint | None:
        """The newest checkpoint that was made under this id, and at this step or before."""
        for entry in reversed(list_checkpoints(self.checkpointer.directory)):
            if entry.has_manifest and entry.step <= step:
                with contextlib.suppress(TailorError, OSError):  # a damaged one is not gone on from
                    found = open_checkpoint(entry.path)
                    if found.manifest.run_id == run_id:
                        return found
        return None

    def _is_taken(self, exists: Callable[..., bool], path: str | Path, trainer: Trainer) -> bool:
        """``ModelCheckpoint.file_exists``, also of names that are yet to come; the same on every rank."""
        is_promised = trainer.strategy.reduce_boolean_decision(self.names.is_promised(path), all=False)
        return is_promised or exists(path, trainer)

    # ---- Saving ----

    def save(self, checkpoint: dict[str, Any], path: Path) -> None:
        """Save what the Trainer has collected, with the live weights and optimizer state; returns at once.

        Raises:
            InvalidInputError, AlreadyExistsError: The checkpoint cannot have this name.
            UnsupportedError: There is state that cannot be saved.
        """
        self.names.check(path)
        step = int(checkpoint["global_step"])
        contents: Contents = "full" if "optimizer_states" in checkpoint else "weights"
        check_hooks(checkpoint)
        if self._last is not None and self._last[0] == step and contents == "full" and self._last[1] == "weights":
            raise UnsupportedError(
                "a step cannot be saved with weights alone and then with optimizer state",
                kind="two-contents",
                path=path,
                hint="put the ModelCheckpoint with save_weights_only behind the other",
            )
        if self._loaded is not None and self._loaded.manifest.step == step and self._is_own(self._loaded):
            self.names.link(step, path)
            return
        handle = self._save(step, contents, checkpoint)
        if self.last_save is not None and self.last_save.path is not None:
            self._published = self.last_save.path
        self.last_save = handle
        if handle.error is None:
            if self._last is None or self._last[0] != step:  # a step that is saved again was measured once
                self._log_curves()
            self._last = (step, contents)
        self.names.add(handle, path)

    def _log_curves(self) -> None:
        """Tell the Trainer's loggers how layers moved, beside what else it tells them of these batches.

        Source: lightning 2.6, pytorch/callbacks/lr_monitor.py (on_train_batch_start).
        """
        if curves := curves_of(self.checkpointer.metrics):
            for tracker in self.trainer.loggers:
                tracker.log_metrics(curves, step=self.trainer.fit_loop.epoch_loop._batches_that_stepped)

    def _save(self, step: int, contents: Contents, checkpoint: Mapping[str, Any]) -> SaveHandle:
        small = self._hyper_parameters.leave_out(checkpoint)
        del small["state_dict"]
        if contents == "full":
            small["optimizer_states"] = []
        loaders = small["loops"]["fit_loop"]["state_dict"].pop("combined_loader", [])

        def write_small_files(directory: Path) -> None:
            if not self._rank:
                write_progress(directory, step, ["data", _SMALL])
                save_objects(directory, {_SMALL: Fixed(small)})
            save_objects(directory, {"data": Fixed({"loaders": loaders})}, rank=self._rank)
            save_rng(directory, rank=self._rank)

        self._wait_for_last()
        try:
            return self.checkpointer.save(
                step,
                self.trainer.lightning_module,
                self.trainer.optimizers,
                write_small_files,
                contents=contents,
                pinned=self.names.steps(),
            )
        except (WriteError, FormatError, NotFoundError) as err:
            # The second failure in a row. It was logged and warned about; training goes on and ``fit`` raises last.
            return SaveHandle(step, error=err)

    def _wait_for_last(self) -> None:
        """Have the names right that say what retention leaves; the next save would wait, too."""
        if self.last_save is not None and self._options.is_one_at_a_time:
            with contextlib.suppress(TailorError):  # it is warned about where all failures are
                self.last_save.result()
        self.names.settle()

    def _is_own(self, found: Checkpoint) -> bool:
        return found.path.resolve().parent == self.checkpointer.directory.resolve()

    def look_after(self) -> None:
        """Take note of saves that ended; waits for nothing."""
        self.checkpointer.collect()
        self.names.settle()
        self.checkpointer.prepare(self.trainer.lightning_module, self.trainer.optimizers)

    def count_ahead(self) -> int:
        """Batches that the Trainer has fetched and not trained on yet, where it cannot know which is the last.

        Returns:
            -1 if the epoch is used up.

        Source: lightning 2.6, pytorch/loops/fetchers.py (_PrefetchDataFetcher), training_epoch_loop.py (advance).
        """
        loop = self.trainer.fit_loop
        progress = loop.epoch_loop.batch_progress
        fetched = getattr(loop._data_fetcher, "batches", None)
        # One, if an exception has ended the training in the middle of a batch, and a callback saves then.
        counts: Any = progress.current
        num_begun = 0 if fetched is None else counts.ready - counts.processed
        if progress.is_last_batch and not num_begun:
            return -1
        return len(fetched or ()) + num_begun

    def close(self) -> None:
        """Finish the saves that are under way.

        Raises:
            WriteError: The last save failed, and nothing was saved since; unless training itself ended by an error.
        """
        try:
            self.checkpointer.close()
        except TailorError:
            # What stopped the training matters more than the save that had failed before.
            if not self.is_interrupted:
                raise
            logger.exception("the last save had failed, too")
        finally:
            self.names.settle()
            for saver in self._savers:
                vars(saver).pop("file_exists", None)

    # ---- Files of Lightning's own ----

    def note_in(self, checkpoint: dict[str, Any]) -> None:
        """Make a file of Lightning's own of the Trainer's dictionary, and note in it of which run it is.

        Positions of loaders that do not keep them themselves would be refused where we are not.
        """
        state = checkpoint.get("loops", {}).get("fit_loop", {}).get("state_dict", {})
        loaders = self.trainer.fit_loop._combined_loader
        if "combined_loader" in state and loaders is not None:
            stateful = [each for each in loaders.flattened if hasattr(each, "state_dict")]
            positions = zip(stateful, state.pop("combined_loader"), strict=True)
            if kept := [position for loader, position in positions if not isinstance(loader, TrainLoader)]:
                state["combined_loader"] = kept
        checkpoint[_RUN_ID] = self._find_run_id()

    def go_on_from(self, checkpoint: Mapping[str, Any]) -> None:
        """A file of Lightning's own is loaded: if it was saved beside this run, its checkpoints are gone on from."""
        run_id = checkpoint.get(_RUN_ID)
        self._begin(None if run_id is None else self._find_own(run_id, int(checkpoint["global_step"])))

    # ---- Loading ----

    def load_newest(self) -> dict[str, Any]:
        """Load the newest checkpoint that verifies."""
        small: dict[Path, _Small] = {}
        found = self.checkpointer.load(
            lambda candidate: self._plan(candidate, small),
            consistent=self._options.consistent,
            max_rollback_steps=self._options.max_rollback_steps,
            max_staleness=self._options.max_staleness,
        )
        if found is None:
            raise NotFoundError(
                "nothing to resume: the run has no checkpoint of LLMTailor",
                kind="empty-run",
                path=self.checkpointer.directory,
                hint='fit without ckpt_path; ckpt_path="last" starts anew where there is none',
            )
        return self._restore(found, small[found.path])

    def load_named(self, path: Path) -> dict[str, Any]:
        """Load the checkpoint of a name."""
        small: dict[Path, _Small] = {}
        found = load_named(
            path,
            lambda candidate: self._plan(candidate, small),
            self.checkpointer.meeting,
            max_staleness=self._options.max_staleness,
        )
        return self._restore(found, small[found.path])

    def _plan(self, candidate: Checkpoint, small: dict[Path, _Small]) -> Fill:
        path = candidate.path
        _require_lightning(path)
        state = read_objects(path, [_SMALL])[_SMALL]
        small[path] = _Small(state)
        if self._options.random_state:
            self._check_world(candidate)
            small[path].loaders = read_objects(path, ["data"], rank=self._rank)["data"]["loaders"]
            small[path].rng = load_rng(path, rank=self._rank)
        model = self.checkpointer.read_model(self.trainer.lightning_module)
        return plan_load(candidate, model, self.trainer.optimizers).fill

    def _check_world(self, candidate: Checkpoint) -> None:
        saved, live = candidate.manifest.world.size, 1 if self._ranks is None else self._ranks.size
        if saved != live:
            raise IncompatibleError(
                "the number of ranks differs from when the checkpoint was saved, so random numbers cannot go on",
                kind="world-size",
                path=candidate.path,
                expected=saved,
                found=live,
                hint="resume on as many, or with TailorCallback(random_state=False): weights and optimizer state are "
                "resharded; random numbers differ from here on, and the epoch's data begin anew",
            )

    def _restore(self, found: Checkpoint, small: _Small) -> dict[str, Any]:
        self.checkpointer.begin(found, self.trainer.lightning_module, self.trainer.optimizers)
        self._loaded = found
        self._last = (found.manifest.step, "full")
        self._rng = small.rng
        self._restore_rng()
        if not self._rank:
            sys.stderr.write(describe_layers(found) + "\n")
        name_last(small.state, self.trainer, found.path.resolve())
        self._loader_states = list(small.loaders)
        if small.loaders:
            small.state["loops"]["fit_loop"]["state_dict"]["combined_loader"] = small.loaders
        return {**small.state, "state_dict": {}}

    def _restore_rng(self) -> None:
        try:
            if self._rng is not None:
                restore_rng(self._rng)
        except BaseException as err:
            self.checkpointer.meeting.agree(Outcome(error=err))
            raise
        self.checkpointer.meeting.agree(Outcome())

    def start(self) -> None:
        """Training begins, or goes on, from here.

        Raises:
            UnsupportedError: The position in the data could not be saved.
        """
        fetcher = self.trainer.fit_loop._data_fetcher
        loaders = self.trainer.fit_loop._combined_loader
        if getattr(fetcher, "batches", None) and loaders is not None and len(loaders.flattened) > 1:
            raise UnsupportedError(
                "the position in several loaders, one of them without a length, cannot be saved",
                kind="loaders",
                hint="give the loaders a length, or state_dict and load_state_dict",
            )
        if self._rng is not None:
            restore_rng(self._rng)
            self._rng = None

    def watch(self, loader: Any) -> Any:
        """A training loader, so that its position is saved; called for each of them, in order.

        Its saved position is given to it here, too: the Trainer does so in the middle of an epoch alone, and a loader
        may have a generator of its own.
        """
        state = self._loader_states.pop(0) if self._loader_states else None
        if hasattr(loader, "state_dict"):
            return loader
        watched = TrainLoader(loader, on_fetch=self.note_fetch, count_ahead=self.count_ahead)
        if state is not None:
            watched.load_state_dict(state)
        return watched

    def note_fetch(self) -> None:
        """A batch of an epoch that begins anew was fetched; if that was ahead of time, random numbers go on from there.

        Source: lightning 2.6, pytorch/loops/fetchers.py (_PrefetchDataFetcher.__iter__), fit_loop.py (setup_data): of a
        loader without a length the first batch is fetched before ``on_train_start``.
        """
        if self._rng is not None:
            self._rng = capture_rng()


@dataclass(slots=True)
class _Small:
    """What of a checkpoint is neither weights nor optimizer state, for this rank."""

    state: dict[str, Any]
    loaders: list[dict[str, Any]] = field(default_factory=list)
    rng: dict[str, Any] | None = None


def load_weights(path: Path, module: LightningModule) -> dict[str, Any]:
    """For validation and the like: each rank by itself, and no optimizer."""
    _require_lightning(path)
    found = load_named(path, lambda candidate: plan_model(candidate, read_model(module)).fill)
    return {**read_objects(found.path, [_SMALL])[_SMALL], "state_dict": {}}


def _require_lightning(path: Path) -> None:
    if not (path / f"{_SMALL}.pt").is_file():
        raise IncompleteError(
            "the checkpoint was not saved by Lightning's Trainer",
            kind="other-trainer",
            path=path,
            expected=f"{_SMALL}.pt",
            found="none",
            hint="resume it with the loop or trainer that saved it",
        )
