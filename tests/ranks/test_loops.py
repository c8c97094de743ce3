"""``Run`` on several ranks: the same promise under DDP, FSDP2 and tensor parallelism; every kill is of all ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ranks.launch import run_ranks
from llmtailor.checkpoint import open_checkpoint
from llmtailor.verify import verify_checkpoint

PROGRAM = Path(__file__).parent / "loop_trainings.py"
CASES = [
    "ddp-full-fp32",
    "ddp-full-bf16",
    "ddp-parity-fp32-spread",
    "ddp-parity-bf16",
    "fsdp-full-fp32",
    "fsdp-full-bf16",
    "fsdp-parity-fp32",
    "fsdp-parity-bf16",
    "tp-full-fp32",
    "tp-parity-bf16",
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("loops")
    run_ranks(PROGRAM, 2, "begin", directory, *CASES, expected=(-9,))
    return directory


@pytest.fixture(scope="module")
def resumed(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_ranks(PROGRAM, 2, "resume", trained, *CASES)
    return trained


def read(directory: Path, case: str, name: str) -> Any:
    return json.loads((directory / f"{case}.{name}.json").read_text())


@pytest.mark.parametrize("case", [case for case in CASES if "-full-" in case])
def test_full_goes_on_bit_for_bit(resumed: Path, case: str) -> None:
    straight, found = read(resumed, case, "straight"), read(resumed, case, "resumed")
    assert found["start"] == 4
    assert found["losses"] == straight["losses"][4:]
    assert found["final"] == straight["final"]


@pytest.mark.parametrize("case", [case for case in CASES if "-parity-" in case])
def test_layers_of_parity_are_those_of_the_step_they_claim(resumed: Path, case: str) -> None:
    truth, found = read(resumed, case, "truth"), read(resumed, case, "resumed")
    manifest = open_checkpoint(resumed / case / "checkpoint-4").manifest
    layer_of = {tensor.fqn: tensor.layer for tensor in manifest.tensors}
    steps = {layer.name: layer.step for layer in manifest.layers}
    assert set(steps.values()) == {2, 4}
    for name, digest in found["loaded"].items():
        fqn = name if name in layer_of else name.removeprefix("state.").rpartition(".")[0]
        assert digest == truth[str(steps[layer_of[fqn]])][name], name


@pytest.mark.parametrize("case", CASES)
def test_every_checkpoint_verifies(resumed: Path, case: str) -> None:
    steps = sorted(int(path.name.split("-")[1]) for path in (resumed / case).glob("checkpoint-*"))
    assert steps == [2, 4, 6]
    for step in steps:
        report = verify_checkpoint(resumed / case / f"checkpoint-{step}")
        assert report.problems == ()
        assert report.unlisted == ()
    assert [path.name for path in (resumed / case / "_staging").iterdir()] == ["lock"]
