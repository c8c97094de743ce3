"""A checkpoint that takes another's place; what a kill or a power failure leaves is in ``crash/test_thinning.py``."""

from __future__ import annotations

import contextlib
import errno
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from faults import Fault, FaultyFileSystem, save_fake, staged_names
from llmtailor.checkpoint import Checkpoint, open_checkpoint
from llmtailor.errors import IntegrityError, LinkFallbackWarning, NotFoundError, WriteError
from llmtailor.manifest import Manifest, encode_manifest
from llmtailor.retention import thin_manifest
from llmtailor.storage import LocalFileSystem, RunDirectory, list_attempts
from llmtailor.verify import verify_checkpoint

WAYS: dict[str, dict[str, int]] = {
    "exchange": {},
    "two renames, for the file system": {"exchange": errno.EINVAL},
    "two renames, for the kernel": {"exchange": errno.ENOSYS},
    "copies": {"link": errno.EPERM, "reflink": errno.EOPNOTSUPP},
}


class Thinnable:
    """A run of two checkpoints, the second sharing layers of the first."""

    def __init__(self, path: Path, filesystem: Any) -> None:
        self.run = RunDirectory(path, filesystem)
        self.first = save_fake(self.run, 10)
        self.second = save_fake(self.run, 20, parent=self.first, layers={"norm"})

    @property
    def thinned(self) -> Manifest:
        thinned = thin_manifest(self.first.manifest)
        assert thinned is not None
        return thinned

    def thin(self) -> None:
        self.run.thin(self.first.path, self.thinned.all_files, encode_manifest(self.thinned)[0])

    def found(self) -> Checkpoint:
        assert verify_checkpoint(self.first.path).is_good
        return open_checkpoint(self.first.path)


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., Thinnable]]:
    made: list[Thinnable] = []

    def make(filesystem: Any = None) -> Thinnable:
        made.append(Thinnable(tmp_path / "run", filesystem))
        return made[-1]

    yield make
    for each in made:
        each.run.close()


@pytest.mark.parametrize("way", WAYS)
def test_a_thinned_checkpoint_takes_the_place_of_the_whole_one(make: Callable[..., Thinnable], way: str) -> None:
    warnings.simplefilter("ignore", LinkFallbackWarning)
    filesystem: Any = FaultyFileSystem(refused=WAYS[way])
    made = make(filesystem)
    inode = (made.first.path / "model-norm.safetensors").stat().st_ino
    before = len(filesystem.calls)
    made.thin()
    assert made.found().manifest == made.thinned
    assert (filesystem.calls[before:].count("rename") > 0) == ("renames" in way)
    assert not (made.first.path / "optimizer").exists()
    assert ((made.first.path / "model-norm.safetensors").stat().st_ino == inode) == (way != "copies")
    assert all((made.first.path / file.path).stat().st_mode & 0o777 == 0o444 for file in made.thinned.all_files)
    assert verify_checkpoint(made.second.path).is_good
    assert sorted(os.listdir(made.run.path)) == ["_staging", "checkpoint-10", "checkpoint-20"]
    assert staged_names(made.run.path) == set()


@pytest.mark.parametrize(
    ("spoil", "error"),
    [
        (lambda path: path.unlink(), NotFoundError),
        (lambda path: (path.unlink(), path.write_bytes(b"")), IntegrityError),
    ],
)
def test_a_checkpoint_that_is_not_as_published_stays_as_it_is(
    make: Callable[..., Thinnable], spoil: Callable[[Path], Any], error: type[Exception]
) -> None:
    made = make()
    spoil(made.first.path / "model-norm.safetensors")
    with pytest.raises(error):
        made.thin()
    assert open_checkpoint(made.first.path).digest == made.first.digest
    assert staged_names(made.run.path) == set()


