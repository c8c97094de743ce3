"""Ranks as threads of one process: real checkpointers, files and votes; only the messages are in memory.

A ``Mailbox`` is what ``torch.distributed``'s store is to real ranks, and can be told to lose, hold up or break what
goes through it. Every rank has a file system of its own that can fail.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch

from faults import FaultyFileSystem, staged_names
from llmtailor import meeting as meeting_module
from llmtailor.checkpoint import open_checkpoint
from llmtailor.checkpointer import Checkpointer
from llmtailor.errors import WriteError
from llmtailor.ranks import Ranks
from llmtailor.storage import LocalFileSystem, list_checkpoints
from llmtailor.verify import verify_checkpoint
from llmtailor.writer import SaveHandle
from llmtailor.writer import ballot as ballot_module

ResultT = TypeVar("ResultT")
NEVER = 10.0
# Of a save that is to work, on a machine however slow.
PATIENT_SECS = 20.0
"""Seconds after which a test says that something waited for more than its deadline."""
NAMES = ("embed_tokens", "layers.0", "layers.1", "layers.2", "norm")


class Mailbox:
    """Messages by key. ``meddle`` is called before each deed, with the rank, the verb and the key; what it raises is
    raised there, and while it waits, that connection waits."""

    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}
        self.counts: dict[str, int] = {}
        self.meddle: Callable[[int, str, str], None] = lambda rank, verb, key: None
        self.mutex = threading.Lock()

    def connect(self, rank: int) -> Connection:
        return Connection(self, rank)


class Connection:
    def __init__(self, mailbox: Mailbox, rank: int) -> None:
        self._mailbox = mailbox
        self._rank = rank

    def set(self, key: str, value: bytes) -> None:
        self._mailbox.meddle(self._rank, "set", key)
        with self._mailbox.mutex:
            self._mailbox.values[key] = value

    def get(self, key: str) -> bytes:
        self._mailbox.meddle(self._rank, "get", key)
        with self._mailbox.mutex:
            return self._mailbox.values[key]

    def multi_get(self, keys: list[str]) -> list[bytes]:
        return [self.get(key) for key in keys]

    def check(self, keys: list[str]) -> bool:
        self._mailbox.meddle(self._rank, "check", keys[0])
        with self._mailbox.mutex:
            return all(key in self._mailbox.values for key in keys)

    def add(self, key: str, amount: int) -> int:
        self._mailbox.meddle(self._rank, "add", key)
        with self._mailbox.mutex:
            self._mailbox.counts[key] = self._mailbox.counts.get(key, 0) + amount
            return self._mailbox.counts[key]

    def delete_key(self, key: str) -> bool:
        self._mailbox.meddle(self._rank, "delete", key)
        with self._mailbox.mutex:
            self._mailbox.counts.pop(key, None)
            return self._mailbox.values.pop(key, None) is not None


class Model(torch.nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed_tokens = torch.nn.Embedding(4, width)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(width, width, bias=False) for _ in range(3))
        self.norm = torch.nn.LayerNorm(width)


class Member:
    """One rank's training; all train alike."""

    def __init__(self, ranks: Ranks, directory: Path, filesystem: Any, options: Mapping[str, Any]) -> None:
        options = dict(options)
        self.rank = ranks.rank
        self.filesystem = filesystem
        torch.manual_seed(0)
        self.model = Model(options.pop("width", 4))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2, foreach=False)
        self.checkpointer = Checkpointer(
            directory,
            ranks=ranks,
            filesystem=filesystem,
            **{"spread_layers": True, "pool_nbytes": 2**16, "commit_timeout_secs": PATIENT_SECS} | options,
        )
        self.checkpointer.begin(None)

    def train(self) -> None:
        for parameter in self.model.parameters():
            parameter.grad = torch.full_like(parameter, 0.5)
        self.optimizer.step()

    def write_small_files(self, directory: Path) -> None:
        (directory / f"state-{self.rank}.json").write_text(f'{{"rank": {self.rank}}}\n')

    def begin_save(self, step: int) -> SaveHandle:
        return self.checkpointer.save(step, self.model, [self.optimizer], self.write_small_files)

    def save(self, step: int) -> Path:
        """Train a step, save, and wait for what becomes of it."""
        self.train()
        try:
            handle = self.begin_save(step)
        except WriteError:  # the failures of two saves in a row are raised when the third is begun
            handle = self.checkpointer.unfinished()[-1]
        return handle.result(60)


