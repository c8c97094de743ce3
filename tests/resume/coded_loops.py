"""A training loop that saves codes after every step, and what its checkpoints have to be."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from coded_runs import check_layers
from llmtailor import Run
from llmtailor.checkpoint import Checkpoint, open_checkpoint
from llmtailor.manifest import LayerRecord
from llmtailor.strategies import SaveContext
from llmtailor.verify import verify_checkpoint
from tiny_models import (
    Snapshot,
    build_llama,
    token_rows,
)
from writer.trainings import state_of

ALL_RESTS = ("q8", "compact", *(pytest.param(rest, marks=pytest.mark.slow) for rest in ("q4", "compact4")))
# Its embedding, its head and two matrices of every block have 4096 elements, which codes are for.
WIDTH = 64
STEPS = 20


@dataclass(kw_only=True)
class Record:
    """What a training did, over all its processes."""

    states: dict[int, Snapshot] = field(default_factory=dict)
    """At each save, by the names in a checkpoint."""
    batches: list[list[list[int]]] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)


class Loop:
    """A training script, from the first line on; saves after every step."""

    def __init__(
        self,
        directory: Path,
        record: Record,
        *,
        seed: int = 0,
        prepare: Callable[[torch.nn.Module], object] = lambda model: None,
        resume: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        self.record = record
        self.model = build_llama(width=WIDTH, seed=seed)
        prepare(self.model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, T_max=STEPS)
        self.run = Run(
            directory,
            self.model,
            self.optimizer,
            scheduler=self.scheduler,
            **{"strategy": "parity", "save_steps": 1, **options},
        )
        self.batches = self.run.batches(DataLoader(token_rows(40), batch_size=4, shuffle=True))
        self.step = self.run.resume(**(resume or {}))

    def state(self) -> Snapshot:
        return state_of(self.model, self.optimizer)

    def train(self, until: int) -> None:
        self.model.train()
        while self.step < until:
            for batch in self.batches:
                self.model(input_ids=batch, labels=batch).loss.backward()
                self.optimizer.step()
                self.optimizer.zero_grad()
                self.record.rates.append(self.scheduler.get_last_lr()[0])
                self.scheduler.step()
                self.record.batches.append(batch.tolist())
                self.step += 1
                self.record.states[self.step] = self.state()
                self.run.step(self.step)
                if self.step == until:
                    break

    def __enter__(self) -> Loop:
        return self

    def __exit__(self, *_: object) -> None:
        self.run.close()


def train(directory: Path, until: int, record: Record, **options: Any) -> None:
    """A process that resumes, or begins, and ends at a step."""
    with Loop(directory, record, **options) as loop:
        loop.train(until)


def nothing(context: SaveContext) -> list[str]:
    """All but the first save are codes alone."""
    return []


def coded(checkpoint: Checkpoint) -> list[LayerRecord]:
    return [layer for layer in checkpoint.manifest.layers if layer.encoding is not None]


def at(directory: Path, step: int) -> Checkpoint:
    return open_checkpoint(directory / f"checkpoint-{step}")


def check(checkpoint: Checkpoint, record: Record) -> Snapshot:
    """Every file of a checkpoint is what it has to be; gives what must be loaded from it."""
    report = verify_checkpoint(checkpoint.path)
    assert report.is_good, report.problems
    return check_layers(checkpoint.path, checkpoint.manifest, record.states)
