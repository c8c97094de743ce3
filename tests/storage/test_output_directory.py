from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from faults import FaultyFileSystem, open_descriptors
from llmtailor.errors import AlreadyExistsError, IntegrityError, LinkFallbackWarning, NotFoundError, WriteError
from llmtailor.storage import FreeSpace, LocalFileSystem, OutputDirectory, output_directory


@pytest.fixture(autouse=True)
def _nothing_stays_open() -> Iterator[None]:
    before = open_descriptors()
    yield
    assert open_descriptors() == before


def new_output(target: Path, filesystem: LocalFileSystem | None = None) -> OutputDirectory:
    return OutputDirectory(target, nbytes=0, num_files=0, filesystem=filesystem)


def fill(output: OutputDirectory, name: str, content: bytes) -> None:
    descriptor = output.create(name, 0o644)
    os.write(descriptor, content)
    output.finish(descriptor)


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_nothing_is_seen_before_it_is_published(tmp_path: Path) -> None:
    output = new_output(tmp_path / "target")
    fill(output, "sub/file", b"text")
    assert not (tmp_path / "target").exists()
    assert output.publish() == tmp_path / "target"
    assert names(tmp_path) == ["target"]
    assert (tmp_path / "target" / "sub" / "file").read_bytes() == b"text"


def test_abandoned_output_leaves_nothing(tmp_path: Path) -> None:
    output = new_output(tmp_path / "target")
    fill(output, "finished", b"text")
    output.create("unfinished", 0o644)
    output.abandon()
    assert names(tmp_path) == []


