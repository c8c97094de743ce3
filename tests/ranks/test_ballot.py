"""The vote on a save, with ranks as threads: whatever one does wrong, all end and know why; the next save works."""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from faults import memory_directory, staged_names
from llmtailor.checkpoint import open_checkpoint
from llmtailor.errors import TailorError, WriteError
from llmtailor.storage import SharedCheckpoint
from llmtailor.votes import Vote, encode_message
from mounts import Mounts
from ranks.rank_threads import (
    NEVER,
    PATIENT_SECS,
    EmptyError,
    FullDisk,
    Member,
    Team,
    check_next_save_works,
    kinds,
    name_of,
    outcome_of,
    published,
    raise_,
    shorten_waits,
    team,
)

pytestmark = pytest.mark.filterwarnings("ignore::llmtailor.errors.TailorWarning")


@pytest.fixture
def run() -> Iterator[Path]:
    with memory_directory() as directory:
        yield directory / "run"


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    shorten_waits(monkeypatch)
    # What is logged here need not be UTF-8, and a report that pytest sends from one process to another must be.
    caplog.set_level(logging.CRITICAL + 1, "llmtailor")


# ---- All is well ----


@pytest.mark.parametrize("size", [2, 3, 8])
@pytest.mark.parametrize("strategy", ["full", "parity"])
def test_all_ranks_publish_one_checkpoint(run: Path, size: int, strategy: str) -> None:
    with team(run, size, strategy=strategy) as found:
        for step in (1, 2, 3):
            assert found.save(step) == [run / f"checkpoint-{step}"] * size
        check_next_save_works(found, 13)
        assert published(run) == [1, 2, 3, 13]
        messages = [key for key in found.mailbox.values if key.startswith("save/")]
        assert {key.split("/")[1] for key in messages} == {"3-0", "13-0"}, "messages of older saves are removed"


def test_every_rank_plans_the_next_save_with_the_same_record(run: Path) -> None:
    with team(run, 3, strategy="parity") as found:
        found.save(1)
        found.save(2)
        plans = [member.checkpointer._lineage.parent_to_plan_with() for member in found.members]
        told = [
            [(each.name, each.step, each.save_index, each.reason) for each in plan.layers] for plan in plans if plan
        ]
        assert told[0] == told[1] == told[2]
        assert {step for _, step, _, _ in told[0]} == {1, 2}


# ---- A rank fails ----


@pytest.mark.parametrize("rank", [0, 1, 2])
@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), RuntimeError("\udcff of torch"), EmptyError()]
)
def test_rank_that_fails_before_the_capture_is_named_on_all(run: Path, rank: int, error: Exception) -> None:
    with team(run, 3, commit_timeout_secs=5.0) as found:
        found.save(1)
        found.members[rank].write_small_files = lambda directory: raise_(error)  # type: ignore[method-assign]
        outcomes = found.save(2)
        for other, outcome in enumerate(outcomes):
            assert isinstance(outcome, WriteError)
            if other != rank:
                assert outcome.kind == "rank-failed"
                assert f"{name_of(rank)} failed: cannot write the trainer's small files" in outcome.what
        del found.members[rank].write_small_files
        check_next_save_works(found, 3)
        assert published(run) == [1, 3]


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("stage", ["create_file", "link_file", "adopt_rest", "deliver"])
@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), EmptyError(), UnicodeError("\udcff")])
def test_rank_that_fails_in_the_background_is_named_on_all(
    run: Path, monkeypatch: pytest.MonkeyPatch, rank: int, stage: str, error: Exception
) -> None:
    with team(run, 3, strategy="parity", commit_timeout_secs=5.0) as found:
        found.save(1)
        method = getattr(SharedCheckpoint, stage)

        def fail(self: SharedCheckpoint, *arguments: Any) -> Any:
            return raise_(error) if self._seat.rank == rank else method(self, *arguments)

        with monkeypatch.context() as patch:
            patch.setattr(SharedCheckpoint, stage, fail)
            outcomes = found.save(2)
        assert all(isinstance(each, Exception) for each in outcomes)
        for other in {0, 1, 2} - {rank}:
            assert kinds(outcomes)[other] == "rank-failed"
            assert f"{name_of(rank)} failed: " in str(outcomes[other])
        for member in found.members:  # what is no fault of the disk ends the training; here it goes on
            member.checkpointer._open_run.uncollected = []
        check_next_save_works(found, 3)


