"""One regime and seed: the uninterrupted run with every configuration's saves along it, then the failures.

Everything is compared with the uninterrupted run on the same batches, so a difference is what the restore did.
"""

from __future__ import annotations

import contextlib
import itertools
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from configurations import REFERENCE, Configuration, plan_saves
from corpus import Corpus
from safetensors.torch import load_file, save_file
from saving import Saver, mean_written, resume_training
from settings import Regime, Settings
from training import State, Training

_OTHER_SEED = 10_000
"""A restored training begins with weights of another seed, so that all it has comes from the checkpoint."""
_NOISE = 1e-6


@dataclass
class Reference:
    """What the uninterrupted run did."""

    losses: list[float] = field(default_factory=list)
    """Of each step."""
    snapshots: dict[int, Path] = field(default_factory=dict)
    """Step -> file of the state, where failures need one."""
    loss_at_failure: float = 0.0
    """Validation."""
    loss_at_end: float = 0.0
    written: dict[str, list[int]] = field(default_factory=dict)
    """Configuration -> bytes of each of its saves."""
    over_limit: dict[str, list[int]] = field(default_factory=dict)
    """The same -> layers of each save that were written exactly because codes would have been too far off."""
    cpu_secs: float = 0.0
    """All of the saves, too."""


@dataclass
class Experiment:
    """One regime and seed.

    Args:
        settings: Of all.
        regime: What is trained.
        corpus: On what.
        seed: In which order, and from which weights.
        weights: Of the base model, for regimes that continue it.
        scratch: Where checkpoints go.
        note_steps: Told how many steps were taken.
    """

    settings: Settings
    regime: Regime
    corpus: Corpus
    seed: int
    weights: State | None
    scratch: Path
    note_steps: Callable[[int], None] = lambda steps: None

    def measure(self, configurations: Sequence[Configuration]) -> Iterator[tuple[Configuration, dict[str, Any]]]:
        """Run all of them, the uninterrupted run first; yields each result as soon as it is there."""
        started = time.process_time()
        reference = self._run_reference([each for each in configurations if each.is_saved])
        reference.cpu_secs = time.process_time() - started
        for configuration in configurations:
            started = time.process_time()
            result = self._measure_one(configuration, reference)
            cpu_secs = time.process_time() - started + (reference.cpu_secs if configuration == REFERENCE else 0)
            shutil.rmtree(self._directory(configuration), ignore_errors=True)  # the references have none
            yield configuration, {**result, "cpu_secs": round(cpu_secs, 1)}

    def _measure_one(self, configuration: Configuration, reference: Reference) -> dict[str, Any]:
        if configuration == REFERENCE:
            return {
                "loss_at_failure": reference.loss_at_failure,
                "loss_at_end": reference.loss_at_end,
                "last_losses": self._mean_of_last(reference.losses),
            }
        if configuration.failures > 1:
            return self._fail_often(configuration, reference)
        return self._fail_once(configuration, reference)

    # ---- The uninterrupted run ----

    def _run_reference(self, saved: Sequence[Configuration]) -> Reference:
        reference = Reference()
        training = self._begin()
        failure, end = self.regime.failure_step, self.regime.steps
        kept = {failure, *(failure - age for age in self.settings.stale_ages)}
        with contextlib.ExitStack() as stack:
            savers = [
                stack.enter_context(Saver(each, self._directory(each), training, self._due(each))) for each in saved
            ]

            def after_step(step: int) -> None:
                self.note_steps(1)
                for saver in savers:
                    saver.after_step(step)
                if step in kept:
                    reference.snapshots[step] = self._keep_snapshot(training, step)

            reference.losses = training.advance(0, failure, after_step)
            reference.written = {saver.configuration.name: saver.written for saver in savers}
            reference.over_limit = {saver.configuration.name: saver.over_limit for saver in savers}
        reference.loss_at_failure = training.validation_loss()
        reference.losses += training.advance(failure, end, lambda step: self.note_steps(1))
        reference.loss_at_end = training.validation_loss()
        reference.snapshots[end] = self._keep_snapshot(training, end)
        return reference

    def _keep_snapshot(self, training: Training, step: int) -> Path:
        path = self.scratch / f"step-{step}.safetensors"
        save_file(training.snapshot(), path)
        return path

    def _load_snapshot(self, reference: Reference, step: int) -> State:
        return load_file(reference.snapshots[step], device=self.settings.device)

    def _due(self, configuration: Configuration) -> range:
        if configuration.failures == 1:
            return plan_saves(configuration, self.regime, self.seed)
        return range(configuration.interval, self.settings.failure_steps[0] + 1, configuration.interval)

    def _begin(self) -> Training:
        return Training(self.settings, self.regime, self.corpus, self.seed, self.weights)

    def _begin_elsewhere(self) -> Training:
        """The batches of this seed, and weights that have nothing to do with it."""
        training = Training(self.settings, self.regime, self.corpus, self.seed + _OTHER_SEED, None)
        training.seed = self.seed
        return training

    def _directory(self, configuration: Configuration) -> Path:
        return self.scratch / configuration.name

    # ---- One failure ----

    def _fail_once(self, configuration: Configuration, reference: Reference) -> dict[str, Any]:
        failure, end = self.regime.failure_step, self.regime.steps
        training = self._begin_elsewhere()
        result: dict[str, Any] = {}
        if configuration.strategy == "stale":
            training.restore(self._load_snapshot(reference, failure - configuration.interval), updates=failure)
        elif configuration.strategy == "noise":
            training.restore(add_noise(self._load_snapshot(reference, failure), self.seed), updates=failure)
        else:
            resume_training(self._directory(configuration), training, failure)
            name = configuration.name
            result |= describe_saves(configuration, reference.written[name], reference.over_limit[name])
        restored = training.validation_loss()
        losses = training.advance(failure, end, lambda step: self.note_steps(1))
        return {
            "difference_at_restore": restored - reference.loss_at_failure,
            **self._compare(training, losses, reference),
            **result,
        }

    # ---- Several failures ----

    def _fail_often(self, configuration: Configuration, reference: Reference) -> dict[str, Any]:
        """Restored again and again, and every time from checkpoints of the run that was restored before."""
        written, over_limit = (
            list(reference.written[configuration.name]),
            list(reference.over_limit[configuration.name]),
        )
        losses: list[float] = []
        stops = [*self.settings.failure_steps, self.regime.steps]
        for restored_at, stop in itertools.pairwise(stops):
            training = self._begin_elsewhere()
            due = range(configuration.interval, stop + 1, configuration.interval)
            with Saver(configuration, self._directory(configuration), training, due) as saver:
                saver.resume(restored_at)

                def after_step(step: int, saver: Saver = saver) -> None:
                    self.note_steps(1)
                    saver.after_step(step)

                losses += training.advance(restored_at, stop, after_step)
            written += saver.written
            over_limit += saver.over_limit
        return {
            **self._compare(training, losses, reference),
            **describe_saves(configuration, written, over_limit),
        }

    # ---- What came of it ----

    def _compare(self, training: Training, losses: list[float], reference: Reference) -> dict[str, Any]:
        end = self.regime.steps
        difference = training.validation_loss() - reference.loss_at_end
        return {
            "difference_at_end": difference,
            "difference_of_last_losses": self._mean_of_last(losses) - self._mean_of_last(reference.losses),
            "is_identical": are_equal(training.snapshot(), self._load_snapshot(reference, end)) and difference == 0,
        }

    def _mean_of_last(self, losses: list[float]) -> float:
        last = losses[-self.settings.last_losses :]
        return sum(last) / len(last)


def describe_saves(configuration: Configuration, written: list[int], over_limit: list[int]) -> dict[str, Any]:
    per_save = mean_written(written, configuration.cycle)
    return {
        "bytes_per_save": round(per_save),
        "bytes_per_step": round(per_save / configuration.interval),
        "bytes_of_saves": written,
        "layers_over_limit": over_limit,
    }


def add_noise(state: State, seed: int) -> State:
    """The same state with weights that are off by one part in a million."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: value * (1 + _NOISE * torch.randn(value.shape, generator=generator).to(value.device))
        if name.startswith("weights.")
        else value
        for name, value in state.items()
    }


def are_equal(left: State, right: State) -> bool:
    return left.keys() == right.keys() and all(torch.equal(value, right[name]) for name, value in left.items())
