from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from assembly.merge_plans import drop_from_cache, write_source
from llmtailor.assembly import reading
from llmtailor.assembly.reading import ALIGNMENT, Reader, aligned_buffer
from llmtailor.assembly.segments import Copy
from llmtailor.assembly.sources import SourceFiles
from llmtailor.errors import IntegrityError

NBYTES = 100_000


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_source(tmp_path / "source", NBYTES)


@pytest.fixture
def sources(path: Path) -> Iterator[SourceFiles]:
    with SourceFiles() as sources:
        sources.inspect(path, NBYTES)
        yield sources


@pytest.fixture(params=[1, 2**62], ids=["direct", "buffered"])
def _way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "_MIN_DIRECT_NBYTES", request.param)


def fetch(sources: SourceFiles, path: Path, *ranges: tuple[int, int]) -> bytes:
    """Ranges of a file, as one read after the other lays them end to end."""
    copies, at = [], 0
    for start, end in ranges:
        copies.append(Copy(at=at, nbytes=end - start, path=path, offset=start))
        at += end - start
    target = aligned_buffer(max(at, 1))
    Reader(sources, 2**21).fetch(copies, target, is_aligned=True)
    return bytes(target[:at])


RANGES = [
    (0, NBYTES), (0, ALIGNMENT), (ALIGNMENT, 3 * ALIGNMENT), (ALIGNMENT, NBYTES), (1, ALIGNMENT), (5, NBYTES - 5),
    (NBYTES - 1, NBYTES), (ALIGNMENT - 1, ALIGNMENT + 1),
]  # fmt: skip


@pytest.mark.usefixtures("_way")
@pytest.mark.parametrize("is_cached", [True, False], ids=["cached", "cold"])
@pytest.mark.parametrize("byte_range", RANGES)
def test_any_range_is_read(sources: SourceFiles, path: Path, byte_range: tuple[int, int], is_cached: bool) -> None:
    if not is_cached:
        drop_from_cache(path)
    start, end = byte_range
    assert fetch(sources, path, byte_range) == path.read_bytes()[start:end]


@pytest.mark.usefixtures("_way")
def test_scattered_ranges_are_read_together(sources: SourceFiles, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drop_from_cache(path)
    content = path.read_bytes()
    reads: list[int] = []
    real = os.preadv

    def counted(descriptor: int, buffers: Any, offset: int, flags: int = 0) -> int:
        if not flags:
            reads.append(offset)
        return real(descriptor, buffers, offset, flags)

    drop_from_cache(path)
    monkeypatch.setattr(os, "preadv", counted)
    ranges = [(70_000, 70_010), (5, 10), (10, 12), (69_000, 71_000), (40_000, 40_001)]
    assert fetch(sources, path, *ranges) == b"".join(content[start:end] for start, end in ranges)
    assert len(reads) <= 1


@pytest.mark.usefixtures("_way")
@pytest.mark.parametrize("is_cached", [True, False], ids=["cached", "cold"])
@pytest.mark.parametrize("byte_range", [(0, NBYTES), (3, NBYTES - 3)])
@pytest.mark.parametrize("end", [50_001, 12 * ALIGNMENT, 0])
def test_a_file_that_ends_too_soon_is_noticed(
    sources: SourceFiles, path: Path, byte_range: tuple[int, int], is_cached: bool, end: int
) -> None:
    os.truncate(path, end)
    if not is_cached:
        drop_from_cache(path)
    with pytest.raises(IntegrityError) as caught:
        fetch(sources, path, byte_range)
    assert caught.value.kind == "changed"


def test_what_is_cached_only_in_part_is_read_whole(tmp_path: Path) -> None:
    path = write_source(tmp_path / "large", 2 * 2**20)
    content = path.read_bytes()
    drop_from_cache(path)
    descriptor = os.open(path, os.O_RDONLY)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
    os.pread(descriptor, 2**20, 0)
    os.close(descriptor)
    with SourceFiles() as sources:
        sources.inspect(path, len(content))
        for _ in range(20):  # it is looked for at a random place
            assert fetch(sources, path, (5, 2**21 - 7)) == content[5 : 2**21 - 7]
            assert fetch(sources, path, (5, 9), (7, 2**21)) == content[5:9] + content[7:]


def test_a_file_system_that_refuses_direct_reads_is_read_otherwise(
    sources: SourceFiles, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "_MIN_DIRECT_NBYTES", 1)
    with sources.using(path) as source:
        direct = source.direct
    assert direct is not None
    real = os.preadv

    def refusing(descriptor: int, buffers: Any, offset: int, flags: int = 0) -> int:
        if descriptor == direct or flags:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(descriptor, buffers, offset, flags)

    monkeypatch.setattr(os, "preadv", refusing)
    content = path.read_bytes()
    assert fetch(sources, path, (0, NBYTES)) == content
    assert fetch(sources, path, (7, NBYTES)) == content[7:]


@pytest.mark.parametrize("is_cached", [True, False], ids=["cached", "cold"])
def test_only_what_is_not_cached_is_read_around_the_cache(
    sources: SourceFiles, path: Path, is_cached: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "_MIN_DIRECT_NBYTES", 1)
    with sources.using(path) as source:
        direct = source.direct
    used: list[int] = []
    was_there: list[bool] = []
    real = os.preadv

    def watched(descriptor: int, buffers: Any, offset: int, flags: int = 0) -> int:
        used.append(descriptor)
        if flags & os.RWF_NOWAIT:
            was_there.append(False)
        got = real(descriptor, buffers, offset, flags)
        if flags & os.RWF_NOWAIT:
            was_there[-1] = True
        return got

    monkeypatch.setattr(os, "preadv", watched)
    # Looking for a page has the kernel fetch it; twice in a thousand times it comes from the disk before it is missed,
    # and then the file is cached.
    for _ in range(5):
        drop_from_cache(path)
        if is_cached:
            path.read_bytes()
        used.clear()
        was_there.clear()
        fetch(sources, path, (5, NBYTES))
        assert (direct in used) == (not all(was_there))
        if all(was_there) == is_cached:
            return
    pytest.fail("the page cache is never what it was made to be")
