"""Flat partitions as tensors of parameters: the way from DeepSpeed's files to names."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from ...errors import UnsupportedError
from ...tensor_refs import Extent, FileTensor, file_tensor
from ...tensors import TensorMeta
from ..numbers import inline_number, read_number
from ..torch_files import TorchTensor, Tree
from .fields import refuse
from .partitions import FlatLayout, keep_whole

__all__ = ["gather", "gather_states", "is_kept_whole", "is_number"]


def gather(
    tensors: Sequence[TorchTensor], layout: FlatLayout, shapes: Mapping[str, tuple[int, ...]], paths: Sequence[Path]
) -> dict[str, FileTensor]:
    """The parameters in a flat tensor.

    Args:
        tensors: Each rank's partition, 1-dim; with or without the padding at its end.
        layout: How the parameters lie on the ranks.
        shapes: Of the parameters, by fqn; all of this flat tensor and maybe others.
        paths: Each rank's file, for errors.

    Raises:
        FormatError: A partition has another size or type than the others say.
    """
    dtype = tensors[0].ref.meta.dtype
    extents: dict[str, list[Extent]] = {}
    for rank, (tensor, pieces) in enumerate(zip(tensors, layout.pieces, strict=True)):
        meta = tensor.ref.meta
        if meta.dtype != dtype or not layout.filled[rank] <= meta.numel <= layout.partition:
            expected = f"{dtype}[{layout.filled[rank]}], or up to [{layout.partition}] with padding"
            raise refuse(f"the partition of rank {rank} has another size", paths[rank], expected=expected, found=meta)
        for piece in pieces:
            held = extents.setdefault(piece.fqn, [])
            # Of what lies on several ranks as a whole, the first counts.
            if not held or held[0].start != piece.start:
                held.extend(_cut(tensor.ref, piece.at, piece.numel, piece.start))
    names = {piece.fqn for pieces in layout.pieces for piece in pieces}
    return {
        fqn: file_tensor(TensorMeta(dtype=dtype, shape=shapes[fqn]), extents[fqn], name=fqn, path=paths[0])
        for fqn in shapes
        if fqn in names
    }


def _cut(tensor: object, at: int, numel: int, start: int) -> Iterator[Extent]:
    """Elements ``at`` to ``at + numel`` of a tensor, as elements of another from ``start`` on."""
    assert isinstance(tensor, FileTensor), tensor  # an opened file gives no others
    for extent in tensor.extents:
        first, last = max(at, extent.start), min(at + numel, extent.start + extent.numel)
        if first < last:
            size = tensor.meta.nbytes // tensor.meta.numel
            offset = extent.offset + (first - extent.start) * size
            yield Extent(path=extent.path, offset=offset, start=start + first - at, numel=last - first)


def gather_states(
    states: Sequence[Mapping[str, Tree]],
    layout: FlatLayout,
    shapes: Mapping[str, tuple[int, ...]],
    paths: Sequence[Path],
) -> dict[str, dict[str, Tree]]:
    """The optimizer state of each parameter in a flat tensor, as the optimizer would hold it for that parameter.

    Args:
        states: What each rank's optimizer holds of its partition; empty if it never made a step.
        layout: How the parameters lie on the ranks.
        shapes: Of this flat tensor's parameters, in its order.
        paths: Each rank's file, for errors.

    Returns:
        fqn -> state name -> tensor of the parameter's shape, or number; absent if there is no state.

    Raises:
        FormatError: The ranks differ.
        UnsupportedError: State that does not lie element by element as the parameters do.
    """
    names = list(states[0])
    for rank, state in enumerate(states):
        if list(state) != names:
            raise refuse(
                f"the optimizer state of rank {rank} is of another kind than that of rank 0",
                paths[rank],
                expected=", ".join(map(str, names)) or "no state",
                found=", ".join(map(str, state)) or "no state",
            )
    found: dict[str, dict[str, Tree]] = {fqn: {} for fqn in shapes} if names else {}
    for name in names:
        values = [state[name] for state in states]
        if all(is_number(value) for value in values):
            number = _common_number(name, values, paths)
            for state in found.values():
                state[name] = number
            continue
        tensors = [value for value in values if isinstance(value, TorchTensor) and len(value.ref.meta.shape) == 1]
        fitting = _find_layout(tensors, layout, shapes) if len(tensors) == len(values) else None
        if fitting is None:
            raise _not_flat(name, values[0], layout, paths[0])
        for fqn, tensor in gather(tensors, fitting, shapes, paths).items():
            found[fqn][name] = TorchTensor(ref=tensor)
    return found


def is_number(value: Tree) -> bool:
    """Whether it is a number of the whole flat tensor: a Python number or a 0-dim tensor."""
    return isinstance(value, bool | int | float) or (isinstance(value, TorchTensor) and value.ref.meta.shape == ())


def _common_number(name: str, values: Sequence[Tree], paths: Sequence[Path]) -> Tree:
    """The number that all ranks must have; a tensor's is read, so that nobody has to look again."""
    numbers = [read_number(value.ref) if isinstance(value, TorchTensor) else value for value in values]
    for rank, number in enumerate(numbers):
        # Not-a-number is equal to nothing, and to be carried along.
        if number != numbers[0] and (number == number or numbers[0] == numbers[0]):
            raise refuse(
                f"{name!r} of rank {rank} is not that of rank 0", paths[rank], expected=numbers[0], found=number
            )
    first = values[0]
    if not isinstance(first, TorchTensor):
        return first
    return TorchTensor(ref=inline_number(numbers[0], first.ref.meta.dtype))


def _find_layout(
    tensors: Sequence[TorchTensor], layout: FlatLayout, shapes: Mapping[str, tuple[int, ...]]
) -> FlatLayout | None:
    if _fits(tensors, layout):
        return layout
    parameters = [(fqn, math.prod(shape)) for fqn, shape in shapes.items()]
    return keep_whole(parameters, layout) if is_kept_whole(tensors, layout, parameters) else None


def _fits(tensors: Sequence[TorchTensor], layout: FlatLayout) -> bool:
    numels = [tensor.ref.meta.numel for tensor in tensors]
    return all(numel in (filled, layout.partition) for numel, filled in zip(numels, layout.filled, strict=True))


def is_kept_whole(tensors: Sequence[TorchTensor], layout: FlatLayout, parameters: Sequence[tuple[str, int]]) -> bool:
    """Whether the ranks have whole parameters rather than their elements of a flat tensor.

    Args:
        tensors: What each rank has.
        layout: Of the flat tensor.
        parameters: fqn and numel, in the order of the flat tensor.
    """
    numels = [tensor.ref.meta.numel for tensor in tensors]
    return not _fits(tensors, layout) and numels == [*keep_whole(parameters, layout).filled]


def _not_flat(name: object, value: Tree, layout: FlatLayout, path: Path) -> UnsupportedError:
    found = str(value.ref.meta) if isinstance(value, TorchTensor) else type(value).__name__
    return UnsupportedError(
        f"the optimizer state {name!r} cannot be told apart by parameters",
        kind="flat-state",
        path=path,
        expected=f"one element for each of the {layout.filled[0]} of the partition, or a number",
        found=found,
        hint="optimizers with block-wise or factored state mix the parameters of a DeepSpeed partition",
    )
