"""What a disk may hold after the power failed: every order of writing that the kernel's promises leave open.

A ``RecordingFileSystem`` notes what a scenario does. Then a crash is supposed after each operation, and of those that
were not fsynced, some are lost. After ALICE (Pillai et al., OSDI 2014), with two rules:

- bytes of a file, and its length, last once the file was fsynced; a name (made, moved, removed) lasts once a directory
  it stands or stood in was fsynced; nothing else lasts, and what does not last may be lost or kept in any combination;
- a rename is seen whole or not at all.

Bytes that went around the page cache (O_DIRECT) are no exception: they may still be in the device's cache, and the
blocks they went to may not be the file's yet. Source: Linux man-pages 6.9, open(2), NOTES: O_DIRECT "does not give the
guarantees of the O_SYNC flag that data and necessary metadata are transferred".
"""

from __future__ import annotations

import random
import shutil
import threading
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from faults import FaultyFileSystem, SimulatedCrash

ROOT = 0
STAGING = "_staging"


@dataclass(frozen=True)
class Names:
    """Changes of names, seen together or not at all: (directory, name, inode or None for "no more")."""

    changes: tuple[tuple[int, str, int | None], ...]


@dataclass(frozen=True)
class Bytes:
    """Bytes put into a file; None stands for zeros."""

    inode: int
    offset: int
    nbytes: int
    content: bytes | None


@dataclass(frozen=True)
class Length:
    """A file cut off, or made longer with zeros."""

    inode: int
    nbytes: int


@dataclass(frozen=True)
class Sync:
    """A file or directory made durable."""

    inode: int


@dataclass(frozen=True)
class Mark:
    """What the scenario may rely on from here."""

    state: Any


Operation = Names | Bytes | Length | Sync | Mark
Tear = Literal["first half", "second half"]
"""What is there of a torn write; a device writes its sectors in any order."""


