"""Earlier files that a save needs and that are gone: all are named at once, and the next save writes their layers."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from pathlib import Path

from ..errors import TailorError
from ..manifest import FileRecord
from .coded_images import CodedImage
from .job import LinkedFile, SaveJob

__all__ = ["find_lost", "find_lost_bases", "name_lost"]

_MAX_NAMED = 8


def find_lost(files: Iterable[LinkedFile]) -> tuple[str, ...]:
    """Layers of which a file is not there as it was published, as far as can be told without reading it."""
    return tuple(sorted({file.layer for file in files if _is_lost(file.record, file.source)}))


def find_lost_bases(job: SaveJob) -> tuple[str, ...]:
    """The same of the files that a save's codes are to lie beside."""
    files: list[LinkedFile] = []
    for image in job.images:
        found = job.find_base(image.layer) if isinstance(image, CodedImage) and image.base == "exact" else None
        if found is not None:
            checkpoint, layer = found
            files += [
                LinkedFile(record=file, source=checkpoint / file.path, layer=image.layer) for file in layer.plain_files
            ]
    return find_lost(files)


def name_lost(error: TailorError, lost: Iterable[str]) -> None:
    """Say in an error which layers the next save writes in full."""
    names = sorted(lost)
    more = f" and {len(names) - _MAX_NAMED} more" if len(names) > _MAX_NAMED else ""
    error.hint = f"the next save writes in full: {', '.join(names[:_MAX_NAMED])}{more}"


def _is_lost(record: FileRecord, source: Path) -> bool:
    try:
        status = os.stat(source, follow_symlinks=False)
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError:  # the device failed, which says nothing about the file
        return False
    return not stat.S_ISREG(status.st_mode) or status.st_size != record.bytes
