"""The power fails after every operation of several ranks, and what was not fsynced is lost in every combination.

Whatever is seen of a run then is whole: every layer, and every rank's small files. Each guard of the protocol, taken
away, is missed.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from pathlib import Path
from typing import Any

import pytest

from crash_model import CrashState, RecordingFileSystem, build_image, crash_states
from faults import memory_directory, new_tree
from llmtailor import ballots
from llmtailor.checkpoint import open_checkpoint
from llmtailor.errors import WriteError
from llmtailor.manifest import MANIFEST_NAME, Manifest
from llmtailor.storage import SharedCheckpoint, StagedCheckpoint, list_checkpoints, staging
from llmtailor.verify import verify_checkpoint
from llmtailor.votes import Fault, Vote
from llmtailor.writer import Ballot, engine
from llmtailor.writer import ballot as ballot_module
from llmtailor.writer.ballot import Outcome
from ranks.rank_threads import Member, team

pytestmark = pytest.mark.filterwarnings("ignore::llmtailor.errors.TailorWarning")
RUN = Path("runs") / "a"


@pytest.fixture
def fast_directory() -> Iterator[Path]:
    with memory_directory() as directory:
        yield directory


@pytest.fixture(autouse=True)
def _few_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "_FSYNC_THREADS", 1)
    monkeypatch.setattr(engine, "_NUM_WRITERS", 1)
    monkeypatch.setattr(ballot_module, "_VISIBLE_SECS", 2.0)


def record(root: Path, size: int, steps: int = 2, **how: Any) -> RecordingFileSystem:
    """Ranks save; all operations of all of them are one journal."""
    options = {name: how.pop(name) for name in ("spread_layers", "commit_timeout_secs") if name in how}
    filesystem = RecordingFileSystem(new_tree(root, "live"), **how)
    acknowledged: dict[int, int] = {}
    mutex = threading.Lock()

    def save(member: Member, step: int) -> None:
        member.save(step)
        with mutex:  # the first rank that says so is the one that counts
            acknowledged[step] = size
            filesystem.mark(dict(acknowledged))

    filesystem.mark({})
    filesystems = [filesystem] * size
    run = root / "live" / RUN
    with team(run, size, strategy="parity", filesystems=filesystems, **options) as found:
        for step in range(1, steps + 1):
            found.all(lambda member, step=step: save(member, step))  # type: ignore[misc]
    return filesystem


def what_is_wrong(journal: list[Any], crash: CrashState, root: Path, size: int) -> str | None:
    build_image(journal, crash.image, root)
    path = root / RUN
    if not path.is_dir():
        return "the run is gone" if crash.state else None
    for entry in list_checkpoints(path):
        if not entry.has_manifest:
            return f"{entry.path.name} is visible without a manifest"
        report = verify_checkpoint(entry.path)
        if not report.is_good:
            return f"{entry.path.name} is visible and not whole: {report.problems[0].path} {report.problems[0].detail}"
        small = {file.path for file in open_checkpoint(entry.path).manifest.files}
        if missing := {f"state-{rank}.json" for rank in range(size)} - small:
            return f"{entry.path.name} is visible without {sorted(missing)}"
    there = {entry.step for entry in list_checkpoints(path)}
    if lost := set(crash.state or ()) - there:
        return f"{sorted(lost)} were acknowledged and are not there"
    return None


def violations(
    filesystem: RecordingFileSystem, root: Path, size: int, counts: Counter[str] | None = None
) -> Iterator[str]:
    seen: set[Hashable] = set()
    counts = Counter() if counts is None else counts
    for crash in crash_states(filesystem.journal, num_random=6):
        counts["states"] += 1
        counts["visible"] += any(name.startswith(f"{RUN}/checkpoint-") for name in crash.image)
        looks = (repr(crash.state), frozenset(crash.image.items()))
        if looks not in seen:
            seen.add(looks)
            counts["distinct"] += 1
            if fault := what_is_wrong(filesystem.journal, crash, root / "image", size):
                yield f"after operation {crash.after}: {fault}"


@pytest.mark.parametrize(
    ("size", "spread"),
    [(2, True), (2, False), pytest.param(3, True, marks=pytest.mark.slow)],
    ids=["2", "2-rank-0-writes", "3"],
)
def test_what_is_seen_is_whole(fast_directory: Path, size: int, spread: bool) -> None:
    filesystem = record(fast_directory, size, spread_layers=spread)
    counts: Counter[str] = Counter()
    assert list(violations(filesystem, fast_directory, size, counts)) == []
    assert counts["states"] > 10_000
    assert counts["visible"] > 2_000
    assert counts["distinct"] >= 5
    assert filesystem.journal[-1].state.keys() == {1, 2}  # type: ignore[union-attr]


def of_member(self: SharedCheckpoint) -> bool:
    return self._seat.rank != 0


def wait_until(is_so: Callable[[], bool]) -> None:
    end = time.monotonic() + 2
    while not is_so() and time.monotonic() < end:
        time.sleep(0.005)


def member_fsyncs_no_file(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    fsync = SharedCheckpoint._fsync_files

    def skip(self: SharedCheckpoint) -> None:
        if of_member(self):
            with self._mutex:
                for descriptor in self._open_files:
                    self._filesystem.close(descriptor)
                self._open_files.clear()
        else:
            fsync(self)

    monkeypatch.setattr(SharedCheckpoint, "_fsync_files", skip)
    return {}


def member_fsyncs_no_directory(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Of names that the member moved, only those that the coordinator's fsync reaches would last."""
    deliver = SharedCheckpoint.deliver

    def deliver_without(self: SharedCheckpoint, vote: bytes) -> None:
        if of_member(self):
            # It comes last, so that nobody else's fsync makes up for it.
            wait_until(lambda: (self._votes / "rank-00000.json").exists())
            self._filesystem = Lazy(self._filesystem)  # type: ignore[assignment]
        deliver(self, vote)

    monkeypatch.setattr(SharedCheckpoint, "deliver", deliver_without)
    return {}


