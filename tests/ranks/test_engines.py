"""DeepSpeed's engines with our checkpoints behind ``save_checkpoint`` and ``load_checkpoint``; every kill is of all."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import llmtailor
from llmtailor.checkpoint import open_checkpoint
from llmtailor.verify import verify_checkpoint
from merge.deepspeed_training import EXTENSIONS
from ranks.launch import run_ranks

PROGRAM = Path(__file__).parent / "engine_trainings.py"
ENVIRONMENT = {"DS_ACCELERATOR": "cpu", "TORCH_EXTENSIONS_DIR": str(EXTENSIONS)}
CASES = [
    f"zero{stage}-{strategy}-{dtype}"
    for stage in (1, 2, 3)
    for strategy in ("full", "parity")
    for dtype in ("fp32", "bf16")
] + ["zero2-full-bf16-accumulate"]
# The first engine of stage 3 changes torch.nn.functional.linear for all that follow in a process.
CASES = sorted(CASES, key=lambda case: case[:5])


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("engines")
    run_ranks(PROGRAM, 2, "begin", directory, *CASES, expected=(-9,), environment=ENVIRONMENT)
    for case in CASES:  # moved when all ranks' files were durable
        assert (directory / case / "latest").read_text() == "checkpoint-4\n"
    run_ranks(PROGRAM, 2, "resume", directory, *CASES, environment=ENVIRONMENT)
    return directory


def read(directory: Path, case: str, name: str) -> Any:
    return json.loads((directory / f"{case}.{name}.json").read_text())


@pytest.mark.parametrize("case", [case for case in CASES if "-full-" in case])
def test_full_goes_on_bit_for_bit(resumed: Path, case: str) -> None:
    straight, found = read(resumed, case, "straight"), read(resumed, case, "resumed")
    assert found["start"] == 4
    assert found["loaded"] == read(resumed, case, "truth")["4"]
    assert found["losses"] == straight["losses"][4:]
    assert found["final"] == straight["final"]


@pytest.mark.parametrize("case", [case for case in CASES if "-parity-" in case])
def test_layers_of_parity_are_those_of_the_step_they_claim(resumed: Path, case: str) -> None:
    """But for moments of stale layers, which go on with the one update count that DeepSpeed keeps for a group."""
    truth, found = read(resumed, case, "truth"), read(resumed, case, "resumed")
    manifest = open_checkpoint(resumed / case / "checkpoint-4").manifest
    layer_of = {tensor.fqn: tensor.layer for tensor in manifest.tensors}
    steps = {layer.name: layer.step for layer in manifest.layers}
    assert set(steps.values()) == {2, 4}
    for name, digest in found["loaded"].items():
        fqn = name if name in layer_of else name.removeprefix("state.").rpartition(".")[0]
        step = steps[layer_of[fqn]]
        if step == 4 or name == fqn or name.endswith(".master"):
            assert digest == truth[str(step)][name], name


@pytest.mark.parametrize("case", CASES)
def test_every_checkpoint_verifies(resumed: Path, case: str) -> None:
    assert (resumed / case / "latest").read_text() == "checkpoint-6\n"
    for step in (2, 4, 6):
        report = verify_checkpoint(resumed / case / f"checkpoint-{step}")
        assert report.problems == ()
        assert report.unlisted == ()
    world = open_checkpoint(resumed / case / "checkpoint-4").manifest.world
    assert (world.size, world.sharding) == (2, "sharded")
    assert [path.name for path in (resumed / case / "_staging").iterdir()] == ["lock"]


@pytest.mark.parametrize("num_ranks", [1, 3, 4])
def test_another_number_of_ranks_loads_the_same_state(resumed: Path, num_ranks: int, tmp_path: Path) -> None:
    cases = ["zero1-full-bf16", "zero2-full-fp32", "zero3-full-bf16", "zero3-parity-fp32"]
    for case in cases:
        shutil.copytree(resumed / case, tmp_path / case)
        shutil.rmtree(tmp_path / case / "checkpoint-6")
    run_ranks(PROGRAM, num_ranks, "reshard", tmp_path, *cases, environment=ENVIRONMENT)
    for case in cases:
        assert read(tmp_path, case, f"resharded-{num_ranks}")["loaded"] == read(resumed, case, "resumed")["loaded"], (
            case
        )
        assert verify_checkpoint(tmp_path / case / "checkpoint-6").problems == ()


def test_another_stage_loads_the_same_state(resumed: Path, tmp_path: Path) -> None:
    shutil.copytree(resumed / "zero2-full-bf16", tmp_path / "zero3-full-bf16")
    shutil.rmtree(tmp_path / "zero3-full-bf16" / "checkpoint-6")
    run_ranks(PROGRAM, 2, "reshard", tmp_path, "zero3-full-bf16", environment=ENVIRONMENT)
    found, expected = read(tmp_path, "zero3-full-bf16", "resharded-2"), read(resumed, "zero2-full-bf16", "resumed")
    assert found["loaded"] == expected["loaded"]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_exported_to_deepspeed_it_is_what_stock_deepspeed_loads(resumed: Path, stage: int, tmp_path: Path) -> None:
    case = f"zero{stage}-full-bf16"
    llmtailor.export(resumed / case / "checkpoint-4", tmp_path / case, to="deepspeed", ranks=2, zero_stage=stage)
    run_ranks(PROGRAM, 2, "stock", tmp_path, case, environment=ENVIRONMENT)
    straight, found = read(resumed, case, "straight"), read(tmp_path, case, "stock")
    assert found["loaded"] == read(resumed, case, "truth")["4"]
    assert found["losses"] == straight["losses"][4:]
    assert found["final"] == straight["final"]
