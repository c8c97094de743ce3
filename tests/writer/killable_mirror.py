"""A process that forks mirrors, to be killed by the test: all is imported once, not once for each kill.

Reads ``<first tier> <mirror> end|linger`` lines; for each it forks a child that mirrors every checkpoint that is not
mirrored yet, and then ends or waits to be killed. Prints the child's pid at once, ``ack <step>`` when a copy is
acknowledged, ``done`` after the last, ``lost <text>`` if anything raises, and ``ended`` when the child is gone.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from llmtailor.storage import list_checkpoints
from llmtailor.writer.mirror import Mirror


def say(text: str) -> None:
    os.write(1, f"{text}\n".encode())


def mirror_rest(first: Path, path: Path) -> None:
    mirror = Mirror(path, first=first)
    newest = max((entry.step for entry in list_checkpoints(path)), default=0)
    for entry in list_checkpoints(first):
        if entry.step > newest:
            mirror.submit(entry.path).result()
            say(f"ack {entry.step}")
    mirror.close()
    say("done")


def main() -> None:
    for line in sys.stdin:
        first, path, then = line.split()
        pid = os.fork()
        if pid == 0:
            signal.alarm(120)  # whatever becomes of the test, it does not linger for ever
            try:
                mirror_rest(Path(first), Path(path))
                if then == "linger":
                    signal.pause()
            except BaseException as err:
                say(f"lost {type(err).__name__}: {' '.join(str(err).split())}")
            os._exit(0)
        say(f"pid {pid}")
        os.waitpid(pid, 0)
        say("ended")


if __name__ == "__main__":
    main()
