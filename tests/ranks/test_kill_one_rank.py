"""One gloo rank is killed, or stopped, at any instant of a save; nothing half is seen, and nobody waits for ever."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llmtailor.checkpoint import open_checkpoint
from llmtailor.storage import list_checkpoints
from llmtailor.verify import verify_checkpoint

DEADLINE_SECS = 2 * 1.0 + 1.0
"""A rank waits for the verdict no longer, by the program's figures."""
SLACK_SECS = 6.0
"""For two cores that have other things to do."""


class Nursery:
    """The forking process, and what its ranks say."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("killable_ranks.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        )
        assert self._process.stdout is not None
        os.set_blocking(self._process.stdout.fileno(), False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._process.stdout, selectors.EVENT_READ)
        self._rest = b""

    def start(self, **command: Any) -> list[int]:
        """Fork ranks; their process ids."""
        assert self._process.stdin is not None
        self._process.stdin.write((json.dumps(command) + "\n").encode())
        self._process.stdin.flush()
        pids: list[int] = self.wait_for("started", 1)[0]["pids"]
        return pids

    def wait_for(self, event: str, count: int, timeout_secs: float = 60) -> list[dict[str, Any]]:
        """What was said until something was said so often."""
        said: list[dict[str, Any]] = []
        for line in self._lines(timeout_secs):
            said.append(json.loads(line))
            if sum(each["event"] == event for each in said) == count:
                return said
        raise AssertionError(f"no {event} in {timeout_secs} s: {said}")

    def _lines(self, timeout_secs: float) -> Iterator[str]:
        assert self._process.stdout is not None
        end = time.monotonic() + timeout_secs
        while True:
            while b"\n" in self._rest:
                line, _, self._rest = self._rest.partition(b"\n")
                yield line.decode()
            if not self._selector.select(max(0.0, end - time.monotonic())):
                return
            self._rest += self._process.stdout.read() or b""

    def play(self, **command: Any) -> list[dict[str, Any]]:
        """All that ranks said until all had ended."""
        self.start(**command)
        return self.wait_for("ended", 1)

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    nursery = Nursery()
    with contextlib.closing(nursery):
        yield nursery


def events(said: list[dict[str, Any]], event: str, rank: int | None = None) -> list[dict[str, Any]]:
    return [each for each in said if each["event"] == event and rank in (None, each.get("rank"))]


def shape(checkpoint: Path) -> dict[str, Any]:
    """Which files a checkpoint must have, whatever its step."""
    manifest = open_checkpoint(checkpoint).manifest
    return {
        "files": sorted(file.path for file in manifest.all_files),
        "parts": {layer.name: [part.rank for part in layer.parts] for layer in manifest.layers},
    }


class Watched:
    """A run whose ranks die, and what must be true of it at any time."""

    def __init__(self, nursery: Nursery, directory: Path, framework: str, size: int) -> None:
        self.nursery = nursery
        self.directory = directory
        self.size = size
        self.framework = framework
        self.acknowledged = 0
        self.newest = 0
        self.states: Counter[str] = Counter()
        self.counts = {each["rank"]: each for each in events(self._play(), "counted")}
        """Of a save in which nobody dies, what each rank does."""
        self.shape = shape(directory / "checkpoint-1")

    def _play(self, **how: Any) -> list[dict[str, Any]]:
        said = self.nursery.play(directory=str(self.directory), framework=self.framework, size=self.size, **how)
        assert not events(said, "lost") + events(said, "broken"), said
        saved = [each["step"] for each in events(said, "saved")]
        resumed = {each["step"] for each in events(said, "resumed")}
        assert len(resumed) == 1
        newest = list_checkpoints(self.directory)[-1].step if events(said, "saved") else 0
        assert min(resumed) >= self.acknowledged, "an acknowledged checkpoint was not resumed from"
        assert min(resumed) == self.newest, "not the newest was resumed from"
        self.newest = newest
        self.acknowledged = max([self.acknowledged, *saved])
        # The save before the one in which a rank dies.
        assert saved.count(min(resumed) + 1) == self.size, said
        return said

    def check_whole(self) -> None:
        entries = list_checkpoints(self.directory)
        assert entries[-1].step >= self.acknowledged
        for entry in entries:
            assert entry.has_manifest
            report = verify_checkpoint(entry.path)
            assert report.is_good, (entry, report.problems)
            assert shape(entry.path) == self.shape

    def kill(self, victim: int, where: str, at: float) -> None:
        """One more start of all ranks, in which one dies."""
        said = self._play(victim=victim, how="kill", where=where, at=at)
        self.check_whole()
        step = events(said, "resumed")[0]["step"] + 2
        is_dead = not events(said, "counted", victim)
        for rank in {*range(self.size)} - {victim}:
            ends = [each for each in said if each.get("rank") == rank and each.get("step") == step]
            last = ends[-1]
            assert last["event"] in ("saved", "failed"), said
            assert last["secs"] < DEADLINE_SECS + SLACK_SECS, last
            if last["event"] == "failed":
                assert is_dead
                assert last["kind"] in ("rank-late", "rank-failed"), last
                assert f"rank {victim}" in last["text"], last
            self.states[last["event"]] += 1
        self.states["dead"] += is_dead
        self.states["published"] += self.newest == step


def instants(counts: dict[str, Any], num_files: int, num_messages: int, num_seconds: int) -> list[tuple[str, float]]:
    """Spread over all that a rank does in a save."""
    files = [("files", 1 + round(n * (counts["files"] - 1) / max(1, num_files - 1))) for n in range(num_files)]
    messages = [("messages", 1 + n) for n in range(num_messages)]
    seconds = [("seconds", 0.002 * (n + 1)) for n in range(num_seconds)]
    return [*files, *messages, *seconds]


@pytest.mark.parametrize("victim", [0, 1])
def test_some_instants(nursery: Nursery, tmp_path: Path, victim: int) -> None:
    run = Watched(nursery, tmp_path / "run", "fsdp", 2)
    for where, at in instants(run.counts[victim], 3, 1, 0):
        run.kill(victim, where, at)
    assert run.states["dead"] >= 3
    assert run.states["failed"] >= 1


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize(("framework", "size"), [("fsdp", 2), ("ddp", 2), ("fsdp", 3)])
def test_many_instants(nursery: Nursery, tmp_path: Path, framework: str, size: int, victim: int) -> None:
    run = Watched(nursery, tmp_path / "run", framework, size)
    for where, at in instants(run.counts[victim], 26, 6, 10):
        run.kill(victim, where, at)
    assert run.states["dead"] >= 30, run.states
    assert run.states["failed"] >= 15, run.states
    # Also of a rank 0 that dies before it can say so.
    assert run.states["published"] >= 1, run.states


# ---- A rank that is stopped, and goes on ----


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize(
    ("where", "at"),
    [("files", 12), pytest.param("files", 40, marks=pytest.mark.slow), ("messages", 1), ("messages", 3)],
)
def test_rank_that_is_stopped_holds_nobody_up(
    nursery: Nursery, tmp_path: Path, victim: int, where: str, at: int
) -> None:
    """SIGSTOP; rank 0 keeps the store, so with it nobody gets an answer either."""
    run, flag = tmp_path / "run", tmp_path / "go on"
    pids = nursery.start(
        directory=str(run), framework="fsdp", size=2, victim=victim, how="stop", where=where, at=at, goes_on=str(flag)
    )
    other = 1 - victim
    try:
        said = wait_for_rank(nursery, other)
        outcome = said[-2]
        assert outcome["step"] == 2
        assert events(said, "returned", other)[-1]["secs"] < DEADLINE_SECS + SLACK_SECS
        assert outcome["secs"] < DEADLINE_SECS + SLACK_SECS
        if outcome["event"] == "failed":
            assert outcome["kind"] == "rank-late", outcome
            assert f"rank {victim}" in outcome["text"], outcome
        for entry in list_checkpoints(run):
            assert verify_checkpoint(entry.path).is_good
    finally:
        os.kill(pids[victim], signal.SIGCONT)
        flag.touch()
    said = nursery.wait_for("ended", 1)
    assert not events(said, "lost") + events(said, "broken"), said
    # One of the two saves after it may still be lost: a rank did not know what the others had published meanwhile.
    assert [each["step"] for each in events(said, "saved")].count(4) == 2, said
    for entry in list_checkpoints(run):
        assert verify_checkpoint(entry.path).is_good
    assert list_checkpoints(run)[-1].step == 4


def wait_for_rank(nursery: Nursery, rank: int) -> list[dict[str, Any]]:
    """What a rank said until it had heard of its second save."""
    found: list[dict[str, Any]] = []
    while not events(found, "counted", rank):
        found += [each for each in nursery.wait_for("counted", 1) if each.get("rank") == rank]
    return found


# ---- Two directories of one name ----


def test_directory_that_is_another_on_one_rank_is_refused_on_all(nursery: Nursery, tmp_path: Path) -> None:
    """A mount namespace of its own, as another machine would have where nothing is mounted."""
    run = tmp_path / "run"
    run.mkdir()
    said = nursery.play(directory=str(run), framework="fsdp", size=2, victim=1, how="mount at open")
    if events(said, "no mounts"):
        pytest.skip("cannot mount; run as root")
    refused = events(said, "refused")
    assert [each["kind"] for each in refused] == ["other-store"] * 2, said
    assert all(str(run) in each["text"] for each in refused)
    assert any("rank 1" in each["text"] for each in refused)
    assert list_checkpoints(run) == []


def test_directory_that_is_mounted_over_between_saves_fails_the_save(nursery: Nursery, tmp_path: Path) -> None:
    run, flag = tmp_path / "run", tmp_path / "go on"
    flag.touch()
    how: dict[str, Any] = {"victim": 1, "how": "mount", "goes_on": str(flag), "strategy": "full"}
    said = nursery.play(directory=str(run), framework="fsdp", size=2, **how)
    if events(said, "no mounts"):
        pytest.skip("cannot mount; run as root")
    failed = events(said, "failed")
    assert [(each["step"], each["kind"]) for each in failed] == [(2, "ranks-disagree")] * 2, said
    assert all("rank 1" in each["text"] and str(run) in each["text"] for each in failed)
    assert sorted(each["step"] for each in events(said, "saved")) == [1, 1, 3, 3, 4, 4]
    assert [entry.step for entry in list_checkpoints(run)] == [1, 3, 4]
    for entry in list_checkpoints(run):
        assert verify_checkpoint(entry.path).is_good
