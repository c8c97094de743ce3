"""The power really fails: a file system on a loop device is shut down under a run, at every operation of its life.

What the kernel was not asked to make durable is lost as it is when the power fails: the journal stops where it is and
nothing reaches the device any more. Then the disk is mounted again, which replays the journal. ``test_crash_states``
plays every disk that the promises of POSIX allow; here is what file systems make of them.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import struct
import subprocess
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from faults import (
    LAYERS,
    Fault,
    FaultyFileSystem,
    RunLog,
    SimulatedCrash,
    expected_path,
    memory_directory,
    open_descriptors,
    play_life_of_a_run,
    save_fake,
    staged_names,
)
from llmtailor.checkpoint import open_checkpoint
from llmtailor.errors import SupersededWarning
from llmtailor.manifest import MANIFEST_NAME
from llmtailor.resume import find_resumable
from llmtailor.storage import RunDirectory, direct_file, list_checkpoints
from llmtailor.verify import verify_checkpoint

pytestmark = pytest.mark.usefixtures("nothing_is_left_of_other_tests")

# Source: Linux fs/ext4/ext4.h and fs/xfs/libxfs/xfs_fs.h, FS_IOC_SHUTDOWN = _IOR('X', 125, __u32), NOLOGFLUSH = 2.
_FS_IOC_SHUTDOWN = 0x8004587D
_NO_LOG_FLUSH = struct.pack("I", 2)
# All of ext4 in one go: no kernel thread is still at it, and makes things durable, while a test plays.
_MAKE = {
    "ext4": ["mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=0,lazy_journal_init=0"],
    "xfs": ["mkfs.xfs", "-q", "-f"],
}
_DISK_NBYTES = {"ext4": 16 * 2**20, "xfs": 320 * 2**20}  # mkfs.xfs takes 300 MiB or more; most of it is a hole
RUN = Path("runs") / "a"

# Given "fsync" or "fsync_directory" and its argument: true if that returns without doing anything.
Lie = Callable[[str, Any], bool]


class Disk:
    """A file system on a device, whose power can be cut."""

    def __init__(self, device: str, path: Path) -> None:
        self._device = device
        self.path = path

    def mount(self) -> None:
        call("mount", self._device, str(self.path))

    def cut_power(self, *, is_busy: bool) -> None:
        """Nothing is written from here on.

        On a busy disk a neighbour made a file of its own durable just before. That takes the journal along: names that
        others made since their last fsync last, the bytes they wrote do not.
        """
        directory = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            if is_busy:
                make_durable_file(self.path / "neighbour")
            fcntl.ioctl(directory, _FS_IOC_SHUTDOWN, _NO_LOG_FLUSH)
        finally:
            os.close(directory)

    def mount_again(self) -> None:
        """The power is back; whoever had files open on the disk has closed them."""
        call("umount", str(self.path))
        self.mount()

    def unmount_in_any_case(self) -> None:
        if os.path.ismount(self.path) and subprocess.run(["umount", str(self.path)], check=False).returncode:
            subprocess.run(["umount", "-l", str(self.path)], check=False)


def call(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(done.stderr.strip().partition("\n")[0])
    return done.stdout.strip()


def make_durable_file(path: Path) -> None:
    with path.open("wb") as file:
        file.write(b"x")
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def new_disk(kind: str) -> Iterator[Disk]:
    """A formatted, mounted disk, of which nothing is left after; skips the test where that is not permitted."""
    if shutil.which(_MAKE[kind][0]) is None:
        pytest.skip(f"no {_MAKE[kind][0]} here; install the tools of {kind}")
    with memory_directory() as directory, contextlib.ExitStack() as cleanup:
        image, path = directory / "image", directory / "mount"
        path.mkdir()
        with image.open("wb") as file:
            file.truncate(_DISK_NBYTES[kind])
        call(*_MAKE[kind], str(image))
        try:
            device = call("losetup", "--find", "--show", str(image))
            cleanup.callback(subprocess.run, ["losetup", "--detach", device], check=True)
            disk = Disk(device, path)
            cleanup.callback(disk.unmount_in_any_case)
            disk.mount()
        except OSError as err:
            pytest.skip(f"cannot mount a loop device ({err}); run as root on a kernel that has {kind}")
        yield disk


@pytest.fixture(params=_MAKE)
def disk(request: pytest.FixtureRequest) -> Iterator[Disk]:
    with new_disk(request.param) as disk:
        yield disk


@pytest.fixture(autouse=True)
def _superseding_is_meant() -> None:
    warnings.simplefilter("ignore", SupersededWarning)


class FileSystemOnMains(FaultyFileSystem):
    """Makes things durable for real; the power fails before one of its operations.

    Args:
        cut_power: Cuts it.
        at: Number of the operation, from 1; None never comes.
        is_lie: Which calls of fsync do nothing.
    """

    def __init__(self, cut_power: Callable[[], None], at: int | None, is_lie: Lie) -> None:
        super().__init__(None if at is None else Fault(at=at, errno=None))
        self._cut_power = cut_power
        self._is_lie = is_lie

    def _due(self) -> Fault | None:
        fault = super()._due()
        if fault is not None:  # still under the mutex: no other thread begins anything between the cut and the end
            self.is_dead = True
            self._cut_power()
        return fault

    def _perform(self, name: str, *args: Any) -> Any:
        try:
            if name in {"fsync", "fsync_directory"}:
                return None if self._is_lie(name, args[0]) else getattr(self._local, name)(*args)
            return super()._perform(name, *args)
        except OSError as err:
            if self.is_dead:  # another thread was at it when the power failed: it learns nothing any more
                raise SimulatedCrash(name) from err
            raise


def tell_the_truth(name: str, argument: Any) -> bool:
    return False


def operations_of_a_life() -> list[str]:
    with memory_directory() as directory:
        filesystem = FaultyFileSystem()
        play_life_of_a_run(directory / RUN, filesystem, RunLog())
        return filesystem.calls


def sample(total: int, count: int) -> list[int]:
    """Numbers from 1 to the total, evenly, the first and the last among them."""
    return sorted({1 + round(each * (total - 1) / (count - 1)) for each in range(count)})


def play_until_the_cut(disk: Disk, at: int | None, *, is_busy: bool, is_lie: Lie = tell_the_truth) -> RunLog:
    """Play on an empty disk and cut the power before an operation, or after all of them; then the power is back."""
    shutil.rmtree(disk.path / RUN.parts[0], ignore_errors=True)
    disk.mount_again()  # what the life before left to be written is written now, not in the middle of this one
    before = open_descriptors()
    filesystem = FileSystemOnMains(lambda: disk.cut_power(is_busy=is_busy), at, is_lie)
    log = RunLog()
    try:
        with contextlib.suppress(SimulatedCrash):
            play_life_of_a_run(disk.path / RUN, filesystem, log)
            disk.cut_power(is_busy=is_busy)
    finally:
        filesystem.bury()
        if log.run is not None:
            log.run.close()
    assert filesystem.is_dead == (at is not None), f"there is no operation {at}"
    assert open_descriptors() == before
    disk.mount_again()
    return log


def find_lost(run: Path, log: RunLog) -> list[str]:
    """Checkpoints that were acknowledged, are not being removed, and are not there as they were."""
    lost = []
    for step in log.acknowledged.keys() - log.removing:
        path = expected_path(run, step)
        places = [path, *(run.glob(f"_{path.name}.superseded*") if step in log.replacing else ())]
        if not any(is_whole(place, log.acknowledged[step]) for place in places):
            lost.append(f"{path.name} was acknowledged and is lost")
    return lost


def is_whole(path: Path, digest: str) -> bool:
    try:
        is_good = (path / MANIFEST_NAME).is_file() and verify_checkpoint(path).is_good
        return is_good and open_checkpoint(path).digest == digest
    except OSError as err:
        # ext4 says so of a name that was made durable before what it names was.
        if err.errno not in (errno.EIO, errno.EUCLEAN):
            raise
        return False


def find_broken(run: Path) -> list[str]:
    """Checkpoints that can be seen and should not be."""
    entries = list_checkpoints(run) if run.is_dir() else []
    bare = [f"{entry.path.name} has no manifest" for entry in entries if not entry.has_manifest]
    reports = [verify_checkpoint(entry.path) for entry in entries if entry.has_manifest]
    bad = [f"{report.path} does not verify: {report.problems}" for report in reports if not report.is_good]
    run_ids = {open_checkpoint(Path(report.path)).manifest.run_id for report in reports if report.is_good}
    return [*bare, *bad, *(["checkpoints of two runs"] if len(run_ids) > 1 else [])]


def go_on(path: Path, log: RunLog) -> None:
    """Resume, and save on top of what was found."""
    must_be_there = log.acknowledged.keys() - log.removing - log.replacing
    run = RunDirectory(path)
    try:
        found = find_resumable(run)
        assert (found.manifest.step if found else 0) >= max(must_be_there, default=0)
        saved = save_fake(run, 100, parent=found, layers={"layers.1"} if found else LAYERS)
        assert verify_checkpoint(saved.path).is_good
        again = find_resumable(run)
        assert again is not None
        assert again.digest == saved.digest
        assert staged_names(path) == set()
    finally:
        run.close()


def check_cuts(disk: Disk, cuts: Iterable[int | None], *, is_busy: bool) -> None:
    for at in cuts:
        log = play_until_the_cut(disk, at, is_busy=is_busy)
        wrong = find_lost(disk.path / RUN, log) + find_broken(disk.path / RUN)
        assert wrong == [], f"after a cut before operation {at}"
        go_on(disk.path / RUN, log)


@pytest.fixture(params=["page cache", "direct"])
def path_of_bytes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Layer files are written through the page cache, or around it."""
    if request.param == "direct":
        monkeypatch.setattr(direct_file, "_MIN_DIRECT_NBYTES", 1)
    return request.param


