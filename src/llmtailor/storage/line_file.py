"""A file that grows by lines, for people and their tools; no checkpoint depends on it."""

from __future__ import annotations

import os
from pathlib import Path

from .staging import translate_os_errors

__all__ = ["append_line", "read_lines"]


def append_line(path: Path, line: str) -> None:
    """Add a line; after one that a crash cut off it begins on a line of its own. Not made durable.

    Raises:
        WriteError: It could not be written.
    """
    with translate_os_errors(f"write {path.name}", path), path.open("ab+") as file:
        size = file.seek(0, os.SEEK_END)
        is_cut = False
        if size:
            file.seek(size - 1)
            is_cut = file.read(1) != b"\n"
        file.write(b"\n" * is_cut + line.encode() + b"\n")


def read_lines(path: Path) -> list[bytes]:
    """Its lines; none if it is not there."""
    try:
        return path.read_bytes().splitlines()
    except FileNotFoundError:
        return []
