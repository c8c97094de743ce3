from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from assembly.merge_plans import (
    file_range,
    plan_of,
    small_merge,
    write_source,
)
from faults import FaultyFileSystem, open_descriptors
from llmtailor.assembly import execute, sources
from llmtailor.errors import (
    FormatError,
    IntegrityError,
    NotFoundError,
    TailorError,
    WriteError,
)
from llmtailor.file_plan import FileRange
from llmtailor.storage import LocalFileSystem
from llmtailor.tensors import ByteRange

CHUNK = 8192


def make_shorter(path: Path) -> None:
    path.chmod(0o644)
    os.truncate(path, 10)
    path.chmod(0o444)


def replace_by_link(path: Path) -> None:
    path.rename(path.with_name("moved"))
    path.symlink_to("moved")


def replace_by_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def replace_by_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGES: list[tuple[Callable[[Path], None], type[TailorError]]] = [
    (Path.unlink, NotFoundError),
    (make_shorter, IntegrityError),
    (replace_by_link, FormatError),
    (replace_by_pipe, FormatError),
    (replace_by_directory, FormatError),
]


@pytest.mark.parametrize(("damage", "error"), DAMAGES)
@pytest.mark.parametrize("name", ["a.bin", "published.bin"])
def test_a_damaged_source_is_refused_before_anything_is_written(
    tmp_path: Path, name: str, damage: Callable[[Path], None], error: type[TailorError]
) -> None:
    plan = small_merge(tmp_path / "sources")
    damage(tmp_path / "sources" / name)
    filesystem: Any = FaultyFileSystem()
    with pytest.raises(error) as caught:
        execute(plan, tmp_path / "target", filesystem=filesystem)
    assert caught.value.path == str(tmp_path / "sources" / name)
    assert {"create", "write_at"}.isdisjoint(filesystem.calls)
    assert [path.name for path in tmp_path.iterdir()] == ["sources"]


# Sources that change meanwhile


class Meddling(LocalFileSystem):
    """Does something to the sources when the first bytes are written."""

    def __init__(self, meddle: Callable[[], object]) -> None:
        self._meddle: Callable[[], object] | None = meddle

    def write_at(self, descriptor: int, buffer: memoryview, offset: int) -> None:
        super().write_at(descriptor, buffer, offset)
        if self._meddle is not None:
            self._meddle()
            self._meddle = None


def append(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"more")


def replace_by_copy(path: Path) -> None:
    shutil.copyfile(path, path.with_name("copy"))
    path.with_name("copy").rename(path)


def write_in_place(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(b"other")


@pytest.mark.usefixtures("_small_things_too")
@pytest.mark.parametrize("meddle", [append, replace_by_copy, write_in_place, Path.unlink, make_shorter])
def test_a_source_that_changes_is_noticed(tmp_path: Path, meddle: Callable[[Path], object]) -> None:
    source = write_source(tmp_path / "sources" / "a", 100_000)
    plan = plan_of(file_range(source, 1, 100_000))
    filesystem = Meddling(lambda: meddle(source))
    with pytest.raises(IntegrityError) as caught:
        execute(plan, tmp_path / "target", threads=1, chunk_nbytes=CHUNK, filesystem=filesystem)
    assert caught.value.kind == "changed"
    assert caught.value.path == str(source)
    assert "changed while it was read" in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["sources"]


def test_a_source_that_is_replaced_between_two_openings_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "_MAX_OPEN", 1)
    a, b = (write_source(tmp_path / "sources" / name, 100_000) for name in "ab")
    plan = plan_of(file_range(a, 1, 9000), file_range(b, 1, 9000), file_range(a, 50_000, 60_000))
    with pytest.raises(IntegrityError) as caught:
        execute(
            plan,
            tmp_path / "target",
            threads=1,
            chunk_nbytes=CHUNK,
            filesystem=Meddling(lambda: replace_by_copy(a)),
        )
    assert caught.value.path == str(a)


def test_a_source_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_source(tmp_path / "sources" / "a", 5000)
    real = os.preadv

    def broken(descriptor: int, *arguments: Any) -> int:
        if os.readlink(f"/proc/self/fd/{descriptor}") == str(source):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(descriptor, *arguments)

    monkeypatch.setattr(os, "preadv", broken)
    with pytest.raises(WriteError) as caught:
        execute(plan_of(file_range(source, 0, 5000)), tmp_path / "target")
    assert caught.value.kind == "unreadable"
    assert caught.value.path == str(source)


def test_sources_are_opened_for_reading_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = small_merge(tmp_path / "sources")
    opened: list[int] = []
    real = os.open

    def watched(path: Any, flags: int, *arguments: Any, **named: Any) -> int:
        if str(path).startswith(str(tmp_path / "sources")):
            opened.append(flags)
        return real(path, flags, *arguments, **named)

    monkeypatch.setattr(os, "open", watched)
    execute(plan, tmp_path / "target")
    assert opened
    assert all(flags & os.O_ACCMODE == os.O_RDONLY for flags in opened)
    assert all(flags & os.O_NOFOLLOW for flags in opened)


def test_a_file_in_use_is_not_closed_for_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "_MAX_OPEN", 1)
    a, b, c = (write_source(tmp_path / name, 100) for name in "abc")
    with sources.SourceFiles() as files:
        before = open_descriptors()
        with files.using(a) as first:
            for other in (b, c):
                with files.using(other) as second:
                    assert os.pread(second.descriptor, 100, 0) == other.read_bytes()
            assert os.pread(first.descriptor, 100, 0) == a.read_bytes()
        with files.using(b):
            pass
        assert len(open_descriptors() - before) <= 2 * 2


def test_file_range_is_checked_for_the_whole_of_its_range(tmp_path: Path) -> None:
    source = write_source(tmp_path / "sources" / "a", 100)
    with pytest.raises(IntegrityError) as caught:
        execute(plan_of(FileRange(path=source, byte_range=ByteRange(start=90, end=101))), tmp_path / "target")
    assert caught.value.kind == "truncated"
