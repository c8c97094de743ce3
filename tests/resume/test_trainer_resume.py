"""transformers' Trainer: what comes after a resume is what would have come without it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from llmtailor.checkpoint import open_checkpoint
from llmtailor.verify import verify_checkpoint
from resume import trainings
from resume.composites import expected_composite
from resume.trainings import CASES, OUTCOME, STOP, prepare
from tiny_models import assert_same, snapshot_model, snapshot_optimizer

IN_ANOTHER_PROCESS = ("llama", "mixin", "accumulation", "bf16")


def run_whole(case: str, directory: Path) -> dict[str, Any]:
    training = prepare(case, directory)
    training.trainer.train()
    return training.outcome(since=stop_of(case))


def run_first_half(case: str, directory: Path) -> None:
    prepare(case, directory, stop=stop_of(case)).trainer.train()


def stop_of(case: str) -> int:
    return 12 if case == "epoch-end" else STOP


def assert_same_outcome(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert len(expected["losses"]) >= 18
    assert found["losses"] == expected["losses"]
    assert found["batches"] == expected["batches"]
    assert found["groups"] == expected["groups"]
    assert found["scheduler"] == expected["scheduler"]
    assert_same(found["model"], expected["model"])
    assert_same(found["optimizer"], expected["optimizer"])


@pytest.mark.parametrize("case", [case for case in CASES if case not in IN_ANOTHER_PROCESS])
def test_trainer_resumes_bit_for_bit(case: str, tmp_path: Path) -> None:
    expected = run_whole(case, tmp_path / "whole")
    run_first_half(case, tmp_path / "halves")

    torch.manual_seed(987)
    training = prepare(case, tmp_path / "halves")
    training.trainer.train(resume_from_checkpoint=True)

    assert_same_outcome(training.outcome(since=stop_of(case)), expected)


@pytest.mark.slow
def test_trainer_resumes_bit_for_bit_in_another_process(tmp_path: Path) -> None:
    expected = {case: run_whole(case, tmp_path / f"{case}-whole") for case in IN_ANOTHER_PROCESS}
    for case in IN_ANOTHER_PROCESS:
        run_first_half(case, tmp_path / case)

    command = [sys.executable, trainings.__file__, str(tmp_path), *IN_ANOTHER_PROCESS]
    path = os.pathsep.join(entry for entry in sys.path if entry)
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "PYTHONPATH": path}, timeout=120)

    for case in IN_ANOTHER_PROCESS:
        found = torch.load(tmp_path / f"{case}-{OUTCOME}", weights_only=True)
        assert_same_outcome(found, expected[case])


@pytest.mark.parametrize("strategy", ["parity", "filter(first=1, last=1, every=2)"])
@pytest.mark.parametrize("case", ["llama", "tied", "bf16"])
def test_a_composite_loads_each_layer_as_it_was_at_its_step(case: str, strategy: str, tmp_path: Path) -> None:
    first = prepare(case, tmp_path, stop=15, strategy=strategy)
    first.trainer.train()
    checkpoint = open_checkpoint(tmp_path / "checkpoint-15")
    steps = {layer.name: layer.step for layer in checkpoint.manifest.layers}
    assert len(set(steps.values())) > 1, "a composite is what this test is about"

    second = prepare(case, tmp_path, strategy=strategy)
    loaded: dict[str, Any] = {}

    class NoteLoaded(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            loaded["model"] = snapshot_model(kwargs["model"])
            loaded["optimizer"] = snapshot_optimizer(kwargs["model"], kwargs["optimizer"].optimizer)

    second.trainer.add_callback(NoteLoaded())
    second.trainer.train(resume_from_checkpoint=True)

    weights, moments = expected_composite(checkpoint.manifest, first.states.models, first.states.optimizers)
    assert_same({name: value for name, value in loaded["model"].items() if name in weights}, weights)
    assert_same(loaded["optimizer"], moments)
    assert {value.item() for name, value in moments.items() if name.endswith(".step")} == set(steps.values())
    assert second.trainer.state.global_step == 30
    assert verify_checkpoint(tmp_path / "checkpoint-30").is_good
