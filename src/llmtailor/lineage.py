"""What the next save of a run follows, and the job that makes of a plan a checkpoint that follows it.

A plan is made by the training thread, the job is finished by a thread of the writer: in between, the saves before it
are published or fail. So what is linked, and who is the parent, is decided anew when the job is finished.
"""

from __future__ import annotations

import contextlib
import os
import platform
import socket
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from pydantic import ValidationError

from . import __version__
from .checkpoint import Checkpoint, open_checkpoint
from .errors import UnsupportedError
from .local_parts import Seat
from .manifest import FileRecord, LayerRecord, Manifest, Parent, SaveRecord, World, Writer, digest_of
from .save_plan import SavePlan
from .storage import StagedCheckpoint, checkpoint_name
from .tiers import Tiers
from .votes import Verdict
from .writer import (
    Ballot,
    CodedImage,
    LayerImage,
    LinkedFile,
    SaveCost,
    SaveHandle,
    SaveJob,
    WrittenCodes,
    WrittenLayer,
)

__all__ = ["Lineage", "describe_save"]

_NO_DIGEST = "xxh3_128:" + "0" * 32


@dataclass(frozen=True, slots=True, kw_only=True)
class _Planned:
    """A save that may be in flight."""

    plan: SavePlan
    handle: SaveHandle
    names: frozenset[str]
    """Of the files that it writes, unless encoding fails."""


