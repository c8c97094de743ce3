"""Names of the framework's own for checkpoints of a run: ``epoch=1-step=8.ckpt`` is a link to ``checkpoint-8``.

A framework names a checkpoint when it asks for a save, decides by names what is to be removed, and knows of no save
that is still under way. So

    a name comes to be, or changes, when its checkpoint is published: until then ``last.ckpt`` leads to the one before
    a name goes when the saves asked for before are published; if one of them fails, it stays, and so does what it names
    a checkpoint without a name is what retention removes, after the next publish: names say which steps are pinned

A link, and not a small file that says where: whoever looks whether the name is there, how old it is or what is in it
gets the answer for the checkpoint, and gets none as long as there is none.

Called by one thread, on the process that writes names; on the others it does nothing.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import AlreadyExistsError, InvalidInputError
from ..storage import checkpoint_name
from ..writer import SaveHandle

__all__ = ["CheckpointNames"]

logger = logging.getLogger(__name__)

_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


@dataclass(slots=True)
class _Pending:
    """A save, and what is to happen to names when it has ended."""

    handle: SaveHandle
    to_link: list[Path] = field(default_factory=list)
    to_remove: list[Path] = field(default_factory=list)


class CheckpointNames:
    """The names of one run.

    Args:
        run: Its directory.
        is_writer: Whether this process writes names.
    """

    def __init__(self, run: Path, *, is_writer: bool) -> None:
        self._run = run.resolve()
        self._is_writer = is_writer
        self._pending: list[_Pending] = []
        self._made: set[Path] = set()
        """By this object."""

    def covers(self, path: str | Path) -> bool:
        """Whether a checkpoint by this path would be one of the run."""
        return "://" not in str(path) and self._run in _place(Path(path)).parents

    def check(self, path: Path) -> Path:
        """The place of a name, if it may be one.

        Raises:
            InvalidInputError: It is not in the run's directory, or named as our own directories are.
            AlreadyExistsError: There is a directory by that name.
        """
        place = _place(path)
        if not self.covers(path):
            raise InvalidInputError(
                "a checkpoint's name has to be in the run's directory",
                kind="checkpoint-name",
                path=path,
                expected=f"a name in {self._run}",
                found=str(place),
                hint="give every ModelCheckpoint the same dirpath, or TailorCallback the directory",
            )
        inside = place.parts[len(self._run.parts)]
        if inside.startswith("_") or _CHECKPOINT.fullmatch(inside):
            raise InvalidInputError(
                "a checkpoint cannot have this name",
                kind="checkpoint-name",
                path=path,
                expected="any but checkpoint-<number> and _*",
                found=inside,
            )
        if place.is_dir() and not place.is_symlink():
            raise AlreadyExistsError(
                "a directory has this checkpoint's name", kind="exists", path=path, hint="move it away"
            )
        return place

    def add(self, handle: SaveHandle, path: Path) -> None:
        """Name a save's checkpoint, once it is published."""
        if not self._is_writer:
            return
        if not self._pending or self._pending[-1].handle is not handle:
            self._pending.append(_Pending(handle))
        self._pending[-1].to_link.append(self.check(path))
        self.settle()

    def link(self, step: int, path: Path) -> None:
        """Name a checkpoint that is there."""
        if self._is_writer:
            self._link(step, self.check(path))

    def remove(self, path: Path) -> None:
        """Forget a name, once the saves asked for before are published."""
        if not self._is_writer:
            return
        if self._pending:
            self._pending[-1].to_remove.append(_place(path))
        else:
            self._unlink(_place(path))

    def is_promised(self, path: str | Path) -> bool:
        """Whether a save that is under way will have this name."""
        return any(_place(Path(path)) in each.to_link for each in self._pending)

    def settle(self) -> None:
        """Do what is due for saves that have ended."""
        while self._pending and self._pending[0].handle.has_ended:
            ended = self._pending.pop(0)
            if ended.handle.path is None:
                # What it was to replace stays, for whoever asked for its removal took the save for done.
                continue
            if not self._made:
                self._drop_stale(ended.handle.step)
            for path in ended.to_link:
                self._link(ended.handle.step, path)
            for path in ended.to_remove:
                self._unlink(path)

    def steps(self) -> set[int]:
        """Of the checkpoints that have a name, or will have one."""
        if not self._is_writer:
            return set()
        return {step for _, step in self._list()} | {each.handle.step for each in self._pending if each.to_link}

    def _link(self, step: int, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        target = os.path.relpath(self._run / checkpoint_name(step), path.parent)
        fresh = path.with_name(f"_{path.name}.new")
        fresh.unlink(missing_ok=True)
        os.symlink(target, fresh)
        os.replace(fresh, path)
        self._made.add(path)

    def _unlink(self, path: Path) -> None:
        path.unlink(missing_ok=True)
        self._made.discard(path)

    def _drop_stale(self, step: int) -> None:
        """Names of checkpoints that the first publish of this run, or of this branch of it, has set aside."""
        for path, other in list(self._list()):
            if other >= step or not path.exists():
                logger.warning("%s named checkpoint-%d, which was set aside; the name was removed", path, other)
                path.unlink()

    def _list(self) -> Iterator[tuple[Path, int]]:
        for directory, names, files in os.walk(self._run):
            # Links to directories are among the names of directories, and are not followed.
            names[:] = [name for name in names if not name.startswith("_") and not _CHECKPOINT.fullmatch(name)]
            for path in (Path(directory, name) for name in (*names, *files) if not name.startswith("_")):
                if not path.is_symlink():
                    continue
                target = Path(os.path.normpath(path.parent / os.readlink(path)))
                match = _CHECKPOINT.fullmatch(target.name)
                if match and target.parent == self._run:
                    yield path, int(match[1])


def _place(path: Path) -> Path:
    """Where a name itself is, whatever it leads to."""
    return path.parent.resolve() / path.name