class Team:
    """All ranks.

    Args:
        directory: The run.
        size: How many.
        filesystems: One for each rank; by default they never fail.
        **options: Of the checkpointers.
    """

    def __init__(self, directory: Path, size: int, *, filesystems: Sequence[Any] | None = None, **options: Any) -> None:
        self.directory = directory
        self.size = size
        self.mailbox = Mailbox()
        self.filesystems = filesystems or [FaultyFileSystem() for _ in range(size)]
        self.ranks = [Ranks(rank, size, lambda rank=rank: self.mailbox.connect(rank)) for rank in range(size)]
        made = together(
            size,
            lambda rank: Member(self.ranks[rank], directory, self.filesystems[rank], self.options_of(rank, options)),
        )
        self.members: list[Member] = [each for each in made if isinstance(each, Member)]
        if faults := [each for each in made if not isinstance(each, Member)]:
            self.close()
            raise faults[0]

    def options_of(self, rank: int, options: Mapping[str, Any]) -> Mapping[str, Any]:
        """An option that is a list has a value for each rank."""
        return {name: value[rank] if isinstance(value, list) else value for name, value in options.items()}

    def wait_at_most(self, timeout_secs: float, *, ranks: Sequence[int] | None = None) -> None:
        """How long saves that begin from now on wait for other ranks; all ranks', if not told which."""
        for rank in range(self.size) if ranks is None else ranks:
            ballots = self.members[rank].checkpointer._ballots
            assert ballots is not None
            ballots._timeout_secs = timeout_secs

    def save(self, step: int) -> list[Path | BaseException]:
        """What became of a save, by rank."""
        return self.all(lambda member: member.save(step))

    def all(self, work: Callable[[Member], ResultT]) -> list[ResultT | BaseException]:
        return together(self.size, lambda rank: work(self.members[rank]))

    def close(self) -> None:
        def close(rank: int) -> None:
            with contextlib.suppress(WriteError):  # what the last save failed of; the test knows
                self.members[rank].checkpointer.close()

        together(len(self.members), close)


def together(size: int, work: Callable[[int], ResultT], *, timeout_secs: float = 90.0) -> list[ResultT | BaseException]:
    """Do something on all ranks at once; what each returned or raised.

    Raises:
        AssertionError: A rank hangs.
    """
    outcomes: dict[int, ResultT | BaseException] = {}

    def run(rank: int) -> None:
        try:
            outcomes[rank] = work(rank)
        except BaseException as err:
            outcomes[rank] = err

    threads = [threading.Thread(target=run, args=(rank,), name=f"rank-{rank}", daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + timeout_secs
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    assert not [thread.name for thread in threads if thread.is_alive()], "hangs"
    return [outcomes[rank] for rank in range(size)]


@contextmanager
def team(directory: Path, size: int, **how: Any) -> Iterator[Team]:
    found = Team(directory, size, **how)
    try:
        yield found
    finally:
        found.mailbox.meddle = lambda rank, verb, key: None
        found.close()


def published(directory: Path) -> list[int]:
    """Steps of a run's checkpoints, each of which is whole."""
    entries = list_checkpoints(directory)
    for entry in entries:
        assert entry.has_manifest, entry
        report = verify_checkpoint(entry.path)
        assert report.is_good, (entry, report.problems)
        assert not report.unlisted, (entry, report.unlisted)
        assert {layer.name for layer in open_checkpoint(entry.path).manifest.layers} == set(NAMES)
    return [entry.step for entry in entries]


def kinds(outcomes: Sequence[object]) -> list[str | None]:
    """Of errors; None of what worked."""
    return [
        getattr(each, "kind", type(each).__name__) if isinstance(each, BaseException) else None for each in outcomes
    ]


def check_next_save_works(found: Team, step: int, *, is_tidy: bool = True) -> None:
    found.wait_at_most(PATIENT_SECS)  # a slow machine is no fault
    assert kinds(found.save(step)) == [None] * found.size
    assert step in published(found.directory)
    if is_tidy:
        assert staged_names(found.directory) == set()
    newest = {member.checkpointer._lineage.newest for member in found.members}
    assert newest == {(step, open_checkpoint(found.directory / f"checkpoint-{step}").digest)}


def name_of(rank: int) -> str:
    return f"rank {rank} ({os.uname().nodename}, process {os.getpid()})"


def outcome_of(member: Member, step: int) -> object:
    try:
        return member.save(step)
    except WriteError as err:
        return err


def raise_(error: BaseException) -> Any:
    raise error


def wait_for(event: threading.Event) -> None:
    event.wait(60)


class EmptyError(RuntimeError):
    """Says nothing."""


class FullDisk(LocalFileSystem):
    is_full = False

    def create(self, path: Path, mode: int = 0o444) -> int:
        if self.is_full:
            raise OSError(28, "No space left on device", str(path))
        return super().create(path, mode)


def shorten_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is waited for beyond a save's own deadline."""
    monkeypatch.setattr(ballot_module, "_GRACE_SECS", 0.3)
    monkeypatch.setattr(ballot_module, "_VISIBLE_SECS", 0.3)
    monkeypatch.setattr(meeting_module, "_VISIBLE_SECS", 0.3)
