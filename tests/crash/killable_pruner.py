"""A process that forks pruners, each killed at one operation on the file system.

Reads ``<run> <errno> <number>`` lines; for each it forks a child that thins all checkpoints of the run but the newest,
on a file system whose exchange of names fails with that errno (0: works), and that kills the child instead of carrying
out its operation of that number. Prints ``signal <n>`` or ``exit <n>`` at the child's end.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from faults import FaultyFileSystem
from llmtailor.pruning import apply_retention
from llmtailor.retention import Keep
from llmtailor.storage import RunDirectory


class KillingFileSystem(FaultyFileSystem):
    """Kills its process at one operation."""

    def __init__(self, number: int, refused: dict[str, int]) -> None:
        super().__init__(refused=refused)
        self._number = number

    def _call(self, name: str, *args: Any) -> Any:
        if len(self.calls) + 1 == self._number:
            os.kill(os.getpid(), signal.SIGKILL)
        return super()._call(name, *args)


def prune(run: Path, refusal: int, number: int) -> None:
    filesystem: Any = KillingFileSystem(number, {"exchange": refusal} if refusal else {})
    directory = RunDirectory(run, filesystem)
    error = apply_retention(directory, keep=Keep(every=10, optimizer=1, consistent=False))
    os._exit(0 if error is None else 1)


def main() -> None:
    for line in sys.stdin:
        run, refusal, number = line.split()
        pid = os.fork()
        if pid == 0:
            try:
                prune(Path(run), int(refusal), int(number))
            finally:
                os._exit(2)
        _, status = os.waitpid(pid, 0)
        code = os.waitstatus_to_exitcode(status)
        sys.stdout.write(f"signal {-code}\n" if code < 0 else f"exit {code}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
