"""The one object behind every integration: saves a run's checkpoints, finds the one to resume from.

    save:   strategy picks layers -> images -> writer (files, links, small files, manifest) -> publish -> retention
    resume: newest that verifies -> the run goes on from it

A failed save never stops training and never touches an older checkpoint: it warns at once, the next save raises if it
fails too, and ``close`` raises if nothing was saved since.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import platform
import secrets
import socket
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from pydantic import ValidationError
from safetensors import SafetensorError

from . import __version__
from .checkpoint import Checkpoint, open_checkpoint
from .errors import (
    FormatError,
    InvalidInputError,
    NotFoundError,
    SaveFailedWarning,
    StrategyIgnoredWarning,
    TailorError,
    UnsupportedError,
    WriteError,
)
from .manifest import INDEX_NAME, FileRecord, Manifest, Parent, World, Writer
from .model_state import ModelState, is_adapted, read_model
from .resume import find_resumable
from .retention import Kept, choose_removals
from .save_plan import Contents, SavePlan, encode_index, plan_save
from .storage import LocalFileSystem, RunDirectory, list_checkpoints
from .strategies import Full, SaveContext, Strategy, parse_strategy
from .writer import LinkedFile, SaveHandle, SaveJob, SaveStats, WrittenLayer, write_checkpoint

__all__ = ["Checkpointer"]

logger = logging.getLogger(__name__)


class Checkpointer:
    """Saves and finds the checkpoints of one run; holds the run's lock until ``close``.

    Called on rank 0 of a single-process run.

    Args:
        directory: The run.
        strategy: Which layers a save writes: text, object, or a callable.
        keep: How many checkpoints to keep; None keeps all.
        keep_consistent: Never remove the newest checkpoint whose layers are all of one step.
        split_experts: Every expert is a layer of its own.
        layer_overrides: Layers of your own: name -> globs over parameter names.
        filesystem: For tests.

    Raises:
        InvalidInputError: An unknown strategy.
        LockedError: Another process writes this run.
        WriteError: The directory cannot be written.
    """

    def __init__(
        self,
        directory: Path | str,
        *,
        strategy: str | Strategy | Callable[[SaveContext], Collection[str]] = "full",
        keep: int | None = None,
        keep_consistent: bool = True,
        split_experts: bool = False,
        layer_overrides: Mapping[str, Sequence[str]] | None = None,
        filesystem: LocalFileSystem | None = None,
    ) -> None:
        self._strategy = parse_strategy(strategy)
        self._keep = keep
        self._keep_consistent = keep_consistent
        self._split_experts = split_experts
        self._layer_overrides = layer_overrides
        self._directory = Path(directory)
        self._run_id = secrets.token_hex(16)
        self._parent: Checkpoint | None = None
        self._newest: SaveHandle | None = None
        self._failure: TailorError | None = None
        self._run = RunDirectory(self._directory, filesystem)

    @property
    def directory(self) -> Path:
        return self._directory

    def read_model(self, module: torch.nn.Module) -> ModelState:
        """The model as this run saves it: its layers, schema and live tensors."""
        return read_model(module, split_experts=self._split_experts, overrides=self._layer_overrides)

    def find(self, *, consistent: bool = False, max_rollback_steps: int | None = None) -> Checkpoint | None:
        """The newest checkpoint that verifies; see ``find_resumable``."""
        return find_resumable(self._run, consistent=consistent, max_rollback_steps=max_rollback_steps)

    def begin(self, parent: Checkpoint | None) -> None:
        """Start a lineage: the next save follows ``parent``, or nothing.

        Without a parent the next save is full. With one, layers that it does not write are linked from it.
        """
        self._parent = parent
        self._newest = None
        is_continued = parent is not None and self._follows_own()
        self._run_id = parent.manifest.run_id if parent is not None and is_continued else secrets.token_hex(16)

    def _follows_own(self) -> bool:
        """True if the next save follows a checkpoint of this directory."""
        return self._parent is not None and self._parent.path.resolve().parent == self._directory.resolve()

    def save(
        self,
        step: int,
        module: torch.nn.Module,
        optimizers: Sequence[torch.optim.Optimizer],
        write_small_files: Callable[[Path], None],
        *,
        contents: Contents = "full",
        pinned: Collection[int] = (),
    ) -> SaveHandle:
        """Save one checkpoint, ``checkpoint-<step>``.

        A step is saved once: asked again, the first save's handle comes back.

        Args:
            step: Optimizer steps done.
            module: The bare model.
            optimizers: Its optimizers, one in most runs.
            write_small_files: Puts scheduler, RNG, trainer state and the like into the directory it is given.
            contents: "weights" leaves the optimizers out.
            pinned: Steps that retention must keep.

        Returns:
            The handle; a save that failed for reasons of the disk says so in ``result()``.

        Raises:
            InvalidInputError: The step is before that of the newest checkpoint.
            UnsupportedError, IncompatibleError: The state cannot be saved at all; at the first save, before training
                went far.
            WriteError: This save failed, and so did the one before.
        """
        if self._newest is not None and self._newest.step == step and self._newest.error is None:
            return self._newest
        if self._parent is not None and step < self._parent.manifest.step:
            raise InvalidInputError(
                "the step goes backwards",
                kind="step-order",
                expected=f"a step after {self._parent.manifest.step}, the newest checkpoint of this run",
                found=step,
                hint="resume from an older checkpoint to go back; the newer ones are then set aside",
            )
        started = time.perf_counter()
        try:
            handle = self._attempt(step, module, optimizers, write_small_files, contents, started)
        except (WriteError, FormatError, NotFoundError) as err:
            handle = SaveHandle(step, error=err)
        self._newest = handle
        self._note_outcome(handle)
        if handle.error is None:
            self._apply_retention(pinned)
        return handle

    def _note_outcome(self, handle: SaveHandle) -> None:
        before, self._failure = self._failure, handle.error
        if handle.error is None:
            return
        logger.error("checkpoint-%d was not saved: %s", handle.step, handle.error)
        warnings.warn(
            f"checkpoint-{handle.step} was not saved; training goes on and older checkpoints are intact\n"
            f"{handle.error}",
            SaveFailedWarning,
            stacklevel=3,
        )
        if before is not None:
            raise handle.error from before

    def _attempt(
        self,
        step: int,
        module: torch.nn.Module,
        optimizers: Sequence[torch.optim.Optimizer],
        write_small_files: Callable[[Path], None],
        contents: Contents,
        started: float,
    ) -> SaveHandle:
        parent = self._parent
        plan = plan_save(
            self.read_model(module),
            optimizers,
            step=step,
            contents=contents,
            strategy=self._strategy_for(module),
            parent=None if parent is None else parent.manifest,
            is_linkable=self._is_linkable,
        )

        def write_all_small_files(directory: Path) -> None:
            with _translate_small_file_errors(directory):
                write_small_files(directory)
                # An adapter has names that only PEFT understands; it brings files of its own for stock tools.
                if not is_adapted(module):
                    (directory / INDEX_NAME).write_text(encode_index(plan), encoding="utf-8")

        job = SaveJob(
            step=step,
            is_first=not self._follows_own(),
            images=plan.images,
            links=[LinkedFile(record=file, source=self._source(file)) for file in plan.links],
            write_small_files=write_all_small_files,
            build_manifest=lambda written, small: self._build_manifest(plan, written, small),
        )
        path, manifest, digest = write_checkpoint(self._run, job)
        self._parent = Checkpoint(path=path, manifest=manifest, digest=digest)
        total_secs = time.perf_counter() - started
        stats = SaveStats(
            written_nbytes=manifest.written_nbytes,
            linked_nbytes=manifest.nbytes - manifest.written_nbytes,
            num_layers_written=len(plan.images),
            num_layers=len(plan.layers),
            stall_secs=total_secs,
            total_secs=total_secs,
        )
        return SaveHandle(step, path=path, manifest=manifest, stats=stats)

    def _strategy_for(self, module: torch.nn.Module) -> Strategy:
        if not is_adapted(module) or isinstance(self._strategy, Full):
            return self._strategy
        # PEFT's own file always holds the whole adapter as it is now: beside it, a composite would be another model.
        warnings.warn(
            f"{self._strategy.text} is not applied to adapters: they are saved whole, as PEFT's own file is",
            StrategyIgnoredWarning,
            stacklevel=2,
        )
        return Full()

    def _build_manifest(
        self, plan: SavePlan, written: Mapping[str, WrittenLayer], small: Sequence[FileRecord]
    ) -> Manifest:
        parent = self._parent
        with _translate_schema_errors(self._directory):
            return Manifest(
                run_id=self._run_id,
                step=plan.step,
                save_index=plan.save_index,
                created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                parent=None if parent is None else Parent(step=parent.manifest.step, digest=parent.digest),
                contents=plan.contents,
                strategy=plan.strategy,
                world=World(size=1, sharding="none"),
                writer=Writer(
                    llmtailor=__version__,
                    torch=torch.__version__,
                    python=platform.python_version(),
                    host=socket.gethostname(),
                    pid=os.getpid(),
                ),
                tensors=plan.tensors,
                optimizers=plan.optimizers,
                layers=plan.record_layers(written),
                files=tuple(small),
            )

    def _source(self, file: FileRecord) -> Path:
        assert self._parent is not None
        return self._parent.path / file.path

    def _is_linkable(self, file: FileRecord) -> bool:
        try:
            return os.stat(self._source(file), follow_symlinks=False).st_size == file.bytes
        except OSError:
            return False

    def _apply_retention(self, pinned: Collection[int]) -> None:
        """Remove what may go; a failure here costs disk, never a checkpoint, so it only warns."""
        if self._keep is None or self._keep <= 0:
            return
        try:
            entries = [entry for entry in list_checkpoints(self._directory) if entry.has_manifest]
            if len(entries) <= self._keep:
                return
            kept = [Kept(step=entry.step, is_consistent=_is_consistent(entry.path)) for entry in entries]
            doomed = choose_removals(kept, limit=self._keep, pinned=pinned, keep_consistent=self._keep_consistent)
            for entry in entries:
                if entry.step in doomed:
                    self._run.remove(entry.path)
        except (TailorError, OSError) as err:
            warnings.warn(f"an old checkpoint could not be removed: {err}", SaveFailedWarning, stacklevel=3)

    def close(self) -> None:
        """Let go of the run.

        Raises:
            WriteError: The last save failed, and nothing was saved since.
        """
        self._run.close()
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure


def _is_consistent(path: Path) -> bool:
    try:
        return open_checkpoint(path).manifest.is_consistent
    except FormatError:
        return False


@contextlib.contextmanager
def _translate_small_file_errors(directory: Path) -> Iterator[None]:
    """Errors of the trainer's own writing: torch.save says RuntimeError of a full disk, safetensors SafetensorError."""
    try:
        yield
    except TailorError:
        raise
    except (OSError, RuntimeError, SafetensorError) as err:
        free = LocalFileSystem().free_space(directory).nbytes
        is_full = getattr(err, "errno", None) == errno.ENOSPC or (free is not None and free < 2**20)
        raise WriteError(
            f"cannot write the trainer's small files: {next(iter(str(err).splitlines()), type(err).__name__)}",
            kind="no-space" if is_full else "io",
            path=directory,
            hint="free space; older checkpoints were not touched" if is_full else "see the error this came from",
        ) from err


@contextlib.contextmanager
def _translate_schema_errors(directory: Path) -> Iterator[None]:
    """A checkpoint that the format cannot describe, such as two small files whose names differ in case alone."""
    try:
        yield
    except ValidationError as err:
        raise UnsupportedError(
            f"this checkpoint cannot be described: {err.errors(include_url=False)[0]['msg']}",
            kind="manifest-schema",
            path=directory,
            hint="see docs/spec/checkpoint-v1.md, section 4; older checkpoints were not touched",
        ) from err
