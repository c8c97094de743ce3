"""The one object behind every integration: saves a run's checkpoints, finds the one to resume from.

    save:   strategy picks layers -> held images -> engine (capture, write, commit, publish) -> retention -> mirror
    resume: newest that verifies, of either tier -> the run goes on from it

A save returns at once; the engine's threads do the rest, and an optimizer's step waits for the state to be captured.
A failed save never stops training and never touches an older checkpoint. The training thread learns of it at the next
call: it warns, the second failure in a row raises, and ``close`` raises if nothing was saved since.
"""

from __future__ import annotations

import logging
import time
import warnings
import weakref
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import SupportsIndex, Unpack

import torch

from .ballots import Ballots
from .checkpoint import Checkpoint
from .codecs import SKIP, parse_rest
from .drift import LayerDrift
from .engine_options import DEFAULT_COMMIT_TIMEOUT_SECS, EngineOptions, check_options
from .errors import InvalidInputError, WriteError
from .flag_log import log_flags_and
from .hold_back import hold_back
from .interval import parse_interval
from .lineage import Lineage
from .live_state import LiveLayers, LiveReader, TrainingReader
from .local_parts import Seat
from .manifest import INDEX_NAME
from .meeting import Meeting, open_together
from .model_state import ModelState, is_adapted
from .monitor import Watch
from .open_runs import OpenRun
from .pace import Pace
from .ranks import Ranks
from .resume import Fill, ResumeLimits, find_resumable, load_resumable
from .retention import Keep, parse_keep
from .save_outcomes import SOFT_ERRORS, SaveOutcomes, translate_small_file_errors
from .save_plan import Contents, SavePlan, applicable_strategy, encode_index, layer_statuses, plan_save
from .step_rules import check_step
from .storage import LocalFileSystem, StagedCheckpoint, StagingSeat
from .strategies import Full, Monitored, SaveContext, Strategy, parse_strategy
from .tiers import Tiers
from .writer import CodedImage, Engine, SaveHandle, admit, code_layer, forget_frames

__all__ = ["Checkpointer"]

logger = logging.getLogger(__name__)


