"""Files of a checkpoint somebody else wrote: found and opened without trusting a name or a file type."""

from __future__ import annotations

import errno
import os
import stat
import struct
from collections.abc import Callable
from pathlib import Path

from ..catalog import SmallFile
from ..errors import FormatError, NotFoundError, UnsupportedError
from ..tensor_refs import FileTensor, InlineTensor, TensorRef

__all__ = ["list_small_files", "open_source", "read_number", "resolve_source"]

# Larger than any tokenizer; what is larger is data of some tool, and not for us to carry along unasked.
_MAX_SMALL_FILE_NBYTES = 2**30
# What the kernel says when something else stands where a file should be. Whatever else it says (EIO, ESTALE, EACCES,
# EMFILE, ...) is about the device, the server or this process, and no evidence against the checkpoint.
_NOT_A_FILE = frozenset({errno.ELOOP, errno.ENXIO, errno.ENODEV, errno.ENAMETOOLONG, errno.EINVAL})
# Programs are never taken from a source: whoever resumes from the result might run them.
_CODE_SUFFIXES = frozenset({".py", ".pyc", ".pyo", ".so", ".sh"})
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
        raise _refuse(path, "a file that can be reached", str(err)) from err
    allowed = [real_root]
    if real_root.parent.name == "snapshots":
        allowed.append(real_root.parent.parent / "blobs")
    if not any(real.is_relative_to(place) for place in allowed):
        raise _refuse(path, f"a file inside {root}", str(real))
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
            raise _refuse(path, _REGULAR, str(err.strerror)) from err
        raise
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        # Not left to whoever reads: of a directory that makes an OSError, as if the device had failed.
        raise _refuse(path, _REGULAR, stat.filemode(mode))
    return descriptor


def list_small_files(root: Path, is_small: Callable[[str], bool]) -> tuple[SmallFile, ...]:
    """The files directly in a checkpoint that are copied as they are; never programs, never hidden files.

    Args:
        root: The checkpoint's directory.
        is_small: Whether a file of this name is copied; asked for plain files only.

    Raises:
        FormatError: One of them leads out of the checkpoint.
    """
    found = []
    for entry in sorted(os.scandir(root), key=lambda entry: entry.name):
        path = Path(entry.path)
        if (
            entry.name.startswith(".")
            or path.suffix in _CODE_SUFFIXES
            or not entry.is_file()
            or not is_small(entry.name)
        ):
            continue
        real = resolve_source(path, root)
        nbytes = real.stat().st_size
        if nbytes > _MAX_SMALL_FILE_NBYTES:
            raise _refuse(
                path, f"at most {_MAX_SMALL_FILE_NBYTES} bytes for a file that is copied whole", f"{nbytes} bytes"
            )
        found.append(SmallFile(name=entry.name, path=real, nbytes=nbytes))
    return tuple(found)


def read_number(tensor: TensorRef) -> int | float:
    """The value of a tensor with a single element: a step count, a learning rate.

    Raises:
        NotFoundError, FormatError: Its file is gone, no regular file, or too short.
        UnsupportedError: Its type has no plain number (complex, 8-bit float).
    """
    meta = tensor.meta
    assert meta.numel == 1, meta
    if meta.dtype not in _NUMBER_FORMATS:
        raise UnsupportedError("a number of this type cannot be read", kind="number-type", found=str(meta))
    match tensor:
        case InlineTensor():
            data = tensor.data
        case FileTensor(extents=(extent,)):
            data = _read_range(extent.path, extent.offset, meta.nbytes)
        case _:
            raise UnsupportedError("a computed number cannot be read", kind="number-type", found=str(meta))
    if meta.dtype == "BF16":
        data = b"\0\0" + data  # the upper half of an F32
    value: int | float = struct.unpack(f"<{_NUMBER_FORMATS[meta.dtype]}", data)[0]
    return value


def _read_range(path: Path, offset: int, nbytes: int) -> bytes:
    descriptor = open_source(path)
    try:
        data = os.pread(descriptor, nbytes, offset)
    finally:
        os.close(descriptor)
    if len(data) != nbytes:
        raise _refuse(path, f"{nbytes} bytes at {offset}", f"{len(data)} bytes")
    return data


# How struct calls the types of safetensors.
_NUMBER_FORMATS = {
    "F64": "d", "F32": "f", "F16": "e", "BF16": "f", "BOOL": "?", "U8": "B", "I8": "b", "U16": "H", "I16": "h",
    "U32": "I", "I32": "i", "U64": "Q", "I64": "q",
}  # fmt: skip


def _refuse(path: Path, expected: str, found: str) -> FormatError:
    return FormatError(
        "not a file to read a checkpoint from",
        kind="not-regular",
        path=path,
        expected=expected,
        found=found,
        hint="the checkpoint is damaged or was tampered with; take another one",
    )
