"""A ``StorageWriter`` and ``AsyncStager`` that makes checkpoints of our own: linked, verified, published at once.

    stage                (all ranks)    async_save alone: what is chosen goes to host memory
    set_up, local plan   (all ranks)
    prepare_global_plan  (coordinator)  has all decided alike? then each rank is told the attempt's name
    write_data           (all ranks)    files, links -> fsync -> moved into the attempt -> a vote, as a WriteResult
    finish               (coordinator)  the votes -> one manifest -> rename

No message but DCP's own. A rank that fails has DCP raise ``CheckpointException`` on all; nothing is published then, and
what the attempt left is swept when the next begins.
"""

from __future__ import annotations

import logging
import os
import re
import secrets
import threading
import weakref
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan as DcpSavePlan
from torch.distributed.checkpoint.planner import SavePlanner, WriteItem, WriteItemType
from torch.distributed.checkpoint.staging import AsyncStager, DefaultStager, StagingOptions
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future

from ...checkpoint import Checkpoint
from ...errors import InvalidInputError, TailorError, TailorWarning, UnsupportedError
from ...lineage import describe_save
from ...local_parts import Seat
from ...manifest import INDEX_NAME, FileRecord, Manifest, digest_of, encode_manifest
from ...pruning import apply_retention
from ...retention import Keep
from ...save_plan import SavePlan, encode_index
from ...storage import RunDirectory, SharedCheckpoint, StagingSeat
from ...votes import Fault, Vote, judge, merge_votes
from ...writer import LayerImage
from ...writer.ballot import find_elsewhere, make_vote
from .layer_files import make_images, write_file, write_layers
from .lineage import Assignment, DcpLineage
from .planner import LocalSavePlan, SaveMeta, TailorPlanner
from .reader import TailorReader
from .small_files import NAMES, encode_names, encode_rest, rest_image
from .staging import STAGED_KEY, HostMemory, StagedState, stage_state
from .state_names import Path as KeyPath

__all__ = ["TailorWriter"]

logger = logging.getLogger(__name__)

_STEP = re.compile(r"(?:.*[^0-9])?([0-9]+)")
_VOTE_KEY = "llmtailor.vote"


