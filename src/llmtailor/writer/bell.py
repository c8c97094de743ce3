"""How a thread that trains waits for threads of ours, such that no Ctrl-C can lock them out."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable

__all__ = ["Bell"]


class Bell:
    """Wakes whoever waits for something to become true.

    Not a ``threading.Condition``: its waiter holds a lock whenever it looks. The exception of a signal's handler may
    come after that lock is taken and before ``with`` knows, or when ``with`` is left, and then it is held for ever by
    nobody. Here a waiter has a lock of its own, which no other thread ever waits for. Source: CPython 3.11,
    Lib/threading.py (``Condition.__enter__`` and ``__exit__`` are Python code, so a handler may run inside of them).
    """

    def __init__(self) -> None:
        self._waiters: list[threading.Lock] = []

    def ring(self) -> None:
        """Have all that wait look again; call it after the change. Any thread."""
        for waiter in [*self._waiters]:
            with contextlib.suppress(RuntimeError):  # it was woken already
                waiter.release()

    def wait_for(self, is_so: Callable[[], bool], timeout_secs: float | None = None) -> bool:
        """Wait until something is true.

        Args:
            is_so: Looks, without a lock.
            timeout_secs: How long to wait; None for ever.

        Returns:
            False if it is not after the timeout.
        """
        ends = None if timeout_secs is None else time.monotonic() + timeout_secs
        waiter = threading.Lock()
        waiter.acquire()
        try:
            self._waiters.append(waiter)
            # Whoever makes it true from here on finds the waiter, and a ring that comes too early is not lost.
            while not is_so():
                rest = -1.0 if ends is None else min(ends - time.monotonic(), threading.TIMEOUT_MAX)
                if ends is not None and rest <= 0:
                    return False
                waiter.acquire(timeout=rest)
            return True
        finally:
            with contextlib.suppress(ValueError):  # interrupted before it was there
                self._waiters.remove(waiter)
