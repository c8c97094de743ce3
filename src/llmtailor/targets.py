"""What a path that the user gives stands for: a checkpoint, or a run and its checkpoints."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from .errors import NotFoundError
from .manifest import MANIFEST_NAME
from .storage import list_checkpoints

__all__ = ["find_checkpoints", "find_passed_over", "newest_checkpoint"]

_EXPECTED = f"a directory with a {MANIFEST_NAME}, or one that holds such directories checkpoint-<step>"


def newest_checkpoint(path: Path) -> Path:
    """The checkpoint itself, or the newest of a run.

    Raises:
        NotFoundError: It is neither.
    """
    return _checkpoints_at(path)[-1]


def find_checkpoints(paths: Iterable[Path]) -> list[Path]:
    """Every checkpoint meant by the paths, each once; a run stands for all of its own, oldest first.

    Raises:
        NotFoundError: A path is neither a checkpoint nor a run that has one.
    """
    found: dict[Path, Path] = {}
    for path in paths:
        for checkpoint in _checkpoints_at(path):
            found.setdefault(checkpoint.resolve(), checkpoint)
    return list(found.values())


def find_passed_over(paths: Iterable[Path]) -> list[Path]:
    """What has the name of a checkpoint in the runs meant by the paths and no manifest, so that it is not found.

    Raises:
        NotFoundError: A path is not a directory.
    """
    runs = {path.resolve(): path for path in paths if not os.path.lexists(path / MANIFEST_NAME)}
    return [entry.path for run in runs.values() for entry in list_checkpoints(run) if not entry.has_manifest]


def _checkpoints_at(path: Path) -> Sequence[Path]:
    if os.path.lexists(path / MANIFEST_NAME):
        return [path]
    if not path.is_dir():
        raise NotFoundError(
            "no such checkpoint or run",
            kind="missing-path",
            path=path,
            expected=_EXPECTED,
            found="a file" if path.exists() else "nothing",
            hint="check the path; llmtailor ls <run> lists the checkpoints of a run",
        )
    checkpoints = [entry.path for entry in list_checkpoints(path) if entry.has_manifest]
    if not checkpoints:
        names = sorted(os.listdir(path))
        raise NotFoundError(
            f"neither a checkpoint of LLMTailor nor a run that has one: no {MANIFEST_NAME}",
            kind="missing-manifest",
            path=path,
            expected=_EXPECTED,
            found=", ".join([*names[:6], *(["..."] if len(names) > 6 else [])]) or "an empty directory",
            hint="if it is half a checkpoint, copy it again as a whole; llmtailor ls <run> lists those of a run",
        )
    return checkpoints
