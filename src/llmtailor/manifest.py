"""The manifest ``tailor.json``: what a checkpoint says about itself, and its commit record.

``docs/spec/checkpoint-v1.md`` section 4 in code. A ``Manifest`` that exists is valid: the same rules hold when it is
built and when it is read. Bytes in, bytes out; files are opened elsewhere.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import xxhash
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from .errors import FormatError, IntegrityError
from .manifest_rules import find_faults
from .strict_json import parse_object
from .tensors import DTYPE_BITS, TensorMeta

__all__ = [
    "FORMAT_VERSION",
    "INDEX_NAME",
    "MANIFEST_NAME",
    "EncodingRecord",
    "ErrorRecord",
    "FileRecord",
    "GroupRecord",
    "LayerRecord",
    "Manifest",
    "OptimizerRecord",
    "Parent",
    "PartRecord",
    "SaveRecord",
    "TensorRecord",
    "World",
    "Writer",
    "decode_manifest",
    "digest_of",
    "encode_manifest",
]

MANIFEST_NAME = "tailor.json"
INDEX_NAME = "model.safetensors.index.json"
FORMAT_VERSION = 1
_FORMAT = "llmtailor-checkpoint"

_DIGEST = r"xxh3_128:[0-9a-f]{32}"
_TRAILER = re.compile(rb',\n"digest": "(' + _DIGEST.encode() + rb')"\n\}\n\Z')
_TRAILER_NBYTES = len(b',\n"digest": "xxh3_128:"\n}\n') + 32
_COMPONENT = re.compile(r"[^./\\\x00-\x1f\x7f][^/\\\x00-\x1f\x7f]*")


def digest_of(*chunks: bytes | memoryview) -> str:
    """Digest of the chunks laid end to end: ``xxh3_128:<32 hex>``."""
    digest = xxhash.xxh3_128()
    for chunk in chunks:
        digest.update(chunk)
    return f"xxh3_128:{digest.hexdigest()}"


def _check_path(value: str) -> str:
    if value == MANIFEST_NAME or not all(_COMPONENT.fullmatch(part) for part in value.split("/")):
        raise ValueError(f"path {value!r} must be relative, of plain components, and not {MANIFEST_NAME}")
    return value


def _check_dtype(value: str) -> str:
    if value not in DTYPE_BITS:
        raise ValueError(f"unknown element type {value!r}")
    return value


Count = Annotated[int, Field(ge=0)]
Seconds = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0)]
Digest = Annotated[str, Field(pattern=rf"^{_DIGEST}$")]
RelativePath = Annotated[str, Field(max_length=1024), AfterValidator(_check_path)]
Name = Annotated[str, Field(min_length=1, max_length=1024)]


class _Record(BaseModel):
    # An infinite number would be written as null: as a constant it is refused by json.dumps.
    model_config = ConfigDict(
        strict=True, frozen=True, extra="forbid", allow_inf_nan=False, ser_json_inf_nan="constants"
    )


class FileRecord(_Record):
    """A file of the checkpoint."""

    path: RelativePath
    """Relative to the checkpoint, with forward slashes."""
    bytes: Count
    digest: Digest


class TensorRecord(_Record):
    """A parameter or persistent buffer of the model."""

    fqn: Name
    kind: Literal["parameter", "buffer"]
    layer: Name
    dtype: Annotated[str, AfterValidator(_check_dtype)]
    shape: Annotated[tuple[Count, ...], Field(max_length=64)]
    trainable: bool
    tied_to: Name | None
    """The fqn that holds the bytes, or None."""

    @property
    def meta(self) -> TensorMeta:
        return TensorMeta(dtype=self.dtype, shape=self.shape)


class GroupRecord(_Record):
    """Hyper-parameters of some parameters of one optimizer."""

    parameters: tuple[Name, ...]
    options: dict[str, Any]
    """JSON; what JSON cannot say is tagged, see the specification."""


class OptimizerRecord(_Record):
    """One optimizer."""

    name: Annotated[Name, Field(alias="class")]
    groups: tuple[GroupRecord, ...]


class ErrorRecord(_Record):
    """How far the codes of a component of a layer are from what they stand for."""

    l2: Share
    """Relative L2 error."""
    max: Share
    """Largest error of an element; see the specification, section 7."""


class EncodingRecord(_Record):
    """Codes of a layer: its state at a step, where its own files do not hold that exactly."""

    step: Count
    """Step of the checkpoint that wrote the codes; they stand for the layer as it was then."""
    save_index: Count
    update_count: Count | None
    rest: Name
    """As the user would write it: ``q8``."""
    base: Literal["exact", "rounded", "none"]
    """What the weights file is to the codes: ``exact``, earlier weights that the codes are relative to; ``rounded``,
    the coded step's weights, of which some are rounded to BF16; ``none``, the coded step's weights as they are."""
    codes: FileRecord
    errors: dict[Literal["weights", "first", "second"], ErrorRecord]
    """By component; those that are exact are left out."""


class PartRecord(_Record):
    """The files that one rank wrote of a layer: its shards of the tensors that are spread over ranks."""

    rank: Count
    weights: FileRecord | None
    optimizer: FileRecord | None

    @property
    def files(self) -> tuple[FileRecord, ...]:
        return tuple(file for file in (self.weights, self.optimizer) if file is not None)


class LayerRecord(_Record):
    """A layer, its files and when they were written."""

    name: Name
    kind: Literal["block", "embedding", "head", "other"]
    stack: Name | None
    index: Count | None
    step: Count
    """Step of the checkpoint that wrote weights and optimizer file."""
    save_index: Count
    update_count: Count | None
    reason: Name
    drift: float | None
    """Relative L2 distance, at this checkpoint's save, of the weights from those of the layer's save before."""
    weights: FileRecord | None
    """None where the weights are in parts."""
    optimizer: FileRecord | None
    """None where the optimizer state is in parts, or there is none."""
    encoding: EncodingRecord | None = None
    """Codes that hold a newer, or the whole, state; None if the files hold it."""
    parts: tuple[PartRecord, ...] = ()
    """Files of tensors that are spread over ranks, by rank; empty if no tensor of the layer is."""
    share: Share | None = None
    """Of what a step of training achieves, at this checkpoint's save; all layers' make 1. None if not measured."""

    @property
    def whole_weights(self) -> FileRecord:
        """The weights file of a layer whose weights are not in parts."""
        assert self.weights is not None, self.name
        return self.weights

    @property
    def weights_files(self) -> tuple[FileRecord, ...]:
        """The weights: one file, or one of each rank that holds some."""
        if self.weights is not None:
            return (self.weights,)
        return tuple(part.weights for part in self.parts if part.weights is not None)

    @property
    def optimizer_files(self) -> tuple[FileRecord, ...]:
        """The optimizer state: none, one file, or one of each rank that holds some."""
        if self.optimizer is not None:
            return (self.optimizer,)
        return tuple(part.optimizer for part in self.parts if part.optimizer is not None)

    @property
    def plain_files(self) -> tuple[FileRecord, ...]:
        """Those that stock tools read."""
        return (*self.weights_files, *self.optimizer_files)

    @property
    def files(self) -> tuple[FileRecord, ...]:
        return self.plain_files if self.encoding is None else (*self.plain_files, self.encoding.codes)

    @property
    def nbytes(self) -> int:
        return sum(file.bytes for file in self.files)

    @property
    def state_step(self) -> int:
        """The step whose state a resume finds."""
        return self.step if self.encoding is None else self.encoding.step

    @property
    def state_update_count(self) -> int | None:
        """Of that state."""
        return self.update_count if self.encoding is None else self.encoding.update_count

    @property
    def has_exact_weights(self) -> bool:
        """True if the weights file holds weights that training once had, bit for bit."""
        return self.encoding is None or self.encoding.base != "rounded"

    def written_nbytes(self, step: int) -> int:
        """Bytes of the files that the save of a step wrote."""
        own = sum(file.bytes for file in self.plain_files) if self.step == step else 0
        return own + (self.encoding.codes.bytes if self.encoding is not None and self.encoding.step == step else 0)


class Parent(_Record):
    """The checkpoint before this one in the run."""

    step: Count
    digest: Digest


class World(_Record):
    """How the state was spread over ranks."""

    size: Annotated[int, Field(ge=1)]
    sharding: Literal["none", "sharded"]
    """``none``: every layer is in whole files, whoever wrote them. ``sharded``: some are in parts."""
    layout: Digest | None = None
    """Digest of how every tensor was cut: parts of checkpoints with another are cut elsewhere. None if none is."""


class Writer(_Record):
    """Who wrote the checkpoint."""

    llmtailor: str
    torch: str
    python: str
    host: str
    pid: int


class SaveRecord(_Record):
    """What the save cost until its layers were written."""

    stall_secs: Seconds
    """Time the training loop was held up."""
    capture_secs: Seconds
    """Until all was in host memory."""
    write_secs: Seconds
    """From then until all was handed to the disk."""
    pool_bytes: Count
    """The most host memory that was in use at a time."""


class Manifest(_Record):
    """A whole checkpoint, described."""

    format: Literal["llmtailor-checkpoint"] = "llmtailor-checkpoint"
    format_version: Literal[1] = 1
    run_id: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
    step: Count
    save_index: Count
    created: Annotated[str, Field(pattern=r"^[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}Z$")]
    parent: Parent | None
    contents: Literal["full", "weights"]
    strategy: Name
    world: World
    writer: Writer
    tensors: tuple[TensorRecord, ...]
    optimizers: tuple[OptimizerRecord, ...]
    layers: tuple[LayerRecord, ...]
    files: tuple[FileRecord, ...]
    save: SaveRecord | None = None
    """None in checkpoints of 0.1, and in those that no training saved."""

    @model_validator(mode="after")
    def _check_whole(self) -> Self:
        faults = find_faults(self)
        if faults:
            raise ValueError("; ".join(faults[:5]) + (f"; and {len(faults) - 5} more" if len(faults) > 5 else ""))
        return self

    @property
    def all_files(self) -> tuple[FileRecord, ...]:
        """Every file but the manifest: the layers' first, in model order."""
        return (*(file for layer in self.layers for file in layer.files), *self.files)

    @property
    def is_consistent(self) -> bool:
        """True if all layers were written at this checkpoint's step, exactly: training passed through this state."""
        return all(layer.step == self.step and layer.encoding is None for layer in self.layers)

    @property
    def is_current(self) -> bool:
        """True if every layer's state is of this checkpoint's step, be it exact or in codes."""
        return all(layer.state_step == self.step for layer in self.layers)

    @property
    def staleness(self) -> int:
        """Steps that the oldest state of a layer is behind the checkpoint."""
        return max((self.step - layer.state_step for layer in self.layers), default=0)

    @property
    def nbytes(self) -> int:
        """Size of all files; linked ones count in full."""
        return sum(file.bytes for file in self.all_files)

    @property
    def written_nbytes(self) -> int:
        """Bytes that this save wrote: layers and codes of its own step, and small files."""
        own = sum(layer.written_nbytes(self.step) for layer in self.layers)
        return own + sum(file.bytes for file in self.files)


