"""Files of a checkpoint that are carried along as they are: configuration, tokenizer and the like."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

from ..catalog import SmallFile
from .small_names import TEMPLATES_DIRECTORY
from .source_files import refuse_file, resolve_source

__all__ = ["list_small_files"]

# Larger than any tokenizer; what is larger is data of some tool, and not for us to carry along unasked.
_MAX_SMALL_FILE_NBYTES = 2**30
# Programs are never taken from a source: whoever resumes from the result might run them.
_CODE_SUFFIXES = frozenset({".py", ".pyc", ".pyo", ".so", ".sh"})


def list_small_files(root: Path, is_small: Callable[[str], bool]) -> tuple[SmallFile, ...]:
    """The files directly in a checkpoint that are copied as they are; never programs, never hidden files.

    Of directories only a tokenizer's further templates.

    Args:
        root: The checkpoint's directory.
        is_small: Whether a file of this name (``additional_chat_templates/rag.jinja``) is copied; asked for plain files
            only.

    Raises:
        FormatError: One of them leads out of the checkpoint.
    """
    found = []
    for name in _plain_files(root):
        path = root / name
        if not is_small(name):
            continue
        real = resolve_source(path, root)
        nbytes = real.stat().st_size
        if nbytes > _MAX_SMALL_FILE_NBYTES:
            raise refuse_file(
                path, f"at most {_MAX_SMALL_FILE_NBYTES} bytes for a file that is copied whole", f"{nbytes} bytes"
            )
        found.append(SmallFile(name=name, path=real, nbytes=nbytes))
    return tuple(found)


def _plain_files(directory: Path, prefix: str = "") -> Iterator[str]:
    for entry in sorted(os.scandir(directory), key=lambda entry: entry.name):
        if entry.is_file() and not entry.name.startswith(".") and Path(entry.name).suffix not in _CODE_SUFFIXES:
            yield prefix + entry.name
        elif entry.name == TEMPLATES_DIRECTORY and not prefix and entry.is_dir():
            yield from _plain_files(directory / entry.name, f"{entry.name}/")
