"""What lies in a run's directory: checkpoints, what was set aside, and which bytes they share.

Reads manifests, names and sizes; no file's content. ``verify`` is for that.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TypeAlias

from .errors import FormatError, NotFoundError
from .formats.manifest_file import read_manifest
from .manifest import MANIFEST_NAME, Manifest
from .storage import STAGING_NAME, CheckpointEntry, list_attempts, list_checkpoints, list_set_aside

__all__ = ["Inode", "Inventory", "RunEntry", "State", "StoredFile", "freed_nbytes", "measure_tree", "take_inventory"]

Inode: TypeAlias = tuple[int, int]
"""Device and number: files with the same one are the same bytes."""


class State(StrEnum):
    """What a directory in a run is."""

    WHOLE = "whole"
    """A checkpoint with a good manifest and every file it names, of the right size."""
    DAMAGED = "damaged"
    """A checkpoint of which that is not true."""
    FOREIGN = "no manifest"
    """Has the name of a checkpoint; another tool's, or half a checkpoint."""
    BAD = "bad"
    """Quarantined."""
    SUPERSEDED = "superseded"
    """Of an abandoned branch."""
    IN_FLIGHT = "in flight"
    """A save or removal under way, or cut off."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredFile:
    """A file as the file system knows it."""

    inode: Inode
    nbytes: int
    num_links: int
    """Names it has, anywhere on its file system."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunEntry:
    """A directory in a run."""

    path: Path
    step: int | None
    """None if it is in flight."""
    state: State
    detail: str | None
    """Why it is in that state; None if whole or not known."""
    manifest: Manifest | None
    """None if it has none that is good."""
    files: Mapping[str, StoredFile]
    """By path in the directory."""

    @property
    def nbytes(self) -> int:
        """Size of all files; linked ones count in full."""
        return sum(file.nbytes for file in self.files.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class Inventory:
    """A run."""

    path: Path
    checkpoints: tuple[RunEntry, ...]
    """Whole and damaged ones, oldest step first."""
    others: tuple[RunEntry, ...]
    """The rest, oldest step first, what is in flight last."""

    @property
    def entries(self) -> tuple[RunEntry, ...]:
        return (*self.checkpoints, *self.others)


def take_inventory(run: Path) -> Inventory:
    """Look through a run.

    Raises:
        NotFoundError: There is no such directory, it is a checkpoint itself, or it holds nothing of a run.
    """
    entries = list_checkpoints(run)
    ours = tuple(_take_checkpoint(entry) for entry in entries if entry.has_manifest)
    foreign = [
        _entry(entry.path, entry.step, State.FOREIGN, "another tool's, or half a checkpoint; left alone")
        for entry in entries
        if not entry.has_manifest
    ]
    set_aside = [_entry(each.path, each.step, State(each.kind), each.reason) for each in list_set_aside(run)]
    attempts = [_entry(path, None, State.IN_FLIGHT, None) for path in list_attempts(run)]
    others = sorted([*foreign, *set_aside], key=lambda entry: (entry.step or 0, entry.path.name))
    inventory = Inventory(path=run, checkpoints=ours, others=(*others, *attempts))
    if not inventory.entries:
        _refuse_stranger(run)
    return inventory


def _take_checkpoint(entry: CheckpointEntry) -> RunEntry:
    try:
        manifest, _ = read_manifest(entry.path)
    except (FormatError, NotFoundError) as err:
        return _entry(entry.path, entry.step, State.DAMAGED, err.what)
    files = measure_tree(entry.path)
    detail = _find_damage(manifest, entry.step, files)
    return RunEntry(
        path=entry.path,
        step=entry.step,
        state=State.WHOLE if detail is None else State.DAMAGED,
        detail=detail,
        manifest=manifest,
        files=files,
    )


def _entry(path: Path, step: int | None, state: State, detail: str | None) -> RunEntry:
    return RunEntry(path=path, step=step, state=state, detail=detail, manifest=None, files=measure_tree(path))


def _find_damage(manifest: Manifest, step: int, files: Mapping[str, StoredFile]) -> str | None:
    """What names and sizes give away."""
    if manifest.step != step:
        return f"its manifest is of step {manifest.step}"
    for fault, paths in (
        ("missing", [record.path for record in manifest.all_files if record.path not in files]),
        (
            "of another size",
            [each.path for each in manifest.all_files if each.path in files and files[each.path].nbytes != each.bytes],
        ),
    ):
        if paths:
            return f"{fault}: {', '.join(paths[:3])}{f' and {len(paths) - 3} more' if len(paths) > 3 else ''}"
    return None


def measure_tree(root: Path) -> dict[str, StoredFile]:
    """All regular files below a directory; links to elsewhere are not followed. What vanishes meanwhile is left out."""
    return dict(_measure(root, ""))


def _measure(directory: Path, prefix: str) -> Iterator[tuple[str, StoredFile]]:
    try:
        with os.scandir(directory) as scan:
            found = sorted(scan, key=lambda each: each.name)
    except (FileNotFoundError, NotADirectoryError):
        return
    for each in found:
        if each.is_dir(follow_symlinks=False):
            yield from _measure(directory / each.name, f"{prefix}{each.name}/")
        elif each.is_file(follow_symlinks=False):
            try:
                status = each.stat(follow_symlinks=False)
            except FileNotFoundError:
                continue
            stored = StoredFile(inode=(status.st_dev, status.st_ino), nbytes=status.st_size, num_links=status.st_nlink)
            yield f"{prefix}{each.name}", stored


def freed_nbytes(doomed: Iterable[RunEntry]) -> int:
    """Bytes that go when directories are removed: those of files whose every name is in them."""
    files = [file for entry in doomed for file in entry.files.values()]
    names = Counter(file.inode for file in files)
    sizes = {file.inode: file.nbytes for file in files if names[file.inode] >= file.num_links}
    return sum(sizes.values())


def _refuse_stranger(path: Path) -> None:
    """Say what a directory without checkpoints is, unless it is a run that has not saved yet."""
    if (path / MANIFEST_NAME).exists():
        raise NotFoundError(
            "this is a checkpoint, not a run",
            kind="not-a-run",
            path=path,
            expected="a directory that holds checkpoint-<step>",
            found="a checkpoint",
            hint=f"llmtailor show {path}, or llmtailor ls {path.resolve().parent}",
        )
    if (path / STAGING_NAME).is_dir():
        return
    below = [name for name in sorted(os.listdir(path)) if (path / name).is_dir()]
    runs = [name for name in below if list_checkpoints(path / name)]
    raise NotFoundError(
        "not a run: it holds no checkpoint",
        kind="not-a-run",
        path=path,
        expected="a directory that holds checkpoint-<step>",
        found=", ".join([*below[:5], *(["..."] if len(below) > 5 else [])]) or "no directories",
        hint=f"llmtailor ls {path / runs[0]}" if runs else "give the directory the trainer saves to",
    )
