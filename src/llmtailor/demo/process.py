"""Training processes: start one, listen to it, kill it in the middle of a save if asked, and never leave one behind."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from ..errors import TailorError
from ..manifest import MANIFEST_NAME
from ..storage import STAGING_NAME, checkpoint_name
from .events import ChildSpec, Event, LossEvent, parse_event, split_lines

__all__ = ["Debris", "Life", "child_command", "find_attempt", "observe_attempt", "run_child"]

_LOCK_NAME = "lock"
# A save counts as in flight, and is shot at, once this many of its files are there.
_FILES_IN_FLIGHT = 6
# Saves of a small model take tens of milliseconds.
_WATCH_SECS = 0.001
_IDLE_SECS = 0.2
# Longer than any step, save or import on a slow and busy machine.
_SILENCE_SECS = 300.0
_EXIT_SECS = 60.0
_LOG_TAIL_LINES = 15
# A launcher's variables would make the child look for other ranks.
_LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True, slots=True, kw_only=True)
class Debris:
    """What a killed save left behind."""

    step: int
    """Of the save."""
    directory: str
    """The attempt, in the run's staging directory."""
    num_files: int
    """New files; links to files of earlier checkpoints are not counted."""
    nbytes: int
    """Their size; space is reserved before a file is filled."""
    was_published: bool
    """The save won: its checkpoint has its name, and nothing was lost but the process."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Life:
    """All that one training process told, and how it ended."""

    events: tuple[Event, ...]
    killed: Debris | None
    """None if it ran to its end."""

    @property
    def last_step(self) -> int:
        """The last step it finished; 0 if none."""
        return max((event.step for event in self.events if isinstance(event, LossEvent)), default=0)


def run_child(spec: ChildSpec, *, log: Path, listen: Callable[[Event], None], kill_from: int | None = None) -> Life:
    """Run one training process to its end, or to its death.

    Args:
        spec: What it does.
        log: Gets all it prints; added to if it is there.
        listen: Is told every event at once.
        kill_from: Kill it with SIGKILL in the middle of the first save at or after this step that is seen in flight.

    Raises:
        TailorError: It failed (``demo-child-failed``, with the end of its log), said nothing for minutes
            (``demo-child-silent``), or no save could be caught in flight (``demo-not-killed``).
    """
    run = Path(spec.run)
    events: list[Event] = []
    rest = b""
    with _started(spec, log) as (process, pipe):
        last_heard = time.monotonic()
        while True:
            is_armed = kill_from is not None and _last_step(events) >= kill_from
            if select.select([pipe], [], [], _WATCH_SECS if is_armed else _IDLE_SECS)[0]:
                chunk = os.read(pipe, 65536)
                if not chunk:
                    break
                lines, rest = split_lines(rest + chunk)
                for event in map(parse_event, lines):
                    events.append(event)
                    listen(event)
                last_heard = time.monotonic()
            elif time.monotonic() - last_heard > _SILENCE_SECS:
                raise _failure("a training process says nothing any more", "demo-child-silent", log)
            if kill_from is not None and is_armed and (attempt := find_attempt(run, kill_from)) is not None:
                process.kill()
                process.wait()
                events += _drain(pipe, rest)
                return Life(events=tuple(events), killed=observe_attempt(run, attempt))
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_EXIT_SECS)
        if process.returncode != 0:
            raise _failure(f"a training process failed (exit status {process.returncode})", "demo-child-failed", log)
    if kill_from is not None:
        raise TailorError(
            f"no save from step {kill_from} on was seen in flight, so none could be killed",
            kind="demo-not-killed",
            path=run,
            hint="saves were too quick for this machine: take a larger --size",
        )
    return Life(events=tuple(events), killed=None)


def child_command(spec: ChildSpec) -> list[str]:
    """The command line of a training process."""
    # -P: nothing in the current directory may stand in for a library.
    return [sys.executable, "-P", "-m", "llmtailor.demo.child", spec.encode()]


@contextlib.contextmanager
def _started(spec: ChildSpec, log: Path) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """A training process and the pipe it reports on; it does not outlive the block."""
    reader, writer = os.pipe()
    started: list[subprocess.Popen[bytes]] = []

    def start() -> None:
        with log.open("ab") as sink:
            started.append(
                subprocess.Popen(
                    child_command(dataclasses.replace(spec, events_fd=writer)),
                    stdin=subprocess.DEVNULL,
                    stdout=sink,
                    stderr=sink,
                    pass_fds=[writer],
                    env=_environment(),
                    start_new_session=True,  # Ctrl-C reaches the parent alone, which then ends the child
                )
            )

    # By a thread that no signal's handler interrupts: of a child that is half started nobody would know.
    starter = ThreadPoolExecutor(max_workers=1)
    try:
        try:
            starter.submit(start).result()
        finally:
            starter.shutdown()
            os.close(writer)
        yield started[0], reader
    finally:
        for process in started:
            process.kill()
            process.wait()
        os.close(reader)


def _environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in _LAUNCHER_VARIABLES}
    return kept | {
        "HF_HUB_OFFLINE": "1",
        "PYTHONUNBUFFERED": "1",
        # Threads that spin while they wait make a step five times as slow as soon as another program wants a core.
        "OMP_WAIT_POLICY": "PASSIVE",
    }


def _last_step(events: list[Event]) -> int:
    return next((event.step for event in reversed(events) if isinstance(event, LossEvent)), 0)


def _drain(pipe: int, rest: bytes) -> list[Event]:
    """What a dead child still said; half a line at the end is dropped."""
    while chunk := os.read(pipe, 65536):
        rest += chunk
    return [parse_event(line) for line in split_lines(rest)[0]]


def find_attempt(run: Path, from_step: int) -> Path | None:
    """A save in flight, of that step or a later one, that has files already; its directory in staging."""
    try:
        names = os.listdir(run / STAGING_NAME)
    except FileNotFoundError:
        return None
    for name in names:
        step = name.partition("-")[0]
        if not step.isdecimal() or int(step) < from_step:
            continue
        attempt = run / STAGING_NAME / name
        if sum(len(files) for _, _, files in os.walk(attempt)) >= _FILES_IN_FLIGHT:
            return attempt
    return None


def observe_attempt(run: Path, attempt: Path) -> Debris:
    """What is left of a save whose process is dead."""
    step = int(attempt.name.partition("-")[0])
    found = [os.lstat(Path(directory, file)) for directory, _, files in os.walk(attempt) for file in files]
    own = [status.st_size for status in found if status.st_nlink == 1]
    return Debris(
        step=step,
        directory=str(attempt),
        num_files=len(own),
        nbytes=sum(own),
        was_published=(run / checkpoint_name(step) / MANIFEST_NAME).is_file(),
    )


def _failure(what: str, kind: str, log: Path) -> TailorError:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-_LOG_TAIL_LINES:]
    tail = "".join(f"\n            {line}" for line in lines)
    return TailorError(what, kind=kind, path=log, found=f"the log ends with{tail}" if tail else "an empty log")