@pytest.mark.parametrize("way", ["exchange", "two renames, for the kernel"])
@pytest.mark.parametrize("moment", ["before", "after", "half"])
def test_error_at_every_operation_leaves_one_of_the_two(tmp_path: Path, way: str, moment: Any) -> None:
    outcomes = set()
    for number in range(1, 200):
        filesystem: Any = FaultyFileSystem(refused=WAYS[way])
        made = Thinnable(tmp_path / f"run-{number}", filesystem)
        filesystem.fault = Fault(at=len(filesystem.calls) + number, errno=errno.EIO, moment=moment)
        with contextlib.suppress(WriteError):
            made.thin()
        assert verify_checkpoint(made.first.path).is_good, "whoever looks without a lock finds one of the two, too"
        if not filesystem.has_fired:
            break
        filesystem.heal()
        # The same process saves on, which settles what is not, and then another one does.
        save_fake(made.run, 30, parent=made.second, layers={"layers.0"})
        outcomes.add(made.found().digest == made.first.digest)
        assert staged_names(made.run.path) == set()
        assert not list(made.run.path.glob("*.thinning"))
        made.run.close()
    assert number > 15
    assert outcomes == {True, False}


def leave_aside(made: Thinnable, *, is_replaced: bool) -> Path:
    """What a writer leaves that was killed between two renames, or after them."""
    aside = made.run.path / "_checkpoint-10.thinning"
    made.run.close()
    os.rename(made.first.path, aside)
    if is_replaced:
        os.mkdir(made.first.path)
    return aside


def test_a_checkpoint_whose_name_is_free_gets_it_back(make: Callable[..., Thinnable]) -> None:
    made = make()
    aside = leave_aside(made, is_replaced=False)
    assert list_attempts(made.run.path) == [aside], "ls shows it"
    RunDirectory(made.run.path).close()
    assert made.found().digest == made.first.digest
    assert not aside.exists()


def test_a_checkpoint_whose_name_is_taken_goes(make: Callable[..., Thinnable]) -> None:
    made = make()
    aside = leave_aside(made, is_replaced=True)
    filesystem: Any = FaultyFileSystem()
    RunDirectory(made.run.path, filesystem).close()
    assert not aside.exists()
    assert staged_names(made.run.path) == set()
    # The new name is durable before the old files go, and so is it that they have no name in the run.
    tail = filesystem.calls[-5:]
    assert tail == ["fsync_directory", "rename", "fsync_directory", "fsync_directory", "remove_tree"]


def test_a_save_that_is_staged_meanwhile_leaves_the_two_renames_alone(make: Callable[..., Thinnable]) -> None:
    """Another thread may stage while a checkpoint is between its two names."""

    class Interrupted(FaultyFileSystem):
        run: RunDirectory

        def _perform(self, name: str, *args: Any) -> Any:
            result = super()._perform(name, *args)
            if name == "rename" and args[1].name.endswith(".thinning"):
                self.run.abandon(self.run.stage(40, 0, 0))
            return result

    filesystem: Any = Interrupted(refused={"exchange": errno.ENOSYS})
    made = make(filesystem)
    filesystem.run = made.run
    made.thin()
    assert made.found().manifest == made.thinned


def test_a_fork_of_the_writer_thins_nothing(make: Callable[..., Thinnable]) -> None:
    made = make()
    made.run.close()
    with pytest.raises(WriteError) as caught:
        made.thin()
    assert caught.value.kind == "closed"
    assert made.found().digest == made.first.digest


def test_exchange_swaps_two_directories(tmp_path: Path) -> None:
    (tmp_path / "one" / "a").mkdir(parents=True)
    (tmp_path / "other" / "b").mkdir(parents=True)
    LocalFileSystem().exchange(tmp_path / "one", tmp_path / "other")
    assert (os.listdir(tmp_path / "one"), os.listdir(tmp_path / "other")) == (["b"], ["a"])
    with pytest.raises(FileNotFoundError) as caught:
        LocalFileSystem().exchange(tmp_path / "one", tmp_path / "none")
    assert (caught.value.filename, caught.value.filename2) == (str(tmp_path / "one"), str(tmp_path / "none"))


def test_exchange_says_when_the_c_library_has_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ctypes.CDLL", lambda name, use_errno: object())
    with pytest.raises(OSError, match="not implemented") as caught:
        LocalFileSystem().exchange(tmp_path, tmp_path)
    assert caught.value.errno == errno.ENOSYS
