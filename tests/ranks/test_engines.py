"""DeepSpeed's engines with our checkpoints behind ``save_checkpoint`` and ``load_checkpoint``; every kill is of all."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import llmtailor
from llmtailor.checkpoint import open_checkpoint
from llmtailor.diff.records import MASTER, WEIGHTS
from llmtailor.errors import InvalidInputError
from llmtailor.integrations.deepspeed import install
from llmtailor.load import Target, plan_targets, read_saved_states
from llmtailor.shards import whole_shard
from llmtailor.state_keys import state_key
from llmtailor.tensor_bytes import torch_dtype
from llmtailor.verify import verify_checkpoint
from ranks.launch import Launches, run_ranks
from ranks.loop_trainings import digests

PROGRAM = Path(__file__).parent / "engine_trainings.py"
FAST = ["zero1-full-bf16", "zero2-parity-fp32", "zero3-full-fp32", "zero3-parity-bf16"]
# The first engine of stage 3 changes torch.nn.functional.linear for all that follow in a process: in order of stages.
MATRIX = [
    f"zero{stage}-{strategy}-{dtype}"
    for stage in "123"
    for strategy in ("full", "parity")
    for dtype in ("fp32", "bf16")
]
SLOW = ["zero2-full-bf16-accumulate", *(case for case in MATRIX if case not in FAST)]
SLOW.sort(key=lambda case: case[:5])
CASES = [*FAST, *(pytest.param(case, marks=pytest.mark.slow) for case in SLOW)]


class Engines(Launches):
    def look(self, verb: str, directory: Path, cases: Sequence[str]) -> None:
        for case in cases:
            # It follows what is durable on all ranks, and the kill may have come in between.
            latest = (directory / case / "latest").read_text()
            assert latest in (("checkpoint-2\n", "checkpoint-4\n") if verb == "begin" else ("checkpoint-6\n",))
            assert open_checkpoint(directory / case / latest.strip())


@pytest.fixture(scope="module")
def trainings(tmp_path_factory: pytest.TempPathFactory) -> Launches:
    return Engines(PROGRAM, tmp_path_factory.mktemp("engines"), [FAST, SLOW])


def is_of(strategy: str, case: Any) -> bool:
    return f"-{strategy}-" in (case if isinstance(case, str) else case.values[0])


def read(directory: Path, case: str, name: str) -> Any:
    return json.loads((directory / f"{case}.{name}.json").read_text())


@pytest.mark.parametrize("case", [case for case in CASES if is_of("full", case)])
def test_full_goes_on_bit_for_bit(trainings: Launches, case: str) -> None:
    resumed = trainings.of(case)
    straight, found = read(resumed, case, "straight"), read(resumed, case, "resumed")
    assert found["start"] == 4
    assert found["loaded"] == read(resumed, case, "truth")["4"]
    assert found["losses"] == straight["losses"][4:]
    assert found["final"] == straight["final"]


@pytest.mark.parametrize("case", [case for case in CASES if is_of("parity", case)])
def test_layers_of_parity_are_those_of_the_step_they_claim(trainings: Launches, case: str) -> None:
    """But for moments of stale layers, which go on with the one update count that DeepSpeed keeps for a group."""
    resumed = trainings.of(case)
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
def test_a_checkpoint_holds_each_layer_as_it_was_at_its_step(trainings: Launches, case: str) -> None:
    """All of it, moments and update counts too: put together from the files of both ranks."""
    directory = trainings.of(case)
    found = open_checkpoint(directory / case / "checkpoint-4")
    held = [tensor for tensor in found.manifest.tensors if tensor.tied_to is None]
    metas = {tensor.fqn: (tensor.meta, tensor.layer) for tensor in held}
    for fqn, saved in read_saved_states(found).items():
        metas |= {state_key(fqn, leaf): (meta, metas[fqn][1]) for leaf, meta in saved.metas.items()}
    wholes = {name: torch.empty(meta.shape, dtype=torch_dtype(meta.dtype)) for name, (meta, _) in metas.items()}
    targets = {name: [Target(tensor=whole, shard=whole_shard(whole.shape))] for name, whole in wholes.items()}
    plan_targets(found, targets).fill()
    truth = read(directory, case, "truth")
    steps = {layer.name: layer.step for layer in found.manifest.layers}
    assert digests(wholes) == {name: truth[str(steps[layer])][name] for name, (_, layer) in metas.items()}
    assert metas.keys() == truth["4"].keys()


@pytest.mark.parametrize("case", CASES)
def test_every_checkpoint_verifies(trainings: Launches, case: str) -> None:
    resumed = trainings.of(case)
    assert (resumed / case / "latest").read_text() == "checkpoint-6\n"
    for step in (2, 4, 6):
        report = verify_checkpoint(resumed / case / f"checkpoint-{step}")
        assert report.problems == ()
        assert report.unlisted == ()
    world = open_checkpoint(resumed / case / "checkpoint-4").manifest.world
    assert (world.size, world.sharding) == (2, "sharded")
    assert [path.name for path in (resumed / case / "_staging").iterdir()] == ["lock"]


@pytest.mark.parametrize(
    "num_ranks", [3, pytest.param(1, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow)]
)
def test_another_number_of_ranks_loads_the_same_state(trainings: Launches, num_ranks: int, tmp_path: Path) -> None:
    cases, resumed = FAST, trainings.of(FAST[0])
    for case in cases:
        shutil.copytree(resumed / case, tmp_path / case)
        shutil.rmtree(tmp_path / case / "checkpoint-6")
    run_ranks(PROGRAM, num_ranks, "reshard", tmp_path, *cases)
    for case in cases:
        assert read(tmp_path, case, f"resharded-{num_ranks}")["loaded"] == read(resumed, case, "resumed")["loaded"], (
            case
        )
        assert verify_checkpoint(tmp_path / case / "checkpoint-6").problems == ()


@pytest.mark.slow
def test_another_stage_loads_the_same_state(trainings: Launches, tmp_path: Path) -> None:
    resumed = trainings.of("zero2-full-bf16")
    shutil.copytree(resumed / "zero2-full-bf16", tmp_path / "zero3-full-bf16")
    shutil.rmtree(tmp_path / "zero3-full-bf16" / "checkpoint-6")
    run_ranks(PROGRAM, 2, "reshard", tmp_path, "zero3-full-bf16")
    found, expected = read(tmp_path, "zero3-full-bf16", "resharded-2"), read(resumed, "zero2-full-bf16", "resumed")
    assert found["loaded"] == expected["loaded"]


@pytest.mark.parametrize("stage", [1, pytest.param(2, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow)])
def test_exported_to_deepspeed_it_is_what_stock_deepspeed_loads(
    trainings: Launches, stage: int, tmp_path: Path
) -> None:
    case = f"zero{stage}-full-bf16"
    resumed = trainings.of(case)
    llmtailor.export(resumed / case / "checkpoint-4", tmp_path / case, to="deepspeed", ranks=2, zero_stage=stage)
    run_ranks(PROGRAM, 2, "stock", tmp_path, case)
    straight, found = read(resumed, case, "straight"), read(tmp_path, case, "stock")
    assert found["loaded"] == read(resumed, case, "truth")["4"]
    assert found["losses"] == straight["losses"][4:]
    assert found["final"] == straight["final"]


@pytest.mark.slow
def test_accelerates_own_save_state_goes_through_the_engine(tmp_path: Path) -> None:
    run_ranks(PROGRAM.with_name("accelerate_engine.py"), 2, tmp_path)
    manifest = open_checkpoint(tmp_path / "checkpoint-2").manifest
    assert {layer.step for layer in manifest.layers} == {1, 2}
    assert verify_checkpoint(tmp_path / "checkpoint-2").problems == ()
    with pytest.raises(InvalidInputError) as caught:
        install(torch.nn.Linear(1, 1))
    assert caught.value.kind == "not-an-engine"


@pytest.mark.parametrize("case", [case for case in CASES if is_of("full", case)])
def test_drift_is_that_between_the_checkpoints(trainings: Launches, case: str) -> None:
    """Each rank looked at its runs of flat partitions; what they say together is what the files say."""
    run = trainings.of(case) / case
    layers = {layer.name: layer for layer in open_checkpoint(run / "checkpoint-4").manifest.layers}
    assert sum(layer.share or 0 for layer in layers.values()) == pytest.approx(1, abs=1e-3)
    for layer in llmtailor.diff_checkpoints(run / "checkpoint-2", run / "checkpoint-4").layers:
        found = layer.find_distance(MASTER) or layer.distances[WEIGHTS]
        if math.isinf(found.relative):  # a bias that had been 0: JSON has no number for it
            assert layers[layer.name].drift is None
            continue
        # Some of the layers have entries that were not picked.
        assert layers[layer.name].drift == pytest.approx(found.relative, rel=0.15, abs=1e-6), layer.name
