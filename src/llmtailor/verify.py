"""Is a checkpoint what it was when it was published? Reads every byte; needs neither the model nor torch."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, MutableMapping
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import TypeAlias

import xxhash

from .errors import FormatError, IntegrityError, NotFoundError
from .formats.safetensors import Header, OpenFile, open_file
from .formats.source_files import open_source
from .formats.tailored import read_manifest
from .manifest import MANIFEST_NAME, FileRecord, LayerRecord, Manifest, TensorRecord, digest_of

__all__ = [
    "FileState",
    "Problem",
    "VerifyReport",
    "check_weights_header",
    "open_verified",
    "verify_checkpoint",
]

FileState: TypeAlias = tuple[int, int, int, int]
"""Device, inode, size and time of change: while these stay, so do the bytes."""

_CHUNK_NBYTES = 8 * 2**20
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


def open_verified(checkpoint: Path, record: FileRecord) -> OpenFile:
    """Open a layer file whose bytes are the published ones.

    Raises:
        IntegrityError: Another size or digest.
        NotFoundError: It is gone.
        FormatError: It is not a regular safetensors file.
    """
    path = checkpoint / record.path
    opened = open_file(path)
    if opened.buffer.nbytes != record.bytes:
        raise IntegrityError(
            "the file has another size", kind="file-size", path=path, expected=record.bytes, found=opened.buffer.nbytes
        )
    found = digest_of(opened.buffer)
    if found != record.digest:
        raise IntegrityError("the file's bytes changed", kind="digest", path=path, expected=record.digest, found=found)
    return opened


def verify_checkpoint(
    checkpoint: Path,
    *,
    on_file: Callable[[FileRecord], None] = lambda record: None,
    digests: MutableMapping[FileState, str] | None = None,
) -> VerifyReport:
    """Check every file of a checkpoint against its manifest, and every layer file against the model schema.

    All problems are collected. A failing device (``EIO``) is raised as it is: it says nothing about the checkpoint.

    Args:
        checkpoint: The directory.
        on_file: Called before each file is read, for a progress bar.
        digests: Of files read before, filled as more are read: pass the same one for several checkpoints of a run, and
            a file that they share is read once.

    Raises:
        NotFoundError: There is no checkpoint.
    """
    try:
        manifest, _ = read_manifest(checkpoint)
    except FormatError as err:
        problem = _problem_of(MANIFEST_NAME, None, err)
        return VerifyReport(path=str(checkpoint), step=None, num_files=1, nbytes=0, problems=(problem,), unlisted=())
    problems = list(_verify_name(checkpoint, manifest))
    nbytes = 0
    for layer, record in _files_by_layer(manifest):
        on_file(record)
        try:
            _verify_file(checkpoint, record, {} if digests is None else digests)
            if layer is not None:
                _verify_header(checkpoint, manifest, layer, record)
        except (FormatError, NotFoundError) as err:
            problems.append(_problem_of(record.path, None if layer is None else layer.name, err))
        nbytes += record.bytes
    return VerifyReport(
        path=str(checkpoint),
        step=manifest.step,
        num_files=1 + len(manifest.all_files),
        nbytes=nbytes,
        problems=tuple(problems),
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


def _verify_file(checkpoint: Path, record: FileRecord, digests: MutableMapping[FileState, str]) -> None:
    path = checkpoint / record.path
    try:
        file = os.fdopen(open_source(path), "rb", buffering=0)
    except (FileNotFoundError, NotADirectoryError) as err:
        raise NotFoundError("the file is missing", kind="missing-file", path=path) from err
    with file:
        status = os.fstat(file.fileno())
        if status.st_size != record.bytes:
            raise IntegrityError(
                "the file has another size", kind="file-size", path=path, expected=record.bytes, found=status.st_size
            )
        state = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
        found = digests.get(state) or _digest_file(file, status.st_size)
    digests[state] = found
    if found != record.digest:
        raise IntegrityError("the file's bytes changed", kind="digest", path=path, expected=record.digest, found=found)


def _digest_file(file: FileIO, nbytes: int) -> str:
    digest, buffer = xxhash.xxh3_128(), memoryview(bytearray(min(_CHUNK_NBYTES, max(1, nbytes))))
    while count := file.readinto(buffer):
        digest.update(buffer[:count])
    return f"xxh3_128:{digest.hexdigest()}"


def _verify_header(checkpoint: Path, manifest: Manifest, layer: LayerRecord, record: FileRecord) -> None:
    """A layer file holds what the schema says: a writer's mistake is found here, not at resume."""
    if record is layer.weights:
        check_weights_header(checkpoint, manifest, layer)
    else:
        tensors = {tensor.fqn: tensor for tensor in manifest.tensors if tensor.layer == layer.name}
        _check_state_names(checkpoint / record.path, tensors, open_file(checkpoint / record.path).header)


def check_weights_header(checkpoint: Path, manifest: Manifest, layer: LayerRecord) -> None:
    """Raise unless a weights file holds exactly the tensors of its layer; reads its header alone.

    Raises:
        NotFoundError: It is gone.
        FormatError: It is no regular safetensors file, or a tensor is missing, too many, or of another type or shape.
    """
    path = checkpoint / layer.weights.path
    of_layer = (tensor for tensor in manifest.tensors if tensor.layer == layer.name and tensor.tied_to is None)
    expected = {tensor.fqn: str(tensor.meta) for tensor in of_layer}
    found = {name: str(tensor.meta) for name, tensor in open_file(path).header.tensors.items()}
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


def _check_state_names(path: Path, tensors: dict[str, TensorRecord], header: Header) -> None:
    prefixes = tuple(f"{_OPTIMIZER_PREFIX}{fqn}." for fqn in tensors)
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
