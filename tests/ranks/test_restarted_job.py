"""A job that is started again where everything that its ranks said before is still there; with ranks as threads.

``torchrun --max-restarts`` keeps the store of ``torch.distributed`` in its agent, which outlives the workers.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from faults import FaultyFileSystem, memory_directory
from llmtailor.errors import TailorError
from llmtailor.ranks import Ranks, open_channel
from ranks.rank_threads import Mailbox, Member, kinds, published, together

SIZE = 3


class Prefixed:
    """A connection whose keys have a prefix, as torch's ``PrefixStore``."""

    def __init__(self, connection: Any, prefix: str) -> None:
        self._connection = connection
        self._prefix = prefix

    def check(self, keys: list[str]) -> bool:
        return bool(self._connection.check([f"{self._prefix}/{key}" for key in keys]))

    def multi_get(self, keys: list[str]) -> list[bytes]:
        return [self.get(key) for key in keys]

    def get(self, key: str) -> bytes:
        return bytes(self._connection.get(f"{self._prefix}/{key}"))

    def set(self, key: str, value: bytes) -> None:
        self._connection.set(f"{self._prefix}/{key}", value)

    def add(self, key: str, amount: int) -> int:
        return int(self._connection.add(f"{self._prefix}/{key}", amount))

    def delete_key(self, key: str) -> bool:
        return bool(self._connection.delete_key(f"{self._prefix}/{key}"))


def join(mailbox: Mailbox, rank: int, size: int = SIZE, *, timeout_secs: float = 30.0) -> Ranks:
    return open_channel(
        rank, size, lambda prefix: Prefixed(mailbox.connect(rank), prefix), "llmtailor/0", timeout_secs=timeout_secs
    )


@pytest.fixture
def run() -> Iterator[Path]:
    with memory_directory() as directory:
        yield directory / "run"


@pytest.mark.parametrize("late", [None, 0, 1])
@pytest.mark.parametrize("size", [2, 3])
def test_job_that_is_started_again_opens_its_run_and_saves(run: Path, late: int | None, size: int) -> None:
    mailbox = Mailbox()

    def start(rank: int) -> Member:
        if rank == late:
            time.sleep(0.2)
        return Member(join(mailbox, rank, size), run, FaultyFileSystem(), {})

    first = [each for each in together(size, start) if isinstance(each, Member)]
    assert kinds(together(size, lambda rank: first[rank].save(1))) == [None] * size
    first[0].checkpointer._tiers.run.close()  # as the kernel does when a process dies; nobody says a word
    again = together(size, start)
    assert kinds(again) == [None] * size
    members = [each for each in again if isinstance(each, Member)]
    assert kinds(together(size, lambda rank: members[rank].save(1))) == [None] * size
    assert published(run) == [1]
    together(size, lambda rank: members[rank].checkpointer.close())
    together(size, lambda rank: first[rank].checkpointer.close())


def test_start_with_more_or_fewer_ranks_does_not_believe_the_one_before() -> None:
    mailbox = Mailbox()
    for size in (3, 2, 4):
        sent = together(size, lambda rank, size=size: join(mailbox, rank, size).post(f"from/{rank}", b"1"))
        assert kinds(sent) == [None] * size
    assert len([key for key in mailbox.values if "/from/" in key]) == 3 + 2 + 4
    assert not [key for key in mailbox.values if "/heard/" in key]


def test_rank_that_does_not_come_to_the_start_is_named() -> None:
    mailbox = Mailbox()
    together(SIZE, lambda rank: join(mailbox, rank))
    outcomes = together(SIZE, lambda rank: None if rank == 1 else join(mailbox, rank, timeout_secs=0.3))
    assert kinds(outcomes)[0] == "rank-late"
    assert isinstance(outcomes[0], TailorError)
    assert outcomes[0].found == "no word of rank 1"
    mailbox = Mailbox()
    together(SIZE, lambda rank: join(mailbox, rank))
    outcomes = together(SIZE, lambda rank: None if rank == 0 else join(mailbox, rank, timeout_secs=0.3))
    assert kinds(outcomes) == [None, "rank-late", "rank-late"]
    assert "no word of rank 0" in str(outcomes[2])
