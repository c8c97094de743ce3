"""Real checkpoints of every format: against numpy by hand, and against what they were exported to."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import llmtailor
from coded_checkpoints import code_layers, make_writable, write_manifest
from diff.model_directories import FQN, diff_models, write_model
from faults import open_descriptors
from llmtailor.checkpoint import open_checkpoint
from llmtailor.diff import Difference, Distance, LayerDifference, compare, plan_diff, summing
from llmtailor.diff.pairing import pair_catalogs
from llmtailor.errors import FormatError, IncompleteError, IntegrityError, InvalidInputError, NotFoundError
from llmtailor.formats import open_catalog
from llmtailor.state_keys import state_key
from master_adamw import MasterAdamW
from tiny_models import build_llama, snapshot_model, snapshot_optimizer, token_rows

DATA = Path(__file__).parent.parent / "compat" / "data"
LLAMA = DATA / "transformers-5.23.0" / "llama"
DEEPSPEED = DATA / "deepspeed-0.19.8"
DCP = DATA / "torch-2.13.0-dcp"

Contents = dict[str, torch.Tensor]


class Training:
    """A run of four steps with a save at each, and what it held then.

    Args:
        directory: Of the run.
        strategy: Which layers a save writes.
        tied: Whether the head is the embedding.
    """

    def __init__(self, directory: Path, *, strategy: str = "full", tied: bool = False) -> None:
        self.contents: dict[int, Contents] = {}
        self.directory = directory
        model = build_llama(dropout=0.0, tied=tied)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        rows = token_rows()
        with llmtailor.Run(directory, model, optimizer, strategy=strategy, save_steps=1) as run:
            for step in range(1, 5):
                optimizer.zero_grad()
                model(input_ids=rows[:4], labels=rows[:4]).loss.backward()
                optimizer.step()
                run.step(step)
                state = {f"state.{key}": value for key, value in snapshot_optimizer(model, optimizer).items()}
                self.contents[step] = {**snapshot_model(model), **state}

    def checkpoint(self, step: int) -> Path:
        return self.directory / f"checkpoint-{step}"


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Training:
    return Training(tmp_path_factory.mktemp("full") / "run")


@pytest.fixture(scope="module")
def parity(tmp_path_factory: pytest.TempPathFactory) -> Training:
    return Training(tmp_path_factory.mktemp("parity") / "run", strategy="parity")


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Training:
    return Training(tmp_path_factory.mktemp("tied") / "run", tied=True)


@pytest.fixture(autouse=True)
def _no_descriptor_stays_open() -> Any:
    before = open_descriptors()
    yield
    assert open_descriptors() == before


def layer_of(difference: Difference, name: str) -> LayerDifference:
    return next(layer for layer in difference.layers if layer.name == name)


def by_hand(a: list[np.ndarray[Any, Any]], b: list[np.ndarray[Any, Any]]) -> dict[str, float]:
    x, y = (np.concatenate([each.ravel() for each in side]).astype(np.float64) for side in (a, b))
    return {
        "numel": len(x),
        "num_equal": int((x == y).sum()),
        "l2": float(np.linalg.norm(y - x)),
        "relative": float(np.linalg.norm(y - x) / np.linalg.norm(x)),
        "max_abs": float(np.abs(y - x).max()),
        "cosine": float(x @ y / np.linalg.norm(x) / np.linalg.norm(y)),
    }


def assert_measures(found: Distance, expected: dict[str, float]) -> None:
    for name, value in expected.items():
        assert getattr(found, name) == pytest.approx(value, rel=1e-12), name


def test_two_steps_of_a_run_are_what_numpy_says(full: Training) -> None:
    difference = llmtailor.diff_checkpoints(full.checkpoint(1), str(full.checkpoint(4)))
    assert (difference.a.step, difference.b.step, difference.a.format) == (1, 4, "tailored")
    assert difference.components == ("weights", "exp_avg", "exp_avg_sq", "step")
    assert not difference.unmatched
    manifest = open_checkpoint(full.checkpoint(1)).manifest
    assert [layer.name for layer in difference.layers] == [layer.name for layer in manifest.layers]
    sides = {step: {key: value.numpy() for key, value in full.contents[step].items()} for step in (1, 4)}
    fqns = {
        layer.name: [each.fqn for each in manifest.tensors if each.layer == layer.name] for layer in manifest.layers
    }
    for component in difference.components:
        keys = {name: [_key(fqn, component) for fqn in fqns[name]] for name in fqns}
        for layer in difference.layers:
            pair = [[sides[step][key] for key in keys[layer.name]] for step in (1, 4)]
            assert_measures(layer.distances[component], by_hand(*pair))
            assert (layer.step_a, layer.step_b, layer.is_identical) == (1, 4, False)
        every = [[sides[step][key] for each in keys.values() for key in each] for step in (1, 4)]
        assert_measures(difference.totals[component], by_hand(*every))
    for tensor in difference.tensors:
        key = _key(tensor.fqn, tensor.component)
        assert_measures(tensor.distance, by_hand([sides[1][key]], [sides[4][key]]))
        assert tensor.fqn in fqns[tensor.layer]
    assert len(difference.tensors) == 4 * sum(map(len, fqns.values()))


def _key(fqn: str, component: str) -> str:
    return fqn if component == "weights" else state_key(fqn, component)


SOURCES = {
    "trainer": (LLAMA / "checkpoint-2", ("tailored", "hf", "dcp")),
    "deepspeed of masters": (DEEPSPEED / "z2-bf16", ("tailored", "hf", "deepspeed", "dcp")),
    "deepspeed of three ranks": (DEEPSPEED / "z3-bf16-frozen-3ranks", ("tailored",)),
    "deepspeed, tied": (DEEPSPEED / "z3-fp32-tied-subgroups", ("tailored", "dcp")),
    "dcp": (DCP / "loop", ("tailored", "dcp")),
    "dcp, tied": (DCP / "tied", ("tailored",)),
}


@pytest.mark.parametrize(
    ("source", "to"), [(path, to) for path, targets in SOURCES.values() for to in targets], ids=str
)
def test_a_checkpoint_is_identical_to_what_it_was_exported_to(source: Path, to: str, tmp_path: Path) -> None:
    llmtailor.export(source, tmp_path / "out", to=to)
    difference = llmtailor.diff_checkpoints(source, tmp_path / "out")
    assert difference.is_identical, (difference.unmatched[:3], difference.totals)
    assert {"weights", "exp_avg", "exp_avg_sq"} <= {*difference.components}
    assert all(distance.numel and not distance.num_unread for distance in difference.totals.values())
    assert llmtailor.diff_checkpoints(tmp_path / "out", source).is_identical


@pytest.mark.parametrize("which", ["full", "tied"])
def test_a_transformers_directory_of_the_same_weights(
    which: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    training: Training = request.getfixturevalue(which)
    llmtailor.export(training.checkpoint(4), tmp_path / "model", to="hf", weights_only=True)
    for pair in [(training.checkpoint(4), tmp_path / "model"), (tmp_path / "model", training.checkpoint(4))]:
        assert llmtailor.diff_checkpoints(*pair, only="weights").is_identical
        assert not llmtailor.diff_checkpoints(training.checkpoint(3), tmp_path / "model", only="weights").is_identical


def test_optimizer_state_that_one_has_alone_is_a_difference(full: Training, tmp_path: Path) -> None:
    llmtailor.export(full.checkpoint(4), tmp_path / "model", to="hf", weights_only=True)
    difference = llmtailor.diff_checkpoints(full.checkpoint(4), tmp_path / "model")
    assert not difference.is_identical
    assert difference.totals["weights"].is_equal
    assert (difference.a.has_optimizer, difference.b.has_optimizer) == (True, False)
    assert {each.component for each in difference.unmatched} == {"exp_avg", "exp_avg_sq", "step"}
    assert all(each.b is None for each in difference.unmatched)


@pytest.mark.parametrize("is_tied_first", [True, False])
def test_a_head_of_its_own_is_compared_with_what_it_was_tied_to(
    tied: Training, is_tied_first: bool, tmp_path: Path
) -> None:
    weights = {key: value.clone() for key, value in tied.contents[4].items() if not key.startswith("state.")}
    assert torch.equal(weights["lm_head.weight"], weights["model.embed_tokens.weight"])
    for name, change in (("equal", 0.0), ("moved", 1.0)):
        weights["lm_head.weight"][0, 0] += change
        pair = [tied.checkpoint(4), write_model(tmp_path / name, weights)]
        difference = llmtailor.diff_checkpoints(*(pair if is_tied_first else reversed(pair)), only="weights")
        unequal = [tensor.fqn for tensor in difference.tensors if not tensor.distance.is_equal]
        assert unequal == (["lm_head.weight"] if change else [])
        assert len(difference.tensors) == len(weights)
        assert not difference.unmatched


def test_masters_are_compared_with_weights_that_are_such(tmp_path: Path) -> None:
    """With weights of 16 bits, their own weights are; with others, the masters they are rounded from."""
    source = DEEPSPEED / "z2-bf16"
    llmtailor.export(source, tmp_path / "F32", to="tailored")
    llmtailor.export(source, tmp_path / "BF16", to="hf", weights_only=True)
    for dtype in ("F32", "BF16"):
        difference = llmtailor.diff_checkpoints(source, tmp_path / dtype, only="weights")
        assert difference.is_identical
        assert {(tensor.a.dtype, tensor.b.dtype) for tensor in difference.tensors} == {(dtype, dtype)}
    itself = llmtailor.diff_checkpoints(source, source)
    assert {"weights", "master"} <= {*itself.components}


def test_a_composite_opens_none_of_the_files_it_shares(parity: Training, tmp_path: Path) -> None:
    """They are not even there."""
    shutil.copytree(parity.directory, tmp_path / "run")
    a, b = (tmp_path / "run" / f"checkpoint-{step}" for step in (3, 4))
    layers = {
        step: {each.name: each for each in open_checkpoint(path).manifest.layers} for step, path in ((3, a), (4, b))
    }
    shared = [name for name, layer in layers[4].items() if layer.step < 4]
    assert 0 < len(shared) < len(layers[4])
    make_writable(tmp_path / "run")
    for name in shared:
        for directory, layer in ((a, layers[3][name]), (b, layers[4][name])):
            for file in layer.files:
                (directory / file.path).unlink()
    difference = llmtailor.diff_checkpoints(a, b)
    assert [layer.name for layer in difference.layers if layer.is_identical] == shared
    for name in shared:
        layer = layer_of(difference, name)
        assert layer.same_files == ("weights", "optimizer")
        assert not layer.tensors
        weights = layer.distances["weights"]
        manifest = open_checkpoint(b).manifest
        assert weights.numel == sum(each.meta.numel for each in manifest.tensors if each.layer == name)
        assert weights.num_unread == weights.num_equal == weights.numel
    read = [layer for layer in difference.layers if layer.name not in shared]
    assert all(layer.tensors and not layer.same_files for layer in read)
    # The rest is opened: without one of its files there is nothing to say.
    other = layers[4][read[0].name]
    assert other.weights is not None
    (b / other.weights.path).unlink()
    with pytest.raises(NotFoundError):
        llmtailor.diff_checkpoints(a, b)


def test_the_same_weights_file_beside_another_optimizer_file(full: Training, tmp_path: Path) -> None:
    """The optimizer alone is opened."""
    with_other_state = tmp_path / "checkpoint-3"
    shutil.copytree(full.checkpoint(3), with_other_state)
    make_writable(with_other_state)
    manifest = open_checkpoint(with_other_state).manifest
    layers = []
    for layer, newer in zip(manifest.layers, open_checkpoint(full.checkpoint(4)).manifest.layers, strict=True):
        assert layer.optimizer is not None
        shutil.copyfile(full.checkpoint(4) / layer.optimizer.path, with_other_state / layer.optimizer.path)
        assert layer.weights is not None
        (with_other_state / layer.weights.path).unlink()
        layers.append(layer.model_copy(update={"optimizer": newer.optimizer}))
    write_manifest(with_other_state, layers)
    difference = llmtailor.diff_checkpoints(full.checkpoint(3), with_other_state)
    assert {layer.same_files for layer in difference.layers} == {("weights",)}
    assert difference.totals["weights"].is_equal
    assert difference.totals["exp_avg"].relative > 0


@pytest.mark.parametrize("link", [True, False], ids=["links", "copies"])
def test_hard_links_of_any_format_are_not_read(link: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = LLAMA / "checkpoint-2"
    shutil.copytree(source, tmp_path / "a")
    subprocess.run(["cp", "-al" if link else "-a", tmp_path / "a", tmp_path / "b"], check=True)
    read = []
    real = summing.Comparer.compare
    monkeypatch.setattr(summing.Comparer, "compare", lambda self, *pair: read.append(pair) or real(self, *pair))
    plan = plan_diff(tmp_path / "a", tmp_path / "b", only="weights")
    difference = compare(plan)
    assert difference.is_identical
    assert (plan.nbytes == 0) == (not read) == link
    assert difference.totals["weights"].num_unread == (difference.totals["weights"].numel if link else 0)


def test_layers_in_codes_are_what_the_codes_stand_for(full: Training, tmp_path: Path) -> None:
    policies = {"layers.0": "q8", "layers.1": "compact", "layers.2": "moments", "norm": "nothing"}
    coded = code_layers(full.checkpoint(4), full.checkpoint(3), tmp_path / "checkpoint-4", policies)
    difference = llmtailor.diff_checkpoints(full.checkpoint(4), coded.path)
    assert not difference.unmatched
    exact = full.contents[4]
    assert not layer_of(difference, "layers.0").is_identical
    for tensor in difference.tensors:
        key = _key(tensor.fqn, tensor.component)
        expected = by_hand([exact[key].numpy()], [coded.truth[key].numpy()])
        assert tensor.distance.l2 == pytest.approx(expected["l2"], rel=1e-12, abs=1e-300), key
        assert tensor.distance.num_equal == expected["num_equal"]
    # Layers without codes are the same files.
    assert layer_of(difference, "layers.3").same_files == ("weights", "optimizer")
    shutil.copytree(coded.path, tmp_path / "copy")
    again = llmtailor.diff_checkpoints(coded.path, tmp_path / "copy")
    assert {layer.same_files for layer in again.layers} == {("weights", "optimizer")}


def test_codes_beside_the_same_exact_files_are_not_those_files(full: Training, tmp_path: Path) -> None:
    """What lies beside codes is what they are relative to: files of an earlier step."""
    older, newer = full.checkpoint(3), full.checkpoint(4)
    q8 = code_layers(newer, older, tmp_path / "q8" / "checkpoint-4", {"layers.0": "q8"}).path
    q4 = code_layers(newer, older, tmp_path / "q4" / "checkpoint-4", {"layers.0": "q4"}).path
    for a, b in [(older, q8), (q8, older), (q8, q4)]:
        layer = layer_of(llmtailor.diff_checkpoints(a, b), "layers.0")
        assert not layer.same_files
        assert 0 < layer.distances["weights"].relative < 0.1


def test_masters_in_the_optimizer_state_are_called_so(tmp_path: Path) -> None:
    model = build_llama(dropout=0.0, dtype=torch.bfloat16)
    optimizer = MasterAdamW(model.parameters(), lr=1e-2)
    rows = token_rows()
    with llmtailor.Run(tmp_path / "run", model, optimizer, save_steps=1) as run:
        for step in (1, 2):
            optimizer.zero_grad()
            model(input_ids=rows[:4], labels=rows[:4]).loss.backward()
            optimizer.step()
            run.step(step)
    difference = llmtailor.diff_checkpoints(tmp_path / "run" / "checkpoint-1", tmp_path / "run" / "checkpoint-2")
    assert {"weights", "master"} <= {*difference.components}
    weights, master = difference.totals["weights"], difference.totals["master"]
    assert master.relative == pytest.approx(weights.relative, rel=0.1)
    assert master.num_equal < weights.num_equal


def test_ties_that_are_held_by_another_name_are_one_tensor(tied: Training, tmp_path: Path) -> None:
    weights = {key: value for key, value in tied.contents[4].items() if not key.startswith("state.")}
    del weights["model.embed_tokens.weight"]
    a = open_catalog(tied.checkpoint(4))
    b = replace(
        open_catalog(write_model(tmp_path / "b", weights)), ties={"model.embed_tokens.weight": "lm_head.weight"}
    )
    for pair in ((a, b), (b, a)):
        plan = pair_catalogs(*pair, kinds=("weights",))
        assert not any(layer.unmatched for layer in plan.layers)
        assert sum(len(layer.pairs) for layer in plan.layers) == len(weights)
        assert compare(plan).is_identical


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (["layers.1"], ["layers.1"]),
        (["layers.*"], ["layers.0", "layers.1", "layers.2", "layers.3"]),
        (["norm", "layers.0-1"], ["layers.0", "layers.1", "norm"]),
        (["norm, layers.[23]"], ["layers.2", "layers.3", "norm"]),
    ],
)
def test_layers_are_chosen_by_pattern_and_stay_in_order(
    full: Training, patterns: list[str], expected: list[str]
) -> None:
    difference = llmtailor.diff_checkpoints(full.checkpoint(1), full.checkpoint(2), layers=patterns)
    assert [layer.name for layer in difference.layers] == expected
    assert {tensor.layer for tensor in difference.tensors} == {*expected}


@pytest.mark.parametrize(
    ("only", "expected"), [("weights", ("weights",)), ("optimizer", ("exp_avg", "exp_avg_sq", "step"))]
)
def test_weights_or_optimizer_alone(full: Training, only: Any, expected: tuple[str, ...]) -> None:
    difference = llmtailor.diff_checkpoints(full.checkpoint(1), full.checkpoint(2), only=only)
    assert difference.components == expected


def test_tensors_that_are_missing_or_of_another_shape_are_listed(tmp_path: Path) -> None:
    ones = {f"model.layers.{number}.up.weight": torch.ones(2, 3) for number in range(3)}
    a = {**ones, "model.gate.weight": torch.ones(2), FQN: torch.ones(4)}
    b = {**ones, "model.layers.3.up.weight": torch.ones(2, 3), FQN: torch.ones(2, 2)}
    difference = diff_models(tmp_path, a, b)
    assert not difference.is_identical
    listed = {(each.fqn, each.layer): (str(each.a), str(each.b)) for each in difference.unmatched}
    assert listed == {
        ("model.gate.weight", "gate"): ("F32[2]", "None"),
        (FQN, "head"): ("F32[4]", "F32[2, 2]"),
        ("model.layers.3.up.weight", "layers.3"): ("None", "F32[2, 3]"),
    }
    assert difference.layers[-1].name == "layers.3"
    assert (difference.totals["weights"].numel, difference.totals["weights"].is_equal) == (18, True)


def refuse(call: Callable[[], Any], error: type[Exception], kind: str) -> Any:
    with pytest.raises(error) as caught:
        call()
    assert caught.value.kind == kind  # type: ignore[attr-defined]
    return caught.value


def test_what_cannot_be_compared_is_told(full: Training, tmp_path: Path) -> None:
    good, model = full.checkpoint(1), write_model(tmp_path / "model", {FQN: torch.ones(2)})
    diff = llmtailor.diff_checkpoints
    refuse(lambda: diff(good, tmp_path / "nothing"), NotFoundError, "missing-checkpoint")
    refuse(lambda: diff(full.directory, good), FormatError, "unknown-format")
    unknown = refuse(lambda: diff(good, full.checkpoint(2), layers=["layer.*"]), NotFoundError, "unknown-layer")
    assert (unknown.layer, unknown.expected) == ("layer.*", "embed_tokens, layers.0-3, norm, lm_head")
    refuse(lambda: diff(model, model, only="optimizer"), IncompleteError, "no-optimizer-state")
    wrong: Any = "moments"
    refuse(lambda: diff(good, good, only=wrong), InvalidInputError, "diff-only")


@pytest.mark.parametrize("chunk_nbytes", [2**10, 2**22], ids=["many threads", "one thread"])
def test_a_file_that_changes_while_it_is_read_is_an_error(tmp_path: Path, chunk_nbytes: int) -> None:
    a, b = {FQN: torch.ones(10_000)}, {FQN: torch.zeros(10_000)}
    plan = plan_diff(write_model(tmp_path / "a", a), write_model(tmp_path / "b", b))
    path = tmp_path / "b" / "model.safetensors"

    def touch(nbytes: int) -> None:
        with path.open("r+b") as file:
            file.seek(-1, 2)
            file.write(b"?")

    refuse(lambda: compare(plan, on_bytes=touch, chunk_nbytes=chunk_nbytes), IntegrityError, "changed")


def test_all_bytes_are_told(full: Training) -> None:
    plan = plan_diff(full.checkpoint(1), full.checkpoint(2))
    told: list[int] = []
    compare(plan, on_bytes=told.append, chunk_nbytes=256)
    assert sum(told) == plan.nbytes > 0


def test_a_plan_reads_no_tensor_and_comparing_needs_no_torch(full: Training) -> None:
    text = (
        "import sys, llmtailor; found = llmtailor.diff_checkpoints(*sys.argv[1:]); "
        "assert not found.is_identical; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", text, full.checkpoint(1), full.checkpoint(2)], check=True)