class Lineage:
    """The chain of checkpoints that a run's saves belong to.

    Args:
        tiers: Where checkpoints of this run are. A parent from anywhere else is of another run.
        session: Text that is new each time a run is opened, and the same on every rank.
        seat: Which rank this is.
        on_published: Told of each published checkpoint, after its handle is.
    """

    def __init__(
        self,
        tiers: Tiers,
        session: str,
        seat: Seat = Seat(),  # noqa: B008
        on_published: Callable[[Path], None] | None = None,
    ) -> None:
        self._tiers = tiers
        self._on_published = on_published
        self._session = session
        self.seat = seat
        self._num_branches = 0
        self._lost: frozenset[str] = frozenset()
        """Layers of which some rank could not link its files: they are written anew."""
        self._directories = {tier.path.resolve() for tier in tiers.all}
        self._is_new_branch = True
        self._mutex = threading.Lock()
        self._run_id = self._new_run_id()
        self._parent: Checkpoint | None = None
        self._planned: list[_Planned] = []
        """Of saves that may be in flight, oldest first."""

    def begin(self, parent: Checkpoint | None) -> None:
        """Follow this checkpoint from now on, or none; no save may be in flight."""
        self._parent = parent
        self._is_new_branch = True
        is_continued = parent is not None and self._follows_own()
        self._run_id = parent.manifest.run_id if parent is not None and is_continued else self._new_run_id()
        self._lost = frozenset()

    def _new_run_id(self) -> str:
        """Of a new run; every rank comes to the same by itself."""
        self._num_branches += 1
        return digest_of(f"{self._session}/{self._num_branches}".encode()).removeprefix("xxh3_128:")

    @property
    def newest(self) -> tuple[int, str] | None:
        """Step and digest of the newest checkpoint that is published, as far as this rank knows."""
        with self._mutex:
            return None if self._parent is None else (self._parent.manifest.step, self._parent.digest)

    def learn(self, verdict: Verdict) -> None:
        """Catch up with what became of a save of many ranks; no save may be in flight.

        A rank that did not hear of a published checkpoint follows it from now on.

        Raises:
            NotFoundError, FormatError: That checkpoint is not there, or is another.
        """
        self._lost = self._lost | set(verdict.lost) if verdict.error is not None else frozenset()
        known = self.newest
        if verdict.parent is None or (known is not None and known[1] == verdict.parent):
            return
        assert verdict.parent_step is not None
        found = open_checkpoint(self._tiers.run.path / checkpoint_name(verdict.parent_step))
        if found.digest == verdict.parent:
            with self._mutex:
                self._parent = found
                self._is_new_branch = False

    def _follows_own(self) -> bool:
        """True if the next save follows a checkpoint of this run."""
        return self._parent is not None and self._parent.path.resolve().parent in self._directories

    @property
    def newest_step(self) -> int | None:
        """Step of the newest save, in flight or published; None before the first."""
        with self._mutex:
            if plans := self._in_flight():
                return plans[-1].step
            return None if self._parent is None else self._parent.manifest.step

    def parent_to_plan_with(self) -> Manifest | None:
        """What the next save will follow if the saves in flight succeed; their files have no digests yet."""
        with self._mutex:
            manifest = None if self._parent is None else self._parent.manifest
            for plan in self._in_flight():
                manifest = self._preview(plan)
            return manifest

    def _preview(self, plan: SavePlan) -> Manifest:
        written = {image.layer: _preview_layer(image) for image in plan.images}
        for layer, each in written.items():
            if each.codes is not None and each.codes.base == "exact" and layer in plan.previous:
                codes = replace(each.codes, base_digest=plan.previous[layer].whole_weights.digest)
                written[layer] = replace(each, codes=codes)
        return self._describe(plan, written, (), None)

    def is_linkable(self, layer: str, files: Sequence[FileRecord]) -> bool:
        """True if files of the parent can be linked, or will be there to be linked.

        On several ranks this says what all know: a file that turns out to be gone fails the save, and is known then.
        """
        if self.seat.size > 1:
            return layer not in self._lost
        with self._mutex:
            coming = [each.names for each in self._planned if each.handle.state.is_in_flight]
            return all(any(file.path in names for names in coming) or self._is_there(file) for file in files)

    def _is_there(self, file: FileRecord) -> bool:
        if self._parent is None:  # what this was planned to follow has failed since
            return False
        try:
            return os.stat(self._source(file), follow_symlinks=False).st_size == file.bytes
        except OSError:
            return False

    def _source(self, file: FileRecord) -> Path:
        assert self._parent is not None
        return self._parent.path / file.path

    def make_job(
        self,
        plan: SavePlan,
        staged: StagedCheckpoint,
        handle: SaveHandle,
        pinned: Collection[int],
        ballot: Ballot | None = None,
    ) -> SaveJob:
        """What the writer is told; the plan counts as in flight from now on, as long as the handle does.

        Args:
            plan: The save, decided.
            staged: Its attempt.
            handle: Its caller's.
            pinned: Steps that retention must keep.
            ballot: On several ranks, the vote on it.
        """
        names = frozenset(name for image in plan.images for name in image.names)
        with self._mutex:
            self._planned.append(_Planned(plan=plan, handle=handle, names=names))
        rebased = _RebasedPlan(plan)

        def find_base(layer: str) -> tuple[Path, LayerRecord] | None:
            with self._mutex:
                record = rebased.after(self._parent).previous.get(layer)
                if self._parent is None or record is None or not record.has_exact_weights:
                    return None
                return self._parent.path, record

        def build_manifest(
            written: Mapping[str, WrittenLayer], small: Sequence[FileRecord], cost: SaveCost
        ) -> Manifest:
            with self._mutex, _translate_schema_errors(staged.path):
                return self._describe(rebased.after(self._parent), written, small, cost)

        return SaveJob(
            step=plan.step,
            staged=staged,
            images=plan.images,
            find_base=find_base,
            plan_links=lambda written: self._plan_links(rebased, written),
            build_manifest=build_manifest,
            is_first=lambda: not self._follows_own(),
            on_published=lambda path, manifest, digest: self._note_published(plan, path, manifest, digest),
            tidy_up=lambda path: self._follow_up(path, handle, pinned),
            ballot=ballot,
        )

    def _plan_links(self, rebased: _RebasedPlan, written: Mapping[str, WrittenLayer]) -> list[LinkedFile]:
        with self._mutex:
            plan = rebased.after(self._parent)
            if self._is_new_branch:
                self._tiers.leave_branch(plan.step, is_first=not self._follows_own())
                self._is_new_branch = False
            return [
                LinkedFile(record=file, source=self._source(file), layer=layer) for layer, file in plan.links(written)
            ]

    def _note_published(self, plan: SavePlan, path: Path, manifest: Manifest, digest: str) -> None:
        with self._mutex:
            self._parent = Checkpoint(path=path, manifest=manifest, digest=digest)
            # It refers to the live state, which may be given up before the next save looks here.
            self._planned = [each for each in self._planned if each.plan is not plan]

    def _follow_up(self, path: Path, handle: SaveHandle, pinned: Collection[int]) -> None:
        try:
            if self._on_published is not None:
                self._on_published(path)
        finally:
            self._tiers.follow_up(path, handle, pinned)

    def _in_flight(self) -> list[SavePlan]:
        self._planned = [each for each in self._planned if each.handle.state.is_in_flight]
        return [each.plan for each in self._planned]

    def _describe(
        self, plan: SavePlan, written: Mapping[str, WrittenLayer], small: Sequence[FileRecord], cost: SaveCost | None
    ) -> Manifest:
        return describe_save(
            plan,
            written,
            small,
            run_id=self._run_id,
            save_index=plan.save_index,
            parent=self._parent,
            num_ranks=self.seat.size,
            save=None if cost is None else _record_cost(cost),
        )