class Checkpointer:
    """Saves and finds the checkpoints of one run; holds the run's lock until ``close``.

    Called by the thread that trains. On several ranks every rank makes one, for the same directory, and calls the
    same methods in the same order; ``save`` waits for nobody, unless it measures how layers move or the interval
    follows from costs: then all hear the same from the coordinator.

    Args:
        directory: The run.
        strategy: Which layers a save writes: text, object, or a callable.
        keep: How many checkpoints to keep, or which: a ``Keep``, or its text; None keeps all.
        keep_consistent: Never remove the newest checkpoint whose layers are all of one step, exactly.
        split_experts: Every expert is a layer of its own.
        layer_overrides: Layers of your own: name -> globs over parameter names.
        filesystem: For tests.
        ranks: The processes that train together; None if this one is alone.
        on_published: Called with the directory of each published checkpoint, by a thread of ours; on rank 0. What it
            raises is logged.
        **options: See ``EngineOptions``.

    Raises:
        InvalidInputError: An unknown strategy, or an option that makes no sense.
        LockedError: Another process writes this run, or its mirror.
        WriteError: The directory, or the mirror, cannot be written. On several ranks every rank raises if one cannot.
        UnsupportedError: An option that several ranks cannot agree on.
    """

    def __init__(
        self,
        directory: Path | str,
        *,
        strategy: str | Strategy | Callable[[SaveContext], Collection[str]] = "full",
        keep: Keep | int | str | None = None,
        keep_consistent: bool = True,
        split_experts: bool = False,
        layer_overrides: Mapping[str, Sequence[str]] | None = None,
        filesystem: LocalFileSystem | None = None,
        ranks: Ranks | None = None,
        on_published: Callable[[Path], None] | None = None,
        **options: Unpack[EngineOptions],
    ) -> None:
        check_options(options, has_peers=ranks is not None)
        self._has_peers = ranks is not None
        self.meeting = Meeting(ranks)
        """Of the ranks, for what they do together."""
        self._strategy = parse_strategy(strategy)
        self._rest = parse_rest(options.get("rest", SKIP))
        spread = options.get("spread_layers", False)
        self._seat = seat = Seat() if ranks is None else Seat(rank=ranks.rank, size=ranks.size, spread=spread)
        self._reader: TrainingReader = LiveReader(split_experts=split_experts, overrides=layer_overrides, seat=seat)
        self._options = options
        self._is_blocking = options.get("capture", "lazy") == "blocking"
        self._is_prepared = False
        self._directory = Path(directory).absolute()
        self._newest: SaveHandle | None = None
        self._parent: Checkpoint | None = None
        """What training went on from."""
        self.num_skipped = 0
        """Saves that were left out because another was in flight."""

        open_tiers = partial(self._open_tiers, keep=keep, keep_consistent=keep_consistent, filesystem=filesystem)
        self._tiers, session = open_together(self.meeting, self._directory, open_tiers)
        try:
            encodes = self._rest is not None
            self._engine = Engine(self._tiers.run, pool_nbytes=options.get("pool_nbytes"), encodes=encodes)
        except BaseException:
            self._tiers.close()
            raise
        if isinstance(self._strategy, Monitored):
            on_published = log_flags_and(on_published, self._tiers)
        self._lineage = Lineage(self._tiers, session, seat, on_published=None if seat.rank else on_published)
        timeout_secs = options.get("commit_timeout_secs", DEFAULT_COMMIT_TIMEOUT_SECS)
        self._watch = self._make_watch(timeout_secs)
        interval = parse_interval(options.get("interval"))
        self.pace = Pace(self._strategy, interval, self.meeting, parse_keep(keep), timeout_secs)
        """When to save next, if that is decided here."""
        self._ballots: Ballots | None = None
        if ranks is not None:
            self._ballots = Ballots(ranks, self._directory, timeout_secs, newest=lambda: self._lineage.newest)
        hook = hold_back(self._engine, None if self._watch is None else self._watch.gradients)
        self._open_run = OpenRun(self._directory, hook, self._engine, self._tiers)
        self._outcomes = SaveOutcomes(self._open_run)
        # Whoever forgets to close it still gets the saves in flight, and the run's lock goes with it.
        self._finalizer = weakref.finalize(self, self._open_run.forget)
        self._finalizer.atexit = False

    def _open_tiers(
        self,
        seat: StagingSeat | None,
        *,
        keep: Keep | int | str | None,
        keep_consistent: bool,
        filesystem: LocalFileSystem | None,
    ) -> Tiers:
        return Tiers(
            self._directory,
            keep=keep,
            keep_consistent=keep_consistent,
            mirror=self._options.get("mirror"),
            mirror_keep=self._options.get("mirror_keep"),
            keep_optimizer=self._options.get("keep_optimizer"),
            filesystem=filesystem,
            seat=seat,
        )

    def _make_watch(self, timeout_secs: float) -> Watch | None:
        """What measures how layers move, if this run does."""
        monitor = self._options.get("monitor", False)
        if not monitor and not self._strategy.needs_drift:
            return None
        on_warning = self._tiers.notices.append
        return Watch(self.meeting, self._directory, timeout_secs, on_warning, has_gradients=monitor == "gradients")

    @property
    def directory(self) -> Path:
        return self._directory

    @property
    def seat(self) -> Seat:
        """Which rank this is."""
        return self._seat

    def read_with(self, reader: TrainingReader) -> None:
        """Have something else read the live state, where that is not torch's model and optimizers."""
        self._reader = reader

    def write_pointer(self, name: str, text: str) -> None:
        """Put a small file for other tools into the run's directory, durably; on rank 0, any thread.

        Raises:
            WriteError: The file there is as it was.
        """
        self._tiers.run.write_pointer(name, text)

    def read_model(self, module: torch.nn.Module) -> ModelState:
        """The model as this run saves it: its layers, schema and live tensors."""
        return self._reader.read_model(module)

    def find(self, **limits: Unpack[ResumeLimits]) -> Checkpoint | None:
        """The newest checkpoint that verifies, of either tier; see ``find_resumable``."""
        self.drain()
        return find_resumable(self._tiers.all, meeting=self.meeting, **limits)

    def load(self, plan: Callable[[Checkpoint], Fill], **limits: Unpack[ResumeLimits]) -> Checkpoint | None:
        """Load the newest checkpoint that verifies, of either tier, while it is verified; see ``load_resumable``."""
        self.drain()
        return load_resumable(self._tiers.all, plan, meeting=self.meeting, **limits)

    def begin(
        self,
        parent: Checkpoint | None,
        module: torch.nn.Module | None = None,
        optimizers: Sequence[torch.optim.Optimizer] = (),
    ) -> None:
        """Start a lineage: the next save follows ``parent``, or nothing.

        Without a parent the next save is full. With one, layers that it does not write are linked from it.

        Args:
            parent: What training goes on from.
            module: The bare model, if all is loaded; else call ``watch`` when it is.
            optimizers: Its optimizers.
        """
        self.drain()
        self._newest = None
        if self._ballots is not None:
            self._ballots.leave()
        self._lineage.begin(parent)
        self._parent = parent
        self.pace.begin(0 if parent is None else parent.manifest.step)
        if module is not None:
            self.watch(module, optimizers)

    def prepare(
        self, module: torch.nn.Module, optimizers: Sequence[torch.optim.Optimizer], *, contents: Contents = "full"
    ) -> None:
        """Have the host memory for the first save ready when it comes; costs something on the first call alone.

        Call it when the optimizers have state, after a step. Fresh memory takes several times as long to fill as
        memory that was in use.
        """
        if self._is_prepared:
            return
        self._is_prepared = True
        live = self._reader.read(module, optimizers if contents == "full" else ())
        self.pace.note_sizes(layer_statuses(live))
        if self._watch is not None and not self._watch.has_begun:
            self._watch.begin(live, self._parent)
        self._engine.prepare([*live.images.values()])
        self._strategy = applicable_strategy(self._strategy, module)
        if self._rest is not None and not isinstance(self._strategy, Full):
            coded = [code_layer(image, self._rest) for image in live.images.values()]
            self._engine.compile([each for each in coded if each is not None])

    def watch(self, module: torch.nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        """Measure how layers move from here on, if this run does; before the first step, after anything is loaded."""
        if self._watch is not None:
            self._watch.begin(self._reader.read(module, optimizers), self._parent)

    @property
    def measures(self) -> Watch | None:
        """What measures how layers move; None if nothing does. See ``watch_on``."""
        return self._watch

    def watch_on(self, before: Watch | None) -> None:
        """Measure from what was known when this run was closed, of a training that went on; after ``begin``."""
        if self._watch is not None and before is not None:
            self._watch.take_over(before)

    def measure(
        self, step: int, module: torch.nn.Module, optimizers: Sequence[torch.optim.Optimizer]
    ) -> Mapping[str, LayerDrift]:
        """How each layer moved since it was saved, now. Waits for all ranks.

        Args:
            step: Optimizer steps done.
            module: The bare model.
            optimizers: Its optimizers.

        Raises:
            InvalidInputError: This run measures nothing.
            WriteError: Kind ``rank-late``.
        """
        if self._watch is None:
            raise InvalidInputError(
                "this run does not measure how layers move", kind="no-monitor", hint="make it with monitor=True"
            )
        self._read(step, module, optimizers)
        self._watch.log()
        return self._watch.drifts

    @property
    def metrics(self) -> dict[str, float]:
        """The newest measurement, flat: ``drift/layers.0`` and its like; empty if there is none."""
        return {} if self._watch is None else self._watch.metrics()

    def _read(self, step: int, module: torch.nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> LiveLayers:
        """The live state; measured, if this run does that."""
        watch = self._watch
        if watch is None:
            return self._reader.read(module, optimizers)
        parent = self._lineage.parent_to_plan_with()
        return watch.measure(
            lambda: self._reader.read(module, optimizers), step, parent, lambda: self.read_model(module).parameters()
        )

    def save(
        self,
        step: SupportsIndex,
        module: torch.nn.Module,
        optimizers: Sequence[torch.optim.Optimizer],
        write_small_files: Callable[[Path], None],
        *,
        contents: Contents = "full",
        pinned: Collection[int] = (),
    ) -> SaveHandle:
        """Save one checkpoint, ``checkpoint-<step>``.

        Returns when buffers, small tensors and small files are copied; the rest is captured until the next step of an
        optimizer. A step is saved once: asked again, the first save's handle comes back. If a signal's handler raises
        in here (Ctrl-C), what was begun by then goes on, and later calls work as ever.

        Args:
            step: Optimizer steps done.
            module: The bare model.
            optimizers: Its optimizers, one in most runs.
            write_small_files: Puts scheduler, RNG, trainer state and the like into the directory it is given.
            contents: "weights" leaves the optimizers out.
            pinned: Steps that retention must keep.

        Returns:
            The handle; a save that failed for reasons of the disk, or was skipped, says so in ``result()``.

        Raises:
            InvalidInputError: The step is no whole number, or before that of the newest checkpoint.
            UnsupportedError, IncompatibleError: The state cannot be saved at all; at the first save, before training
                went far.
            WriteError: Two saves in a row failed. Unless this one was the second, it was begun all the same.
        """
        called = time.perf_counter()
        self.collect()
        step = check_step(step, self._lineage.newest_step)
        if self._has_peers and self._newest is not None and self._newest.step == step:
            self._engine.drain()  # its end is the same on every rank; whether it has come is not
        if self._newest is not None and self._newest.step == step and self._newest.error is None:
            return self._newest
        if not self._make_room(step):
            return SaveHandle(step, is_skipped=True)
        handle = SaveHandle(step, durable=self._options.get("durable", "local"))
        self._is_prepared = True
        attempt = 0 if self._ballots is None else self._ballots.begin(step)
        try:
            self._attempt(handle, module, optimizers, write_small_files, contents, pinned, called, attempt)
            self._note_begun(handle)
        except BaseException as err:
            is_soft, is_taken = isinstance(err, SOFT_ERRORS), self._engine.has_taken(handle)
            if not is_taken:  # else a signal's handler raised, and the save is the engine's to end
                handle.fail(err)
                if self._ballots is not None:
                    self._ballots.fail(step, attempt, err)
            if is_soft:
                forget_frames(err)
            if is_taken or is_soft:
                self._note_begun(handle)
            if is_taken or not is_soft:
                raise
        if self._is_blocking or self._outcomes.is_torn:
            handle.wait_until_captured()
        self._engine.note_return(handle)
        self.collect()
        self.pace.note_save(step, self._outcomes.last_good, self._tiers.run.free_nbytes, called)
        self._outcomes.raise_repeated()
        return handle

    def _note_begun(self, handle: SaveHandle) -> None:
        self._newest = handle
        self._outcomes.note_begun(handle)

    def _make_room(self, step: int) -> bool:
        """Wait for a save in flight to end, if need be; False if this save is to be skipped instead."""
        limit = self._options.get("max_in_flight", 1)
        when_busy = self._options.get("when_busy", "wait")
        admission = admit(self._engine.num_in_flight, limit=limit, when_busy=when_busy)
        if admission == "skip":
            self.num_skipped += 1
            logger.info("checkpoint-%d was skipped: %d saves are in flight", step, limit)
            return False
        if admission == "wait":
            self._engine.wait_for_room(limit)
            self.collect()
        if self._ballots is not None:
            self._ballots.catch_up(self._lineage.learn)
        return True

    def _attempt(
        self,
        handle: SaveHandle,
        module: torch.nn.Module,
        optimizers: Sequence[torch.optim.Optimizer],
        write_small_files: Callable[[Path], None],
        contents: Contents,
        pinned: Collection[int],
        called: float,
        attempt: int,
    ) -> None:
        self._strategy = applicable_strategy(self._strategy, module)
        live = self._read(handle.step, module, optimizers if contents == "full" else ())
        parent = self._lineage.parent_to_plan_with()
        plan = plan_save(
            live,
            step=handle.step,
            contents=contents,
            strategy=self._strategy,
            rest=self._rest,
            parent=parent,
            is_linkable=self._lineage.is_linkable,
            seat=self._seat,
            drifts={} if self._watch is None else self._watch.drifts,
            shares={} if self._watch is None else self._watch.shares,
        )
        self.pace.note_sizes(layer_statuses(live))
        ballot = None if self._ballots is None else self._ballots.open(handle.step, attempt, plan.choice)
        if coded := [image for image in plan.images if isinstance(image, CodedImage)]:
            self._engine.compile(coded)
        staged = self._stage(plan, attempt)
        try:
            with translate_small_file_errors(staged.path):
                write_small_files(staged.path)
                # An adapter has names that only PEFT understands; it brings files of its own for stock tools.
                if self._seat.rank == 0 and plan.has_whole_weights and not is_adapted(module):
                    (staged.path / INDEX_NAME).write_text(encode_index(plan), encoding="utf-8")
                if self._watch is not None:
                    self._watch.note_save(plan, staged.path, parent)
            job = self._lineage.make_job(plan, staged, handle, pinned, ballot)
            self._engine.submit(job, handle, called=called)
        except BaseException:
            if not self._engine.has_taken(handle):
                self._tiers.run.abandon(staged)
            raise

    def _stage(self, plan: SavePlan, attempt: int) -> StagedCheckpoint:
        try:
            return self._tiers.run.stage(plan.step, plan.nbytes, plan.num_files, attempt=attempt)
        except WriteError as err:
            if err.kind != "no-space":
                raise
        # An old checkpoint may be on its way out.
        self._engine.drain()
        return self._tiers.run.stage(plan.step, plan.nbytes, plan.num_files, attempt=attempt)

    # ---- What became of the saves ----

    def collect(self) -> None:
        """Take note of saves that ended meanwhile, and warn of those that failed; waits for nothing.

        Raises:
            TailorError: A save could not be made for reasons that no later one will be without.
        """
        while self._tiers.notices:
            warnings.warn(self._tiers.notices.popleft(), stacklevel=3)
        self._outcomes.collect()

    def wait_until_captured(self) -> None:
        """Wait until no save refers to the live state any more. ``optimizer.step()`` of torch optimizers does this by
        itself; call it before anything else that changes parameters in place."""
        self._engine.wait_until_captured()

    def drain(self, timeout_secs: float | None = None) -> bool:
        """Wait until no save is in flight, nor on its way to the mirror.

        Returns:
            False if some still are after the timeout.
        """
        started = time.monotonic()
        if not self._engine.drain(timeout_secs):
            return False
        rest = None if timeout_secs is None else max(0.0, timeout_secs - (time.monotonic() - started))
        return self._tiers.drain_mirror(rest)

    def unfinished(self) -> list[SaveHandle]:
        """Saves whose ``result`` would wait; any thread."""
        return self._outcomes.unfinished()

    def close(self) -> None:
        """Finish the saves in flight and let go of the run.

        Raises:
            WriteError: The last save failed, and nothing was saved since.
        """
        self._engine.drain()
        if self._ballots is not None:
            self._ballots.part()
        self._open_run.end()
        self._finalizer.detach()
        try:
            self.collect()
        finally:
            failures = self._outcomes.take_failures()
        if failures:
            raise failures[-1]
