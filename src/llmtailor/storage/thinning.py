"""A published checkpoint, replaced under its name by one that lacks some of its files.

    links and a new manifest, in staging, durable -- exchange --> in the run; the old one is in staging -- remove

Where the kernel or the file system knows no exchange of two names, two renames do it, the old one by way of

    _checkpoint-<step>.thinning

so that a writer who is killed in between leaves it where the next one finds it: ``settle`` gives it its name back, or
clears it away if the new one has that. At any instant a whole checkpoint of the step is there, the old or the new.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
from collections.abc import Callable, Iterable
from pathlib import Path

from ..manifest import FileRecord
from .filesystem import LocalFileSystem
from .staging import StagedCheckpoint, translate_os_errors

__all__ = ["aside_name", "find_asides", "replace_published", "settle"]

_ASIDE = re.compile(r"_(checkpoint-(?:0|[1-9][0-9]*))\.thinning")
_NO_EXCHANGE = frozenset({errno.EINVAL, errno.ENOSYS, errno.ENOTSUP})


def aside_name(checkpoint: Path) -> Path:
    """Where a checkpoint is while another takes its name, if that takes two renames."""
    return checkpoint.with_name(f"_{checkpoint.name}.thinning")


def find_asides(run: Path) -> list[Path]:
    """Checkpoints that are being replaced, or were when their writer died."""
    return [run / name for name in sorted(os.listdir(run)) if _ASIDE.fullmatch(name)]


def replace_published(
    filesystem: LocalFileSystem,
    staged: StagedCheckpoint,
    checkpoint: Path,
    files: Iterable[FileRecord],
    manifest: bytes,
) -> None:
    """Fill an attempt with links to some files of a published checkpoint, and let it take that one's place.

    Args:
        filesystem: What carries out the changes.
        staged: The attempt, empty.
        checkpoint: The one to replace.
        files: What stays of it.
        manifest: What the new one says about itself.

    Raises:
        NotFoundError, IntegrityError: A file that stays is not as it was published. Nothing was replaced.
        WriteError: The old one is there, or the new one.
    """
    try:
        for record in files:
            staged.link_file(record, checkpoint / record.path)
        staged.seal(manifest)
    except BaseException:
        staged.abandon()
        raise
    with translate_os_errors(f"replace {checkpoint.name}", checkpoint):
        try:
            _swap(filesystem, staged.path, checkpoint)
        except BaseException:
            with contextlib.suppress(OSError):
                _clear(filesystem, staged.attempt, checkpoint.parent)
            raise
        _clear(filesystem, staged.attempt, checkpoint.parent)


def _swap(filesystem: LocalFileSystem, new: Path, checkpoint: Path) -> None:
    """Exchange two directories. Each is whole and durable."""
    try:
        filesystem.exchange(new, checkpoint)
    except OSError as err:
        if err.errno not in _NO_EXCHANGE:
            raise
    else:
        return
    aside = aside_name(checkpoint)
    try:
        filesystem.rename(checkpoint, aside)
        filesystem.rename(new, checkpoint)
    except BaseException:
        with contextlib.suppress(OSError):  # its name is taken: the new one has it
            filesystem.rename(aside, checkpoint)
        raise
    filesystem.fsync_directory(checkpoint.parent)
    filesystem.rename(aside, new)


def _clear(filesystem: LocalFileSystem, attempt: Path, run: Path) -> None:
    """Remove what is left in staging, once it is durable that it has no other name."""
    filesystem.fsync_directory(run)
    filesystem.remove_tree(attempt)


def settle(filesystem: LocalFileSystem, run: Path, staging: Path, is_live: Callable[[str], bool]) -> None:
    """Put right what a writer left who was killed between two renames. Raises plain ``OSError``.

    Args:
        filesystem: What carries out the changes.
        run: The run, locked.
        staging: Where the next sweep removes things.
        is_live: True of a name that is in use by this process.
    """
    asides = [aside for aside in find_asides(run) if not is_live(aside.name)]
    if not asides:
        return
    # The name of what takes a checkpoint's place lasts before that one goes.
    filesystem.fsync_directory(run)
    for aside in asides:
        checkpoint = run / aside.name.removeprefix("_").removesuffix(".thinning")
        if os.path.lexists(checkpoint):
            filesystem.rename(aside, staging / f"thinned-{checkpoint.name}-{secrets.token_hex(8)}")
        else:
            filesystem.rename(aside, checkpoint)
    filesystem.fsync_directory(run)
