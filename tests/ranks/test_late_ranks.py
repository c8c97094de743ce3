"""Ranks that are late, messages that are lost, a store that does not answer: nobody waits beyond a deadline."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from faults import memory_directory, staged_names
from llmtailor.checkpoint import open_checkpoint
from llmtailor.errors import WriteError
from llmtailor.ranks import LateError, Ranks
from llmtailor.storage import LocalFileSystem, SharedCheckpoint
from ranks.rank_threads import (
    NEVER,
    PATIENT_SECS,
    EmptyError,
    FullDisk,
    Mailbox,
    Member,
    check_next_save_works,
    kinds,
    name_of,
    published,
    raise_,
    shorten_waits,
    team,
    together,
    wait_for,
)

pytestmark = pytest.mark.filterwarnings("ignore::llmtailor.errors.TailorWarning")


@pytest.fixture
def run() -> Iterator[Path]:
    with memory_directory() as directory:
        yield directory / "run"


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    shorten_waits(monkeypatch)


# ---- Late ranks and lost messages ----


def test_late_rank_is_named_and_learns_that_it_was(run: Path) -> None:
    with team(run, 3) as found:
        found.save(1)
        found.wait_at_most(1.0)
        gone_on = threading.Event()

        def wait(directory: Path) -> None:
            gone_on.wait(NEVER)

        found.members[1].write_small_files = wait  # type: ignore[method-assign]
        for member in found.members:
            member.train()
        handle: list[Any] = [None, None, None]

        def save(rank: int) -> Path:
            handle[rank] = found.members[rank].begin_save(2)
            return handle[rank].result(60)

        late = threading.Thread(target=lambda: save_quietly(save, 1))
        late.start()
        started = time.monotonic()
        outcomes = together(3, lambda rank: save(rank) if rank != 1 else Path())
        assert 0.9 < time.monotonic() - started < NEVER
        assert kinds(outcomes) == ["rank-late", None, "rank-late"]
        for outcome in (outcomes[0], outcomes[2]):
            assert "rank 1 did not finish its part within" in str(outcome)
        assert len(staged_names(run)) == 1, "the late rank's own directory"
        gone_on.set()
        late.join(NEVER)
        assert kinds([handle[1].failure]) == ["rank-late"]
        assert "rank 1 did not finish its part" in str(handle[1].failure)
        assert staged_names(run) == set()
        del found.members[1].write_small_files
        check_next_save_works(found, 3)
        assert published(run) == [1, 3]


def save_quietly(save: Callable[[int], Path], rank: int) -> None:
    with contextlib.suppress(WriteError):
        save(rank)


@pytest.mark.parametrize("stage", ["create_file", "link_file", "deliver"])
def test_rank_that_is_late_in_its_files_fails_of_being_late(
    run: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    """Not of files that the others took away under its hands."""
    method = getattr(SharedCheckpoint, stage)

    def dawdle(self: SharedCheckpoint, *arguments: Any) -> Any:
        if self._seat.rank == 1:
            time.sleep(1.2 if stage == "deliver" else 0.5)
        return method(self, *arguments)

    with team(run, 3, strategy="parity") as found:
        found.save(1)
        found.wait_at_most(0.4)
        with monkeypatch.context() as patch:
            patch.setattr(SharedCheckpoint, stage, dawdle)
            outcomes = found.save(2)
        assert kinds(outcomes) == ["rank-late"] * 3
        assert len({str(each).splitlines()[0] for each in outcomes}) == 1
        check_next_save_works(found, 3)


class SlowDisk(LocalFileSystem):
    is_slow = False

    def rename(self, source: Path, target: Path) -> None:
        time.sleep(1.0 if self.is_slow else 0.0)
        super().rename(source, target)


def test_rank_that_is_late_while_it_hands_over_fails_of_being_late(run: Path) -> None:
    """The others remove what is common, and what it is just moving its files to."""
    with team(run, 3, filesystems=[SlowDisk() for _ in range(3)]) as found:
        found.save(1)
        found.wait_at_most(0.4)
        found.filesystems[1].is_slow = True
        outcomes = found.save(2)
        assert kinds(outcomes) == ["rank-late"] * 3
        assert len({str(each).splitlines()[0] for each in outcomes}) == 1
        found.filesystems[1].is_slow = False
        check_next_save_works(found, 3)


def test_rank_that_failed_ends_its_save_when_it_knows_what_all_know(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its next save is planned with that, so it must not begin before the slower ones have ended this one."""
    adopt = SharedCheckpoint.adopt_rest

    def dawdle(self: SharedCheckpoint) -> Any:
        time.sleep(0.5 if self._seat.rank == 0 else 0.0)
        return adopt(self)

    monkeypatch.setattr(SharedCheckpoint, "adopt_rest", dawdle)
    with team(run, 2, filesystems=[FullDisk(), FullDisk()], commit_timeout_secs=5.0) as found:
        found.save(1)
        found.filesystems[1].is_full = True

        def save(member: Member) -> str:
            with contextlib.suppress(WriteError):
                member.save(2)
            assert member.checkpointer._ballots is not None
            verdict = member.checkpointer._ballots._ballots[-1].verdict
            return "" if verdict is None else str(verdict.error)

        assert all(name_of(1) in str(told) for told in found.all(save))


