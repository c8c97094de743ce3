"""The manifest of a checkpoint of our own, read; by commands that list runs too, which is why it needs nothing else."""

from __future__ import annotations

import os
from pathlib import Path

from ..errors import FormatError, NotFoundError
from ..manifest import MANIFEST_NAME, Manifest, decode_manifest
from .source_files import open_source

__all__ = ["read_manifest"]

# A manifest has some 200 bytes a tensor; this is a million tensors.
_MAX_MANIFEST_NBYTES = 256 * 2**20


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
