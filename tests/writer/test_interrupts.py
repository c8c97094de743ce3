"""Ctrl-C at any moment of a save: the engine ends every save, and whoever waits for it is not left waiting.

An exception of a signal's handler may come between any two operations of the thread that trains, and in no other.
"""

from __future__ import annotations

import random
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from llmtailor import checkpointer
from llmtailor.storage import list_checkpoints
from llmtailor.verify import verify_checkpoint
from llmtailor.writer import engine
from llmtailor.writer.bell import Bell
from writer.trainings import Training

END_SECS = 30
_Trace = Callable[[FrameType, str, Any], Any]


class InterruptedQueue:
    """A queue that gets a SIGINT when something is put into it for the first time."""

    def __init__(self, queue: Any, when: str) -> None:
        self._queue = queue
        self._when = when

    def put(self, item: object) -> None:
        when, self._when = self._when, ""
        if when == "before":
            signal.raise_signal(signal.SIGINT)
        self._queue.put(item)
        if when == "after":
            signal.raise_signal(signal.SIGINT)

    def get(self) -> object:
        return self._queue.get()


@pytest.fixture
def training(fast_directory: Path) -> Iterator[Training]:
    training = Training(directory=fast_directory / "run")
    training.train()
    yield training
    assert training.checkpointer.drain(END_SECS), "a save never ends"
    training.close()
    assert all(verify_checkpoint(entry.path).is_good for entry in list_checkpoints(training.directory))


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_save_that_was_handed_over_is_published(training: Training, when: str) -> None:
    training.save().result()
    found: Any = training.checkpointer._engine
    found._captures = InterruptedQueue(found._captures, when)
    training.train()
    with pytest.raises(KeyboardInterrupt):
        training.save()
    training.train()  # waits until the state is captured
    training.save().result()
    assert [entry.step for entry in list_checkpoints(training.directory)] == [1, 2, 3]
    training.check(training.directory / "checkpoint-2")
    assert all(thread.is_alive() for thread in found._threads)


def test_a_save_that_was_handed_over_is_known_to_be(training: Training, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is waited for, and asked for again it is not saved twice."""
    submit = engine.Engine.submit

    def submit_and_interrupt(*args: Any, **kwargs: Any) -> None:
        submit(*args, **kwargs)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(engine.Engine, "submit", submit_and_interrupt)
        with pytest.raises(KeyboardInterrupt):
            training.save()
    handle = training.save()
    training.check(handle.result())
    assert handle.error is None


def test_threads_that_were_half_started(training: Training, monkeypatch: pytest.MonkeyPatch) -> None:
    join = threading.Thread.join

    def interrupt(thread: threading.Thread, timeout: float | None = None) -> None:
        if thread.name == "llmtailor-start":
            monkeypatch.setattr(threading.Thread, "join", join)
            raise KeyboardInterrupt
        join(thread, timeout)

    monkeypatch.setattr(threading.Thread, "join", interrupt)
    with pytest.raises(KeyboardInterrupt):
        training.save()
    training.check(training.save().result())
    names = sorted(thread.name for thread in training.checkpointer._engine._threads)
    assert names == ["llmtailor-capture", "llmtailor-commit", "llmtailor-write-0", "llmtailor-write-1"]


def interrupt_at(number: int, is_counted: Callable[[FrameType], bool]) -> _Trace:
    """Raise at the so many-th line that is counted; to be given to ``sys.settrace``, which is off after that."""
    seen = 0

    def trace(frame: FrameType, event: str, _: object) -> _Trace | None:
        nonlocal seen
        if not is_counted(frame):
            return None
        seen += event == "line"
        if event == "line" and seen == number:
            raise KeyboardInterrupt
        return trace

    return trace


def test_a_save_that_is_interrupted_at_any_line(training: Training) -> None:
    files = {checkpointer.__file__, engine.__file__}
    number, is_interrupted = 0, True
    while is_interrupted:
        number, is_interrupted = number + 1, False
        training.train()
        sys.settrace(interrupt_at(number, lambda frame: frame.f_code.co_filename in files))
        try:
            training.save()
        except KeyboardInterrupt:
            is_interrupted = True
        finally:
            sys.settrace(None)
        assert training.checkpointer._engine.drain(END_SECS), f"interrupted at line {number}: a save never ends"
    assert number > 80, "the lines were not counted"
    training.train()
    training.check(training.save().result())


# A file of the test's own may be left to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_saves_that_are_interrupted_at_random_moments(training: Training) -> None:
    """By real signals, in the middle of whatever Python calls, too."""
    moments = random.Random(0)
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    num_interrupted = 0
    try:
        for _ in range(60):
            training.train()
            try:
                signal.setitimer(signal.ITIMER_REAL, moments.uniform(0.0005, 0.01))
                training.save()
                signal.setitimer(signal.ITIMER_REAL, 0)
            except KeyboardInterrupt:
                num_interrupted += 1
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
            assert training.checkpointer._engine.drain(END_SECS), f"stuck after {num_interrupted} interrupts"
    finally:
        signal.signal(signal.SIGALRM, before)
    training.train()
    training.check(training.save().result())


def test_whoever_is_interrupted_while_waiting_locks_nobody_out() -> None:
    code = {Bell.wait_for.__code__, Bell.ring.__code__}
    is_interrupted, number = True, 0
    while is_interrupted:
        number, is_interrupted = number + 1, False
        bell, reached = Bell(), threading.Event()
        waiter = threading.Thread(target=lambda b=bell, r=reached: b.wait_for(r.is_set), daemon=True)
        waiter.start()
        threading.Timer(0.002, lambda b=bell, r=reached: (r.set(), b.ring())).start()
        sys.settrace(interrupt_at(number, lambda frame: frame.f_code in code))
        try:
            assert bell.wait_for(reached.is_set, 10)
        except KeyboardInterrupt:
            is_interrupted = True
        finally:
            sys.settrace(None)
        waiter.join(10)
        assert not waiter.is_alive()
    assert number > 8


def test_a_bell_is_waited_for_no_longer_than_was_said() -> None:
    bell = Bell()
    assert not bell.wait_for(lambda: False, 0.01)
    assert not bell.wait_for(lambda: False, 0)
    assert bell.wait_for(lambda: True, 0)
    bell.ring()
    assert not bell.wait_for(lambda: False, 0.01)