@pytest.mark.parametrize("rank", [1, 2])
def test_rank_that_misses_the_verdict_catches_up_at_the_next_save(run: Path, rank: int) -> None:
    with team(run, 3, strategy="parity") as found:
        found.save(1)
        found.wait_at_most(0.3, ranks=[rank])

        def hide(other: int, verb: str, key: str) -> None:
            if other == rank and key.endswith("2-0/verdict"):
                raise ConnectionError("hidden")

        found.mailbox.meddle = hide
        outcomes = found.save(2)
        assert kinds(outcomes) == ["rank-late" if other == rank else None for other in range(3)]
        assert "nothing is known of checkpoint-2: rank 0 did not say what became of it" in str(outcomes[rank])
        found.mailbox.meddle = lambda rank, verb, key: None
        check_next_save_works(found, 3)
        assert published(run) == [1, 2, 3]
        manifest = open_checkpoint(run / "checkpoint-3").manifest
        assert {layer.step for layer in manifest.layers} == {2, 3}


def test_verdict_that_is_never_posted_costs_one_more_save(run: Path) -> None:
    with team(run, 2) as found:
        found.save(1)
        found.wait_at_most(0.3, ranks=[1])

        def lose(rank: int, verb: str, key: str) -> None:
            if verb == "set" and key.endswith("2-0/verdict"):
                raise ConnectionError("lost")

        found.mailbox.meddle = lose
        assert kinds(found.save(2)) == [None, "rank-late"]
        found.wait_at_most(PATIENT_SECS)
        outcomes = found.save(3)
        assert kinds(outcomes) == ["ranks-disagree"] * 2
        assert "the checkpoints that ranks follow differ" in str(outcomes[0])
        check_next_save_works(found, 4)
        assert published(run) == [1, 2, 4]


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("verb", ["set", "get", "check", "add", "delete"])
def test_message_that_cannot_be_sent_or_read_ends_in_an_error(run: Path, rank: int, verb: str) -> None:
    """At every message of a save, one after the other."""
    number = [0]
    with team(run, 2) as found:
        found.save(1)
        step = 1
        for at in range(1, 6):
            found.wait_at_most(0.2)
            number[0] = 0

            def fail(other: int, what: str, key: str, at: int = at) -> None:
                if (other, what) == (rank, verb):
                    number[0] += 1
                    if number[0] == at:
                        raise ConnectionError("the store is gone")

            found.mailbox.meddle = fail
            step += 1
            started = time.monotonic()
            outcomes = found.save(step)
            assert time.monotonic() - started < NEVER
            assert set(kinds(outcomes)) <= {None, "rank-late", "rank-failed", "ranks-disagree"}
            found.mailbox.meddle = lambda other, what, key: None
            published(run)
            # A verdict that was never posted is learned at the save after the next.
            step += 1
            if kinds(found.save(step)) != [None, None]:
                step += 1
                check_next_save_works(found, step)
            if number[0] < at:
                break


