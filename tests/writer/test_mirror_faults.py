"""The second tier when something fails: the copy says so, what the mirror holds stays, and the next copy works."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import random
import selectors
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from faults import (
    Fault,
    FaultyFileSystem,
    SimulatedCrash,
    flip_bit,
    memory_directory,
    new_tree,
    open_descriptors,
    overwrite,
    staged_names,
)
from llmtailor.checkpoint import open_checkpoint
from llmtailor.errors import (
    FormatError,
    IntegrityError,
    NotFoundError,
    SaveFailedWarning,
    TailorError,
    TailorWarning,
    WriteError,
)
from llmtailor.storage import LocalFileSystem, list_checkpoints
from llmtailor.verify import verify_checkpoint
from llmtailor.writer.mirror import Mirror, MirrorHandle
from mounts import Mounts
from writer.first_tiers import assert_same_checkpoint, save_run

KINDS = {errno.EIO: "io", errno.ENOSPC: "no-space", errno.EDQUOT: "no-space", errno.EACCES: "read-only"}
NUM_KILLS = 12


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Checkpoints 1 to 3 of a run; do not change them."""
    return save_run(tmp_path_factory.mktemp("saved") / "run", range(1, 4))


@pytest.fixture
def own(saved: list[Path], tmp_path: Path) -> list[Path]:
    """The same, to be damaged."""
    shutil.copytree(saved[0].parent, tmp_path / "run")
    return [tmp_path / "run" / path.name for path in saved]


@pytest.fixture
def mounts(tmp_path: Path) -> Iterator[Mounts]:
    mounts = Mounts(tmp_path)
    yield mounts
    mounts.close()


def settle(handle: MirrorHandle) -> MirrorHandle:
    assert handle.wait(60)
    return handle


def check_good(directory: Path, steps: list[int]) -> None:
    entries = list_checkpoints(directory)
    assert [entry.step for entry in entries] == steps
    for entry in entries:
        report = verify_checkpoint(entry.path)
        assert report.is_good, report.problems


# The first tier


def newest_layer_file(checkpoint: Path) -> Path:
    manifest = open_checkpoint(checkpoint).manifest
    layer = next(layer for layer in manifest.layers if layer.step == manifest.step)
    return checkpoint / layer.weights.path