on_both = pytest.mark.parametrize("is_busy", [False, True], ids=["idle", "busy"])


@pytest.mark.parametrize(
    ("path_of_bytes", "is_busy"),
    [
        pytest.param("page cache", True, id="page cache-busy"),
        pytest.param("direct", False, id="direct-idle"),
        pytest.param("page cache", False, id="page cache-idle", marks=pytest.mark.slow),
        pytest.param("direct", True, id="direct-busy", marks=pytest.mark.slow),
    ],
    indirect=["path_of_bytes"],
)
def test_power_failure_loses_nothing_acknowledged(disk: Disk, path_of_bytes: str, is_busy: bool) -> None:
    total = len(operations_of_a_life())
    assert total > 300
    check_cuts(disk, [*sample(total, 50), None], is_busy=is_busy)


@pytest.mark.slow
@on_both
def test_power_failure_at_every_operation_loses_nothing_acknowledged(
    disk: Disk, path_of_bytes: str, is_busy: bool
) -> None:
    check_cuts(disk, [*range(1, len(operations_of_a_life()) + 1), None], is_busy=is_busy)


MUTANTS: dict[str, Lie] = {
    "files": lambda name, _: name == "fsync",
    "run": lambda name, argument: name == "fsync_directory" and argument.name == RUN.name,
}


@pytest.mark.parametrize("is_lie", MUTANTS.values(), ids=MUTANTS)
def test_without_fsync_acknowledged_checkpoints_are_lost(disk: Disk, path_of_bytes: str, is_lie: Lie) -> None:
    lost = []
    for at in [*sample(len(operations_of_a_life()), 20), None]:
        log = play_until_the_cut(disk, at, is_busy=False, is_lie=is_lie)
        lost.append(bool(find_lost(disk.path / RUN, log)))
    assert lost[-1], "the power failed right after the last save was acknowledged"
    assert sum(lost) >= 5


def test_without_fsync_a_checkpoint_is_seen_that_is_not_whole(disk: Disk) -> None:
    """A neighbour's fsync makes its name durable, and nobody its bytes."""
    published = operations_of_a_life().index("rename") + 1
    log = play_until_the_cut(disk, published + 1, is_busy=True, is_lie=MUTANTS["files"])
    assert log.acknowledged == {}
    assert len(find_broken(disk.path / RUN)) == 1
