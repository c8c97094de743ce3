"""Ranks that open a run together, or find that they cannot; with ranks as threads."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from faults import FaultyFileSystem, memory_directory
from llmtailor import meeting as meeting_module
from llmtailor.errors import InvalidInputError
from llmtailor.meeting import Meeting, Outcome
from llmtailor.ranks import LateError, Ranks
from mounts import Mounts
from ranks.rank_threads import (
    Mailbox,
    Member,
    check_next_save_works,
    kinds,
    name_of,
    published,
    shorten_waits,
    team,
    together,
)

pytestmark = pytest.mark.filterwarnings("ignore::llmtailor.errors.TailorWarning")


@pytest.fixture
def run() -> Iterator[Path]:
    with memory_directory() as directory:
        yield directory / "run"


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    shorten_waits(monkeypatch)


def test_rank_that_is_given_another_path_is_refused_on_all(run: Path) -> None:
    outcomes = open_on(run, run.with_name("other"), run)
    for outcome in outcomes:
        assert isinstance(outcome, InvalidInputError)
        assert outcome.kind == "other-store"
        assert str(run) in str(outcome)
        assert str(run.with_name("other")) in str(outcome)
        assert "rank 1" in str(outcome) or outcome is outcomes[1]
    assert published(run) == []


def test_directory_that_is_another_by_the_same_name_is_refused_on_all(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a machine where nothing is mounted there: what the coordinator left is not seen."""
    is_there = os.path.lexists
    monkeypatch.setattr(meeting_module.os.path, "lexists", lambda path: "/open-" not in str(path) and is_there(path))
    mailbox = Mailbox()
    outcomes = together(
        2, lambda rank: Member(Ranks(rank, 2, lambda: mailbox.connect(rank)), run, FaultyFileSystem(), {})
    )
    assert kinds(outcomes) == ["other-store"] * 2
    # It is no lock that was forgotten: together they can try again.
    monkeypatch.undo()
    with team(run, 2) as found:
        assert kinds(found.save(1)) == [None, None]


def test_directory_that_is_mounted_by_another_name_is_refused_at_once(run: Path, tmp_path: Path) -> None:
    """It is the same, but votes compare names: every save would fail."""
    run.mkdir()
    alias = tmp_path / "alias"
    alias.mkdir()
    mounts = Mounts(tmp_path)
    with contextlib.closing(mounts):
        mounts._call(["mount", "--bind", str(run), str(alias)])
        mounts._mounted.append(alias)
        outcomes = open_on(run, alias)
        assert kinds(outcomes) == ["other-store"] * 2
        assert all(str(run) in str(each) and str(alias) in str(each) for each in outcomes)


def test_symbolic_link_to_the_directory_is_seen_through(run: Path) -> None:
    run.mkdir()
    alias = run.with_name("alias")
    alias.symlink_to(run)
    members = [each for each in open_on(run, alias) if isinstance(each, Member)]
    together(2, lambda rank: members[rank].checkpointer.close())
    assert len(members) == 2


def open_on(*paths: Path) -> list[Member | BaseException]:
    """What becomes of ranks that are given these paths."""
    mailbox, size = Mailbox(), len(paths)
    return together(
        size,
        lambda rank: Member(Ranks(rank, size, lambda: mailbox.connect(rank)), paths[rank], FaultyFileSystem(), {}),
    )


