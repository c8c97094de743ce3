"""What of a state dict belongs to no layer, and what its keys are called: a few small files below ``dcp/``.

    dcp/names.json                    path in the state dict -> tensor in the layer files; written by rank 0
    dcp/rest.rank-00000.json          each other value that a rank has: JSON where that says it exactly
    dcp/rest.rank-00000.pt            key -> value, of what JSON cannot say; read with ``weights_only=True``
    dcp/rest.rank-00000.safetensors   tensors, and shards of tensors

Nothing is unpickled that could run code: what cannot be read back so is refused before anything is written.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any

import torch

from ...checkpoint import Checkpoint
from ...errors import FormatError, UnsupportedError
from ...formats.safetensors import read_header
from ...formats.tailored.shards import encode_shards, read_shards
from ...layer_reading import CheckedFile
from ...layers import part_suffix
from ...local_parts import LocalPart
from ...manifest import FileRecord
from ...optimizer_values import decode_option, encode_option
from ...shards import whole_shard
from ...storage import FileReader
from ...strict_json import parse_object
from ...verify import changed_bytes, open_published
from ...writer import FileImage
from ...writer.images import plan_image
from .state_names import Entry, Path

__all__ = ["NAMES", "RestValue", "SavedName", "decode_names", "encode_names", "encode_rest", "read_rest", "rest_image"]

NAMES = "dcp/names.json"
_REST = re.compile(r"dcp/rest\.rank-[0-9]{5}\.json")
_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedName:
    """A value of a state dict that is in the layer files."""

    path: Path
    fqn: str
    """Of the tensor that holds the bytes."""
    leaf: str | None
    """Of optimizer state; None of a weight."""
    is_tensor: bool
    """False: a number, text or container, which DCP asks for as bytes."""


def encode_names(entries: Iterable[Entry], ties: Mapping[str, str]) -> bytes:
    """``dcp/names.json``: one line for each value of a layer."""
    lines = []
    for entry in entries:
        if entry.role != "rest":
            fqn = ties.get(entry.fqn, entry.fqn)
            leaf = entry.leaf if entry.role == "state" else None
            lines.append(json.dumps([[*entry.path], fqn, leaf, isinstance(entry.value, torch.Tensor)]))
    return f'{{"version": {_VERSION}, "names": [\n  '.encode() + ",\n  ".join(lines).encode() + b"\n]}\n"


def decode_names(checkpoint: Checkpoint) -> tuple[SavedName, ...] | None:
    """What a checkpoint says of the state dict it was saved from; None if it was saved from none.

    Raises:
        IntegrityError, NotFoundError: The file is not what was published.
        FormatError: It cannot be understood.
    """
    record = next((file for file in checkpoint.manifest.files if file.path == NAMES), None)
    if record is None:
        return None
    fields = _parse(checkpoint, record)
    try:
        return tuple(
            SavedName(path=tuple(path), fqn=str(fqn), leaf=None if leaf is None else str(leaf), is_tensor=bool(kind))
            for path, fqn, leaf, kind in fields["names"]
        )
    except (KeyError, TypeError, ValueError) as err:
        raise _bad_file(checkpoint, record) from err


def _parse(checkpoint: Checkpoint, record: FileRecord) -> dict[str, Any]:
    path = checkpoint.path / record.path
    fields = parse_object(read_small(checkpoint, record), what="small state of a checkpoint", path=path)
    if fields.get("version") != _VERSION:
        raise FormatError(
            "the small state has a version this program does not know",
            kind="format-version",
            path=path,
            expected=_VERSION,
            found=ascii(fields.get("version"))[:200],
            hint="upgrade llmtailor",
        )
    return fields


def _bad_file(checkpoint: Checkpoint, record: FileRecord) -> FormatError:
    return FormatError("the small state cannot be understood", kind="small-state", path=checkpoint.path / record.path)


def read_small(checkpoint: Checkpoint, record: FileRecord) -> bytes:
    """A small file, whole.

    Raises:
        IntegrityError, NotFoundError, FormatError: It is not what was published.
    """
    pieces: list[bytes] = []
    path = checkpoint.path / record.path
    with open_published(checkpoint.path, record) as descriptor:
        found = FileReader().digest(descriptor, record.bytes, path, lambda _, piece: pieces.append(bytes(piece)))
    if found != record.digest:
        raise changed_bytes(path, record.digest, found)
    return b"".join(pieces)


def encode_rest(rank: int, values: Mapping[Path, bytes], tensors: Sequence[tuple[Path, str]]) -> dict[str, bytes]:
    """The files of a rank's other values, but for the tensors.

    Args:
        rank: Whose.
        values: As ``torch.save`` wrote each, by path.
        tensors: Path and key of those that are in the safetensors file.

    Returns:
        Content by name; none if there is nothing.

    Raises:
        UnsupportedError: A value could not be read back without running code; names it.
    """
    said: list[str] = []
    pickled: dict[str, Any] = {}
    for path, data in values.items():
        key = ".".join(map(str, path))
        value = _load_safely(data, key)
        try:
            said.append(json.dumps([[*path], "json", encode_option(value)], allow_nan=False))
        except UnsupportedError:
            pickled[key] = value
            said.append(json.dumps([[*path], "pt", key]))
    said += [json.dumps([[*path], "tensor", key]) for path, key in tensors]
    if not said:
        return {}
    stem = f"dcp/rest{part_suffix(rank)}"
    text = f'{{"version": {_VERSION}, "values": [\n  '.encode() + ",\n  ".join(said).encode() + b"\n]}\n"
    files = {f"{stem}.json": text}
    if pickled:
        buffer = io.BytesIO()
        torch.save(pickled, buffer)
        files[f"{stem}.pt"] = buffer.getvalue()
    return files


def _load_safely(data: bytes, key: str) -> Any:
    try:
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as err:  # torch and pickle raise a dozen types for what they refuse
        raise UnsupportedError(
            f"the value {key!r} of the state dict could not be read back",
            kind="object-state",
            fqn=key,
            expected="tensors, numbers, text, bytes and containers of these",
            found=next(iter(str(err).splitlines()), type(err).__name__)[:300],
            hint="turn it into one of these in the object's state_dict(), and back in load_state_dict()",
        ) from err


def rest_image(rank: int, tensors: Mapping[str, LocalPart]) -> FileImage:
    """The file of a rank's tensors that are of no layer; by key, one at least."""
    shards = {key: part.shard for key, part in tensors.items() if part.is_sharded}
    wholes = {key: whole_shard(part.tensor.shape) for key, part in tensors.items() if not part.is_sharded}
    metadata = encode_shards({**shards, **wholes}) if shards else {}
    plain = {key: part.tensor.detach() for key, part in tensors.items()}
    return plan_image(f"dcp/rest{part_suffix(rank)}.safetensors", plain, metadata, are_lazy=())


