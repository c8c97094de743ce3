"""Files that never change again: are they what their own checkpoint says of them?

Whoever copies some bytes of a file into a new one gives them a new digest. Damage would be sound from then on, so it is
looked for before.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from ..errors import IntegrityError
from ..formats.source_files import open_source
from ..manifest import FileRecord
from ..storage import FileReader, read_files
from .sources import translate_read_errors

__all__ = ["check_published"]

_MAX_SHOWN = 10


def check_published(
    published: Mapping[Path, FileRecord], *, on_bytes: Callable[[int], None] = lambda nbytes: None
) -> None:
    """Read files whole and compare them with what was recorded of them, several at a time.

    Args:
        published: What was recorded, by path.
        on_bytes: Told of bytes as they are done; they add up to the files' sizes. Called by one thread at a time.

    Raises:
        IntegrityError: Some are not what they were; lists the first few.
        NotFoundError: One is gone.
        FormatError: One is no regular file.
        WriteError: kind ``unreadable``; the device, or a permission.
    """

    def compare(path: Path, reader: FileReader) -> str | None:
        record = published[path]
        with translate_read_errors(path):
            descriptor = open_source(path)
            try:
                nbytes = os.fstat(descriptor).st_size
                found = reader.digest(descriptor, nbytes, path) if nbytes == record.bytes else f"{nbytes} bytes"
            finally:
                os.close(descriptor)
        return None if found == record.digest else f"{path}: {found}, published was {record.digest}"

    done = read_files(
        list(published),
        lambda path: published[path].bytes,
        compare,
        on_done=lambda path, result: on_bytes(published[path].bytes),
    )
    _refuse(filter(None, done))


def _refuse(faults: Iterable[str]) -> None:
    bad = list(faults)
    if bad:
        raise IntegrityError(
            f"a source is damaged: {len(bad)} of its files are not what was published",
            kind="digest-mismatch",
            found="".join(f"\n    {fault}" for fault in bad[:_MAX_SHOWN]),
            hint="llmtailor verify says what else is damaged; take the layers from another checkpoint",
        )
