"""The demo itself, one phase after the other.

    uninterrupted/   strategy "full", to the end                                the reference
    recovered/       the strategy; killed in the middle of a save; resumed      what is compared with it
    logs/            what each training process printed
    loss.png  report.json

One process trains at a time, so that timings do not disturb each other.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ..errors import AlreadyExistsError, TailorError, UnsupportedError, WriteError
from ..reports.units import format_bytes
from ..storage import checkpoint_name, list_checkpoints
from ..verify import FileState, verify_checkpoint
from .events import ChildSpec, Event, FinishedEvent, LossEvent, ReadyEvent, ResumedEvent, SaveEvent
from .options import REFERENCE_KEPT, DemoOptions, needed_nbytes, plan_kill_step
from .process import Life, run_child
from .report import DemoReport, summarize

__all__ = ["Listener", "Silent", "check_extras", "choose_output", "run_demo"]

_EXTRAS = ("transformers", "accelerate", "matplotlib")
_REFERENCE_NAME = "uninterrupted"
_RECOVERED_NAME = "recovered"
_PLOT_NAME = "loss.png"
_REPORT_NAME = "report.json"
# A publish that wins the race against the kill costs one more try; more than this says that something is wrong.
_MOST_TRIES = 4
_MOST_THREADS = 8


class Listener(Protocol):
    """Somebody who watches."""

    def begin(self, phase: str, total: int) -> None: ...

    def advance(self, done: int, note: str) -> None: ...

    def end(self, note: str, *, is_crash: bool = False) -> None: ...


class Silent:
    """A listener that does nothing."""

    def begin(self, phase: str, total: int) -> None: ...

    def advance(self, done: int, note: str) -> None: ...

    def end(self, note: str, *, is_crash: bool = False) -> None: ...


def run_demo(
    options: DemoOptions, output: Path | None = None, *, keep: bool = True, listener: Listener | None = None
) -> DemoReport:
    """Train, crash, recover and compare; no process is left behind, however it ends.

    Args:
        options: What to run.
        output: Directory to write to, made if need be; ``llmtailor-demo-<n>`` by default.
        keep: Keep the checkpoints; the picture, the report and the logs always stay.
        listener: Told how far it is.

    Raises:
        UnsupportedError: The extra ``demo`` is not installed.
        AlreadyExistsError: ``output`` has something in it.
        WriteError: There is not enough room.
        IntegrityError: A published checkpoint does not verify.
        TailorError: A training process failed; carries the end of its log.
    """
    started = time.monotonic()
    check_extras()
    directory = _make_output(output, needed_nbytes(options))
    demo = _Demo(options=options, directory=directory, keep=keep, listener=listener or Silent())
    try:
        return demo.run(started)
    finally:
        if not keep:
            for name in (_REFERENCE_NAME, _RECOVERED_NAME):
                shutil.rmtree(directory / name, ignore_errors=True)


def check_extras() -> None:
    """Raise if a library of the extra ``demo`` is missing; imports none."""
    missing = [name for name in _EXTRAS if importlib.util.find_spec(name) is None]
    if missing:
        raise UnsupportedError(
            f"the demo needs {' and '.join(missing)}, which this Python does not have",
            kind="missing-extra",
            path=sys.executable,
            hint="pip install 'llmtailor[demo]'",
        )


def choose_output(parent: Path) -> Path:
    """The first ``llmtailor-demo-<n>`` that is free."""
    number = 1
    while os.path.lexists(parent / f"llmtailor-demo-{number}"):
        number += 1
    return parent / f"llmtailor-demo-{number}"


def _make_output(wanted: Path | None, needed: int) -> Path:
    directory = choose_output(Path()) if wanted is None else wanted
    try:
        directory.mkdir(parents=True, exist_ok=True)
        found = sorted(os.listdir(directory))
        if not found:
            (directory / "logs").mkdir()
        free = shutil.disk_usage(directory).free
    except OSError as err:
        raise WriteError(
            f"cannot make the output directory: {err.strerror}",
            kind="io",
            path=directory,
            hint="give another one with --output",
        ) from err
    if found:
        raise AlreadyExistsError(
            "the output directory is not empty",
            kind="output-exists",
            path=directory,
            found=", ".join(found[:5]),
            hint="give a new or empty one with --output, or leave it out",
        )
    if free < needed:
        raise WriteError(
            "not enough room for the demo's checkpoints",
            kind="no-space",
            path=directory,
            expected=f"{needed / 1e6:.0f} MB free",
            found=f"{free / 1e6:.0f} MB free",
            hint="a smaller --size, fewer saves, or --output on another disk",
        )
    return directory


@dataclass(frozen=True, slots=True, kw_only=True)
class _Demo:
    """One demo under way."""

    options: DemoOptions
    directory: Path
    keep: bool
    listener: Listener

    def run(self, started: float) -> DemoReport:
        strategy = self.options.strategy
        reference = self._train("full, uninterrupted", self._spec(_REFERENCE_NAME, "full"))
        killed = self._crash()
        verified_after_kill = self._verify("verify after the kill", [_RECOVERED_NAME])
        resumed = self._train(f"{strategy}, resumed", self._spec(_RECOVERED_NAME, strategy, resume=True))
        debris = killed[-1].killed
        assert debris is not None
        report = summarize(
            self.options,
            reference,
            [*killed, resumed],
            verified_after_kill=verified_after_kill,
            debris_was_swept=not os.path.lexists(debris.directory),
            verified_checkpoints=self._verify("verify everything", [_REFERENCE_NAME, _RECOVERED_NAME]),
            wall_secs=0.0,
            output=str(self.directory),
            plot=str(self.directory / _PLOT_NAME),
            has_checkpoints=self.keep,
        )
        from .plot import draw_losses  # matplotlib: slow to import, and an extra

        draw_losses(report, self.directory / _PLOT_NAME)
        report = dataclasses.replace(report, wall_secs=time.monotonic() - started)
        text = json.dumps(report.record(), indent=2)
        (self.directory / _REPORT_NAME).write_text(text + "\n", encoding="utf-8")
        return report

    def _spec(self, run: str, strategy: str, *, resume: bool = False) -> ChildSpec:
        return ChildSpec(
            run=str(self.directory / run),
            strategy=strategy,
            resume=resume,
            keep=REFERENCE_KEPT if run == _REFERENCE_NAME else None,
            steps=self.options.steps,
            save_steps=self.options.save_steps,
            size=self.options.size,
            seed=self.options.seed,
            threads=min(_MOST_THREADS, len(os.sched_getaffinity(0))),
        )

    def _train(self, phase: str, spec: ChildSpec, *, kill_from: int | None = None) -> Life:
        self.listener.begin(phase, self.options.steps)
        name = f"{Path(spec.run).name}{'-resumed' if spec.resume else ''}.log"
        log = self.directory / "logs" / name
        life = run_child(spec, log=log, listen=_Commentary(self.listener, self.options.steps), kill_from=kill_from)
        if life.killed is None:
            self.listener.end("done")
        elif life.killed.was_published:
            self.listener.end(f"too late: checkpoint-{life.killed.step} was done", is_crash=True)
        else:
            self.listener.end(f"killed while saving step {life.killed.step}", is_crash=True)
        return life

    def _crash(self) -> list[Life]:
        """Train and kill in the middle of a save; if the save was published first, resume and try at the next one."""
        lives: list[Life] = []
        kill_from = plan_kill_step(self.options.steps, self.options.save_steps)
        while len(lives) < _MOST_TRIES:
            spec = self._spec(_RECOVERED_NAME, self.options.strategy, resume=bool(lives))
            life = self._train(f"{self.options.strategy}, to be killed", spec, kill_from=kill_from)
            lives.append(life)
            assert life.killed is not None
            if not life.killed.was_published:
                return lives
            kill_from = life.killed.step + 1
        raise TailorError(
            f"{_MOST_TRIES} saves were published before the kill reached them",
            kind="demo-not-killed",
            path=self.directory,
            hint="saves were too quick for this machine: take a larger --size",
        )

    def _verify(self, phase: str, runs: list[str]) -> int:
        """Verify every published checkpoint, every byte; how many there were."""
        entries = [entry for run in runs for entry in list_checkpoints(self.directory / run)]
        self.listener.begin(phase, len(entries))
        digests: dict[FileState, str] = {}  # a file that several checkpoints share is read once
        for number, entry in enumerate(entries, start=1):
            verify_checkpoint(entry.path, digests=digests).raise_if_bad()
            self.listener.advance(number, checkpoint_name(entry.step))
        self.listener.end(f"all {len(entries)} verify")
        return len(entries)


class _Commentary:
    """Tells the listener what a training process says: its loss, and what its last save cost."""

    def __init__(self, listener: Listener, steps: int) -> None:
        self._listener = listener
        self._steps = steps
        self._save = ""

    def __call__(self, event: Event) -> None:
        match event:
            case ReadyEvent():
                self._say(0, "training starts")
            case ResumedEvent(step=step):
                self._say(step, f"from checkpoint-{step}")
            case LossEvent(step=step, loss=loss):
                self._say(step, f"loss {loss:.2f}{self._save}")
            case SaveEvent(step=step, written_nbytes=nbytes, total_secs=secs, stall_secs=stall):
                self._save = (
                    f", save {step}: {format_bytes(nbytes)} at {nbytes / secs / 1e9:.1f} GB/s, "
                    f"training waited {stall * 1e3:.0f} ms"
                )
            case FinishedEvent(validation_loss=loss):
                self._say(self._steps, f"validation loss {loss:.3f}")
            case _:
                pass

    def _say(self, step: int, text: str) -> None:
        self._listener.advance(step, text)
