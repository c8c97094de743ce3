"""Disks that are slow, fail now and then, or are full: training goes on, the next save works, nothing older is lost."""

from __future__ import annotations

import contextlib
import errno
import gc
import itertools
import mmap
import os
import threading
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from faults import Fault, FaultyFileSystem, new_tree, open_descriptors, staged_names
from llmtailor.errors import SaveFailedWarning, SupersededWarning, TailorError, WriteError
from llmtailor.storage import LocalFileSystem, direct_file, list_checkpoints
from llmtailor.verify import verify_checkpoint
from llmtailor.writer import SaveHandle
from mounts import Mounts
from writer.trainings import Training


class SlowFileSystem(LocalFileSystem):
    """Some operations begin only when they are let through."""

    def __init__(self, *slow: str) -> None:
        self._slow = slow
        self._open = threading.Event()
        self._reached = threading.Event()

    def __getattribute__(self, name: str) -> Any:
        attribute = object.__getattribute__(self, name)
        if name.startswith("_") or name not in object.__getattribute__(self, "_slow"):
            return attribute

        def wait_and_call(*args: Any) -> Any:
            self._reached.set()
            assert self._open.wait(60), "nobody let it through"
            return attribute(*args)

        return wait_and_call

    def wait_until_reached(self) -> None:
        assert self._reached.wait(60), f"no {self._slow} came"

    def let_through(self) -> None:
        self._open.set()

    def block_again(self) -> None:
        self._open.clear()
        self._reached.clear()


# Slow


@pytest.mark.parametrize("operation", ["create", "allocate", "write_at", "fsync", "rename", "fsync_directory"])
def test_training_goes_on_while_the_disk_is_slow(fast_directory: Path, operation: str) -> None:
    disk = SlowFileSystem(operation)
    disk.let_through()
    training = Training(directory=fast_directory / "run", options={"filesystem": disk})
    training.train()
    disk.block_again()
    handle = training.save()
    disk.wait_until_reached()
    handle.captured()
    training.train(20)
    assert handle.state.is_in_flight
    assert list_checkpoints(training.directory) == [] or operation == "fsync_directory"
    disk.let_through()
    training.check(handle.result())
    training.close()


def test_steps_wait_for_a_slow_disk_only_where_the_pool_is_too_small(fast_directory: Path) -> None:
    disk = SlowFileSystem("write_at")
    training = Training(directory=fast_directory / "run", options={"filesystem": disk, "pool_nbytes": 2**16})
    training.train()
    handle = training.save()
    disk.wait_until_reached()
    with pytest.raises(TimeoutError, match="checkpoint-1 is capturing"):
        handle.captured(timeout_secs=0.05)
    threading.Timer(0.05, disk.let_through).start()
    training.train()
    assert handle.state != "capturing"
    training.check(handle.result())
    assert handle.stats is not None
    assert handle.stats.pool_nbytes <= 2**16
    training.close()


def test_a_save_waits_for_the_one_in_flight(fast_directory: Path) -> None:
    disk = SlowFileSystem("fsync")
    training = Training(directory=fast_directory / "run", options={"filesystem": disk})
    training.train()
    first = training.save()
    disk.wait_until_reached()
    training.train()
    threading.Timer(0.05, disk.let_through).start()
    second = training.save()
    assert first.state == "published"
    assert training.checkpointer.num_skipped == 0
    training.check(second.result())
    training.close()


@pytest.mark.parametrize("limit", [1, 2, 3])
def test_a_save_beyond_the_limit_is_skipped_and_counted(fast_directory: Path, limit: int) -> None:
    disk = SlowFileSystem("fsync")
    options = {"filesystem": disk, "when_busy": "skip", "max_in_flight": limit}
    training = Training(directory=fast_directory / "run", options=options)
    begun = []
    for _ in range(limit):
        training.train()
        begun.append(training.save())
    disk.wait_until_reached()
    skipped = []
    for _ in range(2):
        training.train()
        skipped.append(training.save())
    assert [handle.state for handle in skipped] == ["skipped", "skipped"]
    assert training.checkpointer.num_skipped == 2
    for handle in skipped:
        handle_says_skipped(handle)
    disk.let_through()
    for handle in begun:
        training.check(handle.result())
    training.train()
    training.check(training.save().result())
    assert training.checkpointer.num_skipped == 2
    training.close()  # what was skipped is no failure
    assert [entry.step for entry in list_checkpoints(training.directory)] == [*range(1, limit + 1), limit + 3]


def handle_says_skipped(handle: SaveHandle) -> None:
    for wait in (handle.result, handle.captured):
        with pytest.raises(WriteError) as caught:
            wait()
        assert caught.value.kind == "skipped"