def encode_manifest(manifest: Manifest) -> tuple[bytes, str]:
    """The manifest as it stands in ``tailor.json``, and its digest.

    One line per tensor, layer, group and file, so that people can read it and ``diff`` it.
    """
    fields = json.loads(manifest.model_dump_json(by_alias=True))
    # As in checkpoints of those who know of none.
    for layer in fields["layers"]:
        if layer["encoding"] is None:
            del layer["encoding"]
        if not layer["parts"]:
            del layer["parts"]
        if layer["share"] is None:
            del layer["share"]
    if fields["world"]["layout"] is None:
        del fields["world"]["layout"]
    body = "{\n" + ",\n".join(f"{json.dumps(key)}: {_encode_field(value)}" for key, value in fields.items())
    encoded = body.encode("ascii")
    digest = digest_of(encoded)
    return encoded + f',\n"digest": "{digest}"\n}}\n'.encode("ascii"), digest


def _encode_field(value: Any) -> str:
    if isinstance(value, list) and value:
        return "[\n  " + ",\n  ".join(json.dumps(item, allow_nan=False) for item in value) + "\n]"
    return json.dumps(value, allow_nan=False)


def decode_manifest(text: bytes, path: Path | str) -> tuple[Manifest, str]:
    """Check and parse the content of a ``tailor.json``.

    Args:
        text: The whole file.
        path: For the error.

    Returns:
        The manifest and its digest.

    Raises:
        IntegrityError: The text is not the text that was written (digest or trailer).
        FormatError: It is a version we do not know, or breaks the specification.
    """
    body, digest = _split_trailer(text, path)
    _check_version(parse_object(text, what="manifest", path=path), path)
    try:
        # JSON mode: strict about types, yet a JSON array is a tuple.
        return Manifest.model_validate_json(body + b"\n}"), digest
    except ValidationError as err:
        first = err.errors(include_url=False)[0]
        where = "$" + "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"])
        raise FormatError(
            f"the manifest breaks the specification at {where}: {first['msg']}",
            kind="manifest-schema",
            path=path,
            expected=f"version {FORMAT_VERSION} of the checkpoint format",
            found=ascii(first.get("input"))[:200] if first["loc"] else "see above",
            hint=_HINT,
        ) from err


