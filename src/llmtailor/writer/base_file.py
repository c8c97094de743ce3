"""A layer's exact files, read back while the codes that are relative to it are made."""

from __future__ import annotations

import contextlib
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch

from ..codecs import array_name
from ..codecs.decoding import cut_ties, decode
from ..errors import FormatError, IntegrityError
from ..formats.safetensors import read_header
from ..formats.tailored import read_packed
from ..manifest import FileRecord
from ..state_keys import split_state_key
from ..storage import ALIGNMENT, FileReader
from ..tensor_bytes import torch_dtype
from ..tensors import DTYPE_BITS, TensorMeta
from ..verify import open_published

__all__ = ["BaseFile", "BaseLayer"]


class BaseFile:
    """Reads tensors of a published layer file front to back, around the page cache unless it is there.

    The digest is not looked at: codes against a file that rotted are as bad as the file, and a resume reads both.

    Args:
        checkpoint: The directory it is in.
        record: The file, as published.
        reader: With its buffer; nobody else's meanwhile.

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
            header = read_header(self._descriptor, self._path)[0]
            self._tensors = header.tensors
            self.packed = read_packed(self._path, header)
            """Masters that it holds in pieces, by key."""
            self._open = stack.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()

    def has(self, name: str, meta: TensorMeta) -> bool:
        """Whether it holds a tensor of that type and shape."""
        found = self._tensors.get(name) or self.packed.get(name)
        return found is not None and found.meta == meta

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

    def read_all(self, name: str) -> torch.Tensor:
        """All elements of a tensor, in memory of their own; see ``read``."""
        meta = self._tensors[name].meta
        return self.read(name, 0, meta.numel).clone() if meta.numel else torch.empty(0, dtype=torch_dtype(meta.dtype))

    def _bytes_from(self, offset: int) -> memoryview:
        """Some bytes from there on."""
        start, window = self._window
        if not start <= offset < start + window.nbytes:
            start = offset // ALIGNMENT * ALIGNMENT
            nbytes = min(self._reader.piece_nbytes, self.record.bytes - start)
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


class BaseLayer:
    """What the codes of a layer are relative to.

    Args:
        weights: The layer's exact weights file.
        optimizer: Its optimizer file, of the same step, if masters are relative to those in it.
    """

    def __init__(self, weights: BaseFile, optimizer: BaseFile | None = None) -> None:
        self._weights = weights
        self._optimizer = optimizer

        self._ties: tuple[str, np.ndarray[Any, Any]] = "", np.empty(0, np.int64)
        """Of the master that was read last."""

    @property
    def digest(self) -> str:
        return self._weights.record.digest

    @property
    def state_digest(self) -> str | None:
        return None if self._optimizer is None else self._optimizer.record.digest

    def check(self, fqn: str, meta: TensorMeta) -> None:
        """See to it that a weight is there; see ``BaseFile.check``."""
        self._weights.check(fqn, meta)

    def has_master(self, key: str, meta: TensorMeta) -> bool:
        """Whether the state of then holds a master; a parameter that was frozen has none."""
        if self._optimizer is None or not self._optimizer.has(key, meta):
            return False
        half = TensorMeta(dtype="BF16", shape=meta.shape)
        return key not in self._optimizer.packed or self._weights.has(split_state_key(key)[0], half)

    def read(self, fqn: str, start: int, stop: int) -> torch.Tensor:
        """Elements of a weight; see ``BaseFile.read``."""
        return self._weights.read(fqn, start, stop)

    def read_master(self, key: str, start: int, stop: int) -> torch.Tensor:
        """Elements of a master that is there; see ``BaseFile.read``."""
        assert self._optimizer is not None
        packed = self._optimizer.packed.get(key)
        if packed is None:
            return self._optimizer.read(key, start, stop)
        arrays = {name: array_name(key, name) for name in packed.array_names}
        if self._ties[0] != key:
            self._ties = key, self._optimizer.read_all(arrays["ties"]).numpy()
        codes = self._optimizer.read(arrays["codes"], start, stop).numpy()
        weight = self._weights.read(split_state_key(key)[0], start, stop).view(torch.int16).numpy().view("<u2")
        found = np.empty(stop - start, np.float32)
        decode(packed.codec, "F32", {"codes": codes, "ties": cut_ties(self._ties[1], start, stop)}, weight, found)
        return torch.from_numpy(found)
