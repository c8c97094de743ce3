"""The lazy writer: a save returns at once, the state is copied while training goes on, and goes to disk from there.

    training    submit -------------------------------> (forward, backward) -> wait_until_captured -> optimizer.step()
    capture           copy piece, copy piece, ...  captured
    writers                 digest in order, write around the page cache, give the piece back
    commit                                                  links, small files, manifest, fsync, rename   published

Four threads and one ring of host memory for a run. Saves are captured, and published, in the order in which they were
submitted. A thread never waits for the one that trains, so it does not matter if that dies; and a save that fails
anywhere lets go of everything it holds. After DataStates-LLM (HPDC'24): parameters and optimizer state do not change
between two optimizer steps.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import TypeVar

from ..errors import FormatError, NotFoundError, TailorError, WriteError
from ..manifest import FileRecord, LayerRecord, Manifest, encode_manifest
from ..storage import ALIGNMENT, PIECE_NBYTES, FileReader, RunDirectory, SharedCheckpoint, pad
from ..storage.staging import translate_os_errors
from ..strategies import ERROR_LIMIT, NO_BASE
from .ballot import Ballot
from .base_file import BaseFile, BaseLayer
from .bell import Bell
from .coded_images import CodedImage
from .coding import EncodedLayer, LayerEncoder
from .copying import ImageReader
from .devices import Lanes
from .frames import forget_frames
from .handle import SaveHandle
from .images import FileImage, LayerImage
from .job import SaveJob
from .life import SaveState
from .lost_files import find_lost, find_lost_bases, name_lost
from .pool import HostPool, default_pool_nbytes
from .saving import FilePiece, GrowingFile, Saving, Stopped

__all__ = ["Engine"]

logger = logging.getLogger(__name__)

# Around the page cache one thread nearly fills a disk; the second digests meanwhile.
_NUM_WRITERS = 2
# What kernels make on the way to codes, and what the allocator keeps of it: 6 MB were measured.
_ENCODING_NBYTES = 8 * 2**20


class Engine:
    """Writes the checkpoints of one run.

    Args:
        run: Where they are published; open for writing.
        pool_nbytes: Host memory it may take; None takes what a save needs, up to a quarter of what is free.
        encodes: Some layers are going to be written as codes. Those of one layer take memory of their own, all else
            that encoding needs comes out of the pool.
    """

    def __init__(self, run: RunDirectory, *, pool_nbytes: int | None = None, encodes: bool = False) -> None:
        self._run = run
        limit_nbytes = default_pool_nbytes() if pool_nbytes is None else pool_nbytes
        self._pool = HostPool(limit_nbytes, beside_nbytes=_ENCODING_NBYTES if encodes else 0)
        self._lanes = Lanes()
        self._encoder = LayerEncoder(self._lanes)
        self._captures: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._pieces: queue.SimpleQueue[FilePiece | None] = queue.SimpleQueue()
        self._commits: queue.SimpleQueue[Saving | None] = queue.SimpleQueue()
        self._changed = Bell()
        self._in_flight: list[Saving] = []
        """Appended to by the training thread, removed from by the one that commits; each is one operation."""
        self._is_tidying = False
        """The commit thread works for a save that is published."""
        self._threads: list[threading.Thread] = []
        self._starting = threading.Lock()
        self._pid = os.getpid()

    @property
    def num_in_flight(self) -> int:
        """Saves that are neither published nor failed."""
        return len(self._in_flight)

    def prepare(self, images: Sequence[LayerImage]) -> None:
        """Have host memory for a save of these layers ready in the background. Called by the training thread."""
        files = [file for image in images for file in image.files]
        nbytes = sum(pad(file.nbytes) for file in files)
        is_pinned = any(tensor.is_cuda for file in files for tensor in file.tensors)
        self._start_threads()
        self._captures.put(lambda: self._prepare_pool(nbytes, is_pinned))

    def compile(self, images: Sequence[CodedImage]) -> None:
        """Get ready to encode such layers; see ``LayerEncoder.compile``. Called by the training thread."""
        self._encoder.compile(images)

    def submit(self, job: SaveJob, handle: SaveHandle, *, called: float) -> None:
        """Begin a save; the handle tells the rest. Called by the training thread.

        A signal's handler may raise anywhere in here. Whoever gets an exception asks ``has_taken``: a save that was
        taken goes on, and its attempt and its handle are the engine's; any other is still the caller's.

        Args:
            job: What is to be done.
            handle: For the caller.
            called: When the save began, by ``time.perf_counter``.

        Raises:
            WriteError: The engine's threads cannot be started; the attempt was abandoned.
        """
        try:
            saving = Saving(job, handle, called=called, pool=self._pool)
            self._start_threads()
        except BaseException:
            self._run.abandon(job.staged)
            raise
        try:
            self._in_flight.append(saving)  # in one operation it is taken, or it is not
        finally:
            self._captures.put(self._capture_new)

    def has_taken(self, handle: SaveHandle) -> bool:
        """True if a save is the engine's, or was until it ended."""
        is_here = any(saving.handle is handle for saving in [*self._in_flight])
        return is_here or handle.state is not SaveState.CAPTURING

    def note_return(self, handle: SaveHandle) -> None:
        """The call that began a save returns now; what it took is stall."""
        for saving in list(self._in_flight):
            if saving.handle is handle:
                saving.moments.returned = time.perf_counter()

    def _start_threads(self) -> None:
        """Have them started by a thread that no signal's handler interrupts, for half a start would stay so."""
        if self._threads:
            return
        refusals: list[RuntimeError] = []
        starter = threading.Thread(target=lambda: self._start_all(refusals), name="llmtailor-start", daemon=True)
        try:
            starter.start()
        except RuntimeError as err:  # threading says so of a limit on processes
            refusals.append(err)
        else:
            starter.join()
        if refusals:
            raise WriteError(
                "cannot start the threads that write checkpoints",
                kind="io",
                hint="raise the limit on processes (ulimit -u); older checkpoints were not touched",
            ) from refusals[0]

    def _start_all(self, refusals: list[RuntimeError]) -> None:
        loops: list[tuple[str, Callable[[], None]]] = [
            ("capture", lambda: _work_off(self._captures, lambda task: task())),
            ("commit", lambda: _work_off(self._commits, self._end)),
        ]
        loops += [(f"write-{n}", lambda: _work_off(self._pieces, self._write)) for n in range(_NUM_WRITERS)]
        with self._starting:
            if self._threads:  # whoever had them started before was interrupted while it waited
                return
            threads: list[threading.Thread] = []
            try:
                for name, loop in loops:
                    thread = threading.Thread(target=loop, name=f"llmtailor-{name}", daemon=True)
                    thread.start()
                    threads.append(thread)
            except RuntimeError as err:
                refusals.append(err)
                self._stop(threads)
            else:
                self._threads = threads

    # ---- Waiting ----

    def wait_until_captured(self) -> None:
        """Wait until no save refers to the state any more; an optimizer's step calls this first."""
        if not self._in_flight or os.getpid() != self._pid:
            # A forked process has a copy of the state to itself, and none of the threads.
            return
        self._wake()
        for saving in list(self._in_flight):
            if not saving.is_captured:
                saving.wait_until_captured()

    def wait_for_room(self, limit: int) -> None:
        """Wait until fewer than so many saves are in flight."""
        self._wake()
        self._changed.wait_for(lambda: len(self._in_flight) < limit)

    def drain(self, timeout_secs: float | None = None) -> bool:
        """Wait until no save is in flight, and old checkpoints that may go are gone.

        Returns:
            False if there is still something to do after the timeout.
        """
        if os.getpid() != self._pid:
            return True
        self._wake()
        return self._changed.wait_for(lambda: not self._in_flight and not self._is_tidying, timeout_secs)

    def _wake(self) -> None:
        """Say again that there are saves to capture: a signal's handler may have raised before it was said."""
        if not all(saving.has_begun for saving in [*self._in_flight]):
            self._captures.put(self._capture_new)

    def close(self) -> None:
        """Wait for all saves, then end the threads and let go of the memory; more than once is fine."""
        self.drain()
        if os.getpid() == self._pid:
            with self._starting:
                self._stop(self._threads)
                self._threads = []
            self._pool.close()
            self._encoder.close()

    def _stop(self, threads: Sequence[threading.Thread]) -> None:
        self._captures.put(None)
        self._commits.put(None)
        for _ in range(_NUM_WRITERS):
            self._pieces.put(None)
        for thread in threads:
            thread.join()
        # Not all may have been started: what nobody was there to read must not end the threads of another try.
        self._captures, self._pieces, self._commits = queue.SimpleQueue(), queue.SimpleQueue(), queue.SimpleQueue()

    # ---- Capture ----

    def _prepare_pool(self, nbytes: int, is_pinned: bool) -> None:
        try:
            self._pool.reserve(nbytes, is_pinned=is_pinned)
            self._pool.touch()
        except (OSError, MemoryError, RuntimeError) as err:  # the first save will say it where it matters
            logger.warning("host memory for saves could not be prepared: %s", err)

    def _capture_new(self) -> None:
        """Capture the saves that nobody has begun; none, if what is said here was said twice."""
        for saving in [*self._in_flight]:
            if not saving.has_begun:
                saving.has_begun = True
                self._run_capture(saving)

    def _run_capture(self, saving: Saving) -> None:
        try:
            self._capture(saving)
        except BaseException as err:
            saving.fail(err)
        saving.end_capture()
        try:
            if not saving.has_failed:
                saving.handle.advance(SaveState.CAPTURED)
        except BaseException as err:
            saving.fail(err)
        finally:
            self._commits.put(saving)

    def _capture(self, saving: Saving) -> None:
        coded = [image for image in saving.job.images if isinstance(image, CodedImage)]
        num_readers = max(map(_num_bases, coded), default=0)
        if num_readers:
            # What codes are relative to may be in a save that is still on its way.
            self._wait_for_earlier(saving)
        aside_nbytes = num_readers * PIECE_NBYTES
        self._pool.reserve(saving.job.padded_nbytes + aside_nbytes, is_pinned=bool(saving.fences))
        self._lanes.start(saving.fences)
        with contextlib.ExitStack() as stack:
            readers: list[FileReader] = []
            if num_readers:
                aside = stack.enter_context(self._pool.set_aside(aside_nbytes))
                readers = [FileReader(buffer=part) for part in _split(aside, num_readers)]
            for image in saving.job.images:
                for file in self._files(saving, image, readers):
                    self._capture_file(saving, GrowingFile(saving, image.layer, file), file, image)
        self._lanes.synchronize()
        saving.check_unchanged()
        is_packed = any(isinstance(image, LayerImage) and image.masters for image in saving.job.images)
        scratch_nbytes = self._encoder.scratch_nbytes if coded or is_packed else 0
        saving.pool_nbytes = self._pool.high_water_nbytes + scratch_nbytes

    def _wait_for_earlier(self, saving: Saving) -> None:
        self._changed.wait_for(lambda: self._in_flight[0] is saving)

    def _files(
        self, saving: Saving, image: LayerImage | CodedImage, readers: Sequence[FileReader]
    ) -> Sequence[FileImage]:
        """What is written of a layer: its codes or, if it is not to be coded or cannot be, its exact files."""

        def check_readable() -> None:
            if saving.has_failed:
                raise Stopped
            saving.check_readable(image)

        encoded = self._encode(saving, image, readers, check_readable) if isinstance(image, CodedImage) else None
        if encoded is not None:
            return encoded.files
        live = image.live if isinstance(image, CodedImage) else image
        return self._encoder.pack(live, check_readable) if live.masters else live.files

    def _encode(
        self, saving: Saving, image: CodedImage, readers: Sequence[FileReader], check_readable: Callable[[], None]
    ) -> EncodedLayer | None:
        """The codes of a layer; None if it has to be written exactly."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(translate_os_errors("read what codes are relative to", saving.staged.path))
            base = None
            if image.base == "exact":
                found = saving.job.find_base(image.layer)
                records = () if found is None else _base_records(found[1], image)
                if found is None or not records:
                    saving.note_encoded(image.layer, NO_BASE)
                    return None
                pairs = zip(records, readers, strict=False)
                try:
                    files = [stack.enter_context(BaseFile(found[0], record, reader)) for record, reader in pairs]
                except (NotFoundError, FormatError) as err:
                    _note_lost(saving, err, image.layer, {image.layer, *find_lost_bases(saving.job)})
                    raise
                base = BaseLayer(*files)
            encoded = self._encoder.encode(image, base, check_readable)
        saving.note_encoded(image.layer, ERROR_LIMIT if encoded is None else encoded)
        return encoded

    def _capture_file(
        self, saving: Saving, file: GrowingFile, image: FileImage, layer: LayerImage | CodedImage
    ) -> None:
        reader = ImageReader(image.parts, self._lanes)
        offset = 0
        while offset < image.nbytes:
            piece = self._pool.take(image.nbytes - offset, lambda: saving.has_failed)
            if piece is None:
                raise Stopped
            nbytes = min(piece.nbytes, image.nbytes - offset)
            try:
                # A file of codes refers to live tensors, too: to those that stay as they are.
                saving.check_readable(layer)
                reader.fill(piece, nbytes)
                events = self._lanes.events() if saving.fences else ()
            except BaseException:
                try:
                    self._lanes.synchronize()  # what is queued still goes there
                finally:
                    self._pool.give_back(piece)
                raise
            saving.begin_piece()
            self._pieces.put(FilePiece(file=file, piece=piece, offset=offset, nbytes=nbytes, events=events))
            offset += nbytes

    # ---- Write ----

    def _write(self, each: FilePiece) -> None:
        saving = each.file.saving
        try:
            for event in each.events:
                event.synchronize()
            if not saving.has_failed:
                each.file.write(each.piece, each.offset, each.nbytes)
        except BaseException as err:
            saving.fail(err)
        finally:
            self._pool.give_back(each.piece)
            saving.end_piece()

    # ---- Commit ----

    def _end(self, saving: Saving) -> None:
        path = None
        try:
            saving.wait_until_written()
            saving.raise_if_failed()
            path = self._commit(saving)
        except BaseException as err:
            forget_frames(err)
            self._end_failed(saving, err)
        self._is_tidying = True  # first: whoever drains must not see neither
        self._in_flight.remove(saving)
        self._changed.ring()
        # Nobody waits for what comes now: removing gigabytes takes a disk its time.
        try:
            if path is not None:
                saving.job.tidy_up(path)
        except BaseException:
            logger.exception("after checkpoint-%d was published", saving.job.step)
        self._is_tidying = False
        self._changed.ring()

    def _commit(self, saving: Saving) -> Path:
        job, handle, staged = saving.job, saving.handle, saving.staged
        handle.advance(SaveState.WRITTEN)
        written = saving.written_layers()
        links = job.plan_links(written)
        for link in links:
            try:
                staged.link_file(link.record, link.source)
            except TailorError as err:
                _note_lost(saving, err, link.layer, find_lost(links))
                raise
        manifest = job.build_manifest(written, staged.adopt_rest(), saving.cost())
        saving.raise_if_failed()
        if job.ballot is None:
            path, digest = self._publish(saving, manifest)
        else:
            path, manifest, digest = self._publish_together(saving, manifest, job.ballot)
        job.on_published(path, manifest, digest)
        handle.publish(path, manifest, saving.stats(manifest))
        return path

    def _publish(self, saving: Saving, manifest: Manifest) -> tuple[Path, str]:
        """Make a checkpoint durable and visible; its directory and the manifest's digest."""
        encoded, digest = encode_manifest(manifest)
        saving.staged.seal(encoded)
        saving.handle.advance(SaveState.COMMITTED)
        return self._run.publish(saving.staged, saving.job.step, is_first=saving.job.is_first()), digest

    def _publish_together(self, saving: Saving, own: Manifest, ballot: Ballot) -> tuple[Path, Manifest, str]:
        """The same by the vote of all ranks; on the coordinator with the whole manifest."""
        staged = saving.staged
        assert isinstance(staged, SharedCheckpoint)
        ballot.cast(staged, own)
        if not ballot.ranks.is_coordinator:
            outcome = ballot.wait(own)
            saving.handle.advance(SaveState.COMMITTED)
            self._run.abandon(staged)  # its files are in the checkpoint; what is left are empty directories
            return staged.target, outcome.manifest, outcome.digest
        manifest = ballot.count(staged, own)
        path, digest = self._publish(saving, manifest)
        ballot.announce(manifest, digest)
        return path, manifest, digest

    def _end_failed(self, saving: Saving, error: BaseException) -> None:
        # Whatever else goes wrong, whoever waits is told, and this thread goes on to the next save.
        if saving.job.ballot is not None:
            saving.job.ballot.fail(error, lost=saving.lost)
        try:
            self._run.abandon(saving.staged)
        except BaseException:
            logger.exception("what checkpoint-%d left behind could not be removed", saving.job.step)
        saving.handle.fail(error)


