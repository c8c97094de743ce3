"""A few threads that fill the files of a plan, chunk by chunk.

    claim -> fill -> sum -> (in the file's order: account) -> write -> (last of the file: patch, cut off, hand back)

Chunks are claimed in the order of the files, so the one whose turn it is to be accounted for is always in some
thread's hands. Reads and writes are large, aligned and around the page cache; a thread has two buffers and no more.
"""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any

import xxhash

from ..file_plan import FilePlan, FileRange, Part, WrittenFile
from ..storage import ALIGNMENT, DirectFile, LocalFileSystem, OutputDirectory
from ..storage.staging import translate_os_errors
from ..tensors import ByteRange
from .arithmetic import compute
from .checksums import CrcSums
from .reading import Reader, aligned_buffer
from .segments import Chunk, Computed, Copy, Literal, Padding, cut_chunks, segments_of
from .sources import SourceFiles

__all__ = ["CHUNK_NBYTES", "NewFile", "Transfer"]

CHUNK_NBYTES = 8 * 2**20
# Bytes of a chunk for each element that is computed at a time: 2^18 elements, whose temporaries are some 8 MB.
_COMPUTED_SHARE = 32
# Sharing blocks costs two commits of the journal; a small file is copied in less.
_MIN_CLONE_NBYTES = 2**20
# What sharing blocks is refused with: by the file system, across two of them, or for a size that fits no block.
_NO_CLONE = frozenset({errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL, errno.ENOTTY, errno.ENOSYS, errno.EPERM})
# How often it is looked whether interrupted threads are done.
_PATIENCE_SECS = 0.01


class _Stopped(Exception):  # noqa: N818
    """Another thread failed; what this one was doing does not matter any more."""


@dataclass(slots=True, kw_only=True, eq=False)
class NewFile:
    """A file on its way."""

    plan: FilePlan
    nbytes: int
    direct: DirectFile
    is_cloned: bool
    """Its bytes are there already; they are only read, for the digest."""
    crcs: CrcSums | None
    digest: Any = field(default_factory=xxhash.xxh3_128)
    """Unused with ``crcs``."""
    accounted: int = 0
    """Bytes, from its start."""
    written: int = 0
    """Bytes, anywhere."""

    @property
    def record(self) -> WrittenFile:
        digest = None if self.crcs is not None else f"xxh3_128:{self.digest.hexdigest()}"
        return WrittenFile(name=self.plan.name, nbytes=self.nbytes, digest=digest)