class Lazy:
    """A file system that takes fsyncs of directories for granted."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        return (lambda path: None) if name == "fsync_directory" else getattr(self._inner, name)


def coordinator_does_not_fsync_the_common_directory(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    def is_common(path: Path) -> bool:
        return path.name.startswith("checkpoint-") and not path.parent.name.startswith("rank-")

    return {"is_lie": lambda called, path, moved: called == "fsync_directory" and is_common(path)}


def manifest_is_not_fsynced(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    return {"is_lie": lambda called, path, moved: called == "fsync" and path.name == MANIFEST_NAME}


def run_is_not_fsynced(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    return {"is_lie": lambda called, path, moved: called == "fsync_directory" and path.name == RUN.name}


def vote_before_fsync(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The files are in place and the vote is cast; the member makes them durable a little later."""
    fsync, post = SharedCheckpoint._fsync_files, Ballot._post_vote
    late: list[SharedCheckpoint] = []
    monkeypatch.setattr(
        SharedCheckpoint, "_fsync_files", lambda self: late.append(self) if of_member(self) else fsync(self)
    )

    def post_and_sync(self: Ballot, *arguments: Any) -> None:
        post(self, *arguments)
        if not self.ranks.is_coordinator and late:
            wait_until(late[0].target.exists)
            fsync(late.pop())

    monkeypatch.setattr(Ballot, "_post_vote", post_and_sync)
    return {}


