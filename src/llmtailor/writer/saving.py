"""One save on its way through the engine's threads: what of it is done, and whether it may still succeed."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import xxhash

from ..errors import IntegrityError
from ..manifest import FileRecord, Manifest
from ..storage import StagedCheckpoint, StagedFile
from .bell import Bell
from .coded_images import CodedImage
from .coding import EncodedLayer
from .devices import Fences, fence
from .handle import SaveHandle, SaveStats
from .images import FileImage, LayerImage
from .job import SaveCost, SaveJob, WrittenCodes, WrittenLayer
from .pool import HostPool, Piece
from .watch import Watch, watch

__all__ = ["FilePiece", "GrowingFile", "Saving", "Stopped"]


class Stopped(Exception):  # noqa: N818
    """The save has failed elsewhere; what a thread was doing for it does not matter any more."""


@dataclass(slots=True, kw_only=True)
class Moments:
    """When something happened, by ``time.perf_counter``; 0 if it did not yet."""

    called: float = 0.0
    """``Checkpointer.save`` was entered."""
    returned: float = 0.0
    captured: float = 0.0
    written: float = 0.0


class Saving:
    """One save.

    Args:
        job: What is to be done.
        handle: What its caller holds.
        called: When the save began, by ``time.perf_counter``.
        pool: Where its pieces come from; woken when the save fails.
    """

    def __init__(self, job: SaveJob, handle: SaveHandle, *, called: float, pool: HostPool) -> None:
        self.job = job
        self.handle = handle
        self.moments = Moments(called=called)
        self.condition = threading.Condition()
        """Of the engine's threads; the one that trains never takes it, see ``Bell``."""
        self.has_begun = False
        """The thread that captures has seen it."""
        self.waited_secs = 0.0
        """Optimizer steps were held up for so long."""
        self.pool_nbytes = 0
        self.lost: Sequence[str] = ()
        """Layers whose earlier files were found to be gone."""
        self._pool = pool
        self._failure: BaseException | None = None
        self._num_pieces = 0
        """Captured, and not written yet."""
        self._is_captured = False
        self._captured = Bell()
        self._records: dict[tuple[str, str], FileRecord] = {}
        self._encoded: dict[str, EncodedLayer | str] = {}
        """Layers that were to be coded: the codes, or why they were written exactly."""
        files = [file for image in job.images for file in image.sources]
        self._watches: Mapping[str, Sequence[Watch]] = {
            file.name: [watch(*each) for each in file.referred] for file in files
        }
        self.fences: Fences = fence(tensor for file in files for tensor in file.tensors)

    @property
    def staged(self) -> StagedCheckpoint:
        return self.job.staged

    @property
    def has_failed(self) -> bool:
        return self._failure is not None

    @property
    def is_captured(self) -> bool:
        """True once training may change the state."""
        return self._is_captured

    @property
    def stall_secs(self) -> float:
        """Time the training loop was held up by this save, as far as it is known."""
        return self.waited_secs + (self.moments.returned or time.perf_counter()) - self.moments.called

    def cost(self) -> SaveCost:
        """What the save cost until it was written."""
        moments = self.moments
        return SaveCost(
            stall_secs=self.stall_secs,
            capture_secs=moments.captured - moments.called,
            write_secs=moments.written - moments.captured,
            pool_nbytes=self.pool_nbytes,
        )

    def stats(self, manifest: Manifest) -> SaveStats:
        """What the save cost, now that it is published."""
        now = time.perf_counter()
        cost = self.cost()
        return SaveStats(
            written_nbytes=manifest.written_nbytes,
            linked_nbytes=manifest.nbytes - manifest.written_nbytes,
            num_layers_written=len(self.job.images) - self._num_coded,
            num_layers_coded=self._num_coded,
            num_layers=len(manifest.layers),
            stall_secs=cost.stall_secs,
            capture_secs=cost.capture_secs,
            write_secs=cost.write_secs,
            commit_secs=now - self.moments.written,
            total_secs=now - self.moments.called,
            pool_nbytes=cost.pool_nbytes,
        )

    def fail(self, error: BaseException) -> None:
        """Note what went wrong first, and have all threads let go of the save."""
        with self.condition:
            if self._failure is None or isinstance(self._failure, Stopped):
                self._failure = error
            self.condition.notify_all()
        self._pool.wake()

    def raise_if_failed(self) -> None:
        if self._failure is not None:
            raise self._failure

    def check_readable(self, image: LayerImage | CodedImage) -> None:
        """Raise unless the memory of all tensors of a layer is where it was.

        Raises:
            IntegrityError: kind ``changed-during-capture``.
        """
        watches = (each for file in image.sources for each in self._watches.get(file.name, ()))
        self._refuse([each for each in watches if each.has_moved()], "was freed or moved")

    def check_unchanged(self) -> None:
        """Raise if a tensor was changed before it was copied, or while it was.

        Raises:
            IntegrityError: kind ``changed-during-capture``.
        """
        watches = [each for of_file in self._watches.values() for each in of_file]
        self._refuse([each for each in watches if each.has_changed()], "was changed")
        self._watches = {}

    def _refuse(self, changed: Sequence[Watch], how: str) -> None:
        if not changed:
            return
        names = {
            id(tensor): stored.name
            for image in self.job.images
            for file in image.sources
            for stored, tensor in zip(file.layout.tensors, file.tensors, strict=True)
        }
        raise IntegrityError(
            f"the state {how} while it was being captured: {len(changed)} tensors",
            kind="changed-during-capture",
            fqn=names[id(changed[0].tensor)],
            expected="parameters and optimizer state that only optimizer.step() changes",
            found="a change outside of it: load_state_dict, weights swapped in, clipping, offloading, a fused update",
            hint="wait for handle.captured() before such a change; later saves of this run are captured at once",
        )

    def begin_piece(self) -> None:
        """A piece was captured and is to be written."""
        with self.condition:
            self._num_pieces += 1

    def end_piece(self) -> None:
        """A piece was written, or does not matter any more."""
        with self.condition:
            self._num_pieces -= 1
            self.condition.notify_all()

    def end_capture(self) -> None:
        """All is in host memory, or never will be."""
        with self.condition:
            self._is_captured = True
            self.moments.captured = time.perf_counter()
            self.condition.notify_all()
        self._captured.ring()

    def wait_until_captured(self) -> None:
        """Wait; the time counts as stall. Called by the training thread."""
        started = time.perf_counter()
        self._captured.wait_for(lambda: self._is_captured)
        self.waited_secs += time.perf_counter() - started

    def wait_until_written(self) -> None:
        """Wait until no thread works on a piece of it any more."""
        with self.condition:
            self.condition.wait_for(lambda: self._is_captured and not self._num_pieces)
        self.moments.written = time.perf_counter()

    def note_file(self, layer: str, name: str, record: FileRecord) -> None:
        """A file is finished."""
        with self.condition:
            self._records[layer, name] = record

    def note_encoded(self, layer: str, outcome: EncodedLayer | str) -> None:
        """A layer that was to be coded is, or is not, and why. Called by the thread that captures."""
        self._encoded[layer] = outcome

    @property
    def _num_coded(self) -> int:
        return sum(isinstance(outcome, EncodedLayer) for outcome in self._encoded.values())

    def written_layers(self) -> Mapping[str, WrittenLayer]:
        """The files of all layers, when all are finished."""
        return {image.layer: self._written(image) for image in self.job.images}

    def _written(self, image: LayerImage | CodedImage) -> WrittenLayer:
        if not isinstance(image, CodedImage):
            return self._written_exactly(image, None)
        outcome = self._encoded[image.layer]
        if isinstance(outcome, str):
            return self._written_exactly(image.live, outcome)
        return WrittenLayer(
            weights=self._records.get((image.layer, image.live.whole_weights.name)),
            optimizer=None,
            update_count=image.live.count_updates(),
            codes=WrittenCodes(
                file=self._records[image.layer, image.name],
                rest=image.rest.text,
                base=image.base,
                base_digest=outcome.base_digest,
                deviations=outcome.deviations,
            ),
        )

    def _written_exactly(self, image: LayerImage, reason: str | None) -> WrittenLayer:
        weights, optimizer = image.weights, image.optimizer
        return WrittenLayer(
            weights=None if weights is None else self._records[image.layer, weights.name],
            optimizer=None if optimizer is None else self._records[image.layer, optimizer.name],
            update_count=image.count_updates(),
            reason=reason,
        )