def test_directory_that_becomes_another_between_saves_fails_the_save(run: Path) -> None:
    """A link that is turned to another place: the vote says so."""
    places = [run.with_name("first"), run.with_name("second")]
    for place in places:
        (place / "_staging").mkdir(parents=True)
    own = run.with_name("own")
    run.symlink_to(places[0])
    own.symlink_to(places[0])
    with team(run, 2, commit_timeout_secs=2.0) as found:
        found.save(1)
        member = found.members[1]
        assert member.checkpointer._ballots is not None
        member.checkpointer._ballots._directory = own
        member.checkpointer._tiers.run.path = own
        member.checkpointer._tiers.run._staging = own / "_staging"
        found.save(2)
        own.unlink()
        own.symlink_to(places[1])
        outcomes = found.save(3)
        assert kinds(outcomes) == ["ranks-disagree"] * 2
        for outcome in outcomes:
            assert "the directories that ranks write to differ" in str(outcome)
            assert name_of(1) in str(outcome)
            assert str(places[1]) in str(outcome)
        assert published(run) == [1, 2]
        own.unlink()
        own.symlink_to(places[0])
        check_next_save_works(found, 4)


def test_directory_that_is_mounted_over_between_saves_fails_the_save(run: Path) -> None:
    """The same name for all, and what rank 1 writes is not seen by rank 0."""
    other = run.with_name("other")
    (other / "_staging").mkdir(parents=True)
    with team(run, 2, commit_timeout_secs=2.0) as found:
        found.save(1)
        member = found.members[1]
        own = member.checkpointer._tiers.run._staging
        member.checkpointer._tiers.run._staging = other / "_staging"
        outcomes = found.save(2)
        assert kinds(outcomes) == ["ranks-disagree"] * 2
        for outcome in outcomes:
            assert f"{name_of(1)} writes to {run}, which is not the directory that rank 0 knows" in str(outcome)
        assert published(run) == [1]
        member.checkpointer._tiers.run._staging = own
        check_next_save_works(found, 3)


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_error_of_one_rank_is_raised_on_all_that_meet(rank: int) -> None:
    mailbox = Mailbox()
    meetings = [Meeting(Ranks(each, 3, lambda each=each: mailbox.connect(each))) for each in range(3)]
    error = InvalidInputError("this cannot be", kind="odd", found="a \udcff", hint="try again")
    outcomes = together(3, lambda each: meetings[each].agree(Outcome(error=error if each == rank else None)))
    assert kinds(outcomes) == ["odd"] * 3
    assert outcomes[rank] is error
    for other in {0, 1, 2} - {rank}:
        assert f"rank {rank} (" in str(outcomes[other])
        assert "this cannot be" in str(outcomes[other])
    assert together(3, lambda each: meetings[each].agree(Outcome())) == [None] * 3
    damages = together(3, lambda each: meetings[each].agree(Outcome(damage="torn" if each == rank else None)))
    assert damages == [f"rank {rank}: torn"] * 3


def test_ranks_that_say_another_number_of_numbers_disagree_at_once() -> None:
    """As ranks do that measure how the layers of different models move."""
    mailbox = Mailbox()
    meetings = [Meeting(Ranks(each, 3, lambda each=each: mailbox.connect(each))) for each in range(3)]
    numbers = [np.arange(size, dtype=np.float32).tobytes() for size in (4, 4, 6)]
    outcomes = together(3, lambda each: meetings[each].add_up(numbers[each], None, 60.0), timeout_secs=20.0)
    assert kinds(outcomes) == ["ranks-disagree"] * 3
    for outcome in outcomes:
        assert "rank 2 (" in str(outcome)
        assert "6 numbers" in str(outcome)
    assert kinds(together(3, lambda each: meetings[each].add_up(numbers[0], None, 60.0))) == [None] * 3


def test_rank_that_does_not_come_is_named_by_those_who_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting_module, "_TIMEOUT_SECS", 0.3)
    mailbox = Mailbox()
    meetings = [Meeting(Ranks(each, 3, lambda each=each: mailbox.connect(each))) for each in range(3)]
    outcomes = together(3, lambda each: meetings[each].agree(Outcome()) if each != 1 else None)
    assert kinds(outcomes) == ["rank-late", None, "rank-late"]
    for outcome in (outcomes[0], outcomes[2]):
        assert "rank 1 (" in str(outcome)
    with pytest.raises(LateError):
        meetings[2].tell({})