@pytest.mark.parametrize("stage", ["seal", "publish"])
def test_coordinator_that_fails_after_the_vote_is_named_on_all(
    run: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    with team(run, 3, commit_timeout_secs=5.0) as found:
        found.save(1)
        with monkeypatch.context() as patch:
            patch.setattr(SharedCheckpoint, stage, lambda self, *_: raise_(WriteError("the disk is gone", kind="io")))
            outcomes = found.save(2)
        assert kinds(outcomes) == ["io", "rank-failed", "rank-failed"]
        assert f"{name_of(0)} failed: the disk is gone" in str(outcomes[1])
        check_next_save_works(found, 3)
        assert published(run) == [1, 3]


def test_name_that_is_no_utf8_hangs_nobody(run: Path) -> None:
    """What a path says goes into votes and verdicts, as JSON."""
    odd = run.parent / os.fsdecode(b"run-\xff")
    with team(odd, 2, filesystems=[FullDisk(), FullDisk()], commit_timeout_secs=5.0) as found:
        assert found.save(1) == [odd / "checkpoint-1"] * 2
        found.filesystems[1].is_full = True
        assert kinds(found.save(2)) == ["rank-failed", "no-space"]
        found.filesystems[1].is_full = False
        check_next_save_works(found, 3)


def test_full_disk_of_one_rank_leaves_older_checkpoints_alone(run: Path) -> None:
    with team(run, 3, strategy="parity", filesystems=[FullDisk() for _ in range(3)], commit_timeout_secs=5.0) as found:
        found.save(1)
        before = {path: path.read_bytes() for path in (run / "checkpoint-1").rglob("*") if path.is_file()}
        found.filesystems[1].is_full = True
        for step in (2, 3):
            outcomes = found.save(step)
            assert kinds(outcomes) == ["rank-failed", "no-space", "rank-failed"]
            for outcome in (outcomes[0], outcomes[2]):
                assert f"{name_of(1)} failed: cannot write a file of a checkpoint: No space left" in str(outcome)
            assert published(run) == [1]
            assert {path: path.read_bytes() for path in before} == before
        found.filesystems[1].is_full = False
        check_next_save_works(found, 4)


def test_disk_that_is_full_for_all_is_said_by_all(run: Path, tmp_path: Path) -> None:
    """A small file system of their own."""
    mounts = Mounts(tmp_path)
    with contextlib.closing(mounts):
        disk = mounts.mount("tmpfs", "size=3m")
        with team(disk / "run", 2, commit_timeout_secs=5.0) as found:
            found.save(1)
            (disk / "ballast").write_bytes(bytes(2 * 2**20))
            assert kinds(found.save(2)) == ["no-space", "no-space"]
            (disk / "ballast").unlink()
            check_next_save_works(found, 3)


def test_two_ranks_that_write_one_file_are_both_named(run: Path) -> None:
    with team(run, 3, commit_timeout_secs=5.0) as found:
        found.save(1)
        for rank in (1, 2):
            found.members[rank].write_small_files = lambda directory: (directory / "same.json").write_text("{}")  # type: ignore[method-assign, assignment]
        outcomes = found.save(2)
        # The file that came second was refused, unless both came at once: then the votes show it.
        text = str(outcomes[0])
        assert isinstance(outcomes[0], WriteError)
        assert ("same.json" in text and name_of(1) in text and name_of(2) in text) or "File exists" in text
        for rank in (1, 2):
            del found.members[rank].write_small_files
        check_next_save_works(found, 3)
        assert published(run) == [1, 3]


def test_error_can_be_sent_to_another_process(run: Path) -> None:
    with team(run, 2, strategy=["full", "parity"], commit_timeout_secs=5.0) as found:
        for outcome in found.save(1):
            again = pickle.loads(pickle.dumps(outcome))
            assert type(again) is WriteError
            assert str(again) == str(outcome)


# ---- Ranks that disagree ----


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"strategy": ["full", "parity", "full"]}, "choices of layers"),
        ({"width": [4, 5, 4]}, "models, optimizers or their sharding"),
        ({"spread_layers": [True, False, True]}, "no whole checkpoint"),
        ({"spread_layers": [False, True, True]}, None),
    ],
)
def test_ranks_that_disagree_are_told_of_what_and_with_whom(
    run: Path, options: dict[str, Any], what: str | None
) -> None:
    with team(run, 3, commit_timeout_secs=5.0, **options) as found:
        outcomes = found.save(1)
        assert all(isinstance(each, WriteError) for each in outcomes)
        if what is not None:
            assert kinds(outcomes) == ["ranks-disagree"] * 3
            assert len({str(each) for each in outcomes} | {str(outcomes[0])}) <= 2
            for outcome in outcomes:
                assert what in str(outcome)
                assert what == "no whole checkpoint" or name_of(1) in str(outcome)
        assert published(run) == []
        assert staged_names(run) == set()


