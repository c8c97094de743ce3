"""An exact weights file, read back while the codes that are relative to it are made."""

from __future__ import annotations

import contextlib
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import torch

from ..errors import FormatError, IntegrityError
from ..formats.safetensors import read_header
from ..manifest import FileRecord
from ..storage import ALIGNMENT, PIECE_NBYTES, FileReader
from ..tensor_bytes import torch_dtype
from ..tensors import DTYPE_BITS, TensorMeta
from ..verify import open_published

__all__ = ["BaseFile"]


class BaseFile:
    """Reads tensors of a published weights file front to back, around the page cache unless it is there.

    The digest is not looked at: codes against a file that rotted are as bad as the file, and a resume reads both.

    Args:
        checkpoint: The directory it is in.
        record: The file, as published.
        reader: With its buffer.

    Raises:
        NotFoundError, IntegrityError, FormatError: It is not there as it was published.
    """

    def __init__(self, checkpoint: Path, record: FileRecord, reader: FileReader) -> None:
        self.record = record
        self._path = checkpoint / record.path
        self._reader = reader
        self._window: tuple[int, memoryview] = (0, memoryview(b""))
        """Where in the file the reader's buffer is from, and what is in it."""
        self._found = np.empty(0, np.uint8)
        self._open = contextlib.ExitStack()
        with contextlib.ExitStack() as stack:
            self._descriptor = stack.enter_context(open_published(checkpoint, record))
            self._tensors = read_header(self._descriptor, self._path)[0].tensors
            self._open = stack.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()

    def check(self, fqn: str, meta: TensorMeta) -> None:
        """See to it that a tensor is there.

        Raises:
            FormatError: It is not, or of another type or shape.
        """
        found = self._tensors.get(fqn)
        if found is None or found.meta != meta:
            raise FormatError(
                "the file that codes are to be relative to does not hold the tensor",
                kind="schema",
                path=self._path,
                fqn=fqn,
                expected=str(meta),
                found="no such tensor" if found is None else str(found.meta),
            )

    def read(self, fqn: str, start: int, stop: int) -> torch.Tensor:
        """Elements ``start`` to ``stop`` of a tensor: flat, in host memory that the next call uses again.

        Raises:
            IntegrityError: The file ends too soon.
            OSError: The device failed.
        """
        stored = self._tensors[fqn]
        size = DTYPE_BITS[stored.meta.dtype] // 8
        if self._found.nbytes < (stop - start) * size:
            self._found = np.empty((stop - start) * size, np.uint8)
        found = self._found[: (stop - start) * size]
        first, done = stored.byte_range.start + start * size, 0
        while done < found.nbytes:
            piece = self._bytes_from(first + done)[: found.nbytes - done]
            found[done : done + piece.nbytes] = np.frombuffer(piece, np.uint8)
            done += piece.nbytes
        return torch.from_numpy(found).view(torch_dtype(stored.meta.dtype))

    def _bytes_from(self, offset: int) -> memoryview:
        """Some bytes from there on."""
        start, window = self._window
        if not start <= offset < start + window.nbytes:
            start = offset // ALIGNMENT * ALIGNMENT
            nbytes = min(PIECE_NBYTES, self.record.bytes - start)
            window = self._reader.read_piece(self._descriptor, start, nbytes)
            self._window = start, window
            if window.nbytes < nbytes:
                raise IntegrityError(
                    "the file became shorter while it was read",
                    kind="file-size",
                    path=self._path,
                    expected=f"{self.record.bytes} bytes",
                    found=f"{start + window.nbytes} bytes",
                )
        return window[offset - start :]
