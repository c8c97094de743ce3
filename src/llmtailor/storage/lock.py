"""One writer for one run: a lock the kernel lets go of when its holder dies, however it dies."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import weakref
from pathlib import Path

from ..errors import LockedError, WriteError

__all__ = ["RunLock"]

_HELD: weakref.WeakSet[RunLock] = weakref.WeakSet()


class RunLock:
    """The lock of a run, held from construction to ``release`` or the end of the process.

    ``flock`` on a small file that also names the holder. A kill leaves the file and drops the lock, so nothing is
    ever stale and nothing needs a timeout.

    Raises:
        LockedError: Another live process (or another object of this one) holds it; says which host and pid.
        WriteError: The file cannot be made or locked.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor: int | None = None
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        except OSError as err:
            raise WriteError(
                f"cannot open the run's lock: {err.strerror}",
                kind="lock",
                path=path,
                hint="the run's directory must be writable",
            ) from err
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as err:
            holder = os.pread(descriptor, 4096, 0)
            os.close(descriptor)
            if err.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise WriteError(f"cannot lock the run: {err.strerror}", kind="lock", path=path) from err
            raise LockedError(
                "another process is writing this run",
                kind="locked",
                path=path,
                expected="no other writer",
                found=_describe(holder),
                hint=_OWN_HINT if holder == _encode_holder() else "wait for it, stop it, or write to another directory",
            ) from err
        self._descriptor = descriptor
        # Only a note for whoever is refused: a full disk must not stop a resume.
        with contextlib.suppress(OSError):
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, _encode_holder(), 0)
        _HELD.add(self)

    @property
    def is_held(self) -> bool:
        return self._descriptor is not None

    def release(self) -> None:
        """Let go; more than once is fine."""
        if self._descriptor is not None:
            # Not left to close: a process that was just spawned has a copy until it comes to its exec.
            with contextlib.suppress(OSError):
                fcntl.flock(self._descriptor, fcntl.LOCK_UN)
            self._forget()

    def _forget(self) -> None:
        """Close this process's copy; another process's lock stays."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def _describe(holder: bytes) -> str:
    try:
        fields = json.loads(holder)
        return f"held by process {int(fields['pid'])} on host {str(fields['host'])[:255]}"
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return "held by a process that has not written its name yet"


_OWN_HINT = "this process has the run open already: close() that one first (in a notebook, the one of the cell before)"


def _encode_holder() -> bytes:
    return json.dumps({"host": socket.gethostname(), "pid": os.getpid()}).encode()


def _forget_in_child() -> None:
    # A forked child (a DataLoader worker) shares the lock and would keep it alive after its parent was killed.
    for lock in _HELD:
        with contextlib.suppress(OSError):
            lock._forget()


os.register_at_fork(after_in_child=_forget_in_child)