def test_rank_that_saves_another_step_is_named_with_both_steps(run: Path) -> None:
    with team(run, 3) as found:
        found.save(1)
        found.wait_at_most(0.5)
        started = time.monotonic()
        outcomes = found.all(lambda member: member.save(3 if member.rank == 1 else 2))
        assert time.monotonic() - started < NEVER
        assert kinds(outcomes) == ["ranks-disagree"] * 3
        assert f"{name_of(1)} saves checkpoint-3, {name_of(0)} checkpoint-2" in str(outcomes[0])
        assert f"{name_of(1)} saves checkpoint-3, {name_of(0)} checkpoint-2" in str(outcomes[2])
        assert f"{name_of(0)} saves checkpoint-2, {name_of(1)} checkpoint-3" in str(outcomes[1])
        # What a rank handed over for a save that nobody judged stays until the run is opened again.
        check_next_save_works(found, 4, is_tidy=False)
        assert published(run) == [1, 4]
    with team(run, 3) as found:
        assert staged_names(run) == set()


def test_step_that_one_rank_saves_in_addition_harms_only_itself(run: Path) -> None:
    with team(run, 2) as found:
        found.save(1)
        found.wait_at_most(0.3)
        assert kinds([outcome_of(found.members[1], 2)]) == ["rank-late"]
        check_next_save_works(found, 3, is_tidy=False)
        found.wait_at_most(0.3)
        assert kinds([outcome_of(found.members[0], 4)]) == ["rank-late"]
        check_next_save_works(found, 5, is_tidy=False)


def test_same_step_again_gives_the_same_checkpoint(run: Path) -> None:
    with team(run, 2) as found:
        first = found.save(1)
        assert found.all(lambda member: member.begin_save(1).result(60)) == first
        assert published(run) == [1]


def test_step_is_tried_again_after_it_failed(run: Path) -> None:
    with team(run, 2, filesystems=[FullDisk(), FullDisk()], commit_timeout_secs=5.0) as found:
        found.save(1)
        found.filesystems[0].is_full = True
        assert kinds(found.save(2)) == ["no-space", "rank-failed"]
        found.filesystems[0].is_full = False
        check_next_save_works(found, 2)


# ---- Votes that are none ----


@pytest.mark.parametrize("rank", [1, 2])
def test_vote_that_cannot_be_read_names_its_rank(run: Path, rank: int) -> None:
    with team(run, 3, commit_timeout_secs=5.0) as found:
        found.save(1)
        change_votes(found, 2, rank, lambda data: b"\0garbage")
        outcomes = found.save(2)
        assert kinds(outcomes) == ["rank-failed"] * 3
        for outcome in outcomes:
            assert f"rank {rank} (host unknown, process 0) failed: its vote cannot be read" in str(outcome)
        check_next_save_works(found, 3)


def test_vote_in_the_name_of_another_rank_is_refused(run: Path) -> None:
    with team(run, 3, commit_timeout_secs=5.0) as found:
        found.save(1)
        forged = Vote(rank=2, step=2, host="h", pid=1, store="s", choice="c", schema_digest="d", parent=None)
        change_votes(found, 2, 1, lambda data: encode_message(forged))
        outcomes = found.save(2)
        assert "it is one of rank 2" in str(outcomes[0])
        check_next_save_works(found, 3)


def test_verdict_that_cannot_be_read_is_an_error(run: Path) -> None:
    with team(run, 2, commit_timeout_secs=5.0) as found:
        found.save(1)
        change(found, "save/2-0/verdict", lambda data: b"\0garbage")
        outcomes = found.save(2)
        assert kinds(outcomes) == [None, "ranks-disagree"]
        assert "what rank 0 says of it cannot be read" in str(outcomes[1])
        found.save(3)
        check_next_save_works(found, 4)


