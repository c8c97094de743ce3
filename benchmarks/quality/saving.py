"""Checkpoints of a training, made and loaded by ``llmtailor.Run``, and what each of them wrote."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from configurations import SKIP, Configuration, strategy_text
from selection import TopLayers
from training import Training

import llmtailor

_OVER_LIMIT = "error limit"
_POOL_NBYTES = 64 * 2**20
"""Of each of some thirty runs that live beside each other; what they write is the same with any."""


@dataclass
class Saver:
    """A run that saves one training as its configuration says; a context, which closes the run.

    Args:
        configuration: How it saves.
        directory: Of the run.
        training: What it saves.
        due: Steps at which it does.
    """

    configuration: Configuration
    directory: Path
    training: Training
    due: Collection[int]
    written: list[int] = field(default_factory=list)
    """Bytes of each save, as the manifest has them."""
    over_limit: list[int] = field(default_factory=list)
    """Layers of each save that are exact because codes would have been too far off."""

    def __post_init__(self) -> None:
        strategy = make_strategy(self.configuration, self.training)
        self._selection = strategy if isinstance(strategy, TopLayers) else None
        rest = {} if self.configuration.rest == SKIP else {"rest": self.configuration.rest}
        self._run = open_run(self.directory, self.training, strategy=strategy, **rest)

    def after_step(self, step: int) -> None:
        if step in self.due:
            path = self._run.save(step).result()
            manifest = llmtailor.open_checkpoint(path).manifest
            self.written.append(manifest.written_nbytes)
            self.over_limit.append(sum(layer.reason == _OVER_LIMIT for layer in manifest.layers))

    def resume(self, checkpoint_step: int) -> None:
        """Go on from the newest checkpoint, which has to be of this step."""
        load_newest(self._run, checkpoint_step)
        if self._selection is not None:
            self._selection.begin()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> Literal[False]:
        self._run.close()
        return False


def make_strategy(configuration: Configuration, training: Training) -> str | TopLayers:
    if configuration.strategy == "top_drift":
        return TopLayers(training.model, training.optimizer, score="drift")
    if configuration.strategy == "top_adam":
        return TopLayers(training.model, training.optimizer, score="adam")
    return strategy_text(configuration.strategy, training.regime)


def open_run(directory: Path, training: Training, **options: Any) -> llmtailor.Run:
    return llmtailor.Run(
        directory,
        training.model,
        training.optimizer,
        keep=2,
        keep_consistent=False,
        capture="blocking",
        pool_nbytes=_POOL_NBYTES,
        on_sigterm="ignore",
        **options,
    )


def load_newest(run: llmtailor.Run, expected_step: int) -> None:
    with contextlib.redirect_stderr(io.StringIO()):
        step = run.resume()
    assert step == expected_step, f"resumed from step {step}, not {expected_step}"


def resume_training(directory: Path, training: Training, expected_step: int) -> None:
    """Load the newest checkpoint of a run into a training that knows nothing of it."""
    with open_run(directory, training) as run:
        load_newest(run, expected_step)


def mean_written(written: list[int], cycle: int) -> float:
    """Bytes of a save: the mean over whole cycles of the last saves, without the first, which is full."""
    later = written[1:]
    num_saves = len(later) // cycle * cycle or len(later)
    return sum(later[len(later) - num_saves :]) / num_saves
