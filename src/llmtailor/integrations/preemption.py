"""SIGTERM: what a scheduler sends before it takes the machine away.

    first SIGTERM   the previous handler is put back; a thread waits for the saves in flight, at most grace_secs
                    ("save": and for one more save, at the end of the step that is running)
    then            the signal is sent again, to the previous handler: by default the process ends as it always did
    second SIGTERM  goes to the previous handler at once

The handler itself only starts a thread: it interrupts the training thread anywhere, and may wait for nothing there.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from types import FrameType
from typing import Any, Literal, TypedDict, cast

from ..errors import InvalidInputError, UnsupportedError
from ..ranks import Ranks
from ..writer import SaveHandle

__all__ = ["Preemption", "PreemptionOptions", "check_on_ranks", "preemption_options"]

logger = logging.getLogger(__name__)

# Kubernetes and torchrun wait 30 s before they kill. Source: kubernetes 1.34, Pod spec
# (terminationGracePeriodSeconds); torch 2.13, distributed/elastic/multiprocessing/api.py (close, timeout=30).
_GRACE_SECS = 20.0


class PreemptionOptions(TypedDict, total=False):
    """What a run does when it is told to end."""

    on_sigterm: Literal["finish", "save", "ignore"]
    """"finish" (default) finishes the saves in flight; "save" saves once more after the step that is running; "ignore"
    leaves the signal alone. Then the process ends as it would have."""
    grace_secs: float
    """At most so long after the signal; 20 by default. What is not published by then is dropped."""


def preemption_options(options: Mapping[str, Any]) -> PreemptionOptions:
    """Those of an integration's options that are about the end."""
    return cast(PreemptionOptions, {key: options[key] for key in PreemptionOptions.__annotations__ if key in options})


def check_on_ranks(options: PreemptionOptions, ranks: Ranks | None) -> None:
    """Refuse what several ranks cannot do: the signal reaches them at different steps.

    Raises:
        UnsupportedError: ``on_sigterm="save"``.
    """
    if ranks is not None and options.get("on_sigterm") == "save":
        raise UnsupportedError(
            'on_sigterm="save" is not supported on several ranks',
            kind="ranks-option",
            expected='"finish" or "ignore"',
            found='"save"',
            hint="the ranks would have to agree on the step; save more often instead",
        )


class Preemption:
    """Watches for SIGTERM while a run is open. Made, installed and removed by the main thread; elsewhere it does
    nothing, for only the main thread can.

    Args:
        unfinished: Gives the saves in flight; called by a thread of ours.
        options: What to do.

    Raises:
        InvalidInputError: An option makes no sense.
    """

    def __init__(self, unfinished: Callable[[], Sequence[SaveHandle]], options: PreemptionOptions) -> None:
        self._mode = options.get("on_sigterm", "finish")
        self._grace_secs = options.get("grace_secs", _GRACE_SECS)
        if self._mode not in ("finish", "save", "ignore"):
            raise _refuse("on_sigterm", "'finish', 'save' or 'ignore'", self._mode)
        if not self._grace_secs > 0:
            raise _refuse("grace_secs", "a number of seconds > 0", self._grace_secs)
        self._unfinished = unfinished
        self._pid = os.getpid()
        self._previous: Any = None
        self._deadline: float | None = None
        self._last_save_began = threading.Event()
        self._handed_on = threading.Event()

    def install(self) -> None:
        """Take the signal over."""
        if self._mode == "ignore" or threading.current_thread() is not threading.main_thread():
            return
        self._previous = signal.signal(signal.SIGTERM, self._handle)

    def remove(self) -> None:
        """Give the signal back, unless somebody took it over from us."""
        is_ours = threading.current_thread() is threading.main_thread() and self._previous is not None
        if is_ours and signal.getsignal(signal.SIGTERM) == self._handle:
            signal.signal(signal.SIGTERM, self._previous)
        self._previous = None

    @property
    def wants_save(self) -> bool:
        """True if the training thread should save now, and then call ``end``."""
        return self._deadline is not None and self._mode == "save" and not self._last_save_began.is_set()

    @property
    def left_secs(self) -> float:
        """Time that is left after the signal."""
        assert self._deadline is not None
        return max(0.0, self._deadline - time.monotonic())

    def end(self) -> None:
        """The last save has begun: wait here until the process ends, or whoever had the signal before has dealt with
        it. Called by the training thread."""
        self._last_save_began.set()
        self._handed_on.wait()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        # None is a handler that was not installed from Python; there is no way to call that one.
        signal.signal(signal.SIGTERM, signal.SIG_DFL if self._previous is None else self._previous)
        if os.getpid() != self._pid:
            # A forked worker has nothing to finish.
            os.kill(os.getpid(), number)
            return
        self._deadline = time.monotonic() + self._grace_secs
        threading.Thread(target=self._finish, name="llmtailor-preemption", daemon=True).start()

    def _finish(self) -> None:
        logger.warning("SIGTERM: finishing the saves in flight, for %.0f s at most", self._grace_secs)
        if self._mode == "save":
            self._last_save_began.wait(self.left_secs)
        for handle in self._unfinished():
            try:
                handle.result(self.left_secs)
            except TimeoutError:
                logger.warning("checkpoint-%d was dropped: it was %s when time was up", handle.step, handle.state)
            except BaseException:
                logger.exception("checkpoint-%d was not saved", handle.step)
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._pid, signal.SIGTERM)
        self._handed_on.set()


def _refuse(name: str, expected: str, found: object) -> InvalidInputError:
    return InvalidInputError(f"{name} makes no sense", kind="option", expected=expected, found=repr(found))