def _note_lost(saving: Saving, error: TailorError, layer: str, lost: Collection[str]) -> None:
    """An earlier file of a layer cannot be used: say so of all layers, or each would cost another save."""
    error.layer = layer
    saving.lost = tuple(sorted(lost))
    if lost:
        name_lost(error, lost)


def _num_bases(image: CodedImage) -> int:
    """How many files codes are relative to."""
    return 0 if image.base != "exact" else 2 if image.is_relative_to_state else 1


def _split(memory: memoryview, count: int) -> Sequence[memoryview]:
    """As many stretches of whole pages, equally long."""
    nbytes = len(memory) // count // ALIGNMENT * ALIGNMENT
    return [memory[start * nbytes : (start + 1) * nbytes] for start in range(count)]


def _base_records(layer: LayerRecord, image: CodedImage) -> Sequence[FileRecord]:
    """The files that codes of a layer are relative to; none if one of them is not there."""
    if not image.is_relative_to_state:
        return (layer.whole_weights,)
    return () if layer.optimizer is None else layer.plain_files


_Item = TypeVar("_Item")


def _work_off(items: queue.SimpleQueue[_Item | None], work: Callable[[_Item], None]) -> None:
    """A thread's life: until there is None in the queue."""
    while _work_off_one(items, work):
        pass


def _work_off_one(items: queue.SimpleQueue[_Item | None], work: Callable[[_Item], None]) -> bool:
    # A function of its own, so that nothing of one save, nor the state it refers to, is held on to until the next.
    item = items.get()
    if item is None:
        return False
    work(item)
    return True
