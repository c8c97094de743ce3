"""The files of a layer that hold its weights, or its optimizer state: one, or one of each rank that holds some.

    LayerFile     a file, and which elements of which tensors it holds
    check_file    it holds nothing but what belongs to its layer
    join_files    together the files hold every tensor exactly once

Pure: of headers and the manifest.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from ...codecs import CODES_KEY
from ...errors import FormatError, IncompatibleError
from ...manifest import LayerRecord, Manifest
from ...shards import Shard, Shards, do_shards_tile
from ...state_keys import NOTES_KEY, split_state_key
from ...state_tree import Note
from ...strict_json import parse_object
from ...tensor_refs import Extent, FileTensor, file_tensor
from ...tensors import DTYPE_BITS, TensorMeta
from ..safetensors import Header, StoredTensor
from .shards import DCP_KEY, SHARDS_KEY, read_shards

__all__ = [
    "Kind",
    "LayerFile",
    "check_names",
    "check_part",
    "join_files",
    "join_notes",
    "join_refs",
    "open_layer_file",
    "read_notes",
]

Kind: TypeAlias = Literal["weights", "optimizer"]
"""What of a layer a file holds."""

# Columns of a matrix are a run for each row; a catalog keeps them all.
_MAX_RUNS = 2**22
_HINT = "llmtailor verify tells which files of the checkpoint are good; take the layer from another one"


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerFile:
    """A file of a layer, by its header."""

    path: Path
    header: Header
    shards: Shards
    """Which elements of its tensors it holds; of each of them."""

    def meta_of(self, name: str) -> TensorMeta:
        """Type and shape of the whole tensor that one in the file is a part of."""
        return TensorMeta(dtype=self.header.tensors[name].meta.dtype, shape=self.shards[name].shape)


def open_layer_file(path: Path, header: Header, *, is_part: bool) -> LayerFile:
    """What a weights or optimizer file says of its tensors.

    Args:
        path: For the error.
        header: Of the file.
        is_part: The manifest lists it as a rank's part of the layer; otherwise it must hold whole tensors.

    Raises:
        FormatError: It says what cannot be; it is no part and says it is one, or a part in codes.
    """
    shards = read_shards(path, header)
    unfit = [CODES_KEY] if is_part else [SHARDS_KEY, DCP_KEY]
    for key in unfit:
        if key in header.metadata:
            raise FormatError(
                "a rank's part of a layer is in codes" if is_part else "a file of whole tensors says it holds shards",
                kind="shards",
                path=path,
                expected=f"no {key} in its __metadata__",
                found=ascii(header.metadata[key])[:200],
                hint=_HINT,
            )
    return LayerFile(path=path, header=header, shards=shards)


def check_part(file: LayerFile, manifest: Manifest, layer: LayerRecord, kind: Kind) -> None:
    """Raise unless a rank's part of a layer holds what belongs there, and nothing else.

    Raises:
        FormatError: A tensor is of another layer, type or shape; or state of no parameter of the layer.
    """
    held = {tensor.fqn: tensor for tensor in manifest.tensors if tensor.layer == layer.name and tensor.tied_to is None}
    if kind == "optimizer":
        check_names(file.path, file.header, held)
        return
    for name in file.header.tensors:
        expected = held[name].meta if name in held else None
        if file.meta_of(name) != expected:
            raise FormatError(
                "the file does not hold parts of the layer's tensors",
                kind="schema",
                path=file.path,
                layer=layer.name,
                fqn=name,
                expected="no such tensor" if expected is None else f"a part of {expected}",
                found=f"a part of {file.meta_of(name)}",
            )


def check_names(path: Path, header: Header, fqns: Mapping[str, object]) -> None:
    """Raise unless an optimizer file holds state of these parameters alone, by its names.

    Raises:
        FormatError: There is a tensor or a note of another.
    """
    for name in [*header.tensors, *read_notes(path, header)]:
        try:
            fqn = split_state_key(name)[0]
        except IncompatibleError:
            fqn = ""
        if fqn not in fqns:
            raise FormatError(
                "the file holds optimizer state of a parameter of another layer", kind="schema", path=path, fqn=name
            )


def join_files(
    root: Path, layer: LayerRecord, files: Sequence[LayerFile], expected: Mapping[str, TensorMeta] | None
) -> dict[str, TensorMeta]:
    """Check that the files of a layer hold each element of each tensor exactly once.

    Args:
        root: The checkpoint, for the error.
        layer: Whose files they are.
        files: All that hold its weights, or all that hold its optimizer state; each for itself is good.
        expected: What they have to hold, by name; None if whatever they hold will do.

    Returns:
        Type and shape of each whole tensor, by name.

    Raises:
        FormatError: A tensor is missing, or in part, or some of it is there twice; or the files disagree about it.
    """
    of_tensor = _by_tensor(files)
    metas: dict[str, TensorMeta] = {}
    for name, meta in ({} if expected is None else expected).items():
        if name in of_tensor:
            continue
        if meta.numel:  # of none no rank holds anything
            raise _refuse(root, layer, name, str(meta), "no part of it")
        metas[name] = meta
    for name, held in of_tensor.items():
        metas[name] = held[0].meta_of(name)
        other = next((each for each in held if each.meta_of(name) != metas[name]), None)
        if other is not None:
            found = f"{metas[name]} in {held[0].path.name}, {other.meta_of(name)} in {other.path.name}"
            raise _refuse(root, layer, name, "parts of one tensor", found)
        shards = [each.shards[name] for each in held]
        if not do_shards_tile(shards):
            found = f"{sum(shard.numel for shard in shards)} in {', '.join(each.path.name for each in held[:8])}"
            raise _refuse(root, layer, name, f"each of the {metas[name].numel} elements of {metas[name]} once", found)
    return metas


def _by_tensor(files: Sequence[LayerFile]) -> Mapping[str, list[LayerFile]]:
    found: dict[str, list[LayerFile]] = defaultdict(list)
    for file in files:
        for name in file.header.tensors:
            found[name].append(file)
    return found


def _refuse(root: Path, layer: LayerRecord, name: str, expected: str, found: str) -> FormatError:
    return FormatError(
        "the parts of a tensor do not make it up",
        kind="tensor-parts",
        path=root,
        layer=layer.name,
        fqn=name,
        expected=expected,
        found=found,
        hint=_HINT,
    )


def read_notes(path: Path, header: Header) -> dict[str, Note]:
    """What an optimizer file says that tensors cannot, by ``state.<fqn>.<leaf>``."""
    text = header.metadata.get(NOTES_KEY)
    return parse_object(text.encode(), what="notes of an optimizer file", path=path) if text else {}


def join_notes(files: Sequence[LayerFile]) -> dict[str, Note]:
    """The notes of all optimizer files of a layer.

    Raises:
        FormatError: Two files say different things of one value.
    """
    found: dict[str, Note] = {}
    for file in files:
        for name, note in read_notes(file.path, file.header).items():
            if found.setdefault(name, note) != note:
                raise FormatError(
                    "two ranks' parts of a layer disagree about a value of the optimizer's state",
                    kind="schema",
                    path=file.path,
                    fqn=name,
                    expected=ascii(found[name])[:200],
                    found=ascii(note)[:200],
                    hint=_HINT,
                )
    return found


def join_refs(root: Path, files: Sequence[LayerFile], metas: Mapping[str, TensorMeta]) -> dict[str, FileTensor]:
    """Each tensor of a layer by reference.

    Args:
        root: The checkpoint, for the error.
        files: As ``join_files`` was given them.
        metas: As it gave them.

    Raises:
        FormatError: A tensor is in more pieces than anybody would cut it into.
    """
    of_tensor = _by_tensor(files)
    found: dict[str, FileTensor] = {}
    for name, meta in metas.items():
        extents = []
        for file in of_tensor.get(name, ()):
            for extent in _extents(file.path, file.header.tensors[name], file.shards[name]):
                extents.append(extent)
                if len(extents) > _MAX_RUNS:
                    raise FormatError(
                        "a tensor is in too many pieces", kind="shards", path=file.path, fqn=name, expected=_MAX_RUNS
                    )
        found[name] = file_tensor(meta, extents, name=name, path=root)
    return found


def _extents(path: Path, stored: StoredTensor, shard: Shard) -> Iterator[Extent]:
    position, width = stored.byte_range.start, DTYPE_BITS[stored.meta.dtype] // 8
    for start, numel in shard.runs():
        yield Extent(path=path, offset=position, start=start, numel=numel)
        position += numel * width
