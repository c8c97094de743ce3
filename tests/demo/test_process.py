"""Starting, hearing and killing processes, with short scripts in place of those that train."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmtailor.demo import process
from llmtailor.demo.events import ChildSpec, Event, LossEvent
from llmtailor.demo.process import find_attempt, observe_attempt, run_child
from llmtailor.errors import TailorError

Script = Callable[[str], ChildSpec]

PRELUDE = """
import json, os, pathlib, sys, time
spec = json.loads(sys.argv[1])
run = pathlib.Path(spec["run"])
def loss(step):
    os.write(spec["events_fd"], json.dumps({"event": "loss", "step": step, "loss": 1.0}).encode() + b"\\n")
def stage(step, files):
    attempt = run / "_staging" / f"{step}-0123456789abcdef" / f"checkpoint-{step}"
    attempt.mkdir(parents=True)
    for number in range(files):
        (attempt / f"file-{number}").write_bytes(b"0123456789")
    return attempt
"""


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Script:
    """Makes the child run this text after the prelude."""

    def prepare(text: str) -> ChildSpec:
        monkeypatch.setattr(
            process, "child_command", lambda spec: [sys.executable, "-c", PRELUDE + text, spec.encode()]
        )
        return ChildSpec(
            run=str(tmp_path / "run"),
            strategy="parity",
            resume=False,
            keep=None,
            steps=8,
            save_steps=2,
            size="tiny",
            seed=0,
            threads=1,
        )

    return prepare


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "child.log"


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_events_are_heard_in_order(script: Script, log: Path) -> None:
    heard: list[Event] = []
    life = run_child(script("loss(1); loss(2); print('a word')"), log=log, listen=heard.append)
    assert heard == [LossEvent(step=1, loss=1.0), LossEvent(step=2, loss=1.0)]
    assert life.events == tuple(heard)
    assert life.killed is None
    assert life.last_step == 2
    assert log.read_text() == "a word\n"


def test_failure_shows_the_end_of_the_log(script: Script, log: Path) -> None:
    spec = script("loss(1)\nfor n in range(50): print('line', n)\nraise SystemExit('the reason')")
    with pytest.raises(TailorError) as caught:
        run_child(spec, log=log, listen=lambda event: None)
    assert caught.value.kind == "demo-child-failed"
    assert caught.value.path == str(log)
    assert "the reason" in str(caught.value)
    assert "line 0" not in str(caught.value)


def test_silence_is_not_waited_for_forever(script: Script, log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "_SILENCE_SECS", 0.5)
    with pytest.raises(TailorError) as caught:
        run_child(script("time.sleep(60)"), log=log, listen=lambda event: None)
    assert caught.value.kind == "demo-child-silent"


def test_child_is_killed_in_the_middle_of_the_save(script: Script, log: Path) -> None:
    spec = script(
        """
loss(2); stage(2, 9)
loss(4); attempt = stage(4, 8)
os.link(attempt / "file-0", run / "older"); time.sleep(60)
"""
    )
    began = time.monotonic()
    life = run_child(spec, log=log, listen=lambda event: None, kill_from=4)
    assert time.monotonic() - began < 30
    assert life.killed is not None
    assert (life.killed.step, life.killed.was_published, life.last_step) == (4, False, 4)
    # The kill may fall between the making of a file and the writing of its 10 bytes.
    assert 10 * (life.killed.num_files - 1) <= life.killed.nbytes <= 10 * life.killed.num_files


def test_save_without_files_is_not_shot_at(script: Script, log: Path) -> None:
    spec = script("loss(4); stage(4, 0).rmdir(); loss(5)")
    with pytest.raises(TailorError) as caught:
        run_child(spec, log=log, listen=lambda event: None, kill_from=4)
    assert caught.value.kind == "demo-not-killed"


def test_listener_that_raises_leaves_no_child_behind(script: Script, log: Path) -> None:
    class StopError(Exception):
        pass

    pids: list[int] = []

    def listen(event: Event) -> None:
        assert isinstance(event, LossEvent)
        pids.append(event.step)
        raise StopError

    with pytest.raises(StopError):
        run_child(script("loss(os.getpid()); time.sleep(60)"), log=log, listen=listen)
    assert not is_alive(pids[0])


def test_interrupt_in_the_middle_of_a_start_leaves_no_child_behind(
    script: Script, log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[subprocess.Popen[bytes]] = []

    class Interrupted(subprocess.Popen[bytes]):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            started.append(self)
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(subprocess, "Popen", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_child(script("time.sleep(60)"), log=log, listen=lambda event: None)
    (child,) = started
    assert child.wait(10) == -signal.SIGKILL


def test_child_does_not_see_a_launcher(script: Script, log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")
    spec = script("print(json.dumps([os.environ.get('WORLD_SIZE'), os.environ['OMP_WAIT_POLICY']]))")
    run_child(spec, log=log, listen=lambda event: None)
    assert json.loads(log.read_text()) == [None, "PASSIVE"]


def make_attempt(run: Path, step: int, files: int) -> Path:
    attempt = run / "_staging" / f"{step}-00ff"
    (attempt / f"checkpoint-{step}" / "optimizer").mkdir(parents=True)
    for number in range(files):
        (attempt / f"checkpoint-{step}" / "optimizer" / str(number)).write_bytes(b"ten bytes!")
    return attempt


def test_only_attempts_with_files_at_the_wanted_step_count(tmp_path: Path) -> None:
    assert find_attempt(tmp_path, 4) is None
    make_attempt(tmp_path, 2, 20)
    make_attempt(tmp_path, 8, 1)
    (tmp_path / "_staging" / "lock").touch()
    assert find_attempt(tmp_path, 4) is None
    attempt = make_attempt(tmp_path, 6, 20)
    assert find_attempt(tmp_path, 4) == attempt


def test_links_are_not_counted_as_debris(tmp_path: Path) -> None:
    attempt = make_attempt(tmp_path, 6, 3)
    os.link(attempt / "checkpoint-6" / "optimizer" / "0", tmp_path / "older")
    debris = observe_attempt(tmp_path, attempt)
    assert (debris.num_files, debris.nbytes, debris.was_published) == (2, 20, False)


def test_save_that_was_published_in_time_is_recognised(tmp_path: Path) -> None:
    attempt = make_attempt(tmp_path, 6, 0)
    (tmp_path / "checkpoint-6").mkdir()
    (tmp_path / "checkpoint-6" / "tailor.json").touch()
    assert observe_attempt(tmp_path, attempt).was_published
    assert observe_attempt(tmp_path, tmp_path / "_staging" / "6-gone").num_files == 0
