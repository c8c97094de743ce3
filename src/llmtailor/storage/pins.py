"""Steps of a run that must stay: one empty file each, so that anybody may pin at any time, with ``touch``.

    _pinned/400    checkpoint-400 stays, with all its files, until this is removed

Needs no lock: a file is there or not, and nothing else is ever changed.
"""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path

from ..errors import InvalidInputError, NotFoundError
from .filesystem import LocalFileSystem
from .staging import translate_os_errors

__all__ = ["PINS_NAME", "add_pin", "read_pins", "remove_pin"]

PINS_NAME = "_pinned"
_PIN = re.compile(r"(?:checkpoint-)?(0|[1-9][0-9]{0,18})")


def read_pins(run: Path) -> frozenset[int]:
    """Steps that are pinned in a run.

    Raises:
        InvalidInputError: A file there names no step. Better nothing is removed than what somebody meant to keep.
        OSError: The device failed.
    """
    try:
        names = [name for name in os.listdir(run / PINS_NAME) if not name.startswith(".")]
    except (FileNotFoundError, NotADirectoryError):
        return frozenset()
    matches = {name: _PIN.fullmatch(name) for name in names}
    for name in sorted(name for name, match in matches.items() if match is None):
        raise InvalidInputError(
            "cannot tell which checkpoint is pinned; nothing was removed",
            kind="pin-name",
            path=run / PINS_NAME / name,
            expected="a file called 400, or checkpoint-400",
            found=ascii(name),
            hint="rename or remove it",
        )
    return frozenset(int(match[1]) for match in matches.values() if match is not None)


def add_pin(run: Path, step: int, filesystem: LocalFileSystem | None = None) -> None:
    """Pin a step; if it is pinned already that is fine.

    Raises:
        WriteError: It may not be pinned.
    """
    filesystem, pins = filesystem or LocalFileSystem(), run / PINS_NAME
    with translate_os_errors("pin a checkpoint", pins / str(step)):
        with contextlib.suppress(FileExistsError):
            filesystem.make_directory(pins)
        with contextlib.suppress(FileExistsError):
            filesystem.close(filesystem.create(pins / str(step), 0o644))
        filesystem.fsync_directory(pins)
        filesystem.fsync_directory(run)


def remove_pin(run: Path, step: int, filesystem: LocalFileSystem | None = None) -> None:
    """Let a step go again.

    Raises:
        NotFoundError: It is not pinned.
        WriteError: It may still be pinned.
    """
    filesystem, pins = filesystem or LocalFileSystem(), run / PINS_NAME
    names = [pins / name for name in (str(step), f"checkpoint-{step}") if os.path.lexists(pins / name)]
    if not names:
        raise NotFoundError(
            f"step {step} is not pinned",
            kind="not-pinned",
            path=run,
            expected=f"one of {', '.join(map(str, sorted(read_pins(run))))}" if read_pins(run) else "a pinned step",
            found=str(step),
        )
    with translate_os_errors("unpin a checkpoint", pins / str(step)):
        for name in names:
            filesystem.remove_file(name)
        filesystem.fsync_directory(pins)