class _RebasedPlan:
    """A plan after the checkpoint that is its parent in the end; worked out once for each, not for each layer."""

    def __init__(self, plan: SavePlan) -> None:
        self._plan = plan
        self._parent: Checkpoint | None = None
        self._found: SavePlan | None = None

    def after(self, parent: Checkpoint | None) -> SavePlan:
        if self._found is None or parent is not self._parent:
            self._parent = parent
            self._found = self._plan.rebase(None if parent is None else parent.manifest)
        return self._found


def describe_save(
    plan: SavePlan,
    written: Mapping[str, WrittenLayer],
    small: Sequence[FileRecord],
    *,
    run_id: str,
    save_index: int,
    parent: Checkpoint | None,
    num_ranks: int,
    save: SaveRecord | None,
) -> Manifest:
    """The manifest of a save as this rank knows it.

    With several ranks that is no whole checkpoint, so it is not checked; ``votes.merge_votes`` makes a whole one.

    Raises:
        ValidationError: Alone: the format cannot describe it.
    """
    build: Callable[..., Manifest] = Manifest if num_ranks == 1 else Manifest.model_construct
    return build(
        run_id=run_id,
        step=plan.step,
        save_index=save_index,
        created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        parent=None if parent is None else Parent(step=parent.manifest.step, digest=parent.digest),
        contents=plan.contents,
        strategy=plan.strategy,
        world=World(size=num_ranks, sharding="none" if plan.layout is None else "sharded", layout=plan.layout),
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
        files=tuple(sorted(small, key=lambda file: file.path)),
        save=save,
    )


def _preview_layer(image: LayerImage | CodedImage) -> WrittenLayer:
    """What will be written, as far as it is known."""

    def preview(name: str, nbytes: int) -> FileRecord:
        return FileRecord(path=name, bytes=nbytes, digest=_NO_DIGEST)

    if isinstance(image, LayerImage):
        weights, optimizer = image.weights, image.optimizer
        return WrittenLayer(
            weights=None if weights is None else preview(weights.name, weights.nbytes),
            optimizer=None if optimizer is None else preview(optimizer.name, optimizer.nbytes),
            update_count=None,
        )
    weights = image.live.whole_weights
    codes = WrittenCodes(
        file=preview(image.name, image.nbytes),
        rest=image.rest.text,
        base=image.base,
        base_digest=None,
        deviations={},
    )
    return WrittenLayer(
        weights=None if image.base == "exact" else preview(weights.name, image.weights_nbytes),
        optimizer=None,
        update_count=None,
        codes=codes,
    )


def _record_cost(cost: SaveCost) -> SaveRecord:
    return SaveRecord(
        stall_secs=round(cost.stall_secs, 6),
        capture_secs=round(cost.capture_secs, 6),
        write_secs=round(cost.write_secs, 6),
        pool_bytes=cost.pool_nbytes,
    )


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
