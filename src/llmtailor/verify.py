"""Is a checkpoint what it was when it was published? Reads every byte; needs neither the model nor torch."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from .codecs import StoredCodes, array_name
from .errors import FormatError, IntegrityError, NotFoundError
from .formats.safetensors import Header, read_header
from .formats.source_files import open_source
from .formats.tailored import (
    LayerCodes,
    check_packed,
    check_state_base,
    read_codes_header,
    read_manifest,
    read_packed,
    state_metas,
    weights_metas,
)
from .manifest import MANIFEST_NAME, FileRecord, LayerRecord, Manifest
from .storage import FileReader, read_files
from .tensors import ByteRange

__all__ = [
    "FileState",
    "Problem",
    "VerifyReport",
    "changed_bytes",
    "check_layer_header",
    "open_published",
    "verify_checkpoint",
]

FileState: TypeAlias = tuple[int, int, int, int]
"""Device, inode, size and time of change: while these stay, so do the bytes."""

_OPTIMIZER_PREFIX = "state."


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One thing that is wrong with a checkpoint."""

    path: str
    """File, relative to the checkpoint."""
    layer: str | None
    kind: str
    """``missing-file``, ``file-size``, ``digest``, ``not-regular``, or a kind of ``FormatError``."""
    detail: str
    expected: str | None
    found: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyReport:
    """What ``verify_checkpoint`` saw."""

    path: str
    step: int | None
    """None if the manifest itself is bad."""
    num_files: int
    nbytes: int
    """Bytes checked."""
    problems: tuple[Problem, ...]
    unlisted: tuple[str, ...]
    """Files the manifest does not name; they are not part of the checkpoint."""

    @property
    def is_good(self) -> bool:
        return not self.problems

    def raise_if_bad(self) -> None:
        """Raise one IntegrityError that lists all problems."""
        if self.problems:
            first = self.problems[0]
            rest = "".join(f"\n            {problem.path}: {problem.detail}" for problem in self.problems[1:10])
            raise IntegrityError(
                f"the checkpoint does not verify: {len(self.problems)} of {self.num_files} files",
                kind=first.kind,
                path=self.path,
                layer=first.layer,
                expected=first.expected,
                found=f"{first.path}: {first.detail}{f' ({first.found})' if first.found else ''}{rest}",
                hint="resume from an older checkpoint; keep this one for llmtailor verify",
            )


@contextmanager
def open_published(checkpoint: Path, record: FileRecord) -> Iterator[int]:
    """A file of a checkpoint, open for reading, that has the published size.

    Raises:
        IntegrityError: It has another size.
        NotFoundError: It is gone.
        FormatError: It is not a regular file.
    """
    path = checkpoint / record.path
    try:
        descriptor = open_source(path)
    except NotFoundError as err:
        raise NotFoundError("the file is missing", kind="missing-file", path=path) from err
    try:
        nbytes = os.fstat(descriptor).st_size
        if nbytes != record.bytes:
            raise IntegrityError(
                "the file has another size", kind="file-size", path=path, expected=record.bytes, found=nbytes
            )
        yield descriptor
    finally:
        os.close(descriptor)


def changed_bytes(path: Path, expected: str, found: str) -> IntegrityError:
    """The error for a file with another digest than was published."""
    return IntegrityError("the file's bytes changed", kind="digest", path=path, expected=expected, found=found)