def test_a_slow_removal_keeps_nobody_waiting_for_the_result(fast_directory: Path) -> None:
    disk = SlowFileSystem("remove_tree")
    training = Training(directory=fast_directory / "run", options={"filesystem": disk, "keep": 1})
    for _ in range(2):
        training.train()
        training.save().result()
    disk.wait_until_reached()
    training.train()
    training.check(training.handles[-1].result())
    assert not training.checkpointer.drain(timeout_secs=0.05), "it is being removed"
    disk.let_through()
    assert training.checkpointer.drain(60)
    assert [entry.step for entry in list_checkpoints(training.directory)] == [2]
    training.close()


# Failing

# Written by parity, so that there are links, and removals.
OPTIONS = {"strategy": "parity", "keep": 2, "pool_nbytes": 2**17}
NUM_SAVES = 5


@pytest.fixture
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SaveFailedWarning)
        # A first save whose name could not be made durable is there, and set aside by the next, which is the first.
        warnings.simplefilter("ignore", SupersededWarning)
        yield


def train_on(filesystem: Any, directory: Path) -> Training:
    """Train and save a few times; a save that fails stops nothing."""
    training = Training(directory=directory, options={**OPTIONS, "filesystem": filesystem})
    for _ in range(NUM_SAVES):
        training.train()
        with contextlib.suppress(WriteError):  # of the second in a row
            training.save()
        training.checkpointer.drain()
    return training


def check_run(training: Training, faults: FaultyFileSystem) -> None:
    """What a fault may have cost is one save; what is there is whole, and the next save works."""
    failed = [handle for handle in training.handles if handle.error is not None]
    assert all(isinstance(handle.error, TailorError) and handle.error.kind for handle in failed)
    assert len(failed) <= 1
    assert training.step == NUM_SAVES
    faults.heal()
    training.train()
    training.check(training.save().result())
    training.close()
    entries = list_checkpoints(training.directory)
    assert len(entries) >= 2
    for entry in entries:
        assert verify_checkpoint(entry.path).is_good
        training.check(entry.path)
    assert staged_names(training.directory) == set()


def fault_points(directory: Path, names: set[str]) -> list[int]:
    """Numbers of operations, after the run was opened, that have one of these names."""
    faults = FaultyFileSystem()
    training = train_on(faults, directory / "run")
    training.close()
    return [number for number, name in enumerate(faults.calls, start=1) if name in names and number > 10]


@pytest.mark.usefixtures("_quiet")
@pytest.mark.parametrize("moment", ["before", pytest.param("half", marks=pytest.mark.slow)])
@pytest.mark.parametrize("path_of_bytes", ["page cache", "direct"])
def test_a_fault_costs_one_save_and_no_training(
    fast_directory: Path, monkeypatch: pytest.MonkeyPatch, path_of_bytes: str, moment: Literal["before", "half"]
) -> None:
    if path_of_bytes == "direct":
        monkeypatch.setattr(direct_file, "_MIN_DIRECT_NBYTES", 1)
    names = {"write_at"} if moment == "half" else {"create", "write_at", "fsync", "rename", "link", "truncate"}
    points = fault_points(new_tree(fast_directory), names)
    gc.collect()  # what earlier tests left to it may go at any time
    before = open_descriptors()
    hit: Counter[str] = Counter()
    for number in points[:: max(1, len(points) // 25)]:
        faults = FaultyFileSystem(Fault(at=number, errno=errno.EIO, moment=moment))
        check_run(train_on(faults, new_tree(fast_directory) / "run"), faults)
        assert faults.has_fired
        hit[faults.calls[number - 1]] += 1
        assert open_descriptors() == before
    assert sum(hit.values()) >= 20


@pytest.mark.slow
@pytest.mark.usefixtures("_quiet")
@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC], ids=errno.errorcode.get)
def test_a_fault_at_every_operation_costs_one_save_and_no_training(fast_directory: Path, number: int) -> None:
    before = open_descriptors()
    for at in itertools.count(11):  # behind the opening of the run
        faults = FaultyFileSystem(Fault(at=at, errno=number))
        training = train_on(faults, new_tree(fast_directory) / "run")
        if not faults.has_fired:
            training.close()
            break
        check_run(training, faults)
        assert open_descriptors() == before
    assert at > 400


def save_and_wait(training: Training) -> bool:
    """True if the save said that two in a row have failed."""
    is_raised = False
    try:
        training.save()
    except WriteError as err:
        is_raised = err.kind == "io"
    training.checkpointer.drain()
    training.checkpointer.collect()
    return is_raised


@pytest.mark.parametrize(
    "operation", ["create", "allocate", "write_at", "fsync", "rename", "make_directory", "fsync_directory", "link"]
)
def test_a_disk_that_stays_broken_stops_saving_and_not_training(fast_directory: Path, operation: str) -> None:
    faults = FaultyFileSystem()
    training = Training(directory=fast_directory / "run", options={"filesystem": faults, "strategy": "parity"})
    training.train()
    first = training.save()
    training.check(first.result())
    faults._refused[operation] = errno.EIO
    raised = 0
    for _ in range(5):
        training.train()
        with pytest.warns(SaveFailedWarning, match=r"training goes on") as warned:
            raised += save_and_wait(training)
        assert len(warned) == 1
    assert raised >= 3, "the second failure in a row, and those after it, are raised"
    assert [entry.step for entry in list_checkpoints(training.directory)] == [1] or operation == "fsync_directory"
    training.check(first.result())
    del faults._refused[operation]
    training.train()
    save_and_wait(training)  # it may still be said that two in a row had failed
    training.train()
    training.check(training.save().result())
    training.check(training.directory / f"checkpoint-{training.step - 1}")
    training.close()


