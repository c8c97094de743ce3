from __future__ import annotations

import errno
import mmap
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from faults import FaultyFileSystem, open_descriptors, save_fake, staged_names
from llmtailor.errors import AlreadyExistsError, IntegrityError, LinkFallbackWarning, NotFoundError, WriteError
from llmtailor.manifest import MANIFEST_NAME, FileRecord, digest_of
from llmtailor.storage import ALIGNMENT, LocalFileSystem, RunDirectory, StagedCheckpoint, pad, staging
from llmtailor.storage.staging import translate_os_errors


@pytest.fixture
def run(tmp_path: Path) -> Iterator[RunDirectory]:
    run = RunDirectory(tmp_path / "run")
    yield run
    run.close()


@pytest.fixture
def staged(run: RunDirectory) -> Iterator[StagedCheckpoint]:
    before = open_descriptors()
    staged = run.stage(10, 0, 0)
    yield staged
    staged.abandon()
    assert staged_names(run.path) == set()
    assert open_descriptors() == before


def chunks(*parts: bytes) -> list[memoryview]:
    return [memoryview(part) for part in parts]


# Errors


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (errno.ENOSPC, "no-space"), (errno.EDQUOT, "no-space"), (errno.EFBIG, "no-space"), (errno.EROFS, "read-only"),
        (errno.EACCES, "read-only"), (errno.EPERM, "read-only"), (errno.EIO, "io"), (errno.EMFILE, "io"),
    ],
    ids=lambda value: errno.errorcode.get(value, str(value)),
)  # fmt: skip
def test_os_errors_become_ours(number: int, kind: str) -> None:
    with pytest.raises(WriteError) as caught, translate_os_errors("do it", Path("here")):
        raise OSError(number, os.strerror(number))
    assert caught.value.kind == kind
    assert caught.value.path == "here"
    assert isinstance(caught.value.__cause__, OSError)
    assert str(caught.value).startswith(f"cannot do it: {os.strerror(number)}")


def test_the_kernels_path_is_the_better_one() -> None:
    with pytest.raises(WriteError) as caught, translate_os_errors("do it", Path("here")):
        raise OSError(errno.EIO, "x", "there")
    assert caught.value.path == "there"


@pytest.mark.parametrize("cls", [WriteError, NotFoundError, AlreadyExistsError, IntegrityError])
def test_errors_of_ours_stay_what_they_are(cls: Any) -> None:
    with pytest.raises(cls) as caught, translate_os_errors("do it", Path("here")):
        raise cls("said", kind="mine")
    assert caught.value.kind == "mine"


# Files


def write_file(staged: StagedCheckpoint, name: str, content: bytes) -> FileRecord:
    file = staged.create_file(name, len(content))
    buffer = memoryview(mmap.mmap(-1, max(1, pad(len(content)))))
    buffer[: len(content)] = content
    for start in range(0, len(content), 2 * ALIGNMENT):
        nbytes = min(2 * ALIGNMENT, len(content) - start)
        file.write(buffer[start : start + pad(nbytes)], start, nbytes)
    return file.finish(digest_of(content))


def test_write_file_records_what_it_was_given(staged: StagedCheckpoint) -> None:
    record = write_file(staged, "optimizer/a", b"one two")
    assert record == FileRecord(path="optimizer/a", bytes=7, digest=digest_of(b"one two"))
    assert (staged.path / "optimizer/a").read_bytes() == b"one two"
    assert (staged.path / "optimizer/a").stat().st_mode & 0o777 == 0o444


def test_write_file_of_nothing(staged: StagedCheckpoint) -> None:
    assert write_file(staged, "empty", b"").bytes == 0