def verify_checkpoint(
    checkpoint: Path,
    *,
    on_file: Callable[[FileRecord], None] = lambda record: None,
    digests: MutableMapping[FileState, str] | None = None,
    has_layers: bool = True,
) -> VerifyReport:
    """Check every file of a checkpoint against its manifest, and every layer file against the model schema.

    Several files are read at a time. All problems are collected. A failing device (``EIO``) is raised as it is: it
    says nothing about the checkpoint.

    Args:
        checkpoint: The directory.
        on_file: Called before each file is read, for a progress bar; by one thread at a time.
        digests: Of files read before, filled as more are read: pass the same one for several checkpoints of a run, and
            a file that they share is read once.
        has_layers: False leaves the layer files to whoever loads them, and checks the others alone.

    Raises:
        NotFoundError: There is no checkpoint.
    """
    try:
        manifest, _ = read_manifest(checkpoint)
    except FormatError as err:
        problem = _problem_of(MANIFEST_NAME, None, err)
        return VerifyReport(path=str(checkpoint), step=None, num_files=1, nbytes=0, problems=(problem,), unlisted=())
    cache = {} if digests is None else digests
    files = [each for each in _files_by_layer(manifest) if has_layers or each[0] is None]

    def verify(file: tuple[LayerRecord | None, FileRecord], reader: FileReader) -> Problem | None:
        layer, record = file
        try:
            _verify_file(checkpoint, manifest, layer, record, cache, reader)
        except (FormatError, NotFoundError) as err:
            return _problem_of(record.path, None if layer is None else layer.name, err)
        return None

    found = read_files(files, lambda file: file[1].bytes, verify, on_begin=lambda file: on_file(file[1]))
    return VerifyReport(
        path=str(checkpoint),
        step=manifest.step,
        num_files=1 + len(files),
        nbytes=sum(record.bytes for _, record in files),
        problems=(*_verify_name(checkpoint, manifest), *(problem for problem in found if problem is not None)),
        unlisted=tuple(_unlisted(checkpoint, manifest)),
    )


def _files_by_layer(manifest: Manifest) -> Iterator[tuple[LayerRecord | None, FileRecord]]:
    for layer in manifest.layers:
        yield from ((layer, record) for record in layer.files)
    yield from ((None, record) for record in manifest.files)


def _problem_of(path: str, layer: str | None, err: FormatError | NotFoundError) -> Problem:
    expected, found = (None if value is None else str(value) for value in (err.expected, err.found))
    return Problem(path=path, layer=layer, kind=err.kind, detail=err.what, expected=expected, found=found)


def _verify_name(checkpoint: Path, manifest: Manifest) -> Iterator[Problem]:
    name = checkpoint.resolve().name
    number = name.removeprefix("checkpoint-")
    if name.startswith("checkpoint-") and number.isdecimal() and int(number) != manifest.step:
        yield Problem(
            path=MANIFEST_NAME,
            layer=None,
            kind="wrong-step",
            detail="the manifest is of another step than the directory",
            expected=number,
            found=str(manifest.step),
        )


def _verify_file(
    checkpoint: Path,
    manifest: Manifest,
    layer: LayerRecord | None,
    record: FileRecord,
    digests: MutableMapping[FileState, str],
    reader: FileReader,
) -> None:
    path = checkpoint / record.path
    with open_published(checkpoint, record) as descriptor:
        status = os.fstat(descriptor)
        state = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
        found = digests.get(state) or reader.digest(descriptor, status.st_size, path)
        digests[state] = found
        if found != record.digest:
            raise changed_bytes(path, record.digest, found)
        if layer is None:
            return
        # A writer's mistake is found here, not at resume.
        header = read_header(descriptor, path)[0]
        if layer.encoding is not None and record is layer.encoding.codes:
            codes = read_codes_header(path, header, manifest, layer)
            _check_codes(descriptor, path, header, {**codes.weights, **codes.states}, layer)
            if layer.optimizer is not None and codes.is_relative_to_state:
                _check_state_base(checkpoint, layer, layer.optimizer, codes)
        else:
            check_layer_header(path, manifest, layer, record, header, _read_codes(checkpoint, manifest, layer))
            if record is layer.optimizer:
                _check_codes(descriptor, path, header, read_packed(path, header), layer)


def _read_codes(checkpoint: Path, manifest: Manifest, layer: LayerRecord) -> LayerCodes | None:
    """What a layer's codes file says it holds, where that says what its weights file must hold."""
    if layer.encoding is None or layer.has_exact_weights:
        return None
    path = checkpoint / layer.encoding.codes.path
    with open_published(checkpoint, layer.encoding.codes) as descriptor:
        return read_codes_header(path, read_header(descriptor, path)[0], manifest, layer)


