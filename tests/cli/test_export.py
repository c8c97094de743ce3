from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import pytest

from llmtailor.checkpoint import open_checkpoint

Command: TypeAlias = Callable[..., Any]


def test_export_of_our_own_format_links_every_layer(run: Path, tmp_path: Path, llmtailor_json: Command) -> None:
    source = run / "checkpoint-5"
    record = llmtailor_json("export", source, tmp_path / "out")
    layers = open_checkpoint(source).manifest.layers
    assert record["linked_bytes"] == sum(layer.nbytes for layer in layers)
    kept = {(layer.name, layer.step, layer.update_count, layer.weights.digest) for layer in layers}
    made = open_checkpoint(tmp_path / "out").manifest.layers
    assert {(layer.name, layer.step, layer.update_count, layer.weights.digest) for layer in made} == kept
    assert {layer.reason for layer in made} == {"merge"}


def test_export_there_and_back_is_the_same_state(run: Path, tmp_path: Path, llmtailor: Command) -> None:
    source = run / "checkpoint-5"
    llmtailor("export", source, tmp_path / "dcp", "--to", "dcp")
    llmtailor("export", tmp_path / "dcp", tmp_path / "back", "--to", "tailored")
    before, after = (open_checkpoint(path).manifest for path in (source, tmp_path / "back"))
    files = {layer.name: layer.weights.digest for layer in before.layers}
    assert {layer.name: layer.weights.digest for layer in after.layers} == files
    states = {layer.name: layer.optimizer and layer.optimizer.digest for layer in before.layers}
    assert {layer.name: layer.optimizer and layer.optimizer.digest for layer in after.layers} == states
    assert after.optimizers == before.optimizers


@pytest.mark.parametrize("to", ["tailored", "hf", "dcp"])
def test_weights_alone_can_be_exported(run: Path, tmp_path: Path, llmtailor_json: Command, to: str) -> None:
    record = llmtailor_json("export", run / "checkpoint-5", tmp_path / "out", "--weights-only", "--to", to)
    assert record["has_optimizer"] is False
    assert not list((tmp_path / "out").glob("optimizer*"))


def test_weights_alone_are_no_deepspeed_checkpoint(run: Path, tmp_path: Path, llmtailor: Command) -> None:
    out = tmp_path / "out"
    finished = llmtailor("export", run / "checkpoint-5", out, "--weights-only", "--to", "deepspeed", exit_code=12)
    assert "--to hf" in finished.stderr
    assert not out.exists()


def test_source_that_is_no_checkpoint_is_explained(tmp_path: Path, llmtailor: Command) -> None:
    (tmp_path / "notes.txt").write_text("not a checkpoint")
    finished = llmtailor("export", tmp_path, tmp_path / "out", exit_code=4)
    assert "notes.txt" in finished.stderr