class TailorWriter(StorageWriter, AsyncStager):
    """Writes what ``TailorPlanner`` chose into a run, as ``checkpoint-<step>``, and links the rest.

    ::

        planner = TailorPlanner("parity", model=model, optimizers=optimizer)
        reader = TailorReader("runs/a")
        writer = TailorWriter("runs/a", planner, reader=reader)
        dcp.save(state_dict, checkpoint_id=f"step-{step}", storage_writer=writer, planner=planner)

    Every rank makes one, alike, and keeps it; the coordinator holds the run's lock from its first save to ``close``.
    The first save writes all layers, unless ``reader`` loaded a checkpoint of the run: then it follows that.

    For ``async_save`` set ``step`` before, so that only the layers that are chosen are copied to host memory: DCP tells
    the step to a writer only after that, and without it all are.

    Args:
        run_directory: The run; made if it is not there. One that all ranks share.
        planner: The one that is passed to DCP; it is asked what to stage. Without it all is staged.
        reader: What the training was resumed with.
        step: Of the next save, if ``checkpoint_id`` does not end in it.
        keep: How many checkpoints to keep, or which (``llmtailor.Keep``); None keeps all.
        process_group: The one that is passed to DCP, if it is not of all ranks in their order.
    """

    # Whoever waits for the future knows what there is to know: ``stage`` returns when all is copied.
    _synchronize_after_execute = False

    def __init__(
        self,
        run_directory: str | os.PathLike[str],
        planner: TailorPlanner | None = None,
        *,
        reader: TailorReader | None = None,
        step: int | None = None,
        keep: Keep | int | str | None = None,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        self.directory = Path(run_directory)
        self.step = step
        """Of the next save; None if ``checkpoint_id`` says it."""
        self._planner = planner
        self._keep = keep
        self._group = process_group
        self._lineage = DcpLineage(self.directory, reader)
        self._memory = HostMemory()
        self._session = secrets.token_hex(8)
        self._num_attempts = 0
        self._run: RunDirectory | None = None
        self._run_session = ""
        self._run_id: str | None = None
        self._staged: SharedCheckpoint | None = None
        self._own: Manifest | None = None
        self._mutex = threading.Lock()
        self._finalizer: weakref.finalize[..., Any] | None = None

    def __reduce__(self) -> Any:
        raise UnsupportedError(
            "a TailorWriter stays in the process that trains",
            kind="dcp-process",
            expected="async_checkpointer_type=AsyncCheckpointerType.THREAD, DCP's default",
            found="AsyncCheckpointerType.PROCESS",
        )

    # ---- AsyncStager ----

    def stage(self, state_dict: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Copy what the next save writes to host memory; called by ``async_save`` on all ranks, in the training thread.

        Returns:
            A state dict of one key, for ``TailorPlanner``. The model may be changed when this returns.

        Raises:
            InvalidInputError, IncompatibleError, UnsupportedError: As ``TailorPlanner``; the state cannot be saved.
        """
        if self._planner is None:
            staged: Any = DefaultStager(StagingOptions(False, False, False, False)).stage(state_dict)
            return dict(staged)
        named = self._planner.read(state_dict)
        plan, parent = None, self._lineage.find_parent()
        if self.step is not None and (parent is None or self.step > parent.manifest.step):
            meta = self._meta(self.step)
            plan = self._planner.decide(named, meta)
        layers = _written_layers(plan) if plan is not None else frozenset(layer.name for layer in named.live.layers)
        names = frozenset(named.written_by(self._seat(), layers))
        staged_named = stage_state(named, names, self._memory)
        digest = None if parent is None else parent.digest
        return {STAGED_KEY: StagedState(named=staged_named, plan=plan, parent=digest)}

    def synchronize_staging(self) -> None:
        """Nothing to wait for."""

    def close(self) -> None:
        """Let go of the run and of memory; after the last save, on every rank. More than once is fine."""
        self._abandon()
        if self._finalizer is not None:
            self._finalizer()
        self._run, self._run_session = None, ""
        self._memory.drop()

    # ---- StorageWriter ----

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Begin a checkpoint; called on all ranks where ``checkpoint_id`` was given.

        Raises:
            InvalidInputError: No number stands at its end.
        """
        if checkpoint_id is None:
            return
        name = Path(checkpoint_id).name
        match = _STEP.fullmatch(name)
        if match is None:
            raise InvalidInputError(
                "the checkpoint's name does not say its step",
                kind="unknown-step",
                expected="checkpoint_id that ends in the step: step-400, checkpoint-400",
                found=name,
                hint="or leave it out, and set TailorWriter.step",
            )
        self.step = int(match.group(1))

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Whether DCP may pick this writer by the id alone: it may not."""
        return False

    def storage_meta(self) -> SaveMeta:
        """What the planner decides by; called on all ranks, first of all.

        Raises:
            InvalidInputError: The step is not known, or not after the newest checkpoint's.
        """
        self._abandon()
        if self.step is None:
            raise InvalidInputError(
                "the step of this save is not known",
                kind="unknown-step",
                expected='checkpoint_id="step-400", or TailorWriter.step = 400 before the save',
            )
        self._lineage.check_step(self.step)
        return self._meta(self.step)

    def _meta(self, step: int) -> SaveMeta:
        return SaveMeta(
            step=step,
            parent=self._lineage.find_parent(),
            can_link=not self._lineage.has_failed,
            seat=self._seat(),
        )

    def _seat(self) -> Seat:
        """Which rank this is. Layers that all ranks hold are dealt out."""
        if not dist.is_available() or not dist.is_initialized():
            return Seat()
        return Seat(rank=dist.get_rank(self._group), size=dist.get_world_size(self._group), spread=True)

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Called on all ranks; the coordinator takes the run's lock.

        Raises:
            UnsupportedError: The ranks do not come together, or are others than were expected.
            LockedError: Another process writes this run.
            WriteError: The directory cannot be written.
        """
        rank = kwargs.get("rank", 0)
        if not kwargs.get("use_collectives", True) or rank != self._seat().rank:
            raise UnsupportedError(
                "a run is written by all ranks of a process group together",
                kind="dcp-ranks",
                expected=f"use_collectives=True; this process as rank {self._seat().rank} of them",
                found=f"rank {rank}, use_collectives={kwargs.get('use_collectives', True)}",
                hint="give TailorWriter the process_group that DCP is given; no_dist=True only without one",
            )
        if is_coordinator and self._run is None:
            self._open_run(self._session)

    def _open_run(self, session: str) -> RunDirectory:
        if self._run is None or self._run_session != session:
            seat = StagingSeat(rank=self._seat().rank, session=session)
            self._run = RunDirectory(self.directory, seat=seat, on_warning=_log)
            self._run_session = session
            # Whoever forgets to close it lets others in, when it is gone.
            self._finalizer = weakref.finalize(self, self._run.close)
        return self._run

    def prepare_local_plan(self, plan: DcpSavePlan) -> DcpSavePlan:
        """Called on all ranks.

        Raises:
            InvalidInputError: The plan is not of ``TailorPlanner``.
        """
        if not isinstance(plan, LocalSavePlan):
            raise InvalidInputError(
                "TailorWriter writes what TailorPlanner planned",
                kind="dcp-objects",
                expected="planner=TailorPlanner(...)",
                found=type(plan).__name__,
            )
        return plan

    def prepare_global_plan(self, plans: list[DcpSavePlan]) -> list[DcpSavePlan]:
        """Compare what the ranks decided, and name the attempt; on the coordinator.

        Raises:
            WriteError: Kind ``ranks-disagree``.
        """
        seat = self._seat()
        told = [plan for plan in plans if isinstance(plan, LocalSavePlan)]
        assert len(told) == len(plans)
        own = told[0]
        if len(plans) != seat.size:
            raise UnsupportedError(
                "the ranks that save are not those that were expected",
                kind="dcp-ranks",
                expected=seat.size,
                found=len(plans),
                hint="give TailorWriter the process_group that DCP is given",
            )
        fault = _find_other(told)
        if fault is not None and all(plan.parent == own.parent for plan in told):
            raise fault.to_error(own.step)
        # A rank that follows another checkpoint is told which is the newest; an error would not reach its writer.
        assignment = self._assign(own.step, fault)
        return [replace(plan, storage_data=assignment) for plan in told]

    def _assign(self, step: int, fault: Fault | None) -> Assignment:
        parent = self._lineage.find_parent()
        self._num_attempts += 1
        if parent is not None:
            self._run_id = parent.manifest.run_id
        elif self._run_id is None:
            self._run_id = digest_of(self._session.encode()).removeprefix("xxh3_128:")
        return Assignment(
            session=self._session,
            attempt=self._num_attempts,
            step=step,
            run_id=self._run_id,
            save_index=0 if parent is None else parent.manifest.save_index + 1,
            num_ranks=self._seat().size,
            parent_step=None if parent is None else parent.manifest.step,
            parent=None if parent is None else parent.digest,
            fault=fault,
        )

    def write_data(self, plan: DcpSavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write and link this rank's files, durably; called on all ranks.

        Returns:
            A result for each item, and this rank's vote.

        Raises:
            TailorError: Nothing will be published.
        """
        assignment = plan.storage_data
        assert isinstance(assignment, Assignment)
        assert isinstance(planner, TailorPlanner)
        parent = self._lineage.find_parent()
        self._lineage.begin(assignment)
        try:
            if assignment.fault is not None:
                self._lineage.catch_up(assignment)
                raise assignment.fault.to_error(assignment.step)
            vote = self._write(plan.items, planner, assignment, parent)
        except BaseException:
            self._abandon()
            raise
        finally:
            if planner.staged is not None:
                self._memory.give_back(planner.staged)
            planner.forget()
        results = [
            WriteResult(index=item.index, size_in_bytes=_nbytes_of(item), storage_data=None) for item in plan.items
        ]
        results.append(
            WriteResult(index=MetadataIndex(_VOTE_KEY), size_in_bytes=0, storage_data=vote.model_dump_json())
        )
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future

    def _write(
        self, items: Sequence[WriteItem], planner: TailorPlanner, assignment: Assignment, parent: Checkpoint | None
    ) -> Vote:
        seat, named, plan = self._seat(), planner.named, planner.save_plan
        by_key = {item.index.fqn: item for item in items}

        def resolve(name: str) -> torch.Tensor:
            if name in named.notes:
                return named.parts[name].local.tensor
            found: Any = planner.resolve_data(by_key[named.parts[name].key])
            return found  # type: ignore[no-any-return]

        if torch.cuda.is_available():  # our threads have streams of their own
            torch.cuda.synchronize()
        images = make_images(named, seat, _written_layers(plan), resolve)
        staged = self._start(assignment, plan, images)
        written = write_layers(staged, images)
        for layer, file in plan.links(written):
            assert parent is not None
            try:
                staged.link_file(file, parent.path / file.path)
            except TailorError as err:
                err.layer = layer
                raise
        small = [*self._write_rest(staged, items, planner), *staged.adopt_rest()]
        self._own = own = describe_save(
            plan,
            written,
            small,
            run_id=assignment.run_id,
            save_index=assignment.save_index,
            parent=parent,
            num_ranks=assignment.num_ranks,
            save=None,
        )
        vote = make_vote(seat.rank, own.step, self.directory, choice=plan.choice, own=own)
        staged.deliver(vote.model_dump_json().encode())
        if seat.rank != 0:  # what is left of it is empty, and nobody tells this rank when all is done
            self._abandon()
        return vote

    def _start(self, assignment: Assignment, plan: SavePlan, images: Sequence[LayerImage]) -> SharedCheckpoint:
        nbytes = sum(image.nbytes for image in images)
        num_files = sum(len(image.files) for image in images) + plan.num_files
        run = self._open_run(assignment.session)
        staged = run.stage(assignment.step, nbytes, num_files, attempt=assignment.attempt)
        assert isinstance(staged, SharedCheckpoint)
        self._staged = staged
        return staged

    def _write_rest(
        self, staged: SharedCheckpoint, items: Sequence[WriteItem], planner: TailorPlanner
    ) -> list[FileRecord]:
        """This rank's small files; those that are left for ``adopt_rest`` are not among the records."""
        rank, named = self._seat().rank, planner.named
        paths: dict[str, KeyPath] = {entry.key: entry.path for entry in named.entries if entry.role == "rest"}
        values = {paths[key]: item for item in items if (key := item.index.fqn) in paths}
        data = {path: _bytes_of(planner.resolve_data(item)) for path, item in values.items() if _is_bytes(item)}
        tensors = {path: item for path, item in values.items() if not _is_bytes(item)}
        files = encode_rest(rank, data, [(path, item.index.fqn) for path, item in tensors.items()])
        if rank == 0:
            files[NAMES] = encode_names(named.entries, named.ties)
            if planner.save_plan.has_whole_weights:
                files[INDEX_NAME] = encode_index(planner.save_plan).encode()
        for name, content in files.items():
            path = staged.path / name
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(content)
        if not tensors:
            return []
        parts = {item.index.fqn: planner.rest_part(item.index.fqn) for item in tensors.values()}
        return [write_file(staged, rest_image(rank, parts))]

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Publish; on the coordinator, when all ranks have written.

        Raises:
            WriteError: Nothing was published.
        """
        try:
            published = self._publish(results)
        except BaseException:
            self._abandon()
            raise
        self._staged = None
        self._lineage.note_published(published)
        self.step = None
        assert self._run is not None
        error = apply_retention(self._run, keep=self._keep)
        if error is not None:
            logger.warning("an old checkpoint could not be removed: %s", error)

    def _publish(self, results: list[list[WriteResult]]) -> Checkpoint:
        staged, own, run = self._staged, self._own, self._run
        assert staged is not None
        assert own is not None
        assert run is not None
        told = [result.storage_data for each in results for result in each if result.index.fqn == _VOTE_KEY]
        votes = {vote.rank: vote for vote in map(Vote.model_validate_json, told)}
        fault = judge(votes[0], votes, size=self._seat().size, waited_secs=0.0) or find_elsewhere(staged, votes)
        if fault is not None:
            raise fault.to_error(own.step)
        merged = merge_votes(own, votes)
        encoded, digest = encode_manifest(merged)
        staged.seal(encoded)
        path = run.publish(staged, merged.step, is_first=merged.parent is None)
        return Checkpoint(path=path, manifest=merged, digest=digest)

    def _abandon(self) -> None:
        """Remove what an attempt left that was not published."""
        with self._mutex:
            staged, self._staged = self._staged, None
        if staged is not None and self._run is not None:
            self._run.abandon(staged)


def _find_other(plans: Sequence[LocalSavePlan]) -> Fault | None:
    """A rank that is about to save something else than the coordinator."""
    own = plans[0]
    for rank, plan in enumerate(plans):
        if (plan.step, plan.parent, plan.choice) != (own.step, own.parent, own.choice):
            text = (
                f"steps, choices of layers or the checkpoints that ranks follow differ: rank {rank} has step "
                f"{plan.step}, choice {plan.choice}, parent {plan.parent}; rank 0 {own.step}, {own.choice}, "
                f"{own.parent}"
            )
            return Fault(kind="ranks-disagree", text=text)
    return None


def _written_layers(plan: SavePlan) -> frozenset[str]:
    return frozenset(layer.name for layer in plan.layers) - plan.kept


def _is_bytes(item: WriteItem) -> bool:
    return item.type is WriteItemType.BYTE_IO


def _bytes_of(data: Any) -> bytes:
    return bytes(data.getbuffer())


def _nbytes_of(item: WriteItem) -> int:
    if item.tensor_data is None:
        return 0
    return item.tensor_data.chunk.sizes.numel() * item.tensor_data.properties.dtype.itemsize


def _log(warning: TailorWarning) -> None:
    # Not a warning of Python's: where those are errors, it would end a save that is published.
    logger.warning("%s", warning)
