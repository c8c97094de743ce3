"""Two runs as their processes would have told them, without training anything."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from llmtailor.demo.events import Event, FinishedEvent, LossEvent, ReadyEvent, ResumedEvent, SaveEvent
from llmtailor.demo.options import DemoOptions
from llmtailor.demo.process import Debris, Life
from llmtailor.demo.report import DemoReport, summarize

NUM_LAYERS = 4


def tell(steps: range, nbytes: int, save_steps: int = 4, *, save_last: bool = True, shift: float = 0.0) -> list[Event]:
    """A loss for each step, and the saves; the very first save is full."""
    events: list[Event] = []
    for step in steps:
        events.append(LossEvent(step=step, loss=5 / step + shift))
        if step % save_steps == 0 and (save_last or step != steps[-1]):
            written = 1000 if step == save_steps else nbytes
            secs = written / 1000
            events.append(
                SaveEvent(
                    step=step,
                    written_nbytes=written,
                    stall_secs=secs,
                    total_secs=secs,
                    num_layers_written=NUM_LAYERS * written // 1000,
                    num_layers=NUM_LAYERS,
                )
            )
    return events


@pytest.fixture
def reference() -> Life:
    """20 steps, five saves of 1000 bytes."""
    told = [ReadyEvent(num_parameters=7), *tell(range(1, 21), 1000), FinishedEvent(validation_loss=2.0)]
    return Life(events=tuple(told), killed=None)


@pytest.fixture
def lives() -> list[Life]:
    """Killed while saving step 12, resumed from step 8, half of whose layers are of step 4."""
    debris = Debris(step=12, directory="run/_staging/12-ab", num_files=3, nbytes=300, was_published=False)
    killed = [ReadyEvent(num_parameters=7), *tell(range(1, 13), 500, save_last=False)]
    resumed = ResumedEvent(step=8, layer_steps={"embed_tokens": 4, "layers.0": 8, "layers.1": 4, "norm": 8})
    told = [ReadyEvent(num_parameters=7), resumed, *tell(range(9, 21), 500, shift=0.5)]
    return [
        Life(events=tuple(killed), killed=debris),
        Life(events=(*told, FinishedEvent(validation_loss=2.125)), killed=None),
    ]


@pytest.fixture
def make_report(reference: Life, lives: list[Life]) -> Callable[..., DemoReport]:
    """The report of those two runs; processes may be put before the others."""

    def make(*before: Life, debris_was_swept: bool = True, has_checkpoints: bool = True) -> DemoReport:
        return summarize(
            DemoOptions(steps=20, save_steps=4, size="tiny"),
            reference,
            [*before, *lives],
            verified_after_kill=2,
            debris_was_swept=debris_was_swept,
            verified_checkpoints=7,
            wall_secs=12.5,
            output="out put",
            plot="out put/loss.png",
            has_checkpoints=has_checkpoints,
        )

    return make