def change_votes(found: Team, step: int, rank: int, how: Callable[[bytes], bytes]) -> None:
    change(found, f"save/{step}-0/vote/{rank}", how)


def change(found: Team, wanted: str, how: Callable[[bytes], bytes]) -> None:
    """Change a message while it is read for the first time."""

    def meddle(rank: int, verb: str, key: str) -> None:
        if verb == "get" and key == wanted:
            with found.mailbox.mutex:
                found.mailbox.values[key] = how(found.mailbox.values[key])

    found.mailbox.meddle = meddle


# ---- Files that cannot be linked ----


@pytest.mark.parametrize("how", ["gone", "cut off"])
def test_layer_that_one_rank_lost_is_written_anew_by_all(run: Path, how: str) -> None:
    with team(run, 3, strategy="parity", commit_timeout_secs=5.0) as found:
        found.save(1)
        found.save(2)
        kept = [layer for layer in open_checkpoint(run / "checkpoint-2").manifest.layers if layer.step == 2]
        victim = run / "checkpoint-2" / kept[0].whole_weights.path
        if how == "gone":
            victim.unlink()
        else:
            victim.chmod(0o644)
            os.truncate(victim, 3)
        outcomes = found.save(3)
        assert sum(kind == "rank-failed" for kind in kinds(outcomes)) == 2
        assert all(isinstance(each, Exception) for each in outcomes)
        for outcome in outcomes:
            assert "a file to link is" in str(outcome)
        assert kinds(found.save(4)) == [None] * 3
        manifest = open_checkpoint(run / "checkpoint-4").manifest
        assert {layer.name: layer.step for layer in manifest.layers}[kept[0].name] == 4


@pytest.mark.parametrize("rest", ["skip", "q8"])
@pytest.mark.parametrize("spread_layers", [False, True])
def test_all_layers_of_a_checkpoint_that_was_removed_are_written_by_the_second_save(
    run: Path, rest: str, spread_layers: bool
) -> None:
    with team(
        run, 3, strategy="parity", rest=rest, width=64, spread_layers=spread_layers, commit_timeout_secs=5.0
    ) as found:
        for step in (1, 2, 3):
            assert kinds(found.save(step)) == [None] * 3
        shutil.rmtree(run / "checkpoint-3")
        outcomes = found.save(4)
        assert "missing-file" in kinds(outcomes)
        assert all(isinstance(each, Exception) for each in outcomes)
        check_next_save_works(found, 5)
        assert "the next save writes in full: " in "".join(str(each) for each in outcomes)


def test_second_failure_in_a_row_is_a_write_error_whatever_stopped_the_save(run: Path) -> None:
    with team(run, 2, strategy="parity", filesystems=[FullDisk(), FullDisk()], commit_timeout_secs=5.0) as found:
        found.save(1)
        found.save(2)
        found.filesystems[0].is_full = True
        found.save(3)
        found.filesystems[0].is_full = False
        shutil.rmtree(run / "checkpoint-2")
        raised = [error for outcome in found.all(raised_by_two_saves) for error in outcome]  # type: ignore[union-attr]
        assert [type(error) for error in raised] == [WriteError] * 2
        assert "missing-file" in kinds(raised)


def raised_by_two_saves(member: Member) -> list[TailorError]:
    raised = []
    for step in (4, 5):
        member.train()
        try:
            member.begin_save(step)
        except TailorError as err:
            raised.append(err)
        member.checkpointer.drain()
    return raised


def test_lost_layer_is_not_forgotten_by_those_who_missed_the_verdict(run: Path) -> None:
    with team(run, 2, strategy="parity") as found:
        found.save(1)
        found.save(2)
        kept = [layer for layer in open_checkpoint(run / "checkpoint-2").manifest.layers if layer.step == 2]
        (run / "checkpoint-2" / kept[0].whole_weights.path).unlink()

        def hide(rank: int, verb: str, key: str) -> None:
            if rank == 1 and key.endswith("3-0/verdict"):
                raise ConnectionError("hidden")

        found.mailbox.meddle = hide
        found.wait_at_most(0.3, ranks=[1])
        found.save(3)
        found.wait_at_most(PATIENT_SECS)
        assert kinds(found.save(4)) == ["ranks-disagree"] * 2  # only one of them knows of the layer
        assert kinds(found.save(5)) == [None] * 2