def replace_by_link(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to(path.with_name("elsewhere"))


DAMAGES: dict[str, tuple[Callable[[Path], object], type[TailorError], str]] = {
    "checkpoint removed": (lambda file: shutil.rmtree(file.parent), NotFoundError, "missing-file"),
    "checkpoint set aside": (lambda file: file.parent.rename(file.parent / "../_aside"), NotFoundError, "missing-file"),
    "manifest removed": (lambda file: (file.parent / "tailor.json").unlink(), NotFoundError, "missing-file"),
    "manifest changed": (lambda file: flip_bit(file.parent / "tailor.json", 99), IntegrityError, "manifest-digest"),
    "manifest cut off": (lambda file: overwrite(file.parent / "tailor.json", b""), IntegrityError, "manifest-trailer"),
    "file removed": (lambda file: file.unlink(), NotFoundError, "missing-file"),
    "bit flipped": (lambda file: flip_bit(file, 8 * 4096 + 3), IntegrityError, "digest"),
    "file cut off": (lambda file: overwrite(file, file.read_bytes()[:-1]), IntegrityError, "file-size"),
    "file grown": (lambda file: overwrite(file, file.read_bytes() + b"x"), IntegrityError, "file-size"),
    "link in its place": (replace_by_link, FormatError, "not-regular"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_in_the_first_tier_does_not_spread(own: list[Path], tmp_path: Path, damage: str) -> None:
    spoil, error, kind = DAMAGES[damage]
    mirror = Mirror(tmp_path / "mirror", first=own[0].parent)
    mirror.submit(own[0]).result()
    spoil(newest_layer_file(own[1]))
    handle = settle(mirror.submit(own[1]))
    assert isinstance(handle.error, error), handle.error
    assert (handle.error.kind, handle.state, handle.path) == (kind, "failed", None)
    with pytest.raises(error):
        handle.result()
    assert staged_names(mirror.path) == set()
    check_good(mirror.path, [1])
    mirror.submit(own[2]).result()
    mirror.close()
    check_good(mirror.path, [1, 3])


def test_first_tier_that_cannot_be_read_is_told_from_a_damaged_one(
    own: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mirror = Mirror(tmp_path / "mirror", first=own[0].parent)
    preadv = os.preadv

    def fail(descriptor: int, *args: Any) -> int:
        raise OSError(errno.EIO, "the disk is going")

    monkeypatch.setattr(os, "preadv", fail)
    handle = settle(mirror.submit(own[0]))
    assert isinstance(handle.error, WriteError)
    assert handle.error.kind == "unreadable"
    monkeypatch.setattr(os, "preadv", preadv)
    mirror.submit(own[0]).result()
    mirror.close()
    check_good(mirror.path, [1])


def test_checkpoint_that_is_replaced_while_it_is_copied_is_not_mixed(own: list[Path], tmp_path: Path) -> None:
    """The run went back and saved the step again: files of two checkpoints must not end up in one."""

    class Replacing(LocalFileSystem):
        num_created = 0

        def create(self, path: Path, mode: int = 0o444) -> int:
            self.num_created += 1
            if self.num_created == 5:
                own[1].rename(own[1].parent / "_checkpoint-2.superseded")
                shutil.copytree(own[2], own[1])
            return super().create(path, mode)

    mirror = Mirror(tmp_path / "mirror", first=own[0].parent, filesystem=Replacing())
    handle = settle(mirror.submit(own[1]))
    mirror.close()
    assert isinstance(handle.error, IntegrityError)
    assert list_checkpoints(mirror.path) == []


# The mirror


def run_with(fault: Fault, saved: list[Path], template: Path, directory: Path) -> FaultyFileSystem:
    """Mirror step 2 and remove step 1 with one fault, check what must hold after it, and mirror step 3."""
    before = open_descriptors()
    path = new_tree(directory) / "mirror"
    shutil.copytree(template, path)
    filesystem: Any = FaultyFileSystem()
    warnings: list[TailorWarning] = []
    options: dict[str, Any] = {"first": saved[0].parent, "keep": 1, "keep_consistent": False}
    mirror = Mirror(path, filesystem=filesystem, on_warning=warnings.append, **options)
    num_before = len(filesystem.calls)
    filesystem.fault = Fault(
        at=num_before + fault.at, errno=fault.errno, is_persistent=fault.is_persistent, moment=fault.moment
    )
    handle = settle(mirror.submit(saved[1]))
    assert (handle.state == "failed") == (handle.error is not None)
    is_there = 2 in [entry.step for entry in list_checkpoints(path)]
    if handle.error is None:
        assert is_there
    elif fault.errno is None:
        assert isinstance(handle.error, SimulatedCrash)
    else:
        assert isinstance(handle.error, WriteError)
        assert handle.error.kind == KINDS[fault.errno]
        assert (path / "checkpoint-1").is_dir()
    assert (path / "checkpoint-1").is_dir() or is_there
    check_good(path, [entry.step for entry in list_checkpoints(path)])
    if fault.errno is None:
        filesystem.bury()
        mirror.close()
        mirror = Mirror(path, on_warning=warnings.append, **options)  # the next process
    filesystem.heal()
    mirror.submit(saved[2]).result()
    check_good(path, [3])
    assert staged_names(path) == set()
    assert all(isinstance(warning, SaveFailedWarning) for warning in warnings)
    mirror.close()
    filesystem.calls = filesystem.calls[num_before:]
    assert open_descriptors() == before
    return filesystem


EVERY_OPERATION = {
    "make_directory", "create", "allocate", "write_at", "write", "fsync", "close", "link", "rename", "fsync_directory",
    "remove_tree", "remove_empty_directory", "free_space",
}  # fmt: skip


@pytest.mark.parametrize(
    "how",
    [
        {"errno": errno.EIO},
        {"errno": errno.ENOSPC, "is_persistent": True},
        {"errno": errno.EACCES},
        {"errno": errno.EIO, "moment": "after"},
        {"errno": None},
    ],
    ids=["once", "full", "read-only", "after the deed", "crash"],
)
def test_fault_at_every_operation_of_a_copy(saved: list[Path], tmp_path: Path, how: dict[str, Any]) -> None:
    template = tmp_path / "template"
    mirror = Mirror(template, first=saved[0].parent)
    mirror.submit(saved[0]).result()
    mirror.close()
    hit: Counter[str] = Counter()
    with memory_directory() as directory:
        for number in itertools.count(1):
            filesystem = run_with(Fault(at=number, **how), saved, template, directory)
            if not filesystem.has_fired:
                break
            hit[filesystem.calls[number - 1]] += 1
    assert hit.total() > 50
    assert set(hit) >= EVERY_OPERATION


def test_copy_whose_name_may_not_be_durable_is_made_durable_when_it_is_asked_for_again(
    saved: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Forgetful(LocalFileSystem):
        def fsync_directory(self, path: Path) -> None:
            if path == tmp_path and (tmp_path / "checkpoint-1").exists():
                raise OSError(errno.EIO, "the server did not answer")

    mirror = Mirror(tmp_path, first=saved[0].parent, filesystem=Forgetful())
    assert isinstance(settle(mirror.submit(saved[0])).error, WriteError)
    synced: list[Path] = []
    monkeypatch.setattr(LocalFileSystem, "fsync_directory", lambda self, path: synced.append(path))
    mirror.submit(saved[0]).result()
    mirror.close()
    assert synced == [tmp_path]


def test_removal_that_fails_only_warns(saved: list[Path], tmp_path: Path) -> None:
    filesystem: Any = FaultyFileSystem(refused={"remove_tree": errno.EIO})
    warnings: list[TailorWarning] = []
    options: dict[str, Any] = {"keep": 1, "keep_consistent": False, "on_warning": warnings.append}
    mirror = Mirror(tmp_path, first=saved[0].parent, filesystem=filesystem, **options)
    for path in saved[:2]:
        mirror.submit(path).result()
    mirror.close()
    assert [type(warning) for warning in warnings] == [SaveFailedWarning]
    check_good(tmp_path, [2])


def test_mirror_without_hard_links_holds_copies_and_says_so(saved: list[Path], tmp_path: Path) -> None:
    filesystem: Any = FaultyFileSystem(refused={"link": errno.EPERM, "clone": errno.EOPNOTSUPP})
    warnings: list[TailorWarning] = []
    mirror = Mirror(tmp_path, first=saved[0].parent, filesystem=filesystem, on_warning=warnings.append)
    for path in saved:
        mirror.submit(path).result()
    mirror.close()
    check_good(tmp_path, [1, 2, 3])
    assert_same_checkpoint(tmp_path / "checkpoint-3", saved[2])
    assert "copies were made" in str(warnings[0])


def test_file_system_that_is_really_full(saved: list[Path], mounts: Mounts) -> None:
    path = mounts.mount("tmpfs", "size=4m")
    mirror = Mirror(path / "mirror", first=saved[0].parent)
    mirror.submit(saved[0]).result()
    ballast = path / "ballast"
    with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
        while True:
            file.write(b"\0" * 4096)
    handle = settle(mirror.submit(saved[1]))
    assert isinstance(handle.error, WriteError)
    assert handle.error.kind == "no-space"
    check_good(path / "mirror", [1])
    ballast.unlink()
    mirror.submit(saved[1]).result()
    mirror.close()
    check_good(path / "mirror", [1, 2])


def test_mistake_of_ours_does_not_end_the_thread(
    saved: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mirror = Mirror(tmp_path / "mirror", first=saved[0].parent)
    with monkeypatch.context() as patch:
        patch.setattr("llmtailor.writer.mirror.copy_checkpoint", lambda source, tier: 1 // 0)
        handle = settle(mirror.submit(saved[0]))
    assert isinstance(handle.error, ZeroDivisionError)

    def fail(handle: MirrorHandle) -> None:
        raise KeyError(handle.step)

    mirror.submit(saved[0], on_done=fail).result()
    mirror.submit(saved[1]).result()
    mirror.close()
    check_good(tmp_path / "mirror", [1, 2])


def test_newest_is_copied_although_the_one_before_failed(own: list[Path], tmp_path: Path) -> None:
    """And who waited for one that was dropped hears of the failure of the one that took its place."""
    begin, begun = threading.Event(), threading.Event()

    class Waiting(LocalFileSystem):
        def create(self, path: Path, mode: int = 0o444) -> int:
            begun.set()
            assert begin.wait(60)
            return super().create(path, mode)

    mirror = Mirror(tmp_path / "mirror", first=own[0].parent, filesystem=Waiting())
    first = mirror.submit(own[0])
    assert begun.wait(60)
    for path in (own[0], own[2]):
        (path / "scheduler.pt").unlink()
    dropped, newest = mirror.submit(own[1]), mirror.submit(own[2])
    begin.set()
    assert mirror.drain(60)
    for handle in (first, dropped, newest):
        with pytest.raises(NotFoundError):
            handle.result()
    assert (first.state, dropped.state, newest.state) == ("failed", "superseded", "failed")
    assert mirror.submit(own[1]).result() == tmp_path / "mirror" / "checkpoint-2"
    mirror.close()
    check_good(tmp_path / "mirror", [2])


def test_limit_on_threads_leaves_the_mirror_to_others(
    saved: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(WriteError) as caught:
            Mirror(tmp_path, first=saved[0].parent)
    assert caught.value.kind == "no-thread"
    Mirror(tmp_path, first=saved[0].parent).close()


# The process


class Nursery:
    """The forking process and what its children said."""

    def __init__(self) -> None:
        script = Path(__file__).with_name("killable_mirror.py")
        self._process = subprocess.Popen([sys.executable, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._process.stdout is not None
        os.set_blocking(self._process.stdout.fileno(), False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._process.stdout, selectors.EVENT_READ)
        self._rest = b""

    def start(self, first: Path, mirror: Path, then: str) -> int:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{first} {mirror} {then}\n".encode())
        self._process.stdin.flush()
        return int(next(line for line in self.lines() if line.startswith("pid ")).removeprefix("pid "))

    def lines(self) -> Iterator[str]:
        """Lines as they come, up to ``ended``."""
        assert self._process.stdout is not None
        while True:
            while b"\n" in self._rest:
                line, _, self._rest = self._rest.partition(b"\n")
                yield line.decode()
                if line == b"ended":
                    return
            assert self._selector.select(60), "the child hangs"
            self._rest += self._process.stdout.read() or b""

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


def test_sigkill_at_any_instant_loses_nothing_that_is_in_the_mirror(saved: list[Path], tmp_path: Path) -> None:
    moments = random.Random(3)
    mirror = tmp_path / "mirror"
    num_in_flight = 0
    with contextlib.closing(Nursery()) as nursery:
        for _ in range(NUM_KILLS):
            shutil.rmtree(mirror, ignore_errors=True)
            acknowledged = []
            pid = nursery.start(saved[0].parent, mirror, "linger")
            said = nursery.lines()
            for _ in range(moments.randrange(3)):
                acknowledged.append(next(said))
            time.sleep(moments.uniform(0.0, 0.02))
            os.kill(pid, signal.SIGKILL)
            acknowledged += said
            assert not [line for line in acknowledged if line.startswith("lost")]
            newest = max((int(line[4:]) for line in acknowledged if line.startswith("ack ")), default=0)
            steps = [entry.step for entry in list_checkpoints(mirror)] if mirror.is_dir() else []
            assert max(steps, default=0) >= newest
            if steps:
                check_good(mirror, steps)
            num_in_flight += bool(list((mirror / "_staging").glob("[0-9]*")))
            nursery.start(saved[0].parent, mirror, "end")
            assert "done" in list(nursery.lines())
            check_good(mirror, [1, 2, 3])
            assert staged_names(mirror) == set()
    assert num_in_flight >= NUM_KILLS // 4, "the kills missed the copies; the test shows nothing"
