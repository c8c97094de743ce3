"""Every operation on the file system of one rank fails once, at every place of a save of two ranks (after SQLite).

Never is half a checkpoint seen, both ranks are told in typed errors, and the next save works.
"""

from __future__ import annotations

import errno
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from faults import Fault, FaultyFileSystem, memory_directory, staged_names
from llmtailor.errors import WriteError
from llmtailor.storage import LocalFileSystem, direct_file, staging
from llmtailor.strategies import SaveContext
from llmtailor.writer import engine
from ranks.rank_threads import NEVER, Team, check_next_save_works, kinds, published, team

pytestmark = pytest.mark.filterwarnings("ignore::llmtailor.errors.TailorWarning")
KINDS = {errno.EIO: "io", errno.ENOSPC: "no-space"}


def same_every_time(context: SaveContext) -> set[str]:
    """Each rank writes a layer and links others, and the n-th operation is the same in every save."""
    return {"embed_tokens", "layers.0"}


@pytest.fixture
def run() -> Iterator[Path]:
    with memory_directory() as directory:
        yield directory / "run"


@pytest.fixture(autouse=True)
def _in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "_FSYNC_THREADS", 1)
    monkeypatch.setattr(engine, "_NUM_WRITERS", 1)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    ("number", "moment", "is_direct"),
    [
        pytest.param(errno.ENOSPC, "before", False, id="ENOSPC"),
        pytest.param(errno.EIO, "after", True, id="EIO-after-the-deed"),
        pytest.param(errno.EIO, "half", False, id="EIO-half", marks=pytest.mark.slow),
        pytest.param(errno.ENOSPC, "before", True, id="ENOSPC-direct", marks=pytest.mark.slow),
    ],
)
def test_error_at_every_operation(
    run: Path, monkeypatch: pytest.MonkeyPatch, rank: int, number: int, moment: str, is_direct: bool
) -> None:
    if is_direct:
        monkeypatch.setattr(direct_file, "_MIN_DIRECT_NBYTES", 1)
    filesystems = [FaultyFileSystem(), FaultyFileSystem()]
    hit: Counter[str] = Counter()
    step = 2
    with team(run, 2, strategy=same_every_time, filesystems=filesystems, commit_timeout_secs=30.0) as found:
        assert kinds(found.save(1)) == kinds(found.save(2)) == [None, None]
        for at in range(1, 200):
            failing = filesystems[rank]
            failing.calls.clear()
            failing.has_fired = False
            failing.fault = Fault(at=at, errno=number, moment=moment)  # type: ignore[arg-type]
            check_failed_save(found, step + 1, rank, KINDS[number])
            if not failing.has_fired:
                break
            hit[failing.calls[at - 1]] += 1
            failing.heal()
            step += 2
            assert kinds(found.save(step)) == [None, None]
            check_visible(found, step)
    assert hit.total() > 40
    assert {"make_directory", "create", "link", "rename", "fsync", "fsync_directory", "close", "free_space"} <= set(hit)
    assert len(published(run)) > hit.total()


def check_failed_save(found: Team, step: int, rank: int, kind: str) -> None:
    outcomes = found.save(step)
    if kinds(outcomes) == [None, None]:  # of what is only tidying up nobody has to hear
        return
    own, other = outcomes[rank], outcomes[1 - rank]
    assert isinstance(own, WriteError)
    assert own.kind == kind
    assert isinstance(other, WriteError)
    assert other.kind == "rank-failed"
    assert f"rank {rank} (" in other.what
    check_visible(found, step)


def check_visible(found: Team, step: int) -> None:
    names = {path.name for path in found.directory.glob("checkpoint-*")}
    assert f"checkpoint-{step + 1}" not in names
    for entry in sorted(names):
        assert {each.name for each in (found.directory / entry).glob("state-*")} == {"state-0.json", "state-1.json"}
        assert (found.directory / entry / "tailor.json").is_file()


class FullUntilOthersAreDone(LocalFileSystem):
    """Has no room for an attempt's own directory, so many times, and says so when the other rank has delivered."""

    num_refusals = 0

    def make_directory(self, path: Path) -> None:
        if path.parent.name == "rank-00000" and self.num_refusals:
            self.num_refusals -= 1
            vote = path.parents[1] / "votes" / "rank-00001.json"
            wait_until(vote.is_file)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        super().make_directory(path)


@pytest.mark.parametrize(
    ("num_refusals", "expected"), [(1, [None, None]), (2, ["no-space", "rank-failed"])], ids=["once", "twice"]
)
def test_second_try_for_room_finds_what_others_delivered(
    run: Path, num_refusals: int, expected: list[str | None]
) -> None:
    filesystems = [FullUntilOthersAreDone(), LocalFileSystem()]
    with team(run, 2, strategy=same_every_time, filesystems=filesystems) as found:
        found.save(1)
        filesystems[0].num_refusals = num_refusals
        assert kinds(found.save(2)) == expected
        assert filesystems[0].num_refusals == 0
        assert staged_names(run) == set()
        check_next_save_works(found, 3)
    assert published(run) == ([1, 2, 3] if expected == [None, None] else [1, 3])


def wait_until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + NEVER
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_ranks_leave_nothing_behind_but_what_could_not_be_removed(run: Path) -> None:
    filesystems = [FaultyFileSystem(), FaultyFileSystem()]
    with team(run, 2, strategy=same_every_time, filesystems=filesystems) as found:
        found.save(1)
        for at in range(1, 60, 4):
            filesystems[1].calls.clear()
            filesystems[1].fault = Fault(at=at, errno=errno.EIO)
            found.save(2 * at)
            failed = filesystems[1].calls[at - 1] if len(filesystems[1].calls) >= at else ""
            filesystems[1].heal()
            found.save(2 * at + 1)
            assert failed.startswith("remove") or staged_names(run) == set(), failed
