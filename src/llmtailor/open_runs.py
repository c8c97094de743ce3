"""Runs that are open in this process, and how they end: closed, forgotten, or with the process.

However it ends, the saves in flight are finished, the run's lock is let go of, and a failed save that nobody was told
of becomes the exit status.
"""

from __future__ import annotations

import atexit
import logging
import os
import sys
import threading
from pathlib import Path

from torch.utils.hooks import RemovableHandle

from .errors import TailorError
from .tiers import Tiers
from .writer import Engine, SaveHandle

__all__ = ["OpenRun"]

logger = logging.getLogger(__name__)

_OPEN: set[OpenRun] = set()
_UNTOLD: list[OpenRun] = []
"""Forgotten, and their last save failed."""


class OpenRun:
    """What has to be ended of a run; outlives whoever saves to it, and refers to no model.

    Args:
        directory: The run.
        hook: What holds optimizers back.
        engine: Its writer.
        tiers: Its directories.
    """

    def __init__(self, directory: Path, hook: RemovableHandle, engine: Engine, tiers: Tiers) -> None:
        self.directory = directory
        self.uncollected: list[SaveHandle] = []
        """Saves the user was not told the end of. Never changed in place: another thread may be reading it."""
        self.failures: list[BaseException] = []
        """Of the saves since the last one that worked, the newest."""
        self._hook = hook
        self._engine = engine
        self._tiers = tiers
        self._pid = os.getpid()
        _OPEN.add(self)

    def end(self) -> None:
        """Finish the saves in flight and let go of everything; more than once is fine."""
        self._hook.remove()
        try:
            self._engine.close()
        finally:
            self._tiers.close()
            _OPEN.discard(self)

    def forget(self) -> None:
        """End it because nobody can close it any more; called by the garbage collector, on any thread.

        An engine's thread must not wait for itself; so only the main thread ends it at once, and others have it ended.
        """
        if threading.current_thread() is threading.main_thread():
            self._end_untold()
        else:
            threading.Thread(target=self._end_untold, name="llmtailor-end").start()

    def _end_untold(self) -> None:
        self.end()
        if self.last_failure is not None and os.getpid() == self._pid:
            _UNTOLD.append(self)

    @property
    def last_failure(self) -> BaseException | None:
        """What stopped the last save, if nothing was saved since; when all saves have ended."""
        last = self.failures[-1] if self.failures else None
        for handle in self.uncollected:
            last = handle.failure
        return last

    def say_failure(self) -> int:
        """Write to stderr what stopped the last save; returns the exit status it stands for, 0 if there is none."""
        error = self.last_failure
        if error is None:
            return 0
        sys.stderr.write(f"llmtailor: the last save of {self.directory} failed: {error}\n")
        return error.exit_code if isinstance(error, TailorError) else 1


@atexit.register
def _end_open_runs() -> None:
    for run in [*_OPEN]:
        try:
            run._end_untold()
        except Exception:
            logger.exception("%s could not be closed", run.directory)
    status = max((run.say_failure() for run in _UNTOLD), default=0)
    if status:
        # An exception would be printed here, and the exit status stay 0.
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
