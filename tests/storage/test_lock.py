from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from llmtailor.errors import LockedError, WriteError
from llmtailor.storage import RunLock

HOLD = "import sys; from llmtailor.storage import RunLock; lock = RunLock(__import__('pathlib').Path(sys.argv[1]));"
# Forked through multiprocessing as a DataLoader's workers are; the parent says when its child is ready, then waits.
HOLD_AND_FORK = (
    HOLD
    + """
import multiprocessing, time
context = multiprocessing.get_context("fork")
ready = context.Event()
def work():
    assert not lock.is_held
    ready.set()
    time.sleep(60)
child = context.Process(target=work, daemon=True)
child.start()
ready.wait()
print(child.pid, flush=True)
sys.stdin.read()
"""
)
HOLD_AND_WAIT = HOLD + "print('held', flush=True); sys.stdin.read()"


@contextmanager
def holder(path: Path, code: str = HOLD_AND_WAIT) -> Iterator[tuple[subprocess.Popen[str], str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    try:
        yield process, process.stdout.readline().strip()
    finally:
        process.kill()
        process.communicate()


def test_second_holder_is_refused_and_told_who_has_it(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with holder(path) as (process, _):
        with pytest.raises(LockedError) as caught:
            RunLock(path)
        assert caught.value.kind == "locked"
        assert caught.value.found == f"held by process {process.pid} on host {socket.gethostname()}"
        assert caught.value.path == str(path)


def test_second_holder_of_the_same_process_is_refused(tmp_path: Path) -> None:
    lock = RunLock(tmp_path / "lock")
    with pytest.raises(LockedError, match=str(os.getpid())):
        RunLock(tmp_path / "lock")
    lock.release()


def test_refused_holder_leaves_no_descriptor(tmp_path: Path) -> None:
    lock = RunLock(tmp_path / "lock")
    before = os.listdir("/proc/self/fd")
    for _ in range(3):
        with pytest.raises(LockedError):
            RunLock(tmp_path / "lock")
    assert os.listdir("/proc/self/fd") == before
    lock.release()


def test_lock_is_free_after_release(tmp_path: Path) -> None:
    lock = RunLock(tmp_path / "lock")
    assert lock.is_held
    lock.release()
    lock.release()
    assert not lock.is_held
    RunLock(tmp_path / "lock").release()


def test_lock_is_free_after_its_holder_was_killed(tmp_path: Path) -> None:
    with holder(tmp_path / "lock") as (process, _):
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        RunLock(tmp_path / "lock").release()


def test_forked_child_does_not_keep_the_lock(tmp_path: Path) -> None:
    """A worker of a data loader outlives its trainer for a while; the next trainer must not wait for it."""
    with holder(tmp_path / "lock", HOLD_AND_FORK) as (process, child):
        with pytest.raises(LockedError, match=str(process.pid)):
            RunLock(tmp_path / "lock")
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        try:
            os.kill(int(child), 0)  # it still lives
            RunLock(tmp_path / "lock").release()
        finally:
            os.kill(int(child), signal.SIGKILL)


def test_child_that_is_executed_does_not_inherit_the_lock(tmp_path: Path) -> None:
    lock = RunLock(tmp_path / "lock")
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, close_fds=False) as child:
        lock.release()
        RunLock(tmp_path / "lock").release()
        child.kill()


def test_shorter_name_leaves_nothing_of_a_longer_one(tmp_path: Path) -> None:
    (tmp_path / "lock").write_text("x" * 1000)
    lock = RunLock(tmp_path / "lock")
    with pytest.raises(LockedError, match="held by process"):
        RunLock(tmp_path / "lock")
    lock.release()


HOSTILE = ["", "x", "[]", "{}", "[" * 4000, '{"pid": 1e999, "host": "a"}', '{"pid": [], "host": 1}', "\0" * 4096]


@pytest.mark.parametrize("content", HOSTILE)
def test_holder_without_a_readable_name(tmp_path: Path, content: str) -> None:
    lock = RunLock(tmp_path / "lock")
    (tmp_path / "lock").write_text(content)
    with pytest.raises(LockedError) as caught:
        RunLock(tmp_path / "lock")
    assert caught.value.found == "held by a process that has not written its name yet"
    lock.release()


def test_lock_that_is_a_symlink_is_refused(tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("precious")
    (tmp_path / "lock").symlink_to(tmp_path / "victim")
    with pytest.raises(WriteError) as caught:
        RunLock(tmp_path / "lock")
    assert caught.value.kind == "lock"
    assert (tmp_path / "victim").read_text() == "precious"


def test_lock_in_a_directory_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(WriteError) as caught:
        RunLock(tmp_path / "nowhere" / "lock")
    assert caught.value.kind == "lock"


def test_second_holder_in_one_process_is_told_to_close_the_first(tmp_path: Path) -> None:
    first = RunLock(tmp_path / "lock")
    with pytest.raises(LockedError) as caught:
        RunLock(tmp_path / "lock")
    assert caught.value.hint is not None
    assert "close()" in caught.value.hint
    first.release()
    RunLock(tmp_path / "lock").release()