class RecordingFileSystem(FaultyFileSystem):
    """Does everything for real under a directory, and keeps a journal of it.

    Threads take turns: an operation and its note are one, so the journal is an order in which it happened.

    Args:
        root: Durable from the start; only what happens below it is noted.
        is_lie: Given ("fsync" | "fsync_directory", path, target of the latest rename): true to return without doing it.
        trusts_direct: Takes bytes that went around the page cache for durable, and never fsyncs their file.
        is_thief: Make a "link" by moving the file.
        dies_removing: Stop the world once, between the rename and the fsync of a removal.
    """

    def __init__(
        self,
        root: Path,
        *,
        is_lie: Callable[[str, Path, Path], bool] = lambda name, path, moved: False,
        trusts_direct: bool = False,
        is_thief: bool = False,
        dies_removing: bool = False,
        refused: Mapping[str, int] | None = None,
    ) -> None:
        super().__init__(refused=refused)
        self.journal: list[Operation] = []
        self._root = root
        self._is_lie = is_lie
        self._trusts_direct = trusts_direct
        self._is_thief = is_thief
        self._dies_removing = dies_removing
        self._tree: dict[int, dict[str, int]] = {ROOT: {}}
        self._next = ROOT + 1
        self._file_of: dict[int, tuple[int, Path]] = {}
        self._size: dict[int, int] = {}
        self.direct: set[int] = set()
        """Files that are written around the page cache."""
        self._turn = threading.Lock()
        self._moved = root

    def mark(self, state: Any) -> None:
        with self._turn:
            self.journal.append(Mark(state))

    def _perform(self, name: str, *args: Any) -> Any:
        with self._turn:
            return self._perform_and_note(name, *args)

    def _perform_and_note(self, name: str, *args: Any) -> Any:
        if name == "fsync_directory" and self._dies_removing and "remove-" in self._moved.name:
            self._dies_removing = False
            raise SimulatedCrash(name)
        if name == "link" and self._is_thief:
            name = "rename"
        result = super()._perform(name, *args)
        note = getattr(self, f"_note_{name}", None)
        if note is not None:
            note(*args, result)
        return result

    def _find(self, path: Path) -> int | None:
        inode: int | None = ROOT
        for part in path.relative_to(self._root).parts:
            inode = self._tree[inode].get(part) if inode in self._tree else None
            if inode is None:
                return None
        return inode

    def _change(self, *changes: tuple[Path, int | None]) -> None:
        noted = []
        for path, inode in changes:
            directory = self._find(path.parent)
            assert directory is not None, path
            noted.append((directory, path.name, inode))
            if inode is None:
                del self._tree[directory][path.name]
            else:
                self._tree[directory][path.name] = inode
        self.journal.append(Names(tuple(noted)))

    def _new(self, path: Path, *, is_directory: bool) -> int:
        inode, self._next = self._next, self._next + 1
        if is_directory:
            self._tree[inode] = {}
        else:
            self._size[inode] = 0
        self._change((path, inode))
        return inode

    def _note_make_directory(self, path: Path, _: None) -> None:
        self._new(path, is_directory=True)

    def _note_create(self, path: Path, descriptor: int) -> None:
        self._file_of[descriptor] = (self._new(path, is_directory=False), path)

    def _note_open_for_reading(self, path: Path, descriptor: int) -> None:
        inode = self._find(path)
        if inode is None:  # a small file: the trainer made it behind our back
            for parent in reversed(path.relative_to(self._root).parents[:-1]):
                if self._find(self._root / parent) is None:
                    self._new(self._root / parent, is_directory=True)
            inode = self._new(path, is_directory=False)
            content = path.read_bytes()
            self.journal.append(Bytes(inode, 0, len(content), content))
        self._file_of[descriptor] = (inode, path)

    def _note_allocate(self, descriptor: int, nbytes: int, _: None) -> None:
        self.journal.append(Bytes(self._file_of[descriptor][0], 0, nbytes, None))

    def _note_write(self, descriptor: int, buffer: memoryview, _: None) -> None:
        inode, _path = self._file_of[descriptor]
        self.journal.append(Bytes(inode, self._size[inode], buffer.nbytes, bytes(buffer)))
        self._size[inode] += buffer.nbytes

    def _note_write_at(self, descriptor: int, buffer: memoryview, offset: int, _: None) -> None:
        self.journal.append(Bytes(self._file_of[descriptor][0], offset, buffer.nbytes, bytes(buffer)))

    def _note_truncate(self, descriptor: int, nbytes: int, _: None) -> None:
        self.journal.append(Length(self._file_of[descriptor][0], nbytes))

    def _note_set_direct(self, descriptor: int, is_direct: bool, _: None) -> None:
        if is_direct:
            self.direct.add(self._file_of[descriptor][0])

    def _note_fsync(self, descriptor: int, _: None) -> None:
        inode, path = self._file_of[descriptor]
        is_trusted = self._trusts_direct and inode in self.direct
        if not is_trusted and not self._is_lie("fsync", path, self._moved):
            self.journal.append(Sync(inode))

    def _note_fsync_directory(self, path: Path, _: None) -> None:
        if path.is_relative_to(self._root) and not self._is_lie("fsync_directory", path, self._moved):
            inode = self._find(path)
            assert inode is not None, path
            self.journal.append(Sync(inode))

    def _note_link(self, source: Path, target: Path, _: None) -> None:
        self._change((target, self._find(source)))

    def _note_rename(self, source: Path, target: Path, _: None) -> None:
        self._change((source, None), (target, self._find(source)))
        self._moved = target

    def _note_exchange(self, one: Path, other: Path, _: None) -> None:
        self._change((one, self._find(other)), (other, self._find(one)))
        self._moved = other

    def _note_remove_file(self, path: Path, _: None) -> None:
        self._change((path, None))

    def _note_remove_empty_directory(self, path: Path, _: None) -> None:
        self._change((path, None))

    def _note_remove_tree(self, path: Path, _: None) -> None:
        inode = self._find(path)
        if inode is None:  # it held nothing that was ever noted
            return
        for name in list(self._tree.get(inode, {})):
            self._note_remove_tree(path / name, None)
        self._change((path, None))


Image = dict[str, tuple[Hashable, ...] | None]
"""Path -> which writes of the file's are there (None for a directory), below the root, without what is in flight."""


@dataclass(frozen=True)
class CrashState:
    """One thing the disk may hold."""

    after: int
    """Operations done before the crash."""
    state: Any
    """Of the latest mark."""
    image: Image


