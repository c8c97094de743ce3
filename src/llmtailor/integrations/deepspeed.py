"""DeepSpeed engines, ZeRO stages 1 to 3: ``save_checkpoint`` and ``load_checkpoint`` with our checkpoints behind them.

Two methods of the engine are bound anew, and nothing else is touched. Its ``CheckpointEngine`` would be the seam that
DeepSpeed offers, but that sees pickled trees and file names: loading goes by globs over those files, each rank loads
those of all ranks, and ``latest`` is moved before the other ranks' files are there.

    stock                                      here
    save_dir/global_step4/*.pt                 save_dir/checkpoint-4/: layers, parts of ranks, one manifest
    save_dir/latest: global_step4              save_dir/latest: checkpoint-4, moved when all ranks' files are durable
    save_checkpoint returns when it is written returns at once; the optimizer's next step waits for the capture

Source: DeepSpeed 0.19.8, runtime/engine.py (save_checkpoint, load_checkpoint, _load_checkpoint).
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Unpack

from ..checkpoint import Checkpoint, describe_layers, open_checkpoint
from ..checkpointer import Checkpointer
from ..engine_options import EngineOptions, check_options, engine_options, refuse_interval
from ..errors import InvalidInputError, TailorError, UnsupportedError
from ..manifest import MANIFEST_NAME
from ..meeting import Outcome
from ..monitor import Watch
from ..ranks import join_ranks
from ..resume import Fill, load_named
from ..retention import Keep
from ..storage import list_checkpoints
from ..strategies import SaveContext, Strategy, parse_strategy
from ..writer import SaveHandle
from ..zero import EngineState, ZeroLoad, ZeroReader, read_engine_state, write_engine_state
from .deepspeed_tags import add_tag, find_tag

__all__ = ["DeepSpeedRun", "install"]

_LATEST = "latest"


def install(
    engine: Any,
    *,
    strategy: str | Strategy | Callable[[SaveContext], Collection[str]] = "full",
    keep: Keep | int | str | None = None,
    keep_consistent: bool = True,
    split_experts: bool = False,
    layer_overrides: Mapping[str, Sequence[str]] | None = None,
    **options: Unpack[EngineOptions],
) -> DeepSpeedRun:
    """Give a DeepSpeed engine our checkpoints; on every rank, after ``deepspeed.initialize``.

    ::

        engine, *_ = deepspeed.initialize(model=model, config=config)
        run = install(engine, strategy="parity")
        path, client_state = engine.load_checkpoint("runs/a")    # (None, None) when there is nothing to load
        ...
        engine.save_checkpoint("runs/a", client_state={"epoch": 3})
        run.close()

    Args:
        engine: Of ZeRO stage 1, 2 or 3.
        strategy: Which layers a save writes.
        keep: How many checkpoints to keep, or which (``llmtailor.Keep``); None keeps all.
        keep_consistent: Never remove the newest checkpoint whose layers are all of one step, exactly.
        split_experts: Every expert of a block is a layer of its own.
        layer_overrides: Layers of your own: name -> globs over parameter names.
        **options: See ``EngineOptions``.

    Returns:
        What finishes the saves and lets go of the directory: ``close`` it, or use it in a ``with``.

    Raises:
        InvalidInputError: An unknown strategy, or an option that makes no sense.
        UnsupportedError: The engine spreads its state in a way that is not known here (stage 0, MiCS, hpZ, experts).
    """
    check_options(options)
    refuse_interval(options)
    if not hasattr(engine, "load_checkpoint") or not hasattr(engine, "global_steps"):
        raise InvalidInputError(
            "not a DeepSpeed engine",
            kind="not-an-engine",
            expected="what deepspeed.initialize returns first, or accelerator.prepare under DeepSpeed",
            found=type(engine).__qualname__,
        )
    run = DeepSpeedRun(
        engine,
        {
            "strategy": parse_strategy(strategy),
            "keep": keep,
            "keep_consistent": keep_consistent,
            "split_experts": split_experts,
            "layer_overrides": layer_overrides,
            **options,
        },
    )
    engine.save_checkpoint = run.save_checkpoint
    engine.load_checkpoint = run.load_checkpoint
    return run


class DeepSpeedRun:
    """The checkpoints of one engine; made by ``install``."""

    def __init__(self, engine: Any, options: Mapping[str, Any]) -> None:
        self._engine = engine
        self._options = options
        self._stock_load: Callable[..., Any] = engine.load_checkpoint
        self._checkpointer: Checkpointer | None = None
        self._directory: Path | None = None
        self._latest: set[int] = set()
        """Steps of saves to the open run that ``latest`` is to name."""
        # Of each run that this training saved to or loaded from, open or not, as long as it goes on from there:
        self._newest: dict[Path, tuple[Path, str]] = {}
        """Its newest checkpoint, and that one's digest; on rank 0."""
        self._saves: dict[Path, SaveHandle] = {}
        """Its newest save."""
        self._watches: dict[Path, Watch | None] = {}
        """What measured it until it was closed."""
        self.last_save: SaveHandle | None = None
        """The newest save of this process: ``result()`` waits until it is durable."""

    def save_checkpoint(
        self,
        save_dir: str | Path,
        tag: object = None,
        client_state: Mapping[str, Any] | None = None,
        save_latest: bool = True,
        exclude_frozen_parameters: bool = False,
    ) -> bool:
        """As the engine's, and returns at once; ``last_save`` tells the rest.

        A step is saved once in a directory. Asked again, this waits for that save and gives it the tag, too.

        Args:
            save_dir: The run; checkpoints are ``checkpoint-<global steps>`` in it. The one before is closed, which
                waits for its saves.
            tag: A name to load it by, beside the directory's.
            client_state: Rank 0's is kept: tensors, numbers, text and containers.
            save_latest: Move ``latest`` to it, once it is durable on all ranks.
            exclude_frozen_parameters: Not supported: a checkpoint is whole.

        Returns:
            False if the save failed at once, or was skipped.

        Raises:
            UnsupportedError: Something that cannot be saved; kind ``client-state``: the step was saved with another.
            WriteError: Two saves in a row failed; training may go on. Or the tag of a step that was saved before
                could not be written.
        """
        if exclude_frozen_parameters:
            raise UnsupportedError(
                "frozen parameters cannot be left out of a checkpoint",
                kind="frozen-parameters",
                expected="exclude_frozen_parameters=False",
                hint="they are written once and linked after that: parity and round_robin cost nothing for them",
            )
        engine, checkpointer = self._engine, self._open(Path(save_dir))
        step, name = int(engine.global_steps), None if tag is None else str(tag)
        assert self._directory is not None
        saved = self._saves.get(self._directory)
        if saved is not None and saved.step == step and self._save_again(checkpointer, saved, name, client_state):
            if save_latest and checkpointer.seat.rank == 0:
                assert saved.path is not None
                checkpointer.write_pointer(_LATEST, saved.path.name + "\n")
            return True

        def write_small_files(directory: Path) -> None:
            if checkpointer.seat.rank == 0:
                write_engine_state(engine, directory, client_state=client_state, tag=name)

        if save_latest:
            self._latest = {*self._latest, step}
        handle = checkpointer.save(step, engine.module, [engine.optimizer], write_small_files)
        self.last_save = self._saves[self._directory] = handle
        return handle.error is None

    def _save_again(
        self, checkpointer: Checkpointer, saved: SaveHandle, tag: str | None, client_state: Mapping[str, Any] | None
    ) -> bool:
        """Give the checkpoint of a save one more tag, on all ranks; False if there is none because the save failed."""
        with contextlib.suppress(TailorError):  # it is warned about where all failures are
            saved.result()
        # A rank that heard nothing of the end takes the save for failed.
        if not checkpointer.meeting.tell({"is_saved": saved.path is not None})["is_saved"]:
            return False
        try:
            if checkpointer.seat.rank == 0:
                assert saved.path is not None
                add_tag(saved.path, tag, client_state, checkpointer.write_pointer)
        except BaseException as err:
            checkpointer.meeting.agree(Outcome(error=err))
            raise
        checkpointer.meeting.agree(Outcome())
        return True

    def load_checkpoint(
        self,
        load_dir: str | Path,
        tag: object = None,
        load_module_strict: bool = True,
        load_optimizer_states: bool = True,
        load_lr_scheduler_states: bool = True,
        load_module_only: bool = False,
        custom_load_fn: Callable[..., Any] | None = None,
    ) -> tuple[str | None, dict[str, Any] | None]:
        """As the engine's; a directory that has no checkpoint of ours goes to the engine's own.

        Args:
            load_dir: The run, or one checkpoint of it.
            tag: ``checkpoint-<step>``, ``global_step<step>``, or a save's tag; None takes the newest that verifies.
            load_module_strict: Must be True: weights are loaded by name, all of them.
            load_optimizer_states: False loads weights, counters and schedules.
            load_lr_scheduler_states: Load the learning rate schedule.
            load_module_only: Load weights alone.
            custom_load_fn: Not supported.

        Returns:
            Its directory and the ``client_state`` it was saved with; (None, None) if there is none.

        Raises:
            NotFoundError: No checkpoint has that tag.
            IntegrityError: No checkpoint verifies, or the given one does not.
            IncompatibleError: It is of another model or optimizer.
        """
        if self._checkpointer is not None:
            self._checkpointer.drain()  # what is to be loaded may be under way, and no save may refer to what changes
        path = Path(load_dir)
        is_run = path.is_dir() and any(entry.has_manifest for entry in list_checkpoints(path))
        if not is_run and not (path / MANIFEST_NAME).is_file():  # its first save with us is full
            of_stock: tuple[str | None, dict[str, Any] | None] = self._stock_load(
                str(load_dir),
                tag,
                load_module_strict,
                load_optimizer_states,
                load_lr_scheduler_states,
                load_module_only,
                custom_load_fn,
            )
            if of_stock[0] is not None:
                self._note_loaded(None)
            return of_stock
        if custom_load_fn is not None or not load_module_strict:
            raise UnsupportedError(
                "weights are loaded by name, all of them",
                kind="load-options",
                expected="load_module_strict=True and no custom_load_fn",
            )
        has_optimizer = load_optimizer_states and not load_module_only
        checkpointer = self._open(path if is_run else path.parent)
        if is_run and tag is not None:
            path = find_tag(path, str(tag))
        is_newest = is_run and tag is None
        loaded = self._load(checkpointer, None if is_newest else path, has_optimizer=has_optimizer)
        if loaded is None:
            self._note_loaded(None)
            return None, None
        found, load, state = loaded
        load.finish(None if load_module_only else state, with_schedule=load_lr_scheduler_states)
        checkpointer.meeting.agree(Outcome())
        self._note_loaded(found)
        if checkpointer.seat.rank == 0:
            sys.stderr.write(describe_layers(found) + "\n")
        return str(found.path), state.client_state

    def _load(
        self, checkpointer: Checkpointer, named: Path | None, *, has_optimizer: bool
    ) -> tuple[Checkpoint, ZeroLoad, EngineState] | None:
        """Fill the engine from a checkpoint, or from the newest that verifies, on all ranks; None if there is none."""
        loads: dict[Path, tuple[ZeroLoad, EngineState]] = {}

        def plan(candidate: Checkpoint) -> Fill:
            state = read_engine_state(candidate.path)
            load = ZeroLoad(self._engine, candidate, has_optimizer=has_optimizer)
            loads[candidate.path.resolve()] = load, state
            return load.fill

        if named is not None:
            found: Checkpoint | None = load_named(named, plan, checkpointer.meeting)
        else:
            found = checkpointer.load(plan)
        return None if found is None else (found, *loads[found.path.resolve()])

    def _note_loaded(self, found: Checkpoint | None) -> None:
        """Training goes on from a checkpoint of the open run, or from none of ours; no other run is followed then."""
        self._newest, self._saves, self._watches = {}, {}, {}
        if self._checkpointer is None:
            return
        if found is not None:
            assert self._directory is not None
            self._newest[self._directory] = found.path.resolve(), found.digest
        self._checkpointer.begin(found, self._engine.module, [self._engine.optimizer])

    def _open(self, directory: Path) -> Checkpointer:
        """The checkpointer of a run; one run at a time is open."""
        directory = directory.resolve()
        if self._checkpointer is not None and self._directory == directory:
            return self._checkpointer
        self.close()
        options = self._options
        checkpointer = Checkpointer(
            directory,
            strategy=options["strategy"],
            keep=options["keep"],
            keep_consistent=options["keep_consistent"],
            ranks=join_ranks(),
            on_published=self._note_published,
            **engine_options(options),
        )
        checkpointer.read_with(
            ZeroReader(
                self._engine,
                seat=checkpointer.seat,
                split_experts=options["split_experts"],
                overrides=options["layer_overrides"],
            )
        )
        try:
            checkpointer.read_model(self._engine.module)  # what cannot be saved is said now, not at the first save
            self._follow(checkpointer, directory)
        except BaseException:
            checkpointer.close()
            raise
        self._checkpointer, self._directory = checkpointer, directory
        return checkpointer

    def _follow(self, checkpointer: Checkpointer, directory: Path) -> None:
        """Go on after what this training has in a run that was closed meanwhile; anew if that is gone."""
        known = self._newest.get(directory)
        if known is not None and not _is_there(*known):
            known = None
        told = checkpointer.meeting.tell({"path": None if known is None else str(known[0])})["path"]
        try:
            parent = None if told is None else open_checkpoint(Path(told))
        except BaseException as err:
            checkpointer.meeting.agree(Outcome(error=err))
            raise
        checkpointer.meeting.agree(Outcome())
        checkpointer.begin(parent)
        if parent is not None:
            checkpointer.watch_on(self._watches.get(directory))

    def _note_published(self, checkpoint: Path) -> None:
        """Called by a thread of the open run's, on rank 0."""
        found = open_checkpoint(checkpoint)
        self._newest[checkpoint.parent.resolve()] = checkpoint.resolve(), found.digest
        if found.manifest.step in self._latest and self._checkpointer is not None:
            self._checkpointer.write_pointer(_LATEST, checkpoint.name + "\n")

    @property
    def metrics(self) -> dict[str, float]:
        """How layers moved, as of the newest save; as ``Run.metrics``, and empty if nothing was measured."""
        return {} if self._checkpointer is None else self._checkpointer.metrics

    def wait_until_captured(self) -> None:
        """Wait until no save refers to the live state; before anything but ``engine.step()`` changes it."""
        if self._checkpointer is not None:
            self._checkpointer.wait_until_captured()

    def close(self) -> None:
        """Finish the saves that are under way; raises if the last one failed and nothing was saved since.

        Raises:
            WriteError: What stopped the last save.
        """
        if self._checkpointer is not None:
            assert self._directory is not None
            self._watches[self._directory] = self._checkpointer.measures
            try:
                self._checkpointer.close()
            finally:
                self._checkpointer, self._latest = None, set()

    def __enter__(self) -> DeepSpeedRun:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _is_there(path: Path, digest: str) -> bool:
    """Whether a checkpoint is still there, and still that one; it may have been removed while its run was closed."""
    try:
        return open_checkpoint(path).digest == digest
    except (TailorError, OSError):
        return False
