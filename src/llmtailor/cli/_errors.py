"""The only place that turns an error into a message and an exit code.

    TailorError          what, where, expected, found, next step       its class's exit code (3 to 13)
    OSError              what the operating system said, and where     74
    anything else        a traceback: it is our bug                    70
    Ctrl-C               one line                                      130
    a closed pipe        nothing                                       141

Wrong usage (an unknown option, a missing argument) is typer's, with exit code 2. The message goes to stderr; with
``--json`` stdout gets ``{"error": {...}}`` too.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any, ParamSpec

import typer

from ..errors import TailorError
from ..reports.printable import printable

__all__ = ["reported"]

P = ParamSpec("P")

# Source: sysexits.h (EX_SOFTWARE, EX_IOERR); 128 + SIGINT and 128 + SIGPIPE as shells report them.
_EXIT_BUG = 70
_EXIT_OS_ERROR = 74
_EXIT_INTERRUPTED = 130
_EXIT_BROKEN_PIPE = 141


def reported(command: Callable[P, None]) -> Callable[P, None]:
    """Wrap a command so that its errors end it with a message and an exit code."""

    @functools.wraps(command)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            _run(lambda: command(*args, **kwargs))
        except typer.Exit:
            raise
        except KeyboardInterrupt:
            sys.stderr.write("\ninterrupted\n")
            raise typer.Exit(_EXIT_INTERRUPTED) from None
        except BrokenPipeError:
            _forget_stdout()
            raise typer.Exit(_EXIT_BROKEN_PIPE) from None
        except Exception as err:
            raise typer.Exit(_report(err, as_json=bool(kwargs.get("as_json")))) from err

    return wrapper


def _run(command: Callable[[], None]) -> None:
    """Run it and flush stdout: not when the interpreter ends, where a closed pipe could no longer be handled."""
    try:
        command()
    except typer.Exit:
        sys.stdout.flush()
        raise
    sys.stdout.flush()


def _report(err: Exception, *, as_json: bool) -> int:
    """Tell an error and return the exit code. That stdout takes nothing any more may be the very error."""
    exit_code, fields, text = _describe(err)
    sys.stderr.write(f"error: {printable(text, keep_lines=True)}\n")
    try:
        if as_json:
            record = {"error": {**fields, "type": type(err).__name__, "exit_code": exit_code}}
            sys.stdout.write(json.dumps(record, indent=2, default=str) + "\n")
        sys.stdout.flush()
    except BrokenPipeError:
        _forget_stdout()
        return _EXIT_BROKEN_PIPE
    except OSError:
        _forget_stdout()  # what was wrong is on stderr
    return exit_code


def _describe(err: Exception) -> tuple[int, dict[str, Any], str]:
    """Exit code, fields and message of an error."""
    if isinstance(err, TailorError):
        return err.exit_code, err.fields(), str(err)
    if isinstance(err, OSError):
        # Not our class: it is about the device or a permission, and says nothing about a checkpoint.
        seen = TailorError(
            f"the operating system refused: {err.strerror or err}",
            kind="os-error",
            path=err.filename,
            expected="files that may be read, on a device that works",
            found=type(err).__name__,
            hint="check the permissions and the device, then try again",
        )
        return _EXIT_OS_ERROR, seen.fields(), str(seen)
    trace = "".join(traceback.format_exception(err))
    return _EXIT_BUG, {"what": str(err), "kind": "bug"}, f"this is a bug in llmtailor; please report it\n{trace}"


def _forget_stdout() -> None:
    """Let what is still buffered go nowhere instead of failing once more when the interpreter ends."""
    descriptor = os.open(os.devnull, os.O_WRONLY)
    os.dup2(descriptor, sys.stdout.fileno())
    os.close(descriptor)