def test_directories_above_are_made_and_go_with_what_is_abandoned(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    first = new_output(tmp_path / "old" / "new" / "deep" / "target")
    first.abandon()
    assert names(tmp_path) == ["old"]
    assert names(tmp_path / "old") == []
    filesystem: Any = FaultyFileSystem()
    new_output(tmp_path / "old" / "new" / "deep" / "target", filesystem).publish()
    assert "remove_empty_directory" not in filesystem.calls
    assert (tmp_path / "old" / "new" / "deep" / "target").is_dir()


def test_directories_above_stay_if_somebody_uses_them(tmp_path: Path) -> None:
    output = new_output(tmp_path / "new" / "target")
    (tmp_path / "new" / "other").mkdir()
    output.abandon()
    assert names(tmp_path / "new") == ["other"]


def test_directories_above_stay_if_somebody_else_made_them(tmp_path: Path) -> None:
    class Late(LocalFileSystem):
        def make_directory(self, path: Path) -> None:
            if path.name == "new":
                super().make_directory(path)
            super().make_directory(path)

    new_output(tmp_path / "new" / "target", Late()).abandon()
    assert names(tmp_path) == ["new"]


def test_a_relative_target_is_where_it_was_when_it_was_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    output = new_output(Path("target"))
    monkeypatch.chdir(tmp_path / "elsewhere")
    output.publish()
    assert names(tmp_path) == ["elsewhere", "target"]


def test_what_is_above_must_be_a_directory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    with pytest.raises(WriteError):
        new_output(tmp_path / "file" / "target")
    assert names(tmp_path) == ["file"]


@pytest.mark.parametrize("free", [FreeSpace(nbytes=1000, inodes=None), FreeSpace(nbytes=None, inodes=3)])
def test_too_little_room_is_said_with_both_numbers(tmp_path: Path, free: FreeSpace) -> None:
    class Small(LocalFileSystem):
        def free_space(self, path: Path) -> FreeSpace:
            return free

    with pytest.raises(WriteError) as caught:
        OutputDirectory(tmp_path / "target", nbytes=5000, num_files=7, filesystem=Small())
    assert caught.value.kind == "no-space"
    assert str(free.nbytes or free.inodes) in str(caught.value.found)
    assert names(tmp_path) == []


# Who has been here before


def test_what_the_dead_left_is_swept(tmp_path: Path) -> None:
    left = tmp_path / ".target.llmtailor-0123456789abcdef"
    (left / "attempt" / "target").mkdir(parents=True)
    (left / "attempt" / "target" / "file").write_text("half")
    new_output(tmp_path / "target").publish()
    assert names(tmp_path) == ["target"]


def test_what_is_not_ours_is_not_swept(tmp_path: Path) -> None:
    others = [
        ".other.llmtailor-0123456789abcdef", ".target.llmtailor-0123", ".target.llmtailor-0123456789abcdeg",
        "target.llmtailor-0123456789abcdef",
    ]  # fmt: skip
    for name in others:
        (tmp_path / name).mkdir()
    precious = tmp_path / "precious"
    precious.mkdir()
    (tmp_path / ".target.llmtailor-00000000000000aa").symlink_to(precious)
    (tmp_path / ".target.llmtailor-00000000000000bb").write_text("a file")
    before = names(tmp_path)
    new_output(tmp_path / "target").publish()
    assert names(tmp_path) == sorted([*before, "target"])


def test_what_a_living_writer_has_in_flight_is_not_swept(tmp_path: Path) -> None:
    living = new_output(tmp_path / "target")
    fill(living, "file", b"of the first")
    second = new_output(tmp_path / "target")
    fill(second, "file", b"of the second")
    second.publish()
    with pytest.raises(AlreadyExistsError):
        living.publish()
    living.abandon()
    assert names(tmp_path) == ["target"]
    assert (tmp_path / "target" / "file").read_bytes() == b"of the second"


def test_a_claim_that_is_swept_before_it_is_locked_is_made_again(tmp_path: Path) -> None:
    class Swept(LocalFileSystem):
        """Another writer sweeps between the making and the locking."""

        times = 0

        def make_directory(self, path: Path) -> None:
            super().make_directory(path)
            if ".llmtailor-" in path.name and self.times < 2:
                self.times += 1
                new_output(path.with_name("target")).abandon()

    filesystem = Swept()
    output = new_output(tmp_path / "target", filesystem)
    fill(output, "file", b"text")
    output.publish()
    assert filesystem.times == 2
    assert names(tmp_path) == ["target"]


def test_a_claim_that_is_being_swept_is_left_to_who_sweeps_it(tmp_path: Path) -> None:
    held: list[int] = []

    class Locked(LocalFileSystem):
        def make_directory(self, path: Path) -> None:
            super().make_directory(path)
            if ".llmtailor-" in path.name and not held:
                held.append(os.open(path, os.O_RDONLY))
                fcntl.flock(held[0], fcntl.LOCK_EX)

    output = new_output(tmp_path / "target", Locked())
    assert len(names(tmp_path)) == 2
    output.publish()
    os.close(held[0])
    assert len(names(tmp_path)) == 2
    new_output(tmp_path / "other").publish()


def test_a_claim_that_is_swept_while_it_is_being_locked_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = fcntl.flock
    swept: list[Path] = []

    def sweep_first(descriptor: int, operation: int) -> None:
        if not swept:
            swept.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")))
            swept[0].rmdir()
        real(descriptor, operation)

    monkeypatch.setattr(output_directory.fcntl, "flock", sweep_first)
    output = new_output(tmp_path / "target")
    fill(output, "file", b"text")
    output.publish()
    assert swept
    assert names(tmp_path) == ["target"]


def test_without_locks_on_directories_nothing_is_swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".target.llmtailor-0123456789abcdef").mkdir()

    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))

    monkeypatch.setattr(output_directory.fcntl, "flock", refuse)
    new_output(tmp_path / "target").publish()
    assert names(tmp_path) == [".target.llmtailor-0123456789abcdef", "target"]


# Publishing


def test_a_target_that_appears_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    for make in (Path.mkdir, Path.touch):
        output = new_output(tmp_path / "target")
        make(tmp_path / "target")
        with pytest.raises(AlreadyExistsError):
            output.publish()
        output.abandon()
        assert names(tmp_path) == ["target"]
        FaultyFileSystem().remove_tree(tmp_path / "target") if make is Path.mkdir else (tmp_path / "target").unlink()


