"""Runs of tiny real checkpoints, to be mirrored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from llmtailor.checkpoint import open_checkpoint
from llmtailor.checkpointer import Checkpointer
from tiny_models import build_llama, token_rows


def write_small_files(directory: Path) -> None:
    (directory / "scheduler.pt").write_bytes(bytes(range(64)))
    (directory / "empty.txt").touch()
    (directory / "tokenizer").mkdir()
    (directory / "tokenizer" / "vocab.txt").write_text("a\nb\n")


class Training:
    """A model that trains a little before each save."""

    def __init__(self, directory: Path, *, model: torch.nn.Module | None = None, seed: int = 0, **options: Any) -> None:
        self.directory = directory
        self.model = build_llama(num_layers=2, seed=seed) if model is None else model
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        self.checkpointer = Checkpointer(directory, **{"strategy": "parity", **options})

    def save(self, step: int, **options: Any) -> Path:
        torch.manual_seed(step)
        rows = token_rows(2)
        self.model(input_ids=rows, labels=rows).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return self.checkpointer.save(step, self.model, [self.optimizer], write_small_files, **options).result()

    def close(self) -> None:
        self.checkpointer.close()


def save_run(directory: Path, steps: range, **options: Any) -> list[Path]:
    """Checkpoints of one run, the first one whole, then half of the layers in turn."""
    training = Training(directory, **options)
    paths = [training.save(step) for step in steps]
    training.close()
    return paths


def assert_same_checkpoint(copy: Path, original: Path) -> None:
    """The same manifest, and the same bytes in every file, which nobody may write to."""
    found, expected = open_checkpoint(copy), open_checkpoint(original)
    assert found.digest == expected.digest
    assert (copy / "tailor.json").read_bytes() == (original / "tailor.json").read_bytes()
    for file in expected.manifest.all_files:
        assert (copy / file.path).read_bytes() == (original / file.path).read_bytes(), file.path
        assert (copy / file.path).stat().st_mode & 0o777 == 0o444, file.path