def test_slow_coordinator_publishes_all_although_the_others_gave_up(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever gives up leaves in place what it handed over: it cannot know what becomes of it."""
    seal = SharedCheckpoint.seal

    def seal_late(self: SharedCheckpoint, manifest: bytes) -> None:
        time.sleep(1.5)
        seal(self, manifest)

    with team(run, 3, strategy="parity") as found:
        found.save(1)
        found.wait_at_most(0.3, ranks=[1, 2])
        with monkeypatch.context() as patch:
            patch.setattr(SharedCheckpoint, "seal", seal_late)
            assert kinds(found.save(2)) == [None, "rank-late", "rank-late"]
        check_next_save_works(found, 3)
        assert published(run) == [1, 2, 3]


def test_coordinator_parts_when_all_have_heard(run: Path) -> None:
    """At the end of a script rank 0's process, and with it the store, is gone at once."""
    with team(run, 3, commit_timeout_secs=20.0) as found:
        found.save(1)
        slow = threading.Event()
        found.mailbox.meddle = lambda rank, verb, key: None if rank == 0 or "2-0/verdict" not in key else wait_for(slow)
        handles = found.all(lambda member: member.begin_save(2))
        handles[0].result(60)  # type: ignore[union-attr]
        ballots = found.members[0].checkpointer._ballots
        assert ballots is not None
        parting = threading.Thread(target=ballots.part)
        parting.start()
        parting.join(0.3)
        assert parting.is_alive()
        slow.set()
        parting.join(NEVER)
        assert not parting.is_alive()
        assert [handle.result(60) for handle in handles] == [run / "checkpoint-2"] * 3  # type: ignore[union-attr]


def test_coordinator_parts_though_a_rank_is_gone(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with team(run, 2) as found:
        found.save(1)
        found.wait_at_most(0.3, ranks=[1])
        found.mailbox.meddle = lambda rank, verb, key: (
            raise_(ConnectionError()) if "2-0/verdict" in key and rank else None
        )
        found.save(2)
        found.wait_at_most(0.3)
        ballots = found.members[0].checkpointer._ballots
        assert ballots is not None
        started = time.monotonic()
        ballots.part()
        assert 0.2 < time.monotonic() - started < NEVER


# ---- A store that does not answer ----


def test_store_that_never_answers_holds_nobody_beyond_the_deadline(run: Path) -> None:
    """Nor does each call leave another thread behind."""
    with team(run, 2) as found:
        found.save(1)
        found.wait_at_most(0.3)
        back = threading.Event()
        found.mailbox.meddle = lambda rank, verb, key: None if rank == 0 else wait_for(back)
        counts = []
        for step in (2, 3, 4):
            started = time.monotonic()
            outcomes = found.save(step)
            assert time.monotonic() - started < NEVER
            assert kinds(outcomes) == ["rank-late", "rank-late"]
            counts.append(sum(thread.name == "llmtailor-messages" for thread in threading.enumerate()))
        assert max(counts) <= 4 + 1, counts
        assert published(run) == [1]
        back.set()
        time.sleep(0.3)  # what waited for the store ends
        assert not [thread for thread in threading.enumerate() if thread.name == "llmtailor-messages"]
        # The late rank's last words reach the store now, and nobody listens to them.
        if kinds(found.save(5)) != [None, None]:
            found.save(6)
        check_next_save_works(found, 7)


def test_training_thread_waits_for_a_dead_store_no_longer_than_the_deadline(run: Path) -> None:
    """A rank that fails before the capture tells the others so from the training thread."""
    with team(run, 2) as found:
        found.save(1)
        found.wait_at_most(0.3)
        back = threading.Event()
        member = found.members[1]
        member.write_small_files = lambda directory: raise_(OSError(28, "full"))  # type: ignore[method-assign]
        found.mailbox.meddle = lambda rank, verb, key: None if rank == 0 else wait_for(back)
        started = time.monotonic()
        member.train()
        handle = member.begin_save(2)
        assert time.monotonic() - started < 2.0
        assert kinds([handle.failure]) == ["no-space"]
        back.set()


def test_ranks_give_up_at_the_deadline_however_many_ask() -> None:
    mailbox = Mailbox()
    back = threading.Event()
    mailbox.meddle = lambda rank, verb, key: wait_for(back)
    ranks = Ranks(1, 2, lambda: mailbox.connect(1))
    started = time.monotonic()
    for _ in range(12):
        with pytest.raises(LateError, match="rank 1 could not wait for x") as caught:
            ranks.take("x", timeout_secs=0.05)
        assert caught.value.kind == "rank-late"
    assert time.monotonic() - started < NEVER
    assert sum(thread.name == "llmtailor-messages" for thread in threading.enumerate()) <= 4
    back.set()
    mailbox.meddle = lambda rank, verb, key: None
    mailbox.values["x"] = b"there"
    assert ranks.take("x", timeout_secs=NEVER) == b"there"


def test_limit_on_threads_is_an_error_like_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = Ranks(1, 2, lambda: Mailbox().connect(1))
    for _ in range(6):  # more than helpers there are
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", lambda self: raise_(RuntimeError("can't start new thread")))
            with pytest.raises(LateError, match="can't start new thread"):
                ranks.post("a", b"")
    ranks.post("a", b"")


def test_error_without_a_text_is_an_error_like_another() -> None:
    mailbox = Mailbox()
    mailbox.meddle = lambda rank, verb, key: raise_(EmptyError())
    with pytest.raises(LateError, match="EmptyError"):
        Ranks(1, 2, lambda: mailbox.connect(1)).take("x", timeout_secs=5)