def crash_states(journal: list[Operation], *, num_random: int = 12, seed: int = 0) -> Iterator[CrashState]:
    """Everything a disk may hold after a crash at any point of a journal; where that is too much, samples of it."""
    chance = random.Random(seed)
    durable_at = _durable_at(journal)
    state = None
    for end in range(len(journal) + 1):
        if end and isinstance(journal[end - 1], Mark):
            state = journal[end - 1].state
        pending = [index for index in range(end) if durable_at[index] >= end]
        for lost, torn in _choices(pending, chance, num_random):
            yield CrashState(after=end, state=state, image=_replay(journal[:end], lost, torn))


def _durable_at(journal: list[Operation]) -> list[float]:
    """For each operation the index of the one that made it last; of what needs nothing, -1."""
    durable_at: list[float] = [float("inf")] * len(journal)
    waiting: dict[int, list[int]] = {}
    for index, operation in enumerate(journal):
        if isinstance(operation, Names):
            for directory, _, _ in operation.changes:
                waiting.setdefault(directory, []).append(index)
        elif isinstance(operation, Bytes | Length):
            waiting.setdefault(operation.inode, []).append(index)
        else:
            durable_at[index] = -1
            for earlier in waiting.pop(operation.inode, []) if isinstance(operation, Sync) else []:
                durable_at[earlier] = min(durable_at[earlier], index)
    return durable_at


def _choices(
    pending: list[int], chance: random.Random, num_random: int
) -> Iterator[tuple[set[int], Mapping[int, Tear]]]:
    """Which pending operations are lost, and which writes are torn."""
    everything, nothing = set(pending), set[int]()
    whole: Mapping[int, Tear] = {}
    yield nothing, whole
    if not pending:
        return
    yield everything, whole
    yield nothing, dict.fromkeys(pending, "first half")
    yield nothing, dict.fromkeys(pending, "second half")
    for one in pending:
        yield {one}, whole
        yield everything - {one}, whole
    for cut in range(1, len(pending)):  # a journal that keeps the order
        yield set(pending[cut:]), whole
    halves: tuple[Tear, Tear] = ("first half", "second half")
    for _ in range(num_random):
        lost = {index for index in pending if chance.random() < 0.5}
        yield lost, {index: chance.choice(halves) for index in pending if chance.random() < 0.25}


def _replay(operations: list[Operation], lost: set[int], torn: Mapping[int, Tear]) -> Image:
    tree: dict[int, dict[str, int]] = {}
    writes: dict[int, list[Hashable]] = {}
    for index, operation in enumerate(operations):
        if index in lost:
            continue
        if isinstance(operation, Names):
            for directory, name, inode in operation.changes:
                names = tree.setdefault(directory, {})
                if inode is None:
                    names.pop(name, None)
                else:
                    names[name] = inode
        elif isinstance(operation, Bytes):
            writes.setdefault(operation.inode, []).append((index, torn.get(index)))
        elif isinstance(operation, Length):
            writes.setdefault(operation.inode, []).append((index, None))
    files = {operation.inode for operation in operations if isinstance(operation, Bytes)}
    image: Image = {}

    def walk(inode: int, path: str) -> None:
        for name, below in tree.get(inode, {}).items():
            inner = f"{path}/{name}" if path else name
            is_file = below in files
            image[inner] = tuple(writes.get(below, ())) if is_file else None
            if not is_file and name != STAGING:
                walk(below, inner)

    walk(ROOT, "")
    return image


def build_image(journal: list[Operation], image: Image, root: Path) -> None:
    """Make a disk's content real, in an empty directory."""
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir()
    for name, writes in sorted(image.items(), key=lambda item: item[0].split("/")):
        if writes is None:
            (root / name).mkdir()
        else:
            (root / name).write_bytes(_content(journal, writes))


def _content(journal: list[Operation], writes: tuple[Any, ...]) -> bytes:
    content = bytearray()
    for index, tear in writes:
        operation = journal[index]
        if isinstance(operation, Length):
            content[operation.nbytes :] = bytes(max(0, operation.nbytes - len(content)))
            continue
        assert isinstance(operation, Bytes)
        end = operation.offset + operation.nbytes
        content.extend(bytes(max(0, end - len(content))))
        if operation.content is not None:
            half = operation.nbytes // 2
            first = half if tear == "second half" else 0
            last = half if tear == "first half" else operation.nbytes
            content[operation.offset + first : operation.offset + last] = operation.content[first:last]
    return bytes(content)