class Transfer:
    """Fills files of one output directory.

    Args:
        output: Where they go.
        sources: Where their bytes come from.
        filesystem: What carries out the changes.
        num_threads: How many chunks are worked on at once; 1 uses the caller's thread.
        chunk_nbytes: Multiple of ``ALIGNMENT``; a thread holds two buffers of it.
        mode: Permissions of the files.
    """

    def __init__(
        self,
        output: OutputDirectory,
        sources: SourceFiles,
        filesystem: LocalFileSystem,
        *,
        num_threads: int,
        chunk_nbytes: int,
        mode: int,
    ) -> None:
        assert chunk_nbytes % ALIGNMENT == 0
        self._output = output
        self._sources = sources
        self._filesystem = filesystem
        self._on_bytes: Callable[[int], None] = lambda nbytes: None
        self._num_threads = num_threads
        self._chunk_nbytes = chunk_nbytes
        self._mode = mode
        self._zeros = bytes(chunk_nbytes)
        self._can_clone = True
        self._is_stopped = False
        self._num_working = 0
        self._claiming = threading.Lock()
        self._turn = threading.Condition()
        self._written: list[WrittenFile] = []

    def run(self, plans: Sequence[FilePlan], on_bytes: Callable[[int], None]) -> list[WrittenFile]:
        """Write files; they are not durable yet.

        Args:
            plans: Of files that are not there yet.
            on_bytes: Told of each piece that is written; by one thread at a time.

        Returns:
            Their records, in the order in which they were done.

        Raises:
            IntegrityError: A source changed.
            NotFoundError, FormatError: A source is gone, or is no regular file any more.
            WriteError: A source cannot be read, or a file cannot be written.
        """
        self._written, self._on_bytes, self._is_stopped = [], on_bytes, False
        sizes = [plan.nbytes for plan in plans]
        chunks = self._chunks(plans, sizes)
        num_chunks = sum(-(-max(nbytes, 1) // self._chunk_nbytes) for nbytes in sizes)
        num_threads = min(self._num_threads, num_chunks)
        if num_threads <= 1:
            self._work(chunks)
        else:
            self._work_together(chunks, num_threads)
        return self._written

    def _work_together(self, chunks: Iterator[tuple[NewFile, Chunk]], num_threads: int) -> None:
        futures: list[Future[None]] = []
        pool = ThreadPoolExecutor(num_threads)
        try:
            with translate_os_errors("start a thread", self._output.path):
                try:
                    futures.extend(pool.submit(self._work, chunks) for _ in range(num_threads))
                except RuntimeError as err:  # threading says so of a limit on processes
                    raise OSError(errno.EAGAIN, "no thread can be started") from err
            wait(futures)
        finally:
            self._let_go()
            pool.shutdown()
        faults = [fault for future in futures if (fault := future.exception()) is not None]
        for fault in sorted(faults, key=lambda fault: isinstance(fault, _Stopped)):
            raise fault

    def _let_go(self) -> None:
        """Wait until no thread holds a descriptor any more, however impatient the user: its number may be reused.

        Not by joining them: CPython 3.11 takes a thread for ended whose join was interrupted (bpo-45274). One that has
        not begun yet finds that there is nothing to do.
        """
        interrupt: KeyboardInterrupt | None = None
        while True:
            try:
                self._stop()
                while self._num_working:
                    time.sleep(_PATIENCE_SECS)
                break
            except KeyboardInterrupt as err:
                interrupt = err
        if interrupt is not None:
            raise interrupt

    def _stop(self) -> None:
        with self._turn:
            self._is_stopped = True
            self._turn.notify_all()

    def _work(self, chunks: Iterator[tuple[NewFile, Chunk]]) -> None:
        """One thread's life."""
        with self._turn:
            self._num_working += 1
        try:
            with translate_os_errors("get memory for a buffer", self._output.path):
                reader = Reader(self._sources, self._chunk_nbytes)
                buffer = aligned_buffer(self._chunk_nbytes)
            while (claimed := self._claim(chunks)) is not None:
                file, chunk = claimed
                self._fill(chunk, buffer, reader)
                self._account(file, chunk, buffer[: chunk.nbytes])
                if not file.is_cloned:
                    self._write(file, chunk, buffer)
                self._end(file, chunk)
        except BaseException:
            self._stop()
            raise
        finally:
            with self._turn:
                self._num_working -= 1

    def _claim(self, chunks: Iterator[tuple[NewFile, Chunk]]) -> tuple[NewFile, Chunk] | None:
        with self._claiming:
            return None if self._is_stopped else next(chunks, None)

    def _chunks(self, plans: Sequence[FilePlan], sizes: Sequence[int]) -> Iterator[tuple[NewFile, Chunk]]:
        for plan, nbytes in zip(plans, sizes, strict=True):
            file, parts = self._begin(plan, nbytes)
            for chunk in cut_chunks(segments_of(parts), nbytes, self._chunk_nbytes):
                yield file, chunk

    def _begin(self, plan: FilePlan, nbytes: int) -> tuple[NewFile, Sequence[Part]]:
        """Make a file, and have its room reserved."""
        path = self._output.path_of(plan.name)
        descriptor = self._output.create(plan.name, self._mode)
        parts: Sequence[Part] = plan.parts
        is_cloned = self._clone(plan, descriptor)
        if is_cloned:
            parts = (FileRange(path=path, byte_range=ByteRange(start=0, end=nbytes)),)
        with translate_os_errors("reserve room for a file", path):
            direct = DirectFile(self._filesystem, descriptor, 0 if is_cloned else nbytes)
        crcs = CrcSums(plan.crc_patches) if plan.crc_patches else None
        return NewFile(plan=plan, nbytes=nbytes, direct=direct, is_cloned=is_cloned, crcs=crcs), parts

    def _clone(self, plan: FilePlan, descriptor: int) -> bool:
        """Share the blocks of a file that is taken over whole, where the file system can."""
        if not self._can_clone or len(plan.parts) != 1 or plan.crc_patches:
            return False
        part = plan.parts[0]
        if not isinstance(part, FileRange) or part.nbytes < _MIN_CLONE_NBYTES:
            return False
        if part.byte_range.start or part.byte_range.end != self._sources.nbytes_of(part.path):
            return False
        with self._sources.using(part.path) as source, translate_os_errors("share the blocks of a file", part.path):
            try:
                self._filesystem.clone(source.descriptor, descriptor)
            except OSError as err:
                if err.errno not in _NO_CLONE:
                    raise
                self._can_clone = False
        return self._can_clone

    def _fill(self, chunk: Chunk, buffer: memoryview, reader: Reader) -> None:
        copies = [segment for segment in chunk.segments if isinstance(segment, Copy)]
        reader.fetch(copies, buffer, chunk.start, is_aligned=True)
        for segment in chunk.segments:
            if isinstance(segment, Copy):
                continue
            at = segment.at - chunk.start
            target = buffer[at : at + segment.nbytes]
            match segment:
                case Literal():
                    target[:] = segment.data
                case Padding():
                    target[:] = memoryview(self._zeros)[: segment.nbytes]
                case Computed():
                    compute(segment, target, reader.fetch, block_numel=self._chunk_nbytes // _COMPUTED_SHARE)

    def _account(self, file: NewFile, chunk: Chunk, data: memoryview) -> None:
        """Take a chunk into the file's digest or CRCs, after all chunks before it."""
        pieces = file.crcs.sum_pieces(chunk.start, data) if file.crcs is not None else ()
        with self._turn:
            while file.accounted != chunk.start:
                if self._is_stopped:
                    raise _Stopped
                self._turn.wait()
        # No other thread comes here for this file before ``accounted`` moves on.
        if file.crcs is not None:
            file.crcs.account(chunk.start, data, pieces)
        else:
            file.digest.update(data)
        with self._turn:
            file.accounted += chunk.nbytes
            self._turn.notify_all()

    def _write(self, file: NewFile, chunk: Chunk, buffer: memoryview) -> None:
        with translate_os_errors("write a file of a checkpoint", self._output.path_of(file.plan.name)):
            file.direct.write(buffer, chunk.start, chunk.nbytes)

    def _end(self, file: NewFile, chunk: Chunk) -> None:
        """Note that a chunk is done; the last one ends the file."""
        with self._turn:
            file.written += chunk.nbytes
            is_done = file.written == file.nbytes
            if chunk.nbytes:
                self._on_bytes(chunk.nbytes)
        if is_done:
            self._finish(file)

    def _finish(self, file: NewFile) -> None:
        with translate_os_errors("write a file of a checkpoint", self._output.path_of(file.plan.name)):
            for offset, crc in sorted(file.crcs.late.items() if file.crcs is not None else ()):
                file.direct.patch(memoryview(crc.to_bytes(4, "little")), offset)
            file.direct.finish()
        with self._claiming:
            self._output.finish(file.direct.descriptor)
        with self._turn:
            self._written.append(file.record)