@dataclass(frozen=True, slots=True, kw_only=True)
class RestValue:
    """A value that belongs to no layer."""

    path: Path
    value: Any
    """Unless it is a tensor."""
    files: tuple[CheckedFile, ...] = ()
    """Where a tensor is; of several ranks if it is in parts."""


def read_rest(checkpoint: Checkpoint) -> dict[str, RestValue]:
    """The other values of the state dict, by key; of all ranks.

    Raises:
        IntegrityError, NotFoundError, FormatError: A file is not what was published, or cannot be understood.
    """
    records = {file.path: file for file in checkpoint.manifest.files}
    found: dict[str, RestValue] = {}
    for name in sorted(filter(_REST.fullmatch, records)):
        fields = _parse(checkpoint, records[name])
        stem = name.removesuffix(".json")
        try:
            values = [(tuple(path), kind, told) for path, kind, told in fields["values"]]
        except (KeyError, TypeError, ValueError) as err:
            raise _bad_file(checkpoint, records[name]) from err
        kinds = {kind for _, kind, _ in values}
        pickled: Mapping[str, Any] = {}
        if "pt" in kinds:
            pickled = _load_safely(read_small(checkpoint, records[f"{stem}.pt"]), f"{stem}.pt")
        file = _open_tensors(checkpoint, records[f"{stem}.safetensors"]) if "tensor" in kinds else None
        for path, kind, told in values:
            key = ".".join(map(str, path))
            if kind == "tensor":
                assert file is not None
                before = found[key].files if key in found else ()
                found[key] = RestValue(path=path, value=None, files=(*before, file))
            else:
                found[key] = RestValue(path=path, value=pickled[told] if kind == "pt" else decode_option(told))
    return found


def _open_tensors(checkpoint: Checkpoint, record: FileRecord) -> CheckedFile:
    path: FilePath = checkpoint.path / record.path
    with open_published(checkpoint.path, record) as descriptor:
        header, prefix = read_header(descriptor, path)
    shards = read_shards(path, header)
    return CheckedFile(checkpoint=checkpoint.path, record=record, header=header, prefix=prefix, shards=shards)
