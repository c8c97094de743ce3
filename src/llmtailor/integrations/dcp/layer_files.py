"""The files of layers that a rank writes, from what ``TailorPlanner`` resolves."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import xxhash

from ...errors import InvalidInputError
from ...layers import Layer, file_stem
from ...local_parts import Seat
from ...manifest import FileRecord
from ...shards import Shard
from ...storage import PIECE_NBYTES, StagedCheckpoint, aligned_buffer, pad
from ...writer import FileImage, LayerImage, WrittenLayer, optimizer_image, weights_image
from ...writer.copying import ImageReader
from ...writer.devices import Lanes, fence
from ...writer.pool import Piece
from .state_layers import NamedState

__all__ = ["make_images", "write_file", "write_layers"]

# One thread digests while the other writes.
_NUM_THREADS = 2


def make_images(
    named: NamedState, seat: Seat, layers: frozenset[str], resolve: Callable[[str], torch.Tensor]
) -> list[LayerImage]:
    """The files of a rank.

    Args:
        named: The state that is saved.
        seat: Which rank this is.
        layers: Those that are written.
        resolve: Name -> the tensor to write, of the type and shape of what is here.

    Raises:
        InvalidInputError: A planner changes a tensor's type or shape.
    """
    names_of: dict[str, list[str]] = defaultdict(list)
    for name in named.written_by(seat, layers):
        names_of[named.parts[name].layer].append(name)
    images = (
        _make_image(named, layer, seat, names_of[layer.name], resolve, is_owner=seat.owns(number))
        for number, layer in enumerate(named.live.layers)
        if layer.name in layers
    )
    return [image for image in images if image.files]


def _make_image(
    named: NamedState,
    layer: Layer,
    seat: Seat,
    names: Sequence[str],
    resolve: Callable[[str], torch.Tensor],
    *,
    is_owner: bool,
) -> LayerImage:
    tensors = {name: _resolve(named, name, resolve) for name in names}
    weights = {name: tensor for name, tensor in tensors.items() if not name.startswith("state.")}
    states = {name: tensor for name, tensor in tensors.items() if name.startswith("state.")}
    notes = _notes_of(named, layer.fqns) if is_owner else {}
    ranks = [seat.rank if named.is_in_parts(layer.name, of_state=each) else None for each in (False, True)]
    stem = file_stem(layer)
    return LayerImage(
        layer=layer.name,
        weights=weights_image(stem, weights, shards=_shards_of(named, weights), rank=ranks[0]) if weights else None,
        optimizer=optimizer_image(stem, states, notes, shards=_shards_of(named, states), rank=ranks[1]),
    )


def _shards_of(named: NamedState, names: Iterable[str]) -> dict[str, Shard]:
    parts = {name: named.parts[name].local for name in names}
    return {name: part.shard for name, part in parts.items() if part.is_sharded}


def _resolve(named: NamedState, name: str, resolve: Callable[[str], torch.Tensor]) -> torch.Tensor:
    held = named.parts[name].local.tensor
    tensor = resolve(name)
    if tensor.shape != held.shape or tensor.dtype is not held.dtype:
        raise InvalidInputError(
            "a planner changes what is saved of a layer",
            kind="planner-transform",
            fqn=name,
            expected=f"{held.dtype}{list(held.shape)}, as in the state dict",
            found=f"{tensor.dtype}{list(tensor.shape)}",
        )
    return tensor.detach()


def _notes_of(named: NamedState, fqns: Sequence[str]) -> dict[str, object]:
    prefixes = {f"state.{fqn}" for fqn in fqns}
    return {name: note for name, note in named.notes.items() if name.rpartition(".")[0] in prefixes}


def write_layers(staged: StagedCheckpoint, images: Sequence[LayerImage]) -> dict[str, WrittenLayer]:
    """Write files into an attempt, two at a time.

    Raises:
        WriteError: The attempt must be abandoned.
    """
    files = [(image.layer, file) for image in images for file in image.files]
    if not files:
        return {}
    with ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="llmtailor-dcp") as pool:
        records = list(pool.map(lambda each: write_file(staged, each[1]), files))
    found = {file.path: file for file in records}
    return {image.layer: _written(image, found) for image in images}


def _written(image: LayerImage, found: Mapping[str, FileRecord]) -> WrittenLayer:
    return WrittenLayer(
        weights=None if image.weights is None else found[image.weights.name],
        optimizer=None if image.optimizer is None else found[image.optimizer.name],
        update_count=image.count_updates(),
    )


def write_file(staged: StagedCheckpoint, image: FileImage) -> FileRecord:
    """Write one file, piece by piece; any thread.

    Raises:
        WriteError: The attempt must be abandoned.
    """
    file = staged.create_file(image.name, image.nbytes)
    lanes = Lanes()
    lanes.start(fence(image.tensors))
    reader = ImageReader(image.parts, lanes)
    digest = xxhash.xxh3_128()
    memory = np.frombuffer(aligned_buffer(pad(min(PIECE_NBYTES, image.nbytes))), dtype=np.uint8)
    piece = Piece(start=0, nbytes=memory.nbytes, bytes=memory, tensor=torch.from_numpy(memory))
    for offset in range(0, image.nbytes, PIECE_NBYTES):
        nbytes = min(PIECE_NBYTES, image.nbytes - offset)
        reader.fill(piece, nbytes)
        lanes.synchronize()
        digest.update(piece.buffer[:nbytes])
        file.write(piece.buffer, offset, nbytes)
    return file.finish(f"xxh3_128:{digest.hexdigest()}")
