"""Runs a program as one rank, and ends its process without taking the interpreter down.

A thread of gloo may still hold the tensors of the last collective. If it lets go of them while the interpreter is being
taken down the process aborts ("terminate called without an active exception"), whatever the program did. Source: issue
190489 of pytorch. What Python does at the end before that, waiting for threads and ``atexit``, is done here as well.
"""

from __future__ import annotations

import atexit
import os
import runpy
import sys
import threading
import traceback
from pathlib import Path


def _run(program: str) -> int:
    """The program's exit status."""
    try:
        _alive.append(runpy.run_path(program, run_name="__main__"))
    except KeyboardInterrupt:
        raise  # which ends the process by the signal
    except SystemExit as err:
        _alive.append(err)
        if isinstance(err.code, str):
            sys.stderr.write(f"{err.code}\n")
        return err.code if isinstance(err.code, int) else int(err.code is not None)
    except BaseException as err:
        _alive.append(err)
        traceback.print_exc()
        return 1
    return 0


_alive: list[object] = []
"""What a program leaves open, it leaves open to the end of its process."""


if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    sys.path[0] = str(Path(sys.argv[0]).parent)
    status = _run(sys.argv[0])
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
