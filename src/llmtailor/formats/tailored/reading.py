"""Checkpoints of our own, read: the manifest, and a catalog of what the layer files hold."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from ...catalog import Catalog, GroupRef, OptimizerRef, SmallFile, StateRef
from ...errors import FormatError, IntegrityError
from ...layers import Layer, LayerKind, LayerMap
from ...manifest import INDEX_NAME, FileRecord, LayerRecord, Manifest, TensorRecord
from ...state_keys import split_state_key
from ...state_tree import Note
from ...tensor_refs import Extent, FileTensor, TensorRef
from ...tensors import TensorMeta
from ..manifest_file import read_manifest
from ..safetensors import Header, open_file
from .codes import LayerCodes, check_state_base, read_codes_header, state_refs, weights_metas, weights_refs
from .packed import check_packed, read_packed, unpack_refs
from .parts import (
    Kind,
    LayerFile,
    check_names,
    check_part,
    join_files,
    join_notes,
    join_refs,
    open_layer_file,
    read_notes,
)

__all__ = ["layers_of", "open_tailored"]

_Value = TypeVar("_Value")


def open_tailored(path: Path) -> Catalog:
    """Open a checkpoint of our own: its manifest, and of each layer that is asked for the headers of its files.

    A layer in codes is what the codes stand for, not what its plain files hold. Sizes are checked, digests are not:
    that means reading everything, which is ``verify``'s work.

    Raises:
        NotFoundError: It is none; of a layer, when it is asked for: a file is missing.
        FormatError: The manifest is damaged; of a layer: a header is, or a file does not hold its layer.
        IntegrityError: Of a layer: a file has another size than was published, or its codes are relative to other
            files.
    """
    root = path.resolve()
    manifest, _ = read_manifest(path)
    files = _LayerFiles(root, manifest, _tensors_by_layer(manifest))
    order = {tensor.fqn: tensor.layer for tensor in manifest.tensors if tensor.tied_to is None}
    return Catalog(
        path=path,
        format="tailored",
        step=manifest.step,
        weights=_ByLayer(order, files.read_weights),
        buffers=frozenset(tensor.fqn for tensor in manifest.tensors if tensor.kind == "buffer"),
        ties={tensor.fqn: tensor.tied_to for tensor in manifest.tensors if tensor.tied_to is not None},
        states=_ByLayer(order, files.read_states),
        optimizers=tuple(
            OptimizerRef(
                name=optimizer.name,
                groups=tuple(GroupRef(parameters=each.parameters, options=each.options) for each in optimizer.groups),
            )
            for optimizer in manifest.optimizers
        ),
        layer_steps={layer.name: layer.state_step for layer in manifest.layers},
        update_counts={layer.name: layer.state_update_count for layer in manifest.layers},
        # No codes file: one whose codes are all exact may look like the optimizer file that it stands for. No parts of
        # layers: nothing that is written from here is in parts.
        published={
            root / file.path: file
            for layer in manifest.layers
            for file in (layer.weights, layer.optimizer)
            if file is not None
        },
        cut=layers_of(manifest),
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


def _tensors_by_layer(manifest: Manifest) -> Mapping[str, Sequence[TensorRecord]]:
    """Layer -> the tensors that its files hold."""
    held: dict[str, list[TensorRecord]] = defaultdict(list)
    for tensor in manifest.tensors:
        if tensor.tied_to is None:
            held[tensor.layer].append(tensor)
    return held


def layers_of(manifest: Manifest) -> LayerMap:
    """The layers of a checkpoint, with the names of their tensors; opens no file."""
    held = _tensors_by_layer(manifest)
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


class _LayerFiles:
    """The files of a checkpoint's layers, opened when something is asked of them; of a layer in codes, its codes.

    Args:
        root: The checkpoint.
        manifest: Of it.
        held: Tensors that a layer's weights file holds, by layer.
    """

    def __init__(self, root: Path, manifest: Manifest, held: Mapping[str, Sequence[TensorRecord]]) -> None:
        self._root = root
        self._manifest = manifest
        self._held = held
        self._layers = {layer.name: layer for layer in manifest.layers}
        self._codes: dict[str, tuple[LayerCodes, Mapping[str, FileTensor]]] = {}

    def read_weights(self, name: str) -> Mapping[str, TensorRef]:
        """The weights of a layer, by fqn."""
        layer = self._layers[name]
        # The codes of a layer whose weights file is of their step, and exact, say nothing of weights.
        if layer.encoding is None or layer.encoding.base == "none":
            return self._read_weights_file(layer, {tensor.fqn: tensor.meta for tensor in self._held[name]})
        codes, arrays = self._open_codes(layer, layer.encoding.codes)
        return weights_refs(codes, arrays, *self._read_bases(layer, codes))

    def read_states(self, name: str) -> Mapping[str, StateRef]:
        """The optimizer state of a layer, by fqn."""
        layer = self._layers[name]
        if layer.encoding is not None:
            codes, arrays = self._open_codes(layer, layer.encoding.codes)
            is_relative = any(stored.base is not None for stored in codes.states.values())
            weights, state = self._read_bases(layer, codes) if is_relative else ({}, {})
            return _join_states(state_refs(codes, arrays, weights, state), codes.notes)
        if layer.optimizer is None:
            parts = self._open_parts(layer, layer.optimizer_files, "optimizer")
            metas = join_files(self._root, layer, parts, None)
            return _join_states(join_refs(self._root, parts, metas), join_notes(parts))
        path, header = self._open(layer.optimizer)
        open_layer_file(path, header, is_part=False)
        check_names(path, header, {tensor.fqn: tensor for tensor in self._held[name]})
        return _join_states(self._unpack(layer, path, header), read_notes(path, header))

    def _open_parts(self, layer: LayerRecord, records: Sequence[FileRecord], kind: Kind) -> list[LayerFile]:
        """The files of each rank that holds some of a layer's weights, or of its optimizer state."""
        parts = [open_layer_file(*self._open(record), is_part=True) for record in records]
        for part in parts:
            check_part(part, self._manifest, layer, kind)
        return parts

    def _read_bases(
        self, layer: LayerRecord, codes: LayerCodes
    ) -> tuple[Mapping[str, FileTensor], Mapping[str, TensorRef]]:
        """The tensors of the weights file and, if codes are relative to them, of the optimizer file."""
        weights = self._read_weights_file(layer, weights_metas(self._manifest, layer, codes))
        if not codes.is_relative_to_state or layer.optimizer is None:
            return weights, {}
        path, header = self._open(layer.optimizer)
        state = self._unpack(layer, path, header)
        check_state_base(path, layer, codes, {key: tensor.meta for key, tensor in state.items()})
        return weights, state

    def _unpack(self, layer: LayerRecord, path: Path, header: Header) -> Mapping[str, TensorRef]:
        """What an optimizer file stands for, by name."""
        packed = read_packed(path, header)
        check_packed(path, self._manifest, layer, packed)
        weights = self._read_weights_file(layer, weights_metas(self._manifest, layer, None)) if packed else {}
        return unpack_refs(_tensors_of(path, header), packed, weights)

    def _read_weights_file(self, layer: LayerRecord, expected: Mapping[str, TensorMeta]) -> Mapping[str, FileTensor]:
        if layer.weights is None:
            parts = self._open_parts(layer, layer.weights_files, "weights")
            return join_refs(self._root, parts, join_files(self._root, layer, parts, expected))
        path, header = self._open(layer.weights)
        open_layer_file(path, header, is_part=False)
        found = _tensors_of(path, header)
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
        return found

    def _open_codes(self, layer: LayerRecord, file: FileRecord) -> tuple[LayerCodes, Mapping[str, FileTensor]]:
        """What the codes file of a layer holds, and every tensor in it; opened once for weights and state."""
        if layer.name not in self._codes:
            path, header = self._open(file)
            codes = read_codes_header(path, header, self._manifest, layer)
            self._codes[layer.name] = codes, _tensors_of(path, header)
        return self._codes[layer.name]

    def _open(self, file: FileRecord) -> tuple[Path, Header]:
        path = self._root / file.path
        header = open_file(path).header
        if header.nbytes != file.bytes:
            raise IntegrityError(
                "the file has another size than was published",
                kind="file-size",
                path=path,
                expected=file.bytes,
                found=header.nbytes,
                hint="llmtailor verify tells what else is damaged",
            )
        return path, header


def _join_states(tensors: Mapping[str, TensorRef], notes: Mapping[str, Note]) -> dict[str, StateRef]:
    """State by fqn, from ``state.<fqn>.<leaf>``."""
    tensors_of: dict[str, dict[str, TensorRef]] = defaultdict(dict)
    notes_of: dict[str, dict[str, Note]] = defaultdict(dict)
    for key, tensor in tensors.items():
        fqn, leaf = split_state_key(key)
        tensors_of[fqn][leaf] = tensor
    for key, note in notes.items():
        fqn, leaf = split_state_key(key)
        notes_of[fqn][leaf] = note
    fqns = sorted(tensors_of.keys() | notes_of.keys())
    return {fqn: StateRef(tensors=tensors_of.get(fqn, {}), notes=notes_of.get(fqn, {})) for fqn in fqns}


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
