"""The examples do what they say; each is a program that people may copy."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

import tiny_models  # noqa: F401 - one thread
from llmtailor.checkpoint import open_checkpoint

EXAMPLES = Path(__file__).parent.parent / "examples"

pytestmark = pytest.mark.filterwarnings("ignore::llmtailor.errors.TailorWarning")


def test_learning_rates_bring_layers_to_one_pace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    example = runpy.run_path(str(EXAMPLES / "layer_learning_rates.py"))
    example["main"](str(tmp_path))
    paces = [float(pace) for pace in re.findall(r"slowest ([0-9.]+)", capsys.readouterr().out)]
    assert len(paces) == 6
    assert paces[-1] < paces[0] / 3
    (optimizer,) = open_checkpoint(tmp_path / "checkpoint-60").manifest.optimizers
    rates = {str(group.options["layer"]): group.options["lr"] for group in optimizer.groups}
    assert len({*rates.values()}) > 3
    assert all(example["LIMITS"][0] <= rate / example["LR"] <= example["LIMITS"][1] for rate in rates.values())  # type: ignore[operator]


def test_layers_that_are_still_are_frozen_and_stay_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(EXAMPLES / "freeze_still_layers.py")
    runpy.run_path(path)["main"](str(tmp_path), last_step=100)
    runpy.run_path(path)["main"](str(tmp_path))  # resumed: another process would do the same
    frozen = [names.split(", ") for names in re.findall(r"frozen: (.*)", capsys.readouterr().out)]
    assert frozen[0] == ["nothing"]
    assert frozen[-1][:2] == ["embed_tokens", "layers.0"]
    assert frozen[10][: len(frozen[9])] == frozen[9]  # the last before, the first after the resume
    layers = {layer.name: layer for layer in open_checkpoint(tmp_path / "checkpoint-120").manifest.layers}
    assert layers["layers.0"].drift == 0
    assert layers["layers.0"].step < 120
    assert layers["norm"].step == 120
    assert not any(
        each.trainable
        for each in open_checkpoint(tmp_path / "checkpoint-120").manifest.tensors
        if each.layer == "layers.0"
    )