def test_a_name_that_could_not_be_made_durable_is_taken_back(tmp_path: Path) -> None:
    class Failing(LocalFileSystem):
        def fsync_directory(self, path: Path) -> None:
            if (tmp_path / "target").exists():
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            super().fsync_directory(path)

    output = new_output(tmp_path / "target", Failing())
    fill(output, "file", b"text")
    with pytest.raises(WriteError):
        output.publish()
    output.abandon()
    assert names(tmp_path) == []


def test_every_file_is_made_durable_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output_directory, "_MAX_FINISHED_FILES", 4)
    synced: list[str] = []

    class Watched(LocalFileSystem):
        def fsync(self, descriptor: int) -> None:
            synced.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
            super().fsync(descriptor)

    output = new_output(tmp_path / "target", Watched())
    for number in range(10):
        fill(output, str(number), b"text")
    assert len(synced) == 8
    output.sync()
    output.publish()
    assert sorted(synced) == [str(number) for number in range(10)]


def test_directories_are_made_durable_before_the_name(tmp_path: Path) -> None:
    filesystem: Any = FaultyFileSystem()
    output = new_output(tmp_path / "target", filesystem)
    descriptor = output.create("a/b/file", 0o644)
    output.finish(descriptor)
    filesystem.calls.clear()
    output.publish()
    # The file, its two directories and theirs; then the name, and the directory that holds it.
    order = ["fsync", "close", "fsync_directory", "fsync_directory", "fsync_directory", "rename", "fsync_directory"]
    assert filesystem.calls[: len(order)] == order


# Links


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source"
    path.write_bytes(b"text")
    path.chmod(0o444)
    return path


def test_a_link_is_a_second_name(tmp_path: Path, source: Path) -> None:
    output = new_output(tmp_path / "target")
    assert output.link("sub/linked", source, 4)
    output.publish()
    assert (tmp_path / "target" / "sub" / "linked").samefile(source)


@pytest.mark.parametrize("mode", [0o644, 0o464, 0o446])
def test_a_file_that_somebody_may_change_is_not_linked(tmp_path: Path, source: Path, mode: int) -> None:
    source.chmod(mode)
    output = new_output(tmp_path / "target")
    assert not output.link("linked", source, 4)
    fill(output, "linked", b"copy")
    with pytest.warns(LinkFallbackWarning, match="changed in place"):
        output.publish()
    assert (tmp_path / "target" / "linked").read_bytes() == b"copy"


def test_a_link_that_is_refused_may_be_a_copy(tmp_path: Path, source: Path) -> None:
    filesystem: Any = FaultyFileSystem(refused={"link": errno.EXDEV})
    output = new_output(tmp_path / "target", filesystem)
    assert not output.link("linked", source, 4)
    fill(output, "linked", b"copy")
    with pytest.warns(LinkFallbackWarning, match="cross-device") as warned:
        output.publish()
    assert [str(each.message).split(":")[0] for each in warned] == [f"no hard link to {source}"]


def test_links_that_are_refused_are_one_warning(tmp_path: Path, source: Path) -> None:
    filesystem: Any = FaultyFileSystem(refused={"link": errno.EXDEV})
    output = new_output(tmp_path / "target", filesystem)
    for name in ("a", "b", "c"):
        assert not output.link(name, source, 4)
        fill(output, name, b"copy")
    with pytest.warns(LinkFallbackWarning, match=r"to 3 files, such as .*cross-device.* up to 12 bytes") as warned:
        output.publish()
    assert len(warned) == 1


def test_a_link_to_another_file_than_planned_is_refused(tmp_path: Path, source: Path) -> None:
    output = new_output(tmp_path / "target")
    for path, nbytes, error in ((source, 5, IntegrityError), (tmp_path, 4, IntegrityError)):
        with pytest.raises(error):
            output.link("linked", path, nbytes)
    with pytest.raises(NotFoundError):
        output.link("linked", tmp_path / "nothing", 4)
    output.abandon()