def test_write_file_goes_on_after_a_short_write(staged: StagedCheckpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, buffer: write(descriptor, buffer[: max(1, len(buffer) // 3)]))
    write_file(staged, "a", b"x" * 1000 + b"y" * 77)
    assert (staged.path / "a").read_bytes() == b"x" * 1000 + b"y" * 77


def test_write_file_refuses_a_name_that_is_taken(staged: StagedCheckpoint) -> None:
    (staged.path / "a").write_text("somebody was faster")
    with pytest.raises(WriteError) as caught:
        write_file(staged, "a", b"x")
    assert caught.value.kind == "io"
    assert (staged.path / "a").read_text() == "somebody was faster"


def test_write_file_follows_no_symlink(staged: StagedCheckpoint, tmp_path: Path) -> None:
    (staged.path / "a").symlink_to(tmp_path / "outside")
    with pytest.raises(WriteError):
        write_file(staged, "a", b"x")
    assert not (tmp_path / "outside").exists()


def test_many_files_do_not_stay_open(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "_MAX_OPEN_FILES", 8)
    staged = run.stage(10, 0, 0)
    before = len(open_descriptors())
    for number in range(30):
        write_file(staged, str(number), b"x")
        assert len(open_descriptors()) <= before + 8
    staged.abandon()
    assert len(open_descriptors()) <= before


def test_every_file_is_synced_once_and_before_the_rename(tmp_path: Path) -> None:
    filesystem = FaultyFileSystem()
    run = RunDirectory(tmp_path / "run", filesystem)  # type: ignore[arg-type]
    save_fake(run, 10)
    calls = filesystem.calls
    assert calls.count("fsync") == calls.count("create") + calls.count("open_for_reading") == 8 + 3 + 1
    assert calls.count("close") == calls.count("fsync")
    rename = calls.index("rename")
    assert "fsync" not in calls[rename:]
    assert calls[rename:].count("fsync_directory") == 1
    run.close()


def test_after_a_failed_fsync_no_file_is_synced_again(tmp_path: Path) -> None:
    """Linux marks the pages clean: a second fsync would succeed, and the bytes be lost."""
    filesystem = FaultyFileSystem(refused={"fsync": errno.EIO})
    run = RunDirectory(tmp_path / "run", filesystem)  # type: ignore[arg-type]
    with pytest.raises(WriteError):
        save_fake(run, 10)
    assert filesystem.calls.count("fsync") == 8 + 3  # each of the first batch, none twice
    assert filesystem.calls.count("close") == 8 + 3
    assert list(run.path.iterdir()) == [run.path / "_staging"]
    run.close()


def test_error_of_close_ends_the_attempt(tmp_path: Path) -> None:
    """Where NFS and quotas report what went wrong."""
    run = RunDirectory(tmp_path / "run", FaultyFileSystem(refused={"close": errno.EDQUOT}))  # type: ignore[arg-type]
    before = open_descriptors()
    with pytest.raises(WriteError) as caught:
        save_fake(run, 10)
    assert caught.value.kind == "no-space"
    for name in open_descriptors() - before:
        os.close(int(name))  # this one's close refused without closing
    run.close()


@pytest.mark.parametrize("num_started", [0, 1, 3])
def test_no_more_threads_ends_the_attempt(run: RunDirectory, monkeypatch: pytest.MonkeyPatch, num_started: int) -> None:
    """A limit on processes is a limit on threads."""
    before = open_descriptors()
    start = threading.Thread.start
    started: list[threading.Thread] = []

    def start_some(thread: threading.Thread) -> None:
        if len(started) == num_started:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        start(thread)

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start_some)
        with pytest.raises(WriteError) as caught:
            save_fake(run, 10)
    assert caught.value.kind == "io"
    assert open_descriptors() == before
    assert staged_names(run.path) == set()
    save_fake(run, 20)


# Links


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "source").write_bytes(b"12345")
    return tmp_path / "source"


RECORD = FileRecord(path="optimizer/a", bytes=5, digest=digest_of(b"12345"))


def test_link_file_shares_the_inode(staged: StagedCheckpoint, source: Path) -> None:
    assert staged.link_file(RECORD, source) == RECORD
    assert (staged.path / "optimizer/a").stat().st_ino == source.stat().st_ino


def test_link_file_that_is_gone(staged: StagedCheckpoint, source: Path) -> None:
    source.unlink()
    with pytest.raises(NotFoundError) as caught:
        staged.link_file(RECORD, source)
    assert caught.value.kind == "missing-file"


def test_link_file_below_what_is_no_directory(staged: StagedCheckpoint, source: Path) -> None:
    with pytest.raises(NotFoundError):
        staged.link_file(RECORD, source / "below")


def test_link_file_of_another_size(staged: StagedCheckpoint, source: Path) -> None:
    source.write_bytes(b"123456")
    with pytest.raises(IntegrityError) as caught:
        staged.link_file(RECORD, source)
    assert caught.value.kind == "file-size"


def test_link_file_to_a_symlink(staged: StagedCheckpoint, source: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("12345")  # a symlink of the right size
    with pytest.raises(IntegrityError) as caught:
        staged.link_file(RECORD, tmp_path / "link")
    assert caught.value.kind == "not-regular"


def test_link_file_of_a_failing_device(staged: StagedCheckpoint, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    (staged.path / "optimizer").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", fail)
        with pytest.raises(WriteError) as caught:
            staged.link_file(FileRecord(path="a", bytes=5, digest=RECORD.digest), source)
    assert caught.value.kind == "io"


# Small files


def test_adopt_rest_takes_in_what_others_wrote(staged: StagedCheckpoint) -> None:
    write_file(staged, "mine", b"x")
    (staged.path / "b" / "c").mkdir(parents=True)
    (staged.path / "b" / "c" / "deep").write_bytes(b"deep")
    (staged.path / "a.json").write_bytes(b"{}")
    (staged.path / "empty").write_bytes(b"")
    records = staged.adopt_rest()
    assert [(record.path, record.bytes) for record in records] == [("a.json", 2), ("b/c/deep", 4), ("empty", 0)]
    assert records[0].digest == digest_of(b"{}")
    assert (staged.path / "b/c/deep").stat().st_mode & 0o777 == 0o444


def make_link_to_file(path: Path) -> None:
    path.with_name("target").write_text("x")
    path.symlink_to("target")


def make_link_to_directory(path: Path) -> None:
    path.symlink_to(path.parent)


def make_second_name(path: Path) -> None:
    outside = path.parents[4] / "outside"
    outside.write_text("x")
    os.link(outside, path)


NO_SMALL_FILES: list[Callable[[Path], None]] = [
    make_link_to_file,
    make_link_to_directory,
    make_second_name,
    os.mkfifo,
    lambda path: path.symlink_to("nowhere"),
]


@pytest.mark.timeout(20)
@pytest.mark.parametrize("make", NO_SMALL_FILES, ids=["link", "directory link", "second name", "pipe", "dangling"])
def test_adopt_rest_refuses_what_is_no_file_of_its_own(staged: StagedCheckpoint, make: Callable[[Path], None]) -> None:
    make(staged.path / "x")
    with pytest.raises(WriteError) as caught:
        staged.adopt_rest()
    assert caught.value.path is not None
    assert caught.value.path.endswith("x")


@pytest.mark.parametrize("name", [b".hidden", b"a\\b", b"a\nb", b"x\xe9", MANIFEST_NAME.encode()])
def test_adopt_rest_refuses_a_name_no_manifest_may_hold(staged: StagedCheckpoint, name: bytes) -> None:
    (staged.path / os.fsdecode(name)).write_text("x")
    with pytest.raises(WriteError) as caught:
        staged.adopt_rest()
    assert caught.value.kind == "file-name"
    assert caught.value.found == ascii(os.fsdecode(name))


def test_adopt_rest_does_not_take_a_failing_device_for_an_empty_directory(
    staged: StagedCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    (staged.path / "below").mkdir()
    (staged.path / "below" / "scheduler.pt").write_text("x")
    scandir = os.scandir

    def fail_below(path: Any) -> Any:
        if str(path).endswith("below"):
            raise OSError(errno.EIO, os.strerror(errno.EIO), path)
        return scandir(path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", fail_below)
        with pytest.raises(WriteError) as caught:
            staged.adopt_rest()
    assert caught.value.kind == "io"


# Publishing


def test_publish_needs_a_free_name(run: RunDirectory) -> None:
    staged = run.stage(10, 0, 0)
    staged.seal(b"{}")
    (run.path / "checkpoint-10").mkdir()
    with pytest.raises(WriteError):
        staged.publish()
    staged.abandon()
    assert list((run.path / "checkpoint-10").iterdir()) == []


def test_forked_child_does_not_keep_the_files_open(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker of a data loader lives long: it would keep the space of a checkpoint that was removed."""
    is_syncing, may_end = threading.Event(), threading.Event()

    def fsync(filesystem: LocalFileSystem, descriptor: int) -> None:
        is_syncing.set()
        assert may_end.wait(60)

    staged = run.stage(10, 0, 0)
    staged.create_file("begun", 1)
    monkeypatch.setattr(staging, "_MAX_OPEN_FILES", 1)
    monkeypatch.setattr(LocalFileSystem, "fsync", fsync)
    syncing = threading.Thread(target=staged.create_file("syncing", 0).finish, args=(digest_of(b""),))
    syncing.start()
    assert is_syncing.wait(60)
    child = os.fork()
    if not child:
        links = [f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd")]
        held = [os.readlink(link) for link in links if os.path.lexists(link)]
        os._exit(sum(name.startswith(str(run.path)) for name in held))
    may_end.set()
    syncing.join()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, "files of the run are open in the child"
    staged.seal(b"{}")
    staged.publish()


def test_refused_links_are_told_of_once_a_run(tmp_path: Path) -> None:
    told: list[Warning] = []
    filesystem: Any = FaultyFileSystem(refused={"link": errno.EPERM})
    run = RunDirectory(tmp_path / "run", filesystem, on_warning=told.append)
    first = save_fake(run, 10)
    save_fake(run, 20, parent=first, layers={"norm"})
    save_fake(run, 30, parent=first, layers={"norm"})
    filesystem._refused = {"link": errno.EMLINK}
    save_fake(run, 40, parent=first, layers={"norm"})
    run.close()
    assert [type(each) for each in told] == [LinkFallbackWarning] * 2, "one for each reason"
    linked = [file for layer in first.manifest.layers if layer.name != "norm" for file in layer.files]
    assert "Operation not permitted" in str(told[0])
    assert f" {sum(file.bytes for file in linked)} bytes" in str(told[0])
    assert "Too many links" in str(told[1])


def test_abandon_may_come_twice_and_after_publish(run: RunDirectory) -> None:
    staged = run.stage(10, 0, 0)
    staged.seal(b"{}")
    published = staged.publish()
    staged.abandon()
    staged.abandon()
    assert (published / MANIFEST_NAME).read_bytes() == b"{}"


def test_trainer_that_fails_leaves_nothing(run: RunDirectory) -> None:
    before = open_descriptors()

    def fail(directory: Path, step: int) -> None:
        (directory / "half").write_text("x")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save_fake(run, 10, write_small_files=fail)
    assert staged_names(run.path) == set()
    assert open_descriptors() == before
