"""``Run`` on several ranks: the same promise under DDP, FSDP2 and tensor parallelism; every kill is of all ranks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from llmtailor import export
from llmtailor.checkpoint import open_checkpoint
from llmtailor.manifest import World
from llmtailor.verify import verify_checkpoint
from ranks.launch import run_ranks

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
CODED = "ddp-parity-fp32-q8-spread"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("loops")
    run_ranks(PROGRAM, 2, "begin", directory, *CASES, CODED, expected=(-9,))
    return directory


@pytest.fixture(scope="module")
def resumed(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_ranks(PROGRAM, 2, "resume", trained, *CASES, CODED)
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


def test_codes_are_written_by_the_rank_that_owns_the_layer(resumed: Path) -> None:
    manifest = open_checkpoint(resumed / CODED / "checkpoint-4").manifest
    assert manifest.is_current
    coded = [layer for layer in manifest.layers if layer.encoding is not None]
    # Of those that parity does not choose, the ones that codes make smaller.
    assert {(layer.step, layer.state_step) for layer in coded} == {(2, 4)}
    assert len(coded) > 1
    assert verify_checkpoint(resumed / CODED / "checkpoint-4").problems == ()
    assert read(resumed, CODED, "resumed")["start"] == 4  # both ranks loaded the same, which the program compares


@pytest.mark.parametrize("case", CASES)
def test_every_checkpoint_verifies(resumed: Path, case: str) -> None:
    steps = sorted(int(path.name.split("-")[1]) for path in (resumed / case).glob("checkpoint-*"))
    assert steps == [2, 4, 6]
    for step in steps:
        report = verify_checkpoint(resumed / case / f"checkpoint-{step}")
        assert report.problems == ()
        assert report.unlisted == ()
    assert [path.name for path in (resumed / case / "_staging").iterdir()] == ["lock"]


@pytest.mark.parametrize(
    "num_ranks", [3, pytest.param(1, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow)]
)
def test_another_number_of_ranks_loads_the_same_state(resumed: Path, num_ranks: int, tmp_path: Path) -> None:
    cases = ["fsdp-full-fp32", "fsdp-parity-bf16", "ddp-full-fp32"]
    for case in cases:
        shutil.copytree(resumed / case, tmp_path / case)
        shutil.rmtree(tmp_path / case / "checkpoint-6")
    run_ranks(PROGRAM, num_ranks, "reshard", tmp_path, *cases)
    for case in cases:
        found = read(tmp_path, case, f"resharded-{num_ranks}")
        assert found["start"] == 4
        # What two ranks gathered when they had loaded the same checkpoint: the tests above hold that against the truth.
        assert found["loaded"] == read(resumed, case, "resumed")["loaded"]
        manifest = open_checkpoint(tmp_path / case / "checkpoint-6").manifest
        assert manifest.world.size == num_ranks
        # Files of another cut are not linked; where nothing is cut, the number of ranks does not matter.
        assert manifest.is_consistent == ("parity" not in case or case.startswith("fsdp"))
        assert verify_checkpoint(tmp_path / case / "checkpoint-6").problems == ()


def test_what_is_exported_goes_on_as_its_source_does(resumed: Path, tmp_path: Path) -> None:
    """Random numbers are each rank's, so on as many ranks; on one rank, if its user does without them."""
    cases = ["ddp-full-fp32", "fsdp-full-bf16"]
    for case in cases:
        export(resumed / case / "checkpoint-4", tmp_path / case / "checkpoint-4", to="tailored")
        assert open_checkpoint(tmp_path / case / "checkpoint-4").manifest.world == World(size=2, sharding="none")
    run_ranks(PROGRAM, 2, "resume", tmp_path, *cases)
    for case in cases:
        straight, found = read(resumed, case, "straight"), read(tmp_path, case, "resumed")
        assert found["start"] == 4
        assert found["losses"] == straight["losses"][4:]
        assert found["final"] == straight["final"]
        shutil.rmtree(tmp_path / case / "checkpoint-6")
    run_ranks(PROGRAM, 1, "reshard", tmp_path, *cases)
    for case in cases:
        assert read(tmp_path, case, "resharded-1")["loaded"] == read(resumed, case, "resumed")["loaded"]


@pytest.fixture(scope="module")
def on_four(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("four")
    run_ranks(PROGRAM, 4, "begin", directory, *FOUR, expected=(-9,))
    run_ranks(PROGRAM, 4, "resume", directory, *FOUR)
    return directory


FOUR = ["fsdp_tp-full-fp32", "hsdp-full-bf16", "hsdp-parity-fp32", "tp-parity-fp32"]


@pytest.mark.slow
def test_meshes_of_two_dims(on_four: Path, tmp_path: Path) -> None:
    for case in FOUR:
        straight, found = read(on_four, case, "straight"), read(on_four, case, "resumed")
        if "full" in case:
            assert found["losses"] == straight["losses"][4:], case
            assert found["final"] == straight["final"], case
        for step in (2, 4, 6):
            assert verify_checkpoint(on_four / case / f"checkpoint-{step}").problems == ()
    # A mesh of two dims onto two ranks that are cut along one.
    shutil.copytree(on_four / "hsdp-full-bf16", tmp_path / "fsdp-full-bf16")
    shutil.rmtree(tmp_path / "fsdp-full-bf16" / "checkpoint-6")
    run_ranks(PROGRAM, 2, "reshard", tmp_path, "fsdp-full-bf16")
    assert (
        read(tmp_path, "fsdp-full-bf16", "resharded-2")["loaded"]
        == read(on_four, "hsdp-full-bf16", "resumed")["loaded"]
    )
