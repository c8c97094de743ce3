"""Is a checkpoint what it was when it was published? Reads every byte; needs neither the model nor torch."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from .codecs import StoredCodes, array_name
from .errors import FormatError, IntegrityError, NotFoundError
from .formats.manifest_file import read_manifest
from .formats.safetensors import Header, read_header
from .formats.source_files import open_source
from .formats.tailored import (
    Kind,
    LayerCodes,
    LayerFile,
    check_names,
    check_packed,
    check_part,
    check_state_base,
    join_files,
    join_notes,
    open_layer_file,
    read_codes_header,
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One thing that is wrong with a checkpoint."""

    path: str
    """File, relative to the checkpoint; of what is wrong with several files of a layer together, the first of them."""
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
    checkpoint: str | Path,
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
    checkpoint = Path(checkpoint)
    try:
        manifest, _ = read_manifest(checkpoint)
    except FormatError as err:
        problem = _problem_of(MANIFEST_NAME, None, err)
        return VerifyReport(path=str(checkpoint), step=None, num_files=1, nbytes=0, problems=(problem,), unlisted=())
    verifier = _Verifier(checkpoint, manifest, {} if digests is None else digests)
    files = [each for each in _list_files(manifest) if has_layers or each.layer is None]
    found = read_files(
        files, lambda file: file.record.bytes, verifier.verify, on_begin=lambda file: on_file(file.record)
    )
    problems = [problem for problem in found if problem is not None]
    return VerifyReport(
        path=str(checkpoint),
        step=manifest.step,
        num_files=1 + len(files),
        nbytes=sum(file.record.bytes for file in files),
        problems=(*_verify_name(checkpoint, manifest), *problems, *verifier.verify_parts(problems)),
        unlisted=tuple(_unlisted(checkpoint, manifest)),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _File:
    """A file to verify."""

    record: FileRecord
    layer: LayerRecord | None = None
    """None for a small file."""
    kind: Kind | Literal["codes"] | None = None
    """What of its layer it holds."""


def _list_files(manifest: Manifest) -> Iterator[_File]:
    for layer in manifest.layers:
        yield from (_File(record=record, layer=layer, kind="weights") for record in layer.weights_files)
        yield from (_File(record=record, layer=layer, kind="optimizer") for record in layer.optimizer_files)
        if layer.encoding is not None:
            yield _File(record=layer.encoding.codes, layer=layer, kind="codes")
    yield from (_File(record=record) for record in manifest.files)


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


class _Verifier:
    """Verifies the files of one checkpoint, several at a time, and then what those of a layer are together.

    Args:
        checkpoint: The directory.
        manifest: Of it.
        digests: See ``verify_checkpoint``.
    """

    def __init__(self, checkpoint: Path, manifest: Manifest, digests: MutableMapping[FileState, str]) -> None:
        self._checkpoint = checkpoint
        self._manifest = manifest
        self._digests = digests
        self._parts: dict[str, LayerFile] = {}
        """By path: files that are parts of a layer, and good by themselves."""

    def verify(self, file: _File, reader: FileReader) -> Problem | None:
        """What is wrong with a file."""
        try:
            self._verify_file(file, reader)
        except (FormatError, NotFoundError) as err:
            return _problem_of(file.record.path, None if file.layer is None else file.layer.name, err)
        return None

    def verify_parts(self, problems: Sequence[Problem]) -> Iterator[Problem]:
        """What is wrong with layers in parts of which every file is good.

        Args:
            problems: Of the files.
        """
        bad = {problem.path for problem in problems}
        for layer in self._manifest.layers if self._parts else ():
            expected = weights_metas(self._manifest, layer, None) if layer.parts else {}
            for whole, records, metas in (
                (layer.weights, layer.weights_files, expected),
                (layer.optimizer, layer.optimizer_files, None),
            ):
                if whole is not None or not records or not bad.isdisjoint(record.path for record in records):
                    continue
                files = [self._parts[record.path] for record in records]
                try:
                    join_files(self._checkpoint, layer, files, metas)
                    join_notes(files)
                except FormatError as err:
                    yield _problem_of(records[0].path, layer.name, err)

    def _verify_file(self, file: _File, reader: FileReader) -> None:
        layer, record = file.layer, file.record
        path = self._checkpoint / record.path
        with open_published(self._checkpoint, record) as descriptor:
            status = os.fstat(descriptor)
            state = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
            found = self._digests.get(state) or reader.digest(descriptor, status.st_size, path)
            self._digests[state] = found
            if found != record.digest:
                raise changed_bytes(path, record.digest, found)
            if layer is None or file.kind is None:
                return
            # A writer's mistake is found here, not at resume.
            header = read_header(descriptor, path)[0]
            if file.kind == "codes":
                self._verify_codes(descriptor, path, header, layer)
                return
            codes = _read_codes(self._checkpoint, self._manifest, layer)
            checked = check_layer_header(path, self._manifest, layer, file.kind, header, codes)
            if _is_part(layer, file.kind):
                self._parts[record.path] = checked
            elif file.kind == "optimizer":
                _check_codes(descriptor, path, header, read_packed(path, header), layer)

    def _verify_codes(self, descriptor: int, path: Path, header: Header, layer: LayerRecord) -> None:
        codes = read_codes_header(path, header, self._manifest, layer)
        _check_codes(descriptor, path, header, {**codes.weights, **codes.states}, layer)
        if layer.optimizer is not None and codes.is_relative_to_state:
            _check_state_base(self._checkpoint, layer, layer.optimizer, codes)


def _is_part(layer: LayerRecord, kind: Kind) -> bool:
    return (layer.weights if kind == "weights" else layer.optimizer) is None


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
    kind: Kind,
    header: Header,
    codes: LayerCodes | None = None,
) -> LayerFile:
    """Raise unless a layer's weights or optimizer file holds what the schema says.

    Args:
        path: For the error.
        manifest: Of the checkpoint.
        layer: Whose file it is.
        kind: Which of them; a rank's part of the layer if it has no whole file of that kind.
        header: Of the file.
        codes: Of the layer; needed where the weights file is rounded, or codes are relative to the optimizer file.

    Returns:
        What the file holds.

    Raises:
        FormatError: A tensor of the weights is too many, or of another type or shape, or missing in a whole file;
            there is optimizer state of another layer's parameter; or none that codes are relative to.
    """
    is_part = _is_part(layer, kind)
    file = open_layer_file(path, header, is_part=is_part)
    if is_part:
        check_part(file, manifest, layer, kind)
    elif kind == "weights":
        expected = {fqn: str(meta) for fqn, meta in weights_metas(manifest, layer, codes).items()}
        _check_tensors(path, expected, {name: str(stored.meta) for name, stored in header.tensors.items()})
    else:
        check_names(path, header, {tensor.fqn: tensor for tensor in manifest.tensors if tensor.layer == layer.name})
        packed = read_packed(path, header)
        check_packed(path, manifest, layer, packed)
        if codes is not None:
            check_state_base(path, layer, codes, state_metas(header, packed))
    return file


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


def _unlisted(checkpoint: Path, manifest: Manifest) -> Iterator[str]:
    listed = {record.path for record in manifest.all_files} | {MANIFEST_NAME}
    for directory, _, files in os.walk(checkpoint):
        for file in sorted(files):
            name = (Path(directory) / file).relative_to(checkpoint).as_posix()
            if name not in listed:
                yield name
