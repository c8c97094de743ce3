"""Disks that are really full, really read-only, or really another device."""

from __future__ import annotations

import contextlib
import errno
import itertools
import resource
from pathlib import Path
from typing import Any

import pytest

from faults import FaultyFileSystem, save_fake, staged_names
from llmtailor.checkpoint import Checkpoint
from llmtailor.errors import LinkFallbackWarning, WriteError
from llmtailor.resume import find_resumable
from llmtailor.storage import FreeSpace, LocalFileSystem, RunDirectory
from llmtailor.verify import verify_checkpoint
from mounts import Mounts

PLENTY = FreeSpace(nbytes=2**40, inodes=2**30)


class Blind(LocalFileSystem):
    """Does not see a full disk coming, as under a quota; nor, without ``can_allocate``, when it reserves blocks."""

    def __init__(self, *, can_allocate: bool = True) -> None:
        self._can_allocate = can_allocate

    def free_space(self, path: Path) -> FreeSpace:
        return PLENTY

    def allocate(self, descriptor: int, nbytes: int) -> None:
        if self._can_allocate:
            super().allocate(descriptor, nbytes)


def fails(run: RunDirectory, parent: Checkpoint, *, kind: str, **how: Any) -> None:
    """The next save fails as it should, and leaves everything as it was."""
    with pytest.raises(WriteError) as caught:
        save_fake(run, 20, parent=parent, **how)
    assert caught.value.kind == kind
    assert "older" in str(caught.value)
    assert caught.value.path is not None
    assert staged_names(run.path) == set()
    assert verify_checkpoint(parent.path).is_good
    found = find_resumable(run)
    assert found is not None
    assert found.digest == parent.digest


def works(run: RunDirectory, parent: Checkpoint) -> None:
    saved = save_fake(run, 30, parent=parent, layers={"norm", "layers.0"}, numel=3)
    assert verify_checkpoint(saved.path).is_good
    found = find_resumable(run)
    assert found is not None
    assert found.digest == saved.digest
    run.close()


SEEN_BY = {
    "check": LocalFileSystem(),
    "allocate": Blind(),
    "write": Blind(can_allocate=False),
}


def fill_to_the_last_byte(path: Path) -> None:
    with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))


def make_files_until_refused(directory: Path) -> int:
    for number in itertools.count():
        try:
            (directory / str(number)).write_bytes(b"")
        except OSError:
            return number
    raise AssertionError("unreachable")


@pytest.mark.parametrize("seen_by", SEEN_BY)
def test_full_disk(mounts: Mounts, seen_by: str) -> None:
    disk = mounts.mount("tmpfs", "size=6m")
    run = RunDirectory(disk / "a", SEEN_BY[seen_by])
    first = save_fake(run, 10)
    (disk / "ballast").write_bytes(bytes(3 * 2**20))
    fails(run, first, kind="no-space", numel=300_000)
    (disk / "ballast").unlink()
    works(run, first)


def test_disk_filled_to_the_last_byte_can_be_opened_and_resumed(mounts: Mounts) -> None:
    disk = mounts.mount("tmpfs", "size=1m")
    run = RunDirectory(disk / "a", Blind())
    first = save_fake(run, 10)
    run.close()
    (disk / "a" / "_staging" / "lock").write_bytes(b"")
    fill_to_the_last_byte(disk / "ballast")
    again = RunDirectory(disk / "a")
    found = find_resumable(again)
    assert found is not None
    assert found.digest == first.digest
    fails(again, first, kind="no-space")
    (disk / "ballast").unlink()
    again.close()


@pytest.mark.parametrize("seen_by", ["check", "write"])
def test_no_inodes_left(mounts: Mounts, seen_by: str) -> None:
    disk = mounts.mount("tmpfs", "size=16m,nr_inodes=90")
    run = RunDirectory(disk / "a", SEEN_BY[seen_by])
    first = save_fake(run, 10)
    (disk / "ballast").mkdir()
    assert make_files_until_refused(disk / "ballast") > 5
    for number in range(5):
        (disk / "ballast" / str(number)).unlink()
    fails(run, first, kind="no-space")
    for path in (disk / "ballast").iterdir():
        path.unlink()
    works(run, first)