def vote_before_delivery(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The member votes, and moves its files when the coordinator has published; nobody looks for its vote's file."""
    monkeypatch.setattr(SharedCheckpoint, "find_missing_votes", lambda self, ranks: [])
    deliver, post = SharedCheckpoint.deliver, Ballot._post_vote
    monkeypatch.setattr(
        SharedCheckpoint, "deliver", lambda self, vote: None if of_member(self) else deliver(self, vote)
    )

    def post_and_deliver(self: Ballot, *arguments: Any) -> None:
        post(self, *arguments)
        staged = self._staged
        if not self.ranks.is_coordinator and staged is not None:
            wait_until(staged.target.exists)
            staged._common = staged.target
            staged._filesystem.make_directory(staged._shared / "more")
            staged._votes = staged._shared / "more" / "votes"
            deliver(staged, b"")

    monkeypatch.setattr(Ballot, "_post_vote", post_and_deliver)
    return {}


def publish_before_seal(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    seal, publish = SharedCheckpoint.seal, SharedCheckpoint.publish
    manifests: list[bytes] = []
    monkeypatch.setattr(SharedCheckpoint, "seal", lambda self, manifest: manifests.append(manifest))

    def publish_and_seal(self: SharedCheckpoint) -> Path:
        with monkeypatch.context() as patch:
            patch.setattr(SharedCheckpoint, "_leave", lambda self: None)
            target = publish(self)
        self._common = target
        seal(self, manifests.pop())
        return target

    monkeypatch.setattr(SharedCheckpoint, "publish", publish_and_seal)
    return {}


def manifest_before_votes(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The coordinator publishes what it wrote itself, and does not ask the others."""
    monkeypatch.setattr(Ballot, "_collect", lambda self: {0: self._own})
    monkeypatch.setattr(ballot_module, "judge", lambda own, votes, **_: None)
    return {"spread_layers": False}


def coordinator_ignores_who_is_late(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    judge = ballot_module.judge

    def judge_some(own: Vote, votes: Any, **how: Any) -> Fault | None:
        fault = judge(own, votes, **how)
        return None if fault is not None and fault.kind == "rank-late" else fault

    monkeypatch.setattr(ballot_module, "judge", judge_some)
    deliver = SharedCheckpoint.deliver

    def deliver_late(self: SharedCheckpoint, vote: bytes) -> None:
        time.sleep(0.5 if of_member(self) else 0)
        deliver(self, vote)

    monkeypatch.setattr(SharedCheckpoint, "deliver", deliver_late)
    return {"spread_layers": False, "commit_timeout_secs": 0.2}


def coordinator_ignores_who_failed(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr(ballot_module, "judge", lambda own, votes, **_: None)
    monkeypatch.setattr(SharedCheckpoint, "find_missing_votes", lambda self, ranks: [])
    adopt = SharedCheckpoint.adopt_rest

    def fail(self: SharedCheckpoint) -> Any:
        if of_member(self):
            raise WriteError("the disk is full", kind="no-space")
        return adopt(self)

    monkeypatch.setattr(SharedCheckpoint, "adopt_rest", fail)
    return {"spread_layers": False}


def nobody_looks_for_the_votes_files(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """And one rank's directory is another by the same name."""
    monkeypatch.setattr(SharedCheckpoint, "find_missing_votes", lambda self, ranks: [])
    init = SharedCheckpoint.__init__

    def init_elsewhere(self: SharedCheckpoint, filesystem: Any, shared: Path, *rest: Any) -> None:
        if rest[1].rank:
            shared = shared.with_name(f"{shared.name}-of-another-machine")
        init(self, filesystem, shared, *rest)

    monkeypatch.setattr(SharedCheckpoint, "__init__", init_elsewhere)
    return {}


def member_acknowledges_its_own_part(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """When its files are durable, and not when the checkpoint is."""

    def wait_for_nothing(self: Ballot, own: Manifest) -> Outcome:
        return Outcome(manifest=own, digest="xxh3_128:" + "0" * 32)

    monkeypatch.setattr(Ballot, "wait", wait_for_nothing)
    count = Ballot.count

    def count_later(self: Ballot, *arguments: Any) -> Manifest:
        time.sleep(0.2)
        return count(self, *arguments)

    monkeypatch.setattr(Ballot, "count", count_later)
    return {}


def write_in_place(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Ranks hand over into the checkpoint itself."""
    init = SharedCheckpoint.__init__

    def init_in_place(self: SharedCheckpoint, filesystem: Any, shared: Path, target: Path, *rest: Any) -> None:
        init(self, filesystem, shared, target, *rest)
        self._common = target

    monkeypatch.setattr(SharedCheckpoint, "__init__", init_in_place)
    monkeypatch.setattr(SharedCheckpoint, "publish", lambda self: self._target)
    return {}


MUTANTS = [
    member_fsyncs_no_file,
    member_fsyncs_no_directory,
    coordinator_does_not_fsync_the_common_directory,
    manifest_is_not_fsynced,
    run_is_not_fsynced,
    vote_before_fsync,
    vote_before_delivery,
    publish_before_seal,
    manifest_before_votes,
    coordinator_ignores_who_is_late,
    coordinator_ignores_who_failed,
    nobody_looks_for_the_votes_files,
    member_acknowledges_its_own_part,
    write_in_place,
]


@pytest.mark.parametrize("mutate", MUTANTS, ids=[each.__name__ for each in MUTANTS])
def test_every_guard_is_needed(
    fast_directory: Path, monkeypatch: pytest.MonkeyPatch, mutate: Callable[[pytest.MonkeyPatch], dict[str, Any]]
) -> None:
    monkeypatch.setattr(ballots, "_PART_SECS", 0.1)  # some mutants never say that they heard
    filesystem = record(fast_directory, 2, steps=1, **mutate(monkeypatch))
    assert next(violations(filesystem, fast_directory, 2), None) is not None


def test_model_knows_its_own_limits() -> None:
    """If these go, the mutants above test something else than they say."""
    assert {"deliver", "seal", "publish", "find_missing_votes", "_leave"} <= set(vars(SharedCheckpoint))
    assert {"_fsync_files", "adopt_rest"} <= set(vars(StagedCheckpoint))
    assert {"wait", "count", "_collect", "_post_vote"} <= set(vars(Ballot))
