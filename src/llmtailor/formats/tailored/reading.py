"""Checkpoints of our own, read: the manifest, and a catalog of what the layer files hold."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from ...catalog import Catalog, GroupRef, OptimizerRef, SmallFile, StateRef
from ...errors import FormatError, IntegrityError, NotFoundError
from ...layers import Layer, LayerKind, LayerMap
from ...manifest import INDEX_NAME, MANIFEST_NAME, FileRecord, LayerRecord, Manifest, TensorRecord, decode_manifest
from ...state_keys import NOTES_KEY, split_state_key
from ...strict_json import parse_object
from ...tensor_refs import Extent, FileTensor, TensorRef
from ..safetensors import Header, open_file
from ..source_files import open_source

__all__ = ["open_tailored", "read_manifest"]

# A manifest has some 200 bytes a tensor; this is a million tensors.
_MAX_MANIFEST_NBYTES = 256 * 2**20

_Value = TypeVar("_Value")


def read_manifest(checkpoint: Path) -> tuple[Manifest, str]:
    """Read and check the manifest of a checkpoint; opens no other file.

    Returns:
        The manifest and its digest.

    Raises:
        NotFoundError: No such directory, or it has no manifest.
        FormatError: The manifest is damaged, of another version, or of another step than the directory's name says.
    """
    path = checkpoint / MANIFEST_NAME
    try:
        file = os.fdopen(open_source(path), "rb", buffering=0)
    except (FileNotFoundError, NotADirectoryError) as err:
        is_there = checkpoint.is_dir()
        raise NotFoundError(
            f"not a checkpoint of LLMTailor: it has no {MANIFEST_NAME}" if is_there else "no such checkpoint",
            kind="missing-manifest" if is_there else "missing-checkpoint",
            path=checkpoint,
            expected="a directory checkpoint-<step>, written by LLMTailor",
            found=_describe_directory(checkpoint),
            hint="llmtailor ls <run> lists the checkpoints of a run",
        ) from err
    with file:
        nbytes = os.fstat(file.fileno()).st_size
        if nbytes > _MAX_MANIFEST_NBYTES:
            raise FormatError(
                "the manifest is too large to be one",
                kind="manifest-size",
                path=path,
                expected=f"at most {_MAX_MANIFEST_NBYTES} bytes",
                found=f"{nbytes} bytes",
            )
        manifest, digest = decode_manifest(file.read(), path)
    return manifest, digest


def _describe_directory(path: Path) -> str:
    if not path.exists():
        return "nothing"
    names = sorted(os.listdir(path))[:6] if path.is_dir() else []
    return ", ".join(names) if names else ("an empty directory" if path.is_dir() else "a file")


def open_tailored(path: Path) -> Catalog:
    """Open a checkpoint of our own: its manifest, and of each layer that is asked for the headers of its files.

    Sizes are checked, digests are not: that means reading everything, which is ``verify``'s work.

    Raises:
        NotFoundError: It is none; of a layer, when it is asked for: a file is missing.
        FormatError: The manifest is damaged; of a layer: a header is, or a file does not hold its layer.
        IntegrityError: Of a layer: a file has another size than was published.
    """
    root = path.resolve()
    manifest, _ = read_manifest(path)
    held: dict[str, list[TensorRecord]] = defaultdict(list)
    for tensor in manifest.tensors:
        if tensor.tied_to is None:
            held[tensor.layer].append(tensor)
    records = {layer.name: layer for layer in manifest.layers}
    order = {tensor.fqn: tensor.layer for tensor in manifest.tensors if tensor.tied_to is None}
    return Catalog(
        path=path,
        format="tailored",
        step=manifest.step,
        weights=_ByLayer(order, lambda layer: dict(_read_weights(root, records[layer], held[layer]))),
        buffers=frozenset(tensor.fqn for tensor in manifest.tensors if tensor.kind == "buffer"),
        ties={tensor.fqn: tensor.tied_to for tensor in manifest.tensors if tensor.tied_to is not None},
        states=_ByLayer(order, lambda layer: dict(_read_states(root, records[layer], held[layer]))),
        optimizers=tuple(
            OptimizerRef(
                name=optimizer.name,
                groups=tuple(GroupRef(parameters=each.parameters, options=each.options) for each in optimizer.groups),
            )
            for optimizer in manifest.optimizers
        ),
        layer_steps={layer.name: layer.step for layer in manifest.layers},
        update_counts={layer.name: layer.update_count for layer in manifest.layers},
        published={root / file.path: file for layer in manifest.layers for file in layer.files},
        cut=_layer_map(manifest, held),
        files=tuple(_small_file(root, file) for file in manifest.files if file.path != INDEX_NAME),
        native=manifest,
    )


class _ByLayer(Mapping[str, _Value]):
    """What the layer files hold by fqn; a layer's file is opened when the first of its names is looked up.

    A merge of many sources needs a few layers of each, and a model has thousands of tensors.

    Args:
        layer_of: fqn -> layer; the order is the mapping's.
        load: Layer -> its part of the mapping.
    """

    def __init__(self, layer_of: Mapping[str, str], load: Callable[[str], Mapping[str, _Value]]) -> None:
        self._layer_of = layer_of
        self._load = load
        self._loaded: dict[str, Mapping[str, _Value]] = {}

    def __getitem__(self, fqn: str) -> _Value:
        layer = self._layer_of[fqn]
        if layer not in self._loaded:
            self._loaded[layer] = self._load(layer)
        return self._loaded[layer][fqn]

    def __iter__(self) -> Iterator[str]:
        return (fqn for fqn in self._layer_of if fqn in self)

    def __len__(self) -> int:
        return sum(1 for _ in self)


def _layer_map(manifest: Manifest, held: Mapping[str, Sequence[TensorRecord]]) -> LayerMap:
    layers = tuple(
        Layer(
            name=layer.name,
            kind=LayerKind(layer.kind),
            stack=layer.stack,
            index=layer.index,
            fqns=tuple(tensor.fqn for tensor in held[layer.name]),
        )
        for layer in manifest.layers
    )
    return LayerMap(layers, {tensor.fqn: tensor.tied_to for tensor in manifest.tensors if tensor.tied_to is not None})


def _small_file(root: Path, file: FileRecord) -> SmallFile:
    return SmallFile(name=file.path, path=root / file.path, nbytes=file.bytes)


def _open_layer_file(root: Path, file: FileRecord) -> Header:
    header = open_file(root / file.path).header
    if header.nbytes != file.bytes:
        raise IntegrityError(
            "the file has another size than was published",
            kind="file-size",
            path=root / file.path,
            expected=file.bytes,
            found=header.nbytes,
            hint="llmtailor verify tells what else is damaged",
        )
    return header


def _read_weights(root: Path, layer: LayerRecord, held: Sequence[TensorRecord]) -> Iterator[tuple[str, TensorRef]]:
    path = root / layer.weights.path
    found = _tensors_of(path, _open_layer_file(root, layer.weights))
    expected = {tensor.fqn: tensor.meta for tensor in held}
    for fqn in sorted(expected.keys() | found.keys()):
        if fqn not in expected or fqn not in found or found[fqn].meta != expected[fqn]:
            raise FormatError(
                "the file does not hold the layer's tensors",
                kind="schema",
                path=path,
                layer=layer.name,
                fqn=fqn,
                expected=str(expected.get(fqn, "no such tensor")),
                found=str(found[fqn].meta) if fqn in found else "no such tensor",
            )
    yield from found.items()


def _read_states(root: Path, layer: LayerRecord, held: Sequence[TensorRecord]) -> Iterator[tuple[str, StateRef]]:
    if layer.optimizer is None:
        return
    path = root / layer.optimizer.path
    header = _open_layer_file(root, layer.optimizer)
    text = header.metadata.get(NOTES_KEY)
    notes = parse_object(text.encode(), what="notes of an optimizer file", path=path) if text else {}
    fqns = {tensor.fqn for tensor in held}
    tensors: dict[str, dict[str, TensorRef]] = {}
    notes_of: dict[str, dict[str, Any]] = {}
    for name, tensor in _tensors_of(path, header).items():
        fqn, leaf = _split(name, fqns, path)
        tensors.setdefault(fqn, {})[leaf] = tensor
    for name, note in notes.items():
        fqn, leaf = _split(name, fqns, path)
        notes_of.setdefault(fqn, {})[leaf] = note
    for fqn in sorted(tensors.keys() | notes_of.keys()):
        yield fqn, StateRef(tensors=tensors.get(fqn, {}), notes=notes_of.get(fqn, {}))


def _split(name: str, fqns: set[str], path: Path) -> tuple[str, str]:
    fqn, leaf = split_state_key(name)
    if fqn not in fqns:
        raise FormatError(
            "an optimizer file holds state of a parameter that is not of its layer", kind="schema", path=path, fqn=fqn
        )
    return fqn, leaf


def _tensors_of(path: Path, header: Header) -> Mapping[str, FileTensor]:
    return {
        name: FileTensor(
            meta=stored.meta,
            extents=(Extent(path=path, offset=stored.byte_range.start, start=0, numel=stored.meta.numel),)
            if stored.meta.numel
            else (),
        )
        for name, stored in header.tensors.items()
    }