def _split_trailer(text: bytes, path: Path | str) -> tuple[bytes, str]:
    """What the closing digest is of, and the digest, which is right."""
    trailer = _TRAILER.fullmatch(text, max(0, len(text) - _TRAILER_NBYTES))
    if trailer is None:
        raise IntegrityError(
            "the manifest is cut off or changed: its closing digest is missing",
            kind="manifest-trailer",
            path=path,
            expected='a last line "digest": "xxh3_128:..."',
            found=ascii(text[-60:].decode("utf-8", "replace")) if text else "an empty file",
            hint=_HINT,
        )
    body = text[: trailer.start()]
    expected, found = trailer.group(1).decode(), digest_of(body)
    if expected != found:
        raise IntegrityError(
            "the manifest was changed", kind="manifest-digest", path=path, expected=expected, found=found, hint=_HINT
        )
    return body, expected


def _check_version(fields: dict[str, Any], path: Path | str) -> None:
    """Both keys have defaults for who builds a manifest; in a file they must stand there."""
    if fields.get("format") != _FORMAT:
        raise FormatError(
            f"the manifest breaks the specification at $.format: it is not {_FORMAT!r}",
            kind="manifest-schema",
            path=path,
            expected=_FORMAT,
            found=ascii(fields.get("format"))[:200],
            hint=_HINT,
        )
    version = fields.get("format_version")
    if type(version) is not int or version != FORMAT_VERSION:
        raise FormatError(
            "the checkpoint has a format version this program does not know",
            kind="format-version",
            path=path,
            expected=FORMAT_VERSION,
            found=version,
            hint="upgrade llmtailor",
        )


_HINT = "llmtailor verify tells what is damaged; resume falls back to the newest checkpoint that verifies"