def test_read_only_directory(mounts: Mounts) -> None:
    disk = mounts.mount("tmpfs", "size=6m")
    run = RunDirectory(disk / "a")
    first = save_fake(run, 10)
    mounts.cover_read_only(disk / "a")
    fails(run, first, kind="read-only")
    with pytest.raises(WriteError) as caught:
        RunDirectory(disk / "a")
    assert caught.value.kind == "lock"
    with pytest.raises(WriteError) as caught:
        run.remove(first.path)
    assert caught.value.kind == "read-only"
    mounts.uncover(disk / "a")
    works(run, first)


def test_new_run_in_read_only_directory(mounts: Mounts) -> None:
    disk = mounts.mount("tmpfs", "size=1m")
    mounts.cover_read_only(disk)
    with pytest.raises(WriteError) as caught:
        RunDirectory(disk / "runs" / "a")
    assert caught.value.kind == "read-only"


def test_file_size_limit(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "a")
    first = save_fake(run, 10)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64 * 2**10, hard))
    try:
        fails(run, first, kind="no-space", numel=300_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    works(run, first)


@pytest.mark.parametrize("kind", ["ramfs", "tmpfs"])
def test_file_system_that_does_not_count_its_blocks(mounts: Mounts, kind: str) -> None:
    disk = mounts.mount(kind, "size=0" if kind == "tmpfs" else "mode=0755")
    run = RunDirectory(disk / "a")
    assert LocalFileSystem().free_space(disk).nbytes is None
    works(run, save_fake(run, 10))


def test_links_across_devices_become_copies(mounts: Mounts) -> None:
    one, other = mounts.mount("tmpfs", "size=6m"), mounts.mount("tmpfs", "size=6m")
    source = RunDirectory(one / "a")
    first = save_fake(source, 10)
    source.close()
    run = RunDirectory(other / "b")
    with pytest.warns(LinkFallbackWarning, match=r"copies were made.*and their time"):
        second = save_fake(run, 20, parent=first, layers={"norm"})
    assert verify_checkpoint(second.path).is_good
    works(run, second)


@pytest.mark.parametrize("number", [errno.EPERM, errno.EMLINK, errno.EXDEV, errno.EOPNOTSUPP], ids=errno.errorcode.get)
def test_refused_links_become_copies(tmp_path: Path, number: int) -> None:
    run = RunDirectory(tmp_path / "a", FaultyFileSystem(refused={"link": number}))  # type: ignore[arg-type]
    first = save_fake(run, 10)
    with pytest.warns(LinkFallbackWarning) as warned:
        second = save_fake(run, 20, parent=first, layers={"norm"})
    assert len(warned) == 1
    assert verify_checkpoint(second.path).is_good
    for record in first.manifest.all_files:
        assert (first.path / record.path).stat().st_nlink == 1
        assert (second.path / record.path).stat().st_mode & 0o222 == 0
    run.close()


def test_refused_link_for_want_of_space_is_no_reason_to_copy(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "a", FaultyFileSystem(refused={"link": errno.ENOSPC}))  # type: ignore[arg-type]
    fails(run, save_fake(run, 10), kind="no-space", layers={"norm"})
    run.close()


def test_where_no_room_can_be_reserved_nothing_is_written_for_it(mounts: Mounts) -> None:
    """The C library's way out is a byte in every page: over a network, a round trip for each."""
    disk = mounts.mount("ramfs", "mode=755")
    path = disk / "file"
    with path.open("xb") as file:
        LocalFileSystem().allocate(file.fileno(), 2**20)
    assert path.stat().st_size == 0
    run = RunDirectory(disk / "a")
    works(run, save_fake(run, 10))