class GrowingFile:
    """A file whose pieces are written by several threads."""

    def __init__(self, saving: Saving, layer: str, image: FileImage) -> None:
        self.saving = saving
        self._layer = layer
        self._image = image
        self._digest: Any = xxhash.xxh3_128()
        self._file: StagedFile | None = None
        self._num_digested = 0
        """Bytes, from the file's start."""
        self._num_written = 0
        """Bytes, anywhere."""

    def write(self, piece: Piece, offset: int, nbytes: int) -> None:
        """Digest a piece after all before it, and write it.

        Pieces are given to threads in order, so the one whose turn it is is always in some thread's hands.
        """
        condition = self.saving.condition
        with condition:
            condition.wait_for(lambda: self._num_digested == offset or self.saving.has_failed)
            if self.saving.has_failed:
                raise Stopped
        if self._file is None:  # only the first piece comes here: the others wait for it
            self._file = self.saving.staged.create_file(self._image.name, self._image.nbytes)
        self._digest.update(piece.buffer[:nbytes])
        with condition:
            self._num_digested += nbytes
            condition.notify_all()
        self._file.write(piece.buffer, offset, nbytes)
        with condition:
            self._num_written += nbytes
            is_done = self._num_written == self._image.nbytes
        if is_done:
            record = self._file.finish(f"xxh3_128:{self._digest.hexdigest()}")
            self.saving.note_file(self._layer, self._image.name, record)


@dataclass(frozen=True, slots=True, kw_only=True)
class FilePiece:
    """A captured piece on its way to the disk."""

    file: GrowingFile
    piece: Piece
    offset: int
    nbytes: int
    events: Sequence[torch.cuda.Event] = field(default=())
    """When these have passed, its bytes are in host memory."""
