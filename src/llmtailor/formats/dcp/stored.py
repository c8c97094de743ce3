"""What the items of a DCP directory hold: tensors as references that open their blobs when it comes to that."""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path

from ...boxes import box_runs, num_runs
from ...errors import FormatError, UnsupportedError
from ...tensor_refs import Extent, FileTensor, file_tensor
from ...tensors import DTYPE_BITS, TensorMeta
from ..torch_files import TorchTensor, Tree, open_torch_file
from .metadata import Chunk, TensorItem, ValueItem

__all__ = ["StoredTensor", "read_value"]

# A tensor sharded by columns is one run for each row and rank. As many extents as this are 50 MB of them.
_MAX_RUNS = 2**18
# Who computes with a tensor asks anew for each block of it, and in turn with the others of an average.
_MAX_KEPT_EXTENTS = 4 * _MAX_RUNS


class StoredTensor(FileTensor):
    """A tensor of a DCP directory.

    Type and shape are known from ``.metadata``; where in its blobs the elements are, only the blobs say. A merge of
    many sources uses few of their tensors, and a merge into DCP copies blobs whole: so they are opened when somebody
    asks, and what is found is checked then. Where its elements are is kept only of the tensors that were asked last:
    of a tensor that was sharded by columns it takes more room than the names of a whole checkpoint.
    """

    __slots__ = ("__weakref__", "_data", "_placed", "item")

    item: TensorItem
    _data: tuple[FileTensor, ...] | None
    _placed: tuple[Extent, ...] | None

    def __init__(self, item: TensorItem) -> None:
        # The class is frozen, as are all references to tensors.
        object.__setattr__(self, "meta", item.meta)
        object.__setattr__(self, "item", item)
        object.__setattr__(self, "_data", None)
        object.__setattr__(self, "_placed", None)

    @property
    def extents(self) -> tuple[Extent, ...]:
        """Where its elements are.

        Raises:
            FormatError: A blob does not hold its chunk.
            UnsupportedError: They lie too scattered.
        """
        placed = self._placed
        if placed is None:
            placed = self._place()
            _KEPT.add(self, placed)
        return placed

    def _place(self) -> tuple[Extent, ...]:
        item = self.item
        total = sum(num_runs(item.meta.shape, chunk.box) for chunk in item.chunks)
        if total > _MAX_RUNS:
            raise UnsupportedError(
                "a tensor is cut across its rows into too many pieces",
                kind="dcp-scattered",
                path=_directory(item),
                fqn=item.key,
                expected=f"at most {_MAX_RUNS} runs of elements",
                found=f"{total} runs in {len(item.chunks)} chunks",
                hint="merge it into a DCP checkpoint, where chunks stay as they are, or shard along dim 0",
            )
        placed = [
            extent
            for chunk, data in zip(item.chunks, self.check(), strict=True)
            for extent in _place(item.meta, chunk, data.extents)
        ]
        return file_tensor(item.meta, placed, name=item.key, path=_directory(item)).extents

    def check(self) -> tuple[FileTensor, ...]:
        """Open the blobs and check that they hold what they should.

        Returns:
            The tensors in the blobs, by chunk.

        Raises:
            FormatError: One does not.
        """
        if self._data is None:
            object.__setattr__(self, "_data", tuple(_open_chunk(self.item, chunk) for chunk in self.item.chunks))
        assert self._data is not None
        return self._data


class _Kept:
    """The tensors that know where their elements are, in the order in which they found out; threads share them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._tensors: deque[tuple[weakref.ref[StoredTensor], int]] = deque()
        self._num_extents = 0

    def add(self, tensor: StoredTensor, placed: tuple[Extent, ...]) -> None:
        """Let a tensor know, and the first ones forget."""
        with self._lock:
            object.__setattr__(tensor, "_placed", placed)
            self._tensors.append((weakref.ref(tensor), len(placed)))
            self._num_extents += len(placed)
            while self._num_extents > _MAX_KEPT_EXTENTS and len(self._tensors) > 1:
                ref, num_extents = self._tensors.popleft()
                self._num_extents -= num_extents
                if (forgetful := ref()) is not None:
                    object.__setattr__(forgetful, "_placed", None)


_KEPT = _Kept()


def _directory(item: TensorItem) -> Path:
    return item.chunks[0].blob.path.parent if item.chunks else Path(item.directory)


def _open_chunk(item: TensorItem, chunk: Chunk) -> FileTensor:
    tree = open_torch_file(chunk.blob.path, byte_range=chunk.blob.byte_range)
    expected = TensorMeta(dtype=item.meta.dtype, shape=chunk.box.sizes)
    if not isinstance(tree, TorchTensor) or not isinstance(tree.ref, FileTensor) or tree.ref.meta != expected:
        raise FormatError(
            "a shard file does not hold what .metadata says",
            kind="dcp-blob",
            path=chunk.blob.path,
            fqn=item.key,
            expected=f"{expected} at byte {chunk.blob.byte_range.start}",
            found=str(tree.ref.meta) if isinstance(tree, TorchTensor) else type(tree).__name__,
            hint="the files are of different checkpoints, or damaged; copy the checkpoint again",
        )
    return tree.ref


def _place(meta: TensorMeta, chunk: Chunk, held: Sequence[Extent]) -> Iterator[Extent]:
    """The extents of a chunk, numbered in the whole tensor.

    Two partitions of the chunk's elements are laid over each other: the runs in the tensor and the extents in the file.
    """
    nbytes_each = DTYPE_BITS[meta.dtype] // 8
    extents = iter(held)
    extent, used = next(extents, None), 0
    for start, numel in box_runs(meta.shape, chunk.box):
        done = 0
        while done < numel:
            assert extent is not None, "both cover the chunk"
            length = min(numel - done, extent.numel - used)
            offset = extent.offset + used * nbytes_each
            yield Extent(path=extent.path, offset=offset, start=start + done, numel=length)
            done, used = done + length, used + length
            if used == extent.numel:
                extent, used = next(extents, None), 0


def read_value(item: ValueItem) -> Tree:
    """The value of an item that is no tensor.

    Raises:
        FormatError: Its blob is no torch file.
    """
    return open_torch_file(item.blob.path, byte_range=item.blob.byte_range)
