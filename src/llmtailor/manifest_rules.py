"""Which manifests must be refused, when written as when read: ``docs/spec/checkpoint-v1.md`` section 4 in code."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .manifest import EncodingRecord, LayerRecord, Manifest

__all__ = ["find_faults"]


def find_faults(manifest: Manifest) -> list[str]:
    """What is wrong with a manifest, in words; empty if it describes a whole checkpoint."""
    return [
        *_name_faults(manifest),
        *_tensor_faults(manifest),
        *_layer_faults(manifest),
        *_group_faults(manifest),
    ]


def _twice(names: Iterable[str], what: str) -> Iterator[str]:
    return (f"{what} {name!r} occurs {count} times" for name, count in Counter(names).items() if count > 1)


def _name_faults(manifest: Manifest) -> Iterator[str]:
    yield from _twice((tensor.fqn for tensor in manifest.tensors), "tensor")
    yield from _twice((layer.name for layer in manifest.layers), "layer")
    # Case-insensitive file systems exist; two names that differ in case alone would be one file there.
    yield from _twice((file.path.casefold() for file in manifest.all_files), "path")


def _tensor_faults(manifest: Manifest) -> Iterator[str]:
    layers = {layer.name for layer in manifest.layers}
    holders = {tensor.fqn for tensor in manifest.tensors if tensor.tied_to is None}
    for tensor in manifest.tensors:
        if tensor.layer not in layers:
            yield f"tensor {tensor.fqn!r} is of layer {tensor.layer!r}, which is not there"
        if tensor.tied_to is not None and tensor.tied_to not in holders:
            yield f"tensor {tensor.fqn!r} is tied to {tensor.tied_to!r}, which holds no bytes"
    for name in sorted(layers - {tensor.layer for tensor in manifest.tensors if tensor.tied_to is None}):
        yield f"layer {name!r} has no tensor"


def _layer_faults(manifest: Manifest) -> Iterator[str]:
    for layer in manifest.layers:
        if layer.step > manifest.step or layer.save_index > manifest.save_index:
            yield f"layer {layer.name!r} was saved at step {layer.step}, after the checkpoint's {manifest.step}"
        if layer.update_count is not None and not layer.optimizer_files:
            yield f"layer {layer.name!r} has an update count and no optimizer file"
        if (layer.kind == "block") != (layer.index is not None) or (layer.stack is None) != (layer.index is None):
            yield f"layer {layer.name!r} must have a stack and an index if it is a block, and only then"
        if manifest.contents == "weights" and layer.optimizer_files:
            yield f"layer {layer.name!r} has an optimizer file in a checkpoint of weights"
        yield from _part_faults(manifest, layer)
        if layer.encoding is not None:
            yield from _encoding_faults(manifest, layer, layer.encoding)
    if manifest.contents == "weights" and manifest.optimizers:
        yield "a checkpoint of weights has an optimizer"


def _part_faults(manifest: Manifest, layer: LayerRecord) -> Iterator[str]:
    ranks = [part.rank for part in layer.parts]
    if ranks != sorted(set(ranks)) or any(rank >= manifest.world.size for rank in ranks):
        yield f"parts of layer {layer.name!r} must be in order of ranks, each below {manifest.world.size}"
    if not all(part.files for part in layer.parts):
        yield f"a part of layer {layer.name!r} has no file"
    if not layer.weights_files:
        yield f"layer {layer.name!r} has no weights"
    for whole, parts, what in (
        (layer.weights, [part.weights for part in layer.parts], "weights"),
        (layer.optimizer, [part.optimizer for part in layer.parts], "optimizer state"),
    ):
        if whole is not None and any(parts):
            yield f"layer {layer.name!r} has its {what} both whole and in parts"
    if layer.parts and (manifest.world.sharding == "none" or manifest.world.layout is None):
        yield f"layer {layer.name!r} is in parts, and the world is not sharded or has no layout"
    if layer.parts and layer.encoding is not None:
        yield f"layer {layer.name!r} has both parts and codes"


def _encoding_faults(manifest: Manifest, layer: LayerRecord, encoding: EncodingRecord) -> Iterator[str]:
    if not layer.step <= encoding.step <= manifest.step or not layer.save_index <= encoding.save_index:
        yield f"codes of layer {layer.name!r} are of step {encoding.step}, outside of {layer.step} to {manifest.step}"
    if encoding.save_index > manifest.save_index:
        yield f"codes of layer {layer.name!r} are of save {encoding.save_index}, after the checkpoint's"
    if encoding.base != "exact" and (layer.step != encoding.step or layer.optimizer is not None):
        yield f"codes of layer {layer.name!r} need weights of their own step, and no optimizer file beside them"
    if manifest.contents == "weights" and encoding.update_count is not None:
        yield f"codes of layer {layer.name!r} count updates in a checkpoint of weights"


def _group_faults(manifest: Manifest) -> Iterator[str]:
    parameters = {tensor.fqn for tensor in manifest.tensors if tensor.kind == "parameter"}
    for optimizer in manifest.optimizers:
        grouped = [fqn for group in optimizer.groups for fqn in group.parameters]
        yield from _twice(grouped, f"in the groups of {optimizer.name}, parameter")
        for fqn in sorted(set(grouped) - parameters):
            yield f"{optimizer.name} has {fqn!r}, which is not a parameter of the model"
