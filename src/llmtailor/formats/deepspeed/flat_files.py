"""Torch files with tensors that are put together from pieces of others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from ...file_plan import FilePlan, Part, Zeros
from ...tensor_refs import FileTensor, TensorRef, TensorSlice
from ...tensors import DTYPE_BITS, TensorMeta
from ..torch_files import TorchTensor, Tree, plan_torch_file
from .partitions import Piece

__all__ = ["FlatFile"]


class FlatFile:
    """A torch file in the making.

    A tree has a tensor as one reference, and a flat partition consists of many. So the tree gets a stand-in of the
    right size, and the pieces take its place in the plan, where only sizes matter.
    """

    def __init__(self) -> None:
        self._pieces: dict[int, tuple[FileTensor, tuple[Part, ...]]] = {}

    def join(
        self,
        tensors: Mapping[str, TensorRef],
        pieces: Sequence[Piece],
        *,
        numel: int,
        dtype: str,
        requires_grad: bool = False,
    ) -> TorchTensor:
        """A 1-dim tensor for the tree, from pieces of others; zeros where there is none.

        Args:
            tensors: By fqn, all of element type ``dtype``.
            pieces: In order of their place.
            numel: Of the whole; may be cut shorter than the padding, never than the pieces.
            dtype: Element type, safetensors spelling.
            requires_grad: As torch saves it.
        """
        stand_in = FileTensor(meta=TensorMeta(dtype=dtype, shape=(numel,)), extents=())
        self._pieces[id(stand_in)] = (stand_in, tuple(_parts(tensors, pieces, numel, DTYPE_BITS[dtype] // 8)))
        return TorchTensor(ref=stand_in, requires_grad=requires_grad)

    def plan(self, name: str, tree: Tree) -> FilePlan:
        """The file, with all pieces in their places.

        Raises:
            UnsupportedError: There is a class in the tree that nobody vouches for.
        """
        plan = plan_torch_file(name, tree)
        parts: list[Part] = []
        for part in plan.parts:
            found = self._pieces.get(id(part.tensor)) if isinstance(part, TensorSlice) else None
            parts.extend([part] if found is None else found[1])
        planned = replace(plan, parts=tuple(parts))
        assert planned.nbytes == plan.nbytes, name
        return planned


def _parts(tensors: Mapping[str, TensorRef], pieces: Sequence[Piece], numel: int, itemsize: int) -> Iterator[Part]:
    position = 0
    for piece in pieces:
        if piece.at > position:
            yield Zeros(nbytes=(piece.at - position) * itemsize)
        yield TensorSlice(tensor=tensors[piece.fqn], start=piece.start, stop=piece.start + piece.numel)
        position = piece.at + piece.numel
    assert position <= numel, (position, numel)
    if position < numel:
        yield Zeros(nbytes=(numel - position) * itemsize)
