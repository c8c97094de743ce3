"""A trainer is killed again and again, at any instant; nothing acknowledged is lost and training always goes on."""

from __future__ import annotations

import contextlib
import os
import random
import selectors
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmtailor.checkpoint import open_checkpoint
from llmtailor.storage import list_checkpoints
from llmtailor.verify import verify_checkpoint

NUM_KILLS = {"lazy": 60, "patient": 20}
NUM_KILLS_WITH_CODES = 20


class Nursery:
    """The forking process and what its children said."""

    def __init__(self) -> None:
        script = Path(__file__).with_name("killable_trainer.py")
        self._process = subprocess.Popen(
            [sys.executable, str(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert self._process.stdout is not None
        os.set_blocking(self._process.stdout.fileno(), False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._process.stdout, selectors.EVENT_READ)
        self._rest = b""

    def start(self, strategy: str, directory: Path, steps: int, pace: str) -> int:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{strategy} {directory} {steps} {pace}\n".encode())
        self._process.stdin.flush()
        # What it said while it warmed up, and of children that ended by themselves, comes first.
        return int(next(line for line in self.lines(60) if line.startswith("pid ")).removeprefix("pid "))

    def lines(self, timeout_secs: float) -> Iterator[str]:
        """Lines as they come, until the timeout."""
        assert self._process.stdout is not None
        end = time.monotonic() + timeout_secs
        while True:
            while b"\n" in self._rest:
                line, _, self._rest = self._rest.partition(b"\n")
                yield line.decode()
            if not self._selector.select(max(0.0, end - time.monotonic())):
                return
            self._rest += self._process.stdout.read() or b""

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


@pytest.fixture
def nursery() -> Iterator[Nursery]:
    nursery = Nursery()
    with contextlib.closing(nursery):
        yield nursery


def finish(nursery: Nursery, strategy: str, directory: Path, steps: int, pace: str) -> str:
    nursery.start(strategy, directory, steps, pace)
    said = []
    for line in nursery.lines(120):
        said.append(line)
        if line == "ended":
            break
    done = [line.removeprefix("done ") for line in said if line.startswith("done ")]
    assert done, said
    return done[0]


def wait_for_saves(nursery: Nursery, count: int) -> list[str]:
    said: list[str] = []
    while sum(line.startswith("ack ") for line in said) < count:
        said.append(next(nursery.lines(60)))
        assert not said[-1].startswith("lost"), said
    return said


def holds_codes(checkpoint: Path) -> bool:
    return any(layer.encoding is not None for layer in open_checkpoint(checkpoint).manifest.layers)


def phases(run: Path) -> list[str]:
    """How far the saves had come that were in flight when their process was killed."""
    found = []
    for attempt in (run / "_staging").glob("*-*"):
        names = {path.name for path in attempt.rglob("*") if path.is_file()}
        if "tailor.json" in names:
            found.append("committed")
        elif any(name.startswith("model-") for name in names):
            found.append("written")
        elif not attempt.name.startswith("remove-"):
            found.append("captured")
    return found


@pytest.mark.parametrize(
    ("strategy", "pace"),
    [
        ("full", "lazy"),
        ("parity", "lazy"),
        pytest.param("parity", "patient", marks=pytest.mark.slow),
        pytest.param("parity+q8", "lazy", marks=pytest.mark.slow),
        pytest.param("parity+q8", "patient", marks=pytest.mark.slow),
    ],
)
def test_sigkill_at_any_instant_loses_nothing_acknowledged(
    tmp_path: Path, nursery: Nursery, strategy: str, pace: str
) -> None:
    moments = random.Random(20)
    has_codes = "+" in strategy
    num_kills = NUM_KILLS_WITH_CODES if has_codes else NUM_KILLS[pace]
    run = tmp_path / "run"
    acknowledged = 0
    hit: Counter[str] = Counter()
    for kill in range(num_kills):
        pid = nursery.start(strategy, run, 10_000, pace)
        said = wait_for_saves(nursery, moments.randrange(4))
        # From before the run is opened, through every part of a save, to the middle of the next one.
        time.sleep(moments.uniform(0.0, 0.06))
        os.kill(pid, signal.SIGKILL)
        for line in nursery.lines(60):
            said.append(line)
            if line == "ended":
                break
        assert not [line for line in said if line.startswith("lost")], (kill, said)
        acknowledged = max([acknowledged, *(int(line[4:]) for line in said if line.startswith("ack "))])
        hit.update(phases(run))
        if acknowledged:
            entries = list_checkpoints(run)
            assert entries[-1].step >= acknowledged, (kill, entries)
            for entry in entries:
                assert verify_checkpoint(entry.path).is_good, (kill, entry)
    assert acknowledged > num_kills
    assert hit.total() >= num_kills // 5, "the kills missed the saves; the test shows nothing"
    assert hit["written"] >= 3, hit
    assert min(hit["captured"], hit["committed"]) >= 3 or pace == "patient" or has_codes, hit
    assert holds_codes(list_checkpoints(run)[-1].path) == has_codes
    assert not list(run.glob("*.bad*")) + list(run.glob("*.superseded*"))

    steps = acknowledged + 20
    killed = finish(nursery, strategy, run, steps, pace)
    if strategy == "full":
        assert killed == finish(nursery, strategy, tmp_path / "uninterrupted", steps, "patient")
