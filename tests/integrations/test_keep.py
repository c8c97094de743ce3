"""Which checkpoints of a run stay, as users say it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import llmtailor
from llmtailor.checkpoint import open_checkpoint
from llmtailor.errors import IncompleteError, InvalidInputError
from llmtailor.integrations.transformers import tailor
from llmtailor.retention import METRICS_NAME
from tiny_models import VOCABULARY, build_llama, build_trainer

LOSSES = {1: 5.0, 2: 1.0, 3: 4.0, 4: 2.0, 5: 6.0, 6: 7.0}


def train(directory: Path, **options: object) -> None:
    model = build_llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with llmtailor.Run(directory, model, optimizer, save_steps=1, **options) as run:  # type: ignore[arg-type]
        for step, loss in LOSSES.items():
            tokens = torch.randint(0, VOCABULARY, (2, 8))
            model(input_ids=tokens, labels=tokens).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            run.step(step, metrics={"eval_loss": loss})


def contents(directory: Path) -> dict[int, str]:
    """Step -> "full" or "weights", of what is there."""
    manifests = [open_checkpoint(path).manifest for path in directory.glob("checkpoint-*")]
    return {manifest.step: manifest.contents for manifest in sorted(manifests, key=lambda each: each.step)}


def test_a_run_keeps_its_best_and_its_last(tmp_path: Path) -> None:
    train(tmp_path, keep="last=1, best=2")
    assert sorted(contents(tmp_path)) == [2, 4, 6]
    assert (tmp_path / "checkpoint-2" / METRICS_NAME).read_text() == '{"eval_loss": 1.0}\n'


def test_a_run_keeps_every_third_and_optimizer_state_of_the_newest(tmp_path: Path) -> None:
    train(tmp_path, keep=llmtailor.Keep(last=2, every=3), keep_optimizer=1)
    assert contents(tmp_path) == {3: "weights", 5: "weights", 6: "full"}
    model = build_llama()
    optimizer = torch.optim.AdamW(model.parameters())
    with llmtailor.Run(tmp_path, model, optimizer) as run:
        with pytest.raises(IncompleteError, match="weights alone"):
            run.resume(tmp_path / "checkpoint-5")
        assert run.resume() == 6


def test_what_to_keep_is_checked_before_training(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="makes no sense as a rule"):
        train(tmp_path, keep="sometimes")
    with pytest.raises(InvalidInputError, match="makes no sense as a rule"):
        tailor(build_trainer(tmp_path), keep="sometimes")
    with pytest.raises(InvalidInputError, match="makes no sense as a rule"):
        tailor(build_trainer(tmp_path), keep_optimizer=0)


def test_the_trainer_keeps_by_rules(tmp_path: Path) -> None:
    trainer = build_trainer(tmp_path, save_steps=1, max_steps=6, save_total_limit=1)
    tailor(trainer, keep="last=1, every=2", keep_optimizer=1).train()
    assert contents(tmp_path) == {2: "weights", 4: "weights", 6: "full"}