@pytest.mark.parametrize("operation", ["fsync", "create"])
@pytest.mark.filterwarnings("ignore::llmtailor.errors.SaveFailedWarning")
def test_failed_saves_keep_nothing_of_the_state(
    fast_directory: Path, monkeypatch: pytest.MonkeyPatch, operation: str
) -> None:
    """However many there are, and whoever keeps their handles."""
    training = Training(directory=fast_directory / "run")
    training.model.register_buffer("mark", torch.zeros(3, 77))
    training.train()

    def fail(*args: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    def count_copies() -> int:
        training.checkpointer.drain()
        training.states.clear()
        gc.collect()
        found = [each for each in gc.get_objects() if type(each) is torch.Tensor and each.shape == (3, 77)]
        return len(found)

    monkeypatch.setattr(LocalFileSystem, operation, fail)
    kept = training.save()
    most = count_copies()
    for _ in range(6):
        training.train()
        with contextlib.suppress(WriteError):
            training.save()
    assert count_copies() <= most
    assert kept.error is not None
    with pytest.raises(WriteError):
        training.close()


def test_no_thread_can_be_started(fast_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As under a limit on processes: the save fails typed, and the next one works."""
    training = Training(directory=fast_directory / "run")
    training.train()

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        with pytest.warns(SaveFailedWarning, match="threads"):
            handle = training.save()
    assert isinstance(handle.error, WriteError)
    assert staged_names(training.directory) == set()
    training.train()
    training.check(training.save().result())
    training.close()


def test_a_fault_of_ours_is_raised_and_the_run_goes_on(fast_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not of the disk: hiding it behind a warning would hide it for good."""
    training = Training(directory=fast_directory / "run")
    training.train()
    with monkeypatch.context() as patch:
        patch.setattr(LocalFileSystem, "write_at", lambda *args: 1 / 0)
        handle = training.save()
        with pytest.raises(ZeroDivisionError):
            handle.result()
        training.train()
        with pytest.raises(ZeroDivisionError):
            training.checkpointer.collect()
    assert staged_names(training.directory) == set()
    training.check(training.save().result())
    training.close()


# Full


def test_training_on_a_full_disk_goes_on_and_saves_again_when_there_is_room(mounts: Mounts) -> None:
    disk = mounts.mount("tmpfs", "size=8m")
    training = Training(directory=disk / "run")
    training.train()
    first = training.save()
    training.check(first.result())
    (disk / "ballast").write_bytes(bytes(os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize - 2**20))
    training.train()
    with pytest.warns(SaveFailedWarning, match="checkpoint-2 was not saved"):
        save_and_wait(training)
    assert training.handles[-1].error is not None
    assert training.handles[-1].error.kind == "no-space"
    training.train(3)
    training.check(first.result())
    assert staged_names(training.directory) == set()
    (disk / "ballast").unlink()
    training.check(training.save().result())
    training.close()


def test_the_disk_fills_up_in_the_middle_of_a_save(mounts: Mounts, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = mounts.mount("tmpfs", "size=16m")
    training = Training(directory=disk / "run")
    training.train()
    first = training.save()
    training.check(first.result())
    create = LocalFileSystem.create

    def create_and_fill(self: LocalFileSystem, path: Path, mode: int = 0o444) -> int:
        descriptor = create(self, path, mode)
        if path.name == "model-norm.safetensors":
            free = os.statvfs(disk)
            (disk / "ballast").write_bytes(bytes(free.f_bavail * free.f_frsize))
        return descriptor

    monkeypatch.setattr(LocalFileSystem, "create", create_and_fill)
    training.train()
    handle = training.save()
    with pytest.raises(WriteError) as caught:
        handle.result()
    assert caught.value.kind == "no-space"
    monkeypatch.undo()
    (disk / "ballast").unlink()
    with pytest.warns(SaveFailedWarning):
        training.checkpointer.collect()
    training.train()
    training.check(training.save().result())
    training.check(first.result())
    training.close()


# Memory


def test_host_memory_that_cannot_be_had_costs_one_save(fast_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training = Training(directory=fast_directory / "run")
    training.train()

    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    with monkeypatch.context() as patch:
        patch.setattr(mmap, "mmap", refuse)
        handle = training.save()
        with pytest.raises(WriteError) as caught:
            handle.result()
    assert caught.value.kind == "host-memory"
    training.train()
    with pytest.warns(SaveFailedWarning, match="training goes on"):
        training.checkpointer.collect()
    training.check(training.save().result())
    training.close()
