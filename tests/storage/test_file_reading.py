from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from faults import open_descriptors
from llmtailor.errors import IntegrityError
from llmtailor.manifest import digest_of
from llmtailor.storage import FileReader, file_reading, read_files

PIECE = 3 * 4096


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_reading, "PIECE_NBYTES", PIECE)


@pytest.fixture(params=[1, 2**62], ids=["around the page cache", "through it"])
def _way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_reading, "_MIN_DIRECT_NBYTES", request.param)


@pytest.fixture
def _direct(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_reading, "_MIN_DIRECT_NBYTES", 1)


def write(path: Path, nbytes: int) -> bytes:
    content = os.urandom(nbytes)
    path.write_bytes(content)
    return content


def drop_from_cache(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def count_cached_pages(path: Path) -> int:
    """By mincore, for asking with a read would bring pages in."""
    nbytes = path.stat().st_size
    pages = (ctypes.c_ubyte * -(-nbytes // mmap.PAGESIZE))()
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        start = ctypes.c_char.from_buffer(mapped)
        failed = ctypes.CDLL(None).mincore(ctypes.byref(start), ctypes.c_size_t(nbytes), pages)
        del start
    assert not failed
    return sum(page & 1 for page in pages)


def read(path: Path, nbytes: int | None = None) -> tuple[str, list[tuple[int, bytes]]]:
    descriptor = os.open(path, os.O_RDONLY)
    pieces: list[tuple[int, bytes]] = []
    try:
        digest = FileReader().digest(
            descriptor,
            os.fstat(descriptor).st_size if nbytes is None else nbytes,
            path,
            lambda offset, piece: pieces.append((offset, bytes(piece))),
        )
    finally:
        os.close(descriptor)
    return digest, pieces


@pytest.mark.usefixtures("_way")
@pytest.mark.parametrize("is_cached", [True, False], ids=["cached", "cold"])
@pytest.mark.parametrize("nbytes", [0, 1, 4095, 4096, 4097, PIECE - 1, PIECE, PIECE + 1, 5 * PIECE, 5 * PIECE + 7])
def test_file_of_any_size_is_read_in_order(tmp_path: Path, nbytes: int, is_cached: bool) -> None:
    path = tmp_path / "file"
    content = write(path, nbytes)
    if not is_cached:
        drop_from_cache(path)
    digest, pieces = read(path)
    assert digest == digest_of(content)
    assert [offset for offset, _ in pieces] == list(range(0, nbytes, PIECE))
    assert b"".join(piece for _, piece in pieces) == content


@pytest.mark.usefixtures("_direct")
def test_what_is_cached_only_in_part_is_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "file"
    content = write(path, 6 * PIECE + 5)
    for start, nbytes in ((0, 4096), (PIECE, 2 * 4096), (2 * PIECE + 4096, PIECE), (6 * PIECE, 5)):
        drop_from_cache(path)
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
        os.pread(descriptor, nbytes, start)
        os.close(descriptor)
        for _ in range(5):  # it is looked for at a random place
            assert read(path)[0] == digest_of(content)


@pytest.mark.usefixtures("_way")
@pytest.mark.parametrize("is_cached", [True, False], ids=["cached", "cold"])
def test_a_reader_works_with_memory_that_it_is_given(tmp_path: Path, is_cached: bool) -> None:
    path = tmp_path / "file"
    content = write(path, 5 * PIECE + 7)
    if not is_cached:
        drop_from_cache(path)
    buffer = memoryview(mmap.mmap(-1, 2 * 4096))
    reader = FileReader(buffer=buffer)
    assert reader.piece_nbytes == 2 * 4096
    pieces: list[bytes] = []
    with open(path, "rb") as file:
        found = reader.digest(file.fileno(), len(content), path, lambda _, piece: pieces.append(bytes(piece)))
    assert found == digest_of(content)
    assert [len(piece) for piece in pieces[:-1]] == [2 * 4096] * (len(content) // (2 * 4096))
    assert b"".join(pieces) == content
    assert bytes(buffer[: len(pieces[-1])]) == pieces[-1]


def test_a_cold_file_does_not_come_into_the_page_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_reading, "PIECE_NBYTES", 2**20)
    path = tmp_path / "file"
    write(path, 4 * 2**20)
    drop_from_cache(path)
    if count_cached_pages(path):
        pytest.skip("the file system keeps its files in the page cache")
    found_there: set[int] = set()
    real = os.preadv

    def watched(descriptor: int, buffers: Any, offset: int, flags: int = 0) -> int:
        got = real(descriptor, buffers, offset, flags)
        if flags & os.RWF_NOWAIT:
            found_there.add(offset // 2**20)
        return got

    monkeypatch.setattr(os, "preadv", watched)
    read(path)
    # Looking for a page has the kernel fetch it; twice in a thousand times it comes from the disk before it is missed,
    # and then that piece is read as if it had been there.
    assert len(found_there) < 4
    # Of 1024: where it was asked whether something is there.
    assert count_cached_pages(path) <= 64 + 256 * len(found_there)


@pytest.mark.parametrize("refuses", ["the flag", "the read"])
@pytest.mark.usefixtures("_direct")
def test_file_system_that_refuses_direct_reads_is_read_through_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refuses: str
) -> None:
    path = tmp_path / "file"
    content = write(path, 2 * PIECE + 9)
    drop_from_cache(path)
    real, real_fcntl = os.preadv, fcntl.fcntl

    def refuse_read(descriptor: int, buffers: Any, offset: int, flags: int = 0) -> int:
        if flags or real_fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(descriptor, buffers, offset)

    def refuse_flag(descriptor: int, command: int, value: int = 0) -> int:
        if command == fcntl.F_SETFL and value & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real_fcntl(descriptor, command, value)

    if refuses == "the read":
        monkeypatch.setattr(os, "preadv", refuse_read)
    else:
        monkeypatch.setattr(fcntl, "fcntl", refuse_flag)
    assert read(path)[0] == digest_of(content)


@pytest.mark.usefixtures("_way")
@pytest.mark.parametrize("is_cached", [True, False], ids=["cached", "cold"])
@pytest.mark.parametrize("nbytes", [0, 4096, PIECE, PIECE + 100, 2 * PIECE - 1])
def test_file_that_became_shorter_is_refused(tmp_path: Path, nbytes: int, is_cached: bool) -> None:
    path = tmp_path / "file"
    write(path, nbytes)
    if not is_cached:
        drop_from_cache(path)
    with pytest.raises(IntegrityError) as caught:
        read(path, 2 * PIECE)
    assert (caught.value.kind, caught.value.found) == ("file-size", f"{nbytes} bytes")


@pytest.mark.usefixtures("_way")
def test_failing_device_is_raised_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write(path, PIECE)

    def fail(*args: Any) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(OSError, match="Input/output") as caught:
        read(path)
    assert type(caught.value) is OSError


# read_files


@pytest.fixture
def paths(tmp_path: Path) -> Iterator[list[Path]]:
    before = open_descriptors()
    paths = [tmp_path / str(number) for number in range(12)]
    for number, path in enumerate(paths):
        write(path, number * 4096 + 1)
    yield paths
    assert open_descriptors() == before
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("llmtailor-read")]


def size(path: Path) -> int:
    return path.stat().st_size


def digest(path: Path, reader: FileReader) -> str:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return reader.digest(descriptor, size(path), path)
    finally:
        os.close(descriptor)


def test_results_come_in_the_order_of_the_items(paths: list[Path]) -> None:
    done: dict[Path, str] = {}
    mine = threading.get_ident()

    def on_done(path: Path, result: str) -> None:
        assert threading.get_ident() == mine
        done[path] = result

    expected = [digest_of(path.read_bytes()) for path in paths]
    for _ in range(10):
        done.clear()
        assert read_files(paths, size, digest, on_done=on_done) == expected
        assert done == dict(zip(paths, expected, strict=True))
    assert read_files([], size, digest) == []


def test_several_files_are_read_at_a_time_and_no_more_than_four(paths: list[Path]) -> None:
    together = threading.Barrier(4)
    readers: set[int] = set()

    def meet(path: Path, reader: FileReader) -> None:
        readers.add(id(reader))
        together.wait(timeout=30)

    read_files(paths, size, meet)
    assert len(readers) == 4


def test_large_files_go_first_and_others_stay_in_order(paths: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_reading, "_SMALL_NBYTES", 10 * 4096)
    begun: list[Path] = []
    read_files(paths, size, digest, on_begin=begun.append)
    assert begun == [paths[11], paths[10], *paths[:10]]


def test_little_is_read_in_the_callers_thread(paths: list[Path]) -> None:
    mine = threading.current_thread()
    assert read_files(paths[:2], size, lambda path, reader: threading.current_thread()) == [mine, mine]


def test_threads_that_cannot_be_started_are_done_without(paths: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    expected = read_files(paths, size, digest)
    real = threading.Thread.start

    for limit in (0, 2):
        started: list[threading.Thread] = []

        def start(thread: threading.Thread, limit: int = limit, started: list[Any] = started) -> None:
            if len(started) == limit:
                raise RuntimeError("can't start new thread")
            started.append(thread)
            real(thread)

        monkeypatch.setattr(threading.Thread, "start", start)
        assert read_files(paths, size, digest) == expected
        assert len(started) == limit


@pytest.mark.parametrize("where", ["work", "on_begin", "on_done"])
@pytest.mark.parametrize("error", [OSError(errno.EIO, "bad"), KeyboardInterrupt()])
def test_an_error_stops_all_threads_and_is_raised(paths: list[Path], where: str, error: BaseException) -> None:
    def fail(path: Path, *rest: object) -> None:
        if path == paths[3]:
            raise error

    begun: list[Path] = []

    def work(path: Path, reader: FileReader) -> None:
        begun.append(path)
        time.sleep(0.01)
        if where == "work":
            fail(path)

    callbacks: dict[str, Any] = {} if where == "work" else {where: fail}
    with pytest.raises(type(error)) as caught:
        read_files(paths * 10, size, work, **callbacks)
    assert caught.value is error
    assert len(begun) < 60


def test_reading_stops_within_a_file_when_another_failed(paths: list[Path]) -> None:
    endless = threading.Event()

    def work(path: Path, reader: FileReader) -> str:
        if path == paths[0]:
            endless.wait(timeout=30)
            raise OSError(errno.EIO, "bad")
        endless.set()
        while True:
            digest(path, reader)

    with pytest.raises(OSError, match="bad"):
        read_files(paths, size, work)


def test_memory_that_cannot_be_had_is_raised(paths: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(nbytes: int) -> memoryview:
        raise MemoryError

    monkeypatch.setattr(file_reading, "aligned_buffer", refuse)
    for chosen in (paths, paths[:1]):
        with pytest.raises(MemoryError):
            read_files(chosen, size, digest)