def _check_state_base(checkpoint: Path, layer: LayerRecord, record: FileRecord, codes: LayerCodes) -> None:
    path = checkpoint / record.path
    with open_published(checkpoint, record) as descriptor:
        header = read_header(descriptor, path)[0]
    check_state_base(path, layer, codes, state_metas(header, read_packed(path, header)))


def _check_codes(
    descriptor: int, path: Path, header: Header, codes: Mapping[str, StoredCodes], layer: LayerRecord
) -> None:
    """Decode all codes of a file, one tensor at a time; what they are relative to does not matter here.

    Raises:
        FormatError: Some cannot be decoded.
    """
    coded = {key: stored for key, stored in codes.items() if stored.codec != "exact"}
    if not coded:
        return
    from .codecs.decoding import decode_tensor  # numpy is not needed for checkpoints without codes

    for key, stored in coded.items():
        ranges = {name: header.tensors[array_name(key, name)].byte_range for name in stored.array_names}
        arrays = {name: memoryview(_pread(descriptor, path, each)) for name, each in ranges.items()}
        try:
            decode_tensor(stored, arrays, None, memoryview(bytearray(stored.meta.nbytes)))
        except ValueError as err:
            raise FormatError(
                f"codes cannot be decoded: {err}", kind="codes", path=path, layer=layer.name, fqn=key
            ) from err


def _pread(descriptor: int, path: Path, byte_range: ByteRange) -> bytes:
    data = bytearray()
    while len(data) < byte_range.nbytes:
        more = os.pread(descriptor, byte_range.nbytes - len(data), byte_range.start + len(data))
        if not more:
            raise IntegrityError("the file became shorter while it was read", kind="file-size", path=path)
        data += more
    return bytes(data)


def check_layer_header(
    path: Path,
    manifest: Manifest,
    layer: LayerRecord,
    record: FileRecord,
    header: Header,
    codes: LayerCodes | None = None,
) -> None:
    """Raise unless a layer's weights or optimizer file holds what the schema says.

    Args:
        path: For the error.
        manifest: Of the checkpoint.
        layer: Whose file it is.
        record: One of ``layer.plain_files``.
        header: Of the file.
        codes: Of the layer; needed where the weights file is rounded, or codes are relative to the optimizer file.

    Raises:
        FormatError: A tensor of the weights is missing, too many, or of another type or shape; there is optimizer
            state of another layer's parameter; or none that codes are relative to.
    """
    of_layer = [tensor for tensor in manifest.tensors if tensor.layer == layer.name]
    if record is layer.weights:
        expected = {fqn: str(meta) for fqn, meta in weights_metas(manifest, layer, codes).items()}
        _check_tensors(path, expected, {name: str(stored.meta) for name, stored in header.tensors.items()})
    else:
        _check_state_names(path, [tensor.fqn for tensor in of_layer], header)
        packed = read_packed(path, header)
        check_packed(path, manifest, layer, packed)
        if codes is not None:
            check_state_base(path, layer, codes, state_metas(header, packed))


def _check_tensors(path: Path, expected: dict[str, str], found: dict[str, str]) -> None:
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise FormatError(
                "the file does not hold the layer's tensors",
                kind="schema",
                path=path,
                fqn=name,
                expected=expected.get(name, "no such tensor"),
                found=found.get(name, "no such tensor"),
            )


def _check_state_names(path: Path, fqns: list[str], header: Header) -> None:
    prefixes = tuple(f"{_OPTIMIZER_PREFIX}{fqn}." for fqn in fqns)
    for name in header.tensors:
        if not name.startswith(prefixes):
            raise FormatError(
                "the file holds optimizer state of a parameter of another layer", kind="schema", path=path, fqn=name
            )


def _unlisted(checkpoint: Path, manifest: Manifest) -> Iterator[str]:
    listed = {record.path for record in manifest.all_files} | {MANIFEST_NAME}
    for directory, _, files in os.walk(checkpoint):
        for file in sorted(files):
            name = (Path(directory) / file).relative_to(checkpoint).as_posix()
            if name not in listed:
                yield name
