"""What the demo found out, as records, and how it follows from what the training processes told. Pure."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any, TypeVar

from ..errors import TailorError
from .events import Event, FinishedEvent, LossEvent, ReadyEvent, ResumedEvent, SaveEvent, SaveFailedEvent
from .options import DemoOptions
from .process import Life

if TYPE_CHECKING:
    from rich.console import RenderableType

__all__ = ["CrashReport", "DemoReport", "LossPoint", "RunReport", "StaleLayer", "join_names", "summarize"]

EventT = TypeVar("EventT", ReadyEvent, ResumedEvent, FinishedEvent)


@dataclass(frozen=True, slots=True, kw_only=True)
class LossPoint:
    """The training loss of one step."""

    step: int
    loss: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RunReport:
    """One run: its saves and where it ended."""

    strategy: str
    num_saves: int
    full_save_nbytes: int
    """Of its first save, which is full under every strategy."""
    save_nbytes: int
    """Median, without the first save."""
    save_secs: float
    """Median, without the first save: from the call to a durable checkpoint."""
    stall_secs: float
    """Median, without the first save: training waited this long."""
    failed_saves: int
    validation_loss: float
    losses: tuple[tuple[LossPoint, ...], ...]
    """By process: an uninterrupted run has one part, a killed and resumed one two or more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StaleLayer:
    """A layer that was saved before the checkpoint it belongs to."""

    layer: str
    step: int
    staleness: int
    """Steps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CrashReport:
    """The kill, what it left, and the resume."""

    save_step: int
    """Of the save that was in flight."""
    killed_at_step: int
    """The last step that was trained before the kill."""
    debris_files: int
    debris_nbytes: int
    debris_was_swept: bool
    """The resumed run removed it."""
    missed_steps: tuple[int, ...]
    """Saves that were published a moment before the kill; the run was resumed and killed again each time."""
    resumed_step: int
    lost_steps: int
    """``killed_at_step - resumed_step``: trained twice."""
    num_layers: int
    stale_layers: tuple[StaleLayer, ...]
    """Of the checkpoint resumed from, in model order."""
    verified_after_kill: int
    """Published checkpoints of the killed run, each of which verified, before anything was resumed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoReport:
    """The whole demo."""

    size: str
    num_parameters: int
    steps: int
    save_steps: int
    seed: int
    reference: RunReport
    """Strategy ``full``, uninterrupted."""
    recovered: RunReport
    """Killed and resumed."""
    crash: CrashReport
    share: float
    """Bytes of a save of the recovered run over those of the reference."""
    validation_difference: float
    """Recovered minus reference, in nats."""
    verified_checkpoints: int
    """All that are on disk at the end, of both runs; each verified."""
    wall_secs: float
    output: str
    plot: str
    has_checkpoints: bool
    """They were kept."""

    def record(self) -> dict[str, Any]:
        """For JSON."""
        return dataclasses.asdict(self)

    def names(self) -> list[str]:
        """The output directory."""
        return [self.output]

    def tables(self) -> Iterator[RenderableType]:
        """For people."""
        from .tables import report_tables

        return report_tables(self)


def summarize(
    options: DemoOptions,
    reference: Life,
    lives: Sequence[Life],
    *,
    verified_after_kill: int,
    debris_was_swept: bool,
    verified_checkpoints: int,
    wall_secs: float,
    output: str,
    plot: str,
    has_checkpoints: bool,
) -> DemoReport:
    """Put the report together.

    Args:
        options: What was run.
        reference: The uninterrupted run.
        lives: The other run's processes in order: all killed but the last.
        verified_after_kill: See ``CrashReport``.
        debris_was_swept: See ``CrashReport``.
        verified_checkpoints: See ``DemoReport``.
        wall_secs: The whole demo took this long.
        output: Directory of everything.
        plot: The picture.
        has_checkpoints: See ``DemoReport``.
    """
    full = _report_run("full", [reference])
    recovered = _report_run(options.strategy, lives)
    return DemoReport(
        size=options.size,
        num_parameters=_only(reference.events, ReadyEvent).num_parameters,
        steps=options.steps,
        save_steps=options.save_steps,
        seed=options.seed,
        reference=full,
        recovered=recovered,
        crash=_report_crash(lives, verified_after_kill, debris_was_swept),
        share=recovered.save_nbytes / full.save_nbytes,
        validation_difference=recovered.validation_loss - full.validation_loss,
        verified_checkpoints=verified_checkpoints,
        wall_secs=wall_secs,
        output=output,
        plot=plot,
        has_checkpoints=has_checkpoints,
    )


def _report_run(strategy: str, lives: Sequence[Life]) -> RunReport:
    events = [event for life in lives for event in life.events]
    saves = [event for event in events if isinstance(event, SaveEvent)]
    if len(saves) < 2:
        raise TailorError(
            "too few saves were done to compare anything",
            kind="demo-too-few-saves",
            expected="2 or more",
            found=len(saves),
            hint="the logs tell why saves failed",
        )
    later = saves[1:]
    return RunReport(
        strategy=strategy,
        num_saves=len(saves),
        full_save_nbytes=saves[0].written_nbytes,
        save_nbytes=round(median(save.written_nbytes for save in later)),
        save_secs=median(save.total_secs for save in later),
        stall_secs=median(save.stall_secs for save in later),
        failed_saves=sum(isinstance(event, SaveFailedEvent) for event in events),
        validation_loss=_only(lives[-1].events, FinishedEvent).validation_loss,
        losses=tuple(
            tuple(LossPoint(step=each.step, loss=each.loss) for each in life.events if isinstance(each, LossEvent))
            for life in lives
        ),
    )


def _report_crash(lives: Sequence[Life], verified_after_kill: int, debris_was_swept: bool) -> CrashReport:
    last, resumed = lives[-2], _only(lives[-1].events, ResumedEvent)
    assert last.killed is not None
    return CrashReport(
        save_step=last.killed.step,
        killed_at_step=last.last_step,
        debris_files=last.killed.num_files,
        debris_nbytes=last.killed.nbytes,
        debris_was_swept=debris_was_swept,
        missed_steps=tuple(life.killed.step for life in lives[:-2] if life.killed is not None),
        resumed_step=resumed.step,
        lost_steps=last.last_step - resumed.step,
        num_layers=len(resumed.layer_steps),
        stale_layers=tuple(
            StaleLayer(layer=layer, step=step, staleness=resumed.step - step)
            for layer, step in resumed.layer_steps.items()
            if step < resumed.step
        ),
        verified_after_kill=verified_after_kill,
    )


def _only(events: Iterable[Event], kind: type[EventT]) -> EventT:
    found = [event for event in events if isinstance(event, kind)]
    assert len(found) == 1, (kind, len(found))
    return found[0]


def join_names(layers: Iterable[str]) -> str:
    """Layers in few words: numbered ones of a stack share its name.

    >>> join_names(["embed_tokens", "layers.1", "layers.3"])
    'embed_tokens, layers.1/3'
    """
    by_stack: dict[str, list[str]] = {}
    for layer in layers:
        stack, _, index = layer.rpartition(".")
        if stack and index.isdecimal():
            by_stack.setdefault(stack, []).append(index)
        else:
            by_stack[layer] = []
    return ", ".join(f"{stack}.{'/'.join(indexes)}" if indexes else stack for stack, indexes in by_stack.items())
