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
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmtailor.storage import list_checkpoints
from llmtailor.verify import verify_checkpoint

NUM_KILLS = 45


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

    def start(self, strategy: str, directory: Path, steps: int) -> int:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{strategy} {directory} {steps}\n".encode())
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


def finish(nursery: Nursery, strategy: str, directory: Path, steps: int) -> str:
    nursery.start(strategy, directory, steps)
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


@pytest.mark.parametrize("strategy", ["full", "parity"])
def test_sigkill_at_any_instant_loses_nothing_acknowledged(tmp_path: Path, nursery: Nursery, strategy: str) -> None:
    moments = random.Random(20)
    run = tmp_path / "run"
    acknowledged, in_flight_kills = 0, 0
    for kill in range(NUM_KILLS):
        pid = nursery.start(strategy, run, 10_000)
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
        in_flight_kills += any(entry.is_dir() for entry in (run / "_staging").glob("*")) if run.exists() else 0
        if acknowledged:
            entries = list_checkpoints(run)
            assert entries[-1].step >= acknowledged, (kill, entries)
            for entry in entries:
                assert verify_checkpoint(entry.path).is_good, (kill, entry)
    assert acknowledged > NUM_KILLS
    assert in_flight_kills >= NUM_KILLS // 5, "the kills missed the saves; the test shows nothing"
    assert not list(run.glob("*.bad*")) + list(run.glob("*.superseded*"))

    steps = acknowledged + 20
    killed = finish(nursery, strategy, run, steps)
    if strategy == "full":
        assert killed == finish(nursery, strategy, tmp_path / "uninterrupted", steps)
