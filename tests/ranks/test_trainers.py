"""transformers' Trainer on several ranks, under DDP and FSDP2: stock resume code, our checkpoints."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from llmtailor.checkpoint import open_checkpoint
from llmtailor.verify import verify_checkpoint
from ranks.launch import Launches, run_ranks

PROGRAM = Path(__file__).parent / "trainer_trainings.py"
# accelerate's state is one for a process, so each of these is a launch of its own. The first two are the fast ones.
LAUNCHES = [
    ["ddp-full-fp32", "ddp-parity-fp32"],
    ["fsdp-full-bf16-tied", "fsdp-parity-fp32"],
    ["ddp-full-bf16"],
    ["fsdp-full-fp32", "fsdp-parity-bf16"],
    ["zero2-full-bf16", "zero3-parity-bf16"],
    ["zero2-parity-fp32", "zero3-full-fp32"],
]
CASES = [
    pytest.param(case, marks=() if launch in LAUNCHES[:2] else pytest.mark.slow)
    for launch in LAUNCHES
    for case in launch
]


@pytest.fixture(scope="module")
def trainings(tmp_path_factory: pytest.TempPathFactory) -> Launches:
    return Launches(PROGRAM, tmp_path_factory.mktemp("trainers"), LAUNCHES)


def read(directory: Path, case: str, name: str) -> Any:
    return json.loads((directory / f"{case}.{name}.json").read_text())


@pytest.mark.parametrize("case", [case for case in CASES if "-full-" in case.values[0]])
def test_full_goes_on_bit_for_bit(trainings: Launches, case: str) -> None:
    resumed = trainings.of(case)
    straight, found = read(resumed, case, "straight"), read(resumed, case, "resumed")
    assert found["losses"] == straight["losses"]
    assert found["final"] == straight["final"]


@pytest.mark.parametrize("case", [case for case in CASES if "-parity-" in case.values[0]])
def test_layers_of_parity_are_those_of_the_step_they_claim(trainings: Launches, case: str) -> None:
    resumed = trainings.of(case)
    truth, found = read(resumed, case, "truth"), read(resumed, case, "resumed")
    manifest = open_checkpoint(resumed / case / "checkpoint-4").manifest
    layer_of = {tensor.fqn: tensor.layer for tensor in manifest.tensors}
    steps = {layer.name: layer.step for layer in manifest.layers}
    assert set(steps.values()) == {2, 4}
    names = [name for name in found["loaded"] if name.removeprefix("state.").rpartition(".")[0] in layer_of]
    names += [name for name in found["loaded"] if name in layer_of]
    assert len(names) > 30
    for name in names:
        fqn = name if name in layer_of else name.removeprefix("state.").rpartition(".")[0]
        step = steps[layer_of[fqn]]
        # DeepSpeed keeps one update count for a group, and the moments of stale layers go on with that.
        if not case.startswith("zero") or step == 4 or name == fqn or name.endswith(".master"):
            assert found["loaded"][name] == truth[str(step)][name], name


@pytest.mark.parametrize("case", CASES)
def test_every_checkpoint_verifies(trainings: Launches, case: str) -> None:
    resumed = trainings.of(case)
    steps = sorted(int(path.name.split("-")[1]) for path in (resumed / case).glob("checkpoint-*"))
    assert steps == [2, 4, 6]
    for step in steps:
        checkpoint = resumed / case / f"checkpoint-{step}"
        assert verify_checkpoint(checkpoint).problems == ()
        assert (checkpoint / "model.safetensors.index.json").exists() == case.startswith(("ddp", "zero2"))
        assert {path.name for path in checkpoint.glob("rng_state*")} == {"rng_state_0.pth", "rng_state_1.pth"}


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [3, 4])
def test_another_number_of_ranks_loads_the_same_state(trainings: Launches, num_ranks: int, tmp_path: Path) -> None:
    cases = ["fsdp-full-fp32", "fsdp-parity-bf16"]
    resumed = trainings.of(cases[0])
    for case in cases:
        shutil.copytree(resumed / case, tmp_path / case)
        shutil.rmtree(tmp_path / case / "checkpoint-6")
    run_ranks(PROGRAM, num_ranks, "reshard", tmp_path, *cases)
    for case in cases:
        assert read(tmp_path, case, f"resharded-{num_ranks}")["loaded"] == read(resumed, case, "resumed")["loaded"]
