"""Files of a checkpoint somebody else wrote: found and opened without trusting a name or a file type."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from ..errors import FormatError, NotFoundError

__all__ = ["open_source", "refuse_file", "resolve_source"]

# What the kernel says when something else stands where a file should be. Whatever else it says (EIO, ESTALE, EACCES,
# EMFILE, ...) is about the device, the server or this process, and no evidence against the checkpoint.
_NOT_A_FILE = frozenset({errno.ELOOP, errno.ENXIO, errno.ENODEV, errno.ENAMETOOLONG, errno.EINVAL})
_REGULAR = "a regular file; no symbolic link, pipe or device is read as one"


def resolve_source(path: Path, root: Path) -> Path:
    """The real path of a file of a checkpoint.

    A symbolic link is followed only inside the checkpoint or, as the hub's cache makes them, to a blob of the same
    repository.

    Args:
        path: The file.
        root: The checkpoint's directory.

    Raises:
        NotFoundError: There is no such file.
        FormatError: It leads out of the checkpoint.

    Source:
        huggingface_hub 1.x, file_download.py (_create_symlink): ``models--x/snapshots/<rev>/<file>`` is a link to
        ``../../blobs/<digest>``.
    """
    try:
        real, real_root = path.resolve(strict=True), root.resolve(strict=True)
    except FileNotFoundError as err:
        raise NotFoundError("a file of the checkpoint is missing", kind="missing-file", path=path) from err
    except (OSError, RuntimeError) as err:
        raise refuse_file(path, "a file that can be reached", str(err)) from err
    allowed = [real_root]
    if real_root.parent.name == "snapshots":
        allowed.append(real_root.parent.parent / "blobs")
    if not any(real.is_relative_to(place) for place in allowed):
        raise refuse_file(path, f"a file inside {root}", str(real))
    return real


def open_source(path: Path) -> int:
    """Open a regular file for reading; the caller closes the descriptor.

    Raises:
        NotFoundError: There is no such file.
        FormatError: It is a link, a pipe, a device or a directory.
    """
    try:
        # O_NONBLOCK: opening a pipe somebody left there must not hang.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError) as err:
        raise NotFoundError("a file of the checkpoint is missing", kind="missing-file", path=path) from err
    except OSError as err:
        if err.errno in _NOT_A_FILE:
            raise refuse_file(path, _REGULAR, str(err.strerror)) from err
        raise
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        # Not left to whoever reads: of a directory that makes an OSError, as if the device had failed.
        raise refuse_file(path, _REGULAR, stat.filemode(mode))
    return descriptor


def refuse_file(path: Path, expected: str, found: str) -> FormatError:
    """The error of what stands where a file should be."""
    return FormatError(
        "not a file to read a checkpoint from",
        kind="not-regular",
        path=path,
        expected=expected,
        found=found,
        hint="the checkpoint is damaged or was tampered with; take another one",
    )
