"""Checkpoints with layers in codes as sources: every target holds what the codes stand for, exactly."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import llmtailor
from coded_checkpoints import (
    POLICIES,
    Change,
    Coded,
    change_codes,
    code_layers,
    make_writable,
    read_tensors,
    write_manifest,
)
from formats.simple_writer import load_ref
from llmtailor.carried_files import PROVENANCE_NAME
from llmtailor.checkpoint import open_checkpoint
from llmtailor.codecs import BASE_KEY, CODES_KEY
from llmtailor.errors import FormatError, IntegrityError, NotFoundError, TailorError
from llmtailor.formats import detect_format, open_catalog
from llmtailor.integrations.transformers import tailor
from llmtailor.manifest import digest_of
from llmtailor.merging import plan_export
from llmtailor.recipe import parse_recipe
from llmtailor.save_history import recipe_of_run
from llmtailor.state_keys import state_key
from llmtailor.tensor_refs import CodedTensor, files_of
from llmtailor.tensors import TensorMeta
from llmtailor.verify import verify_checkpoint
from merge.merges import merge_layers, merge_with_itself
from tensor_content import host_bytes
from tiny_models import build_llama, build_trainer, snapshot_model, snapshot_optimizer, token_rows

OLDER, NEWER = 5, 10
POLICY_OF = {
    "embed_tokens": "kept",
    "layers.0": "q8",
    "layers.1": "q4",
    "layers.2": "compact",
    "layers.3": "compact4",
    "norm": "moments",
    "lm_head": "nothing",
}
TARGETS = ("tailored", "hf", "deepspeed", "dcp")

Contents = dict[str, torch.Tensor]
"""By fqn, and by ``state.<fqn>.<leaf>``."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """Exact checkpoints at steps 5 and 10, and that of step 10 in codes."""

    older: Path
    newer: Path
    coded: Coded


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["F32", "BF16"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    directory = tmp_path_factory.mktemp("run")
    torch.manual_seed(321)
    model = build_llama(width=24, dtype=request.param)
    tailor(build_trainer(directory / "a", model=model, stop=NEWER, max_steps=15), strategy="full").train()
    older, newer = (directory / "a" / f"checkpoint-{step}" for step in (OLDER, NEWER))
    coded = code_layers(newer, older, directory / f"checkpoint-{NEWER}", POLICY_OF)
    return Run(older=older, newer=newer, coded=coded)


def digests(directory: Path) -> dict[str, str]:
    return {str(path): digest_of(path.read_bytes()) for path in sorted(directory.rglob("*")) if path.is_file()}


def contents(checkpoint: Path) -> Contents:
    """Weights in their best precision, and state, of a checkpoint of any format without codes."""
    catalog = open_catalog(checkpoint)
    found = {fqn: load_ref(catalog.masters.get(fqn, ref)) for fqn, ref in catalog.weights.items()}
    for fqn, state in catalog.states.items():
        found |= {state_key(fqn, leaf): load_ref(ref) for leaf, ref in state.tensors.items()}
    return found


def assert_equal_values(found: Contents, expected: Contents) -> None:
    """The same numbers; a framework may keep them in wider types."""
    assert found.keys() == expected.keys()
    different = [key for key in found if not torch.equal(found[key].double(), expected[key].double())]
    assert not different, different[:5]


def assert_same_bits(found: Contents, expected: Contents) -> None:
    assert found.keys() == expected.keys()
    different = [
        key
        for key in found
        if found[key].dtype != expected[key].dtype or host_bytes(found[key]) != host_bytes(expected[key])
    ]
    assert not different, different[:5]


def test_the_codes_are_not_what_they_stand_for(run: Run) -> None:
    """Else the tests below would be of nothing."""
    exact = contents(run.newer)
    older = contents(run.older)
    inexact = {key for key, value in run.coded.truth.items() if not torch.equal(value, exact[key])}
    manifest = open_checkpoint(run.coded.path).manifest
    for name in ("layers.0", "layers.1", "layers.2", "layers.3"):
        fqns = [tensor.fqn for tensor in manifest.tensors if tensor.layer == name]
        assert any(state_key(fqn, "exp_avg") in inexact for fqn in fqns)
        is_exact = exact[fqns[0]].dtype is torch.bfloat16
        assert any(fqn in inexact for fqn in fqns) != is_exact
        assert any(not torch.equal(run.coded.truth[fqn], older[fqn]) for fqn in fqns)
    assert {record.encoding.base for record in manifest.layers if record.encoding} == {"exact", "rounded", "none"}


def test_a_coded_checkpoint_is_opened_as_its_newest_state(run: Run) -> None:
    catalog = open_catalog(run.coded.path)
    assert set(catalog.layer_steps.values()) == {NEWER}
    assert set(catalog.update_counts.values()) == {NEWER}
    refs = {**catalog.weights}
    for fqn, state in catalog.states.items():
        refs |= {state_key(fqn, leaf): ref for leaf, ref in state.tensors.items()}
    assert refs.keys() == run.coded.truth.keys()
    for key, ref in refs.items():
        expected = run.coded.truth[key]
        assert ref.meta.shape == tuple(expected.shape)
        if not isinstance(ref, CodedTensor):
            assert host_bytes(load_ref(ref)) == host_bytes(expected)
    plain = {record.optimizer for record in open_checkpoint(run.coded.path).manifest.layers}
    paths = {run.coded.path / record.path for record in plain if record is not None}
    assert not paths & {path for ref in refs.values() for path in files_of(ref)}


@pytest.mark.parametrize("to", TARGETS)
def test_export_holds_what_the_codes_stand_for(run: Run, to: str, tmp_path: Path) -> None:
    before = digests(run.coded.path)
    options = {"ranks": 2} if to == "deepspeed" else {}
    llmtailor.export(run.coded.path, tmp_path / "out", to=to, **options)
    assert detect_format(tmp_path / "out") == to
    assert_equal_values(contents(tmp_path / "out"), run.coded.truth)
    assert digests(run.coded.path) == before


def test_a_merged_checkpoint_of_ours_holds_plain_exact_files(run: Run, tmp_path: Path) -> None:
    out = merge_with_itself(run.coded.path, tmp_path / "out" / "checkpoint-10")
    assert verify_checkpoint(out).is_good
    assert_same_bits(contents(out), run.coded.truth)
    manifest = open_checkpoint(out).manifest
    assert {(layer.step, layer.update_count, layer.encoding) for layer in manifest.layers} == {(NEWER, NEWER, None)}
    assert not (out / "codes").exists()
    for layer in manifest.layers:
        assert layer.optimizer is not None
        assert all(key.startswith("state.") and "|" not in key for key in read_tensors(out / layer.optimizer.path))
    # What is exact in one plain file already need not be written again.
    linked = {
        layer.name
        for layer in manifest.layers
        if os.path.samefile(out / layer.weights.path, run.coded.path / layer.weights.path)
    }
    rounded = {"layers.2", "layers.3"} if _is_bf16(run) else set()
    assert linked == {"norm", "lm_head"} | rounded
    assert all(path.stat().st_nlink == 1 for path in (out / "optimizer").iterdir())


def test_a_codes_file_that_looks_like_an_optimizer_file_is_not_taken_for_one(tmp_path: Path) -> None:
    """Momentum alone, exact: the same bytes at the same places in a file of the same size, under other names."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 4, bias=False))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with llmtailor.Run(tmp_path / "run", model, optimizer, save_steps=1) as run:
        for step in (1, 2):
            model(torch.ones(4)).sum().backward()
            optimizer.step()
            run.step(step)
    older, newer = (tmp_path / "run" / f"checkpoint-{step}" for step in (1, 2))
    coded = code_layers(newer, older, tmp_path / "checkpoint-2", {"0": "nothing"})
    (plain,), (record,) = (open_checkpoint(path).manifest.layers for path in (newer, coded.path))
    assert record.encoding is not None
    assert plain.optimizer is not None
    assert record.encoding.codes.bytes == plain.optimizer.bytes
    llmtailor.export(coded.path, tmp_path / "out")
    assert_same_bits(contents(tmp_path / "out"), coded.truth)


def _is_bf16(run: Run) -> bool:
    return run.coded.truth["lm_head.weight"].dtype is torch.bfloat16


def test_a_merged_checkpoint_is_one_like_any_other(run: Run, tmp_path: Path) -> None:
    """Merged with itself once more it is the same, by links alone."""
    out = merge_with_itself(run.coded.path, tmp_path / "out" / "checkpoint-10")
    again = merge_with_itself(out, tmp_path / "again" / "checkpoint-10")
    for layer in open_checkpoint(again).manifest.layers:
        assert all(os.path.samefile(out / file.path, again / file.path) for file in layer.files)


@pytest.mark.parametrize("is_coded_newer", [True, False])
def test_layers_in_codes_and_exact_ones_are_merged(run: Run, is_coded_newer: bool, tmp_path: Path) -> None:
    mixed = {"layers.0", "layers.2", "norm"}
    newer, older = (run.coded.path, run.older) if is_coded_newer else (run.newer, run.coded.path)
    out = merge_layers(newer, older, sorted(mixed), tmp_path / "out" / "checkpoint-10")
    manifest = open_checkpoint(out).manifest
    of_layer = {tensor.fqn: tensor.layer for tensor in manifest.tensors}
    exact = contents(run.older if is_coded_newer else run.newer)
    expected = {
        key: run.coded.truth[key] if (of_layer[_fqn(key)] in mixed) != is_coded_newer else exact[key] for key in exact
    }
    assert_same_bits(contents(out), expected)
    assert verify_checkpoint(out).is_good
    steps = {layer.name: (layer.step, layer.update_count) for layer in manifest.layers}
    assert steps == {name: (OLDER, OLDER) if is_coded_newer and name in mixed else (NEWER, NEWER) for name in steps}


def _fqn(key: str) -> str:
    return key.removeprefix("state.").rpartition(".")[0] if key.startswith("state.") else key


def test_weights_alone_are_brought_to_another_type(run: Run, tmp_path: Path) -> None:
    llmtailor.export(run.coded.path, tmp_path / "out", to="hf", weights_only=True, dtype="float16")
    found = {fqn: load_ref(ref) for fqn, ref in open_catalog(tmp_path / "out").weights.items()}
    expected = {key: value.half() for key, value in run.coded.truth.items() if not key.startswith("state.")}
    assert_same_bits(found, expected)


def test_a_recipe_of_a_run_takes_codes_for_what_is_newest(run: Run, tmp_path: Path) -> None:
    runs = tmp_path / "run"
    shutil.copytree(run.older, runs / "checkpoint-5")
    shutil.copytree(run.coded.path, runs / "checkpoint-10")
    recipe = parse_recipe(recipe_of_run(runs, None).encode(), path=tmp_path / "recipe.yaml")
    assert str(runs / "checkpoint-5") not in str(recipe)
    assert str(runs / "checkpoint-10") in str(recipe)
    assert str(runs / "checkpoint-10") not in recipe_of_run(runs, OLDER)


def test_codes_that_are_kept_are_no_newer_version(run: Run, tmp_path: Path) -> None:
    """A later checkpoint holds the same codes; the first that has them stands for their save."""
    runs = tmp_path / "run"
    shutil.copytree(run.coded.path, runs / "checkpoint-10")
    shutil.copytree(run.coded.path, runs / "checkpoint-15")
    make_writable(runs)
    layers = list(open_checkpoint(runs / "checkpoint-15").manifest.layers)
    layers[0] = open_checkpoint(run.newer).manifest.layers[0].model_copy(update={"step": 15})
    write_manifest(runs / "checkpoint-15", layers, step=15)
    text = recipe_of_run(runs, None)
    newest = text.split("checkpoint-15", 2)[1:]
    assert "embed_tokens" in newest[0]
    assert "norm" not in newest[0].split("# step 10")[0]


def test_a_plan_of_codes_reads_no_tensor(run: Run, tmp_path: Path) -> None:
    """Every array's bytes are replaced by a hole, which a reader of them would find."""
    expected = plan_export(run.coded.path)
    copy = tmp_path / "checkpoint-10"
    shutil.copytree(run.coded.path, copy)
    make_writable(copy)
    for file in copy.rglob("*.safetensors"):
        nbytes, end = file.stat().st_size, 8 + int.from_bytes(file.read_bytes()[:8], "little")
        os.truncate(file, end)
        os.truncate(file, nbytes)
    found = plan_export(copy)
    assert [(row.layer, row.step, row.nbytes) for row in found.rows] == [
        (row.layer, row.step, row.nbytes) for row in expected.rows
    ]
    sizes = [
        {file.name: file.nbytes for file in plan.files.files if file.name != PROVENANCE_NAME}
        for plan in (found, expected)
    ]
    assert sizes[0] == sizes[1]
    assert found.linked_nbytes == expected.linked_nbytes > 0


def test_codes_are_exported_without_torch(run: Run, tmp_path: Path) -> None:
    text = "import sys, llmtailor; llmtailor.export(*sys.argv[1:], to='hf'); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", text, run.coded.path, tmp_path / "out"], check=True)


def set_metadata(key: str, value: str | None) -> Change:
    def change(arrays: dict[str, tuple[TensorMeta, bytes]], metadata: dict[str, str]) -> None:
        metadata.pop(key, None)
        if value is not None:
            metadata[key] = value

    return change


def drop_array(end: str) -> Change:
    def change(arrays: dict[str, tuple[TensorMeta, bytes]], metadata: dict[str, str]) -> None:
        del arrays[next(name for name in arrays if name.endswith(end))]

    return change


def reshape_array(end: str) -> Change:
    def change(arrays: dict[str, tuple[TensorMeta, bytes]], metadata: dict[str, str]) -> None:
        name = next(name for name in arrays if name.endswith(end))
        meta, content = arrays[name]
        arrays[name] = TensorMeta(dtype=meta.dtype, shape=(meta.numel, 1)), content

    return change


def change_entries(old: str, new: str) -> Change:
    def change(arrays: dict[str, tuple[TensorMeta, bytes]], metadata: dict[str, str]) -> None:
        assert old in metadata[CODES_KEY]
        metadata[CODES_KEY] = metadata[CODES_KEY].replace(old, new, 1)

    return change


def scales_without_end(arrays: dict[str, tuple[TensorMeta, bytes]], metadata: dict[str, str]) -> None:
    name = next(name for name in arrays if name.endswith("exp_avg|scales"))
    arrays[name] = arrays[name][0], b"\x80\x7f" * arrays[name][0].numel


OTHER = "xxh3_128:" + "f" * 32
# Codes files that nobody should have written, published like any other: layer, change, class and kind of the error.
HOSTILE: dict[str, tuple[str, Change, type[TailorError], str]] = {
    "codes against other weights": ("layers.0", set_metadata(BASE_KEY, OTHER), IntegrityError, "codes-base"),
    "codes against what they do not say": ("layers.0", set_metadata(BASE_KEY, None), FormatError, "codes-base"),
    "codes of the same step against a file": ("layers.2", set_metadata(BASE_KEY, OTHER), FormatError, "codes-base"),
    "no word of codes": ("norm", set_metadata(CODES_KEY, None), FormatError, "codes"),
    "an array less": ("layers.1", drop_array("exp_avg|scales"), FormatError, "codes"),
    "an array of another shape": ("layers.1", reshape_array("exp_avg|codes"), FormatError, "codes"),
    "an unknown codec": ("layers.0", change_entries('"int8"', '"int2"'), FormatError, "codec"),
    "another type": ("norm", change_entries('"codec":"exact"', '"codec":"int8"'), FormatError, "codes"),
    "another name": ("norm", change_entries("state.model.norm", "state.model.dorm"), FormatError, "codes"),
    "scales without end": ("layers.3", scales_without_end, FormatError, "codes"),
}


@pytest.fixture
def hostile(run: Run, tmp_path: Path) -> Path:
    """A copy to be spoilt."""
    path = tmp_path / "source" / "checkpoint-10"
    shutil.copytree(run.coded.path, path)
    return path


def assert_refused(source: Path, expected: type[TailorError], kind: str, to: str = "hf", **options: Any) -> TailorError:
    """An export fails, and nothing is written."""
    before = digests(source)
    target = source.parent.parent / "target"
    target.mkdir()
    with pytest.raises(expected) as caught:
        llmtailor.export(source, target / "out", to=to, **options)
    assert type(caught.value) is expected
    assert caught.value.kind == kind
    assert list(target.iterdir()) == []
    assert digests(source) == before
    return caught.value


@pytest.mark.parametrize("name", list(HOSTILE))
def test_hostile_codes_are_refused_and_nothing_is_written(name: str, hostile: Path) -> None:
    layer, change, expected, kind = HOSTILE[name]
    change_codes(hostile, layer, change)
    error = assert_refused(hostile, expected, kind)
    assert error.path is not None
    assert Path(error.path).parent == hostile / "codes"


@pytest.mark.parametrize("run", [torch.bfloat16], indirect=True, ids=["BF16"])
def test_frames_that_lie_are_refused_and_nothing_is_written(run: Run, hostile: Path) -> None:
    def change(arrays: dict[str, tuple[TensorMeta, bytes]], metadata: dict[str, str]) -> None:
        for name, (meta, content) in arrays.items():
            if name.endswith("|planes"):
                arrays[name] = meta, b"\x28\xb5\x2f\xfd" + b"?" * (len(content) - 4)

    change_codes(hostile, "layers.0", change)
    for to in TARGETS:
        options = {"ranks": 2} if to == "deepspeed" else {}
        error = assert_refused(hostile, FormatError, "codes", to=to, **options)
        assert error.path == str(hostile / "codes" / "layers.000.safetensors")
        (hostile.parent.parent / "target").rmdir()


Spoil = Callable[[Path], None]
DAMAGES: Mapping[str, tuple[Spoil, type[TailorError], str]] = {
    "codes are missing": (lambda path: (path / "codes/norm.safetensors").unlink(), NotFoundError, "missing-file"),
    "codes are cut off": (
        lambda path: os.truncate(path / "codes/norm.safetensors", 4100),
        FormatError,
        "file-size",
    ),
    "the base is missing": (
        lambda path: (path / "model-layers.000.safetensors").unlink(),
        NotFoundError,
        "missing-file",
    ),
    "the base is another size": (
        lambda path: shutil.copyfile(path / "model-norm.safetensors", path / "model-layers.000.safetensors") and None,
        IntegrityError,
        "file-size",
    ),
}


@pytest.mark.parametrize("name", list(DAMAGES))
def test_damaged_sources_are_refused_and_nothing_is_written(name: str, hostile: Path) -> None:
    spoil, expected, kind = DAMAGES[name]
    make_writable(hostile)
    spoil(hostile)
    assert_refused(hostile, expected, kind)


@pytest.mark.parametrize("run", [torch.float32], indirect=True, ids=["F32"])
def test_a_weights_file_that_is_not_rounded_where_it_should_be_is_refused(run: Run, hostile: Path) -> None:
    """Codes and weights file are of two saves."""
    layers = list(open_checkpoint(hostile).manifest.layers)
    index = next(index for index, layer in enumerate(layers) if layer.name == "layers.2")
    target = hostile / layers[index].weights.path
    target.unlink()
    shutil.copy(run.newer / layers[index].weights.path, target)
    content = target.read_bytes()
    record = layers[index].weights.model_copy(update={"bytes": len(content), "digest": digest_of(content)})
    layers[index] = layers[index].model_copy(update={"weights": record})
    write_manifest(hostile, layers)
    assert_refused(hostile, FormatError, "schema")


def train_in_codes(directory: Path, rest: str, spoil: Callable[[torch.nn.Module], None] = lambda model: None) -> Path:
    """A run whose last save wrote half of its layers as codes.

    Args:
        directory: Of the run.
        rest: Of the run.
        spoil: Does something to the model before the last save.
    """
    model = build_llama(width=64, dropout=0.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    rows = token_rows()
    with llmtailor.Run(directory, model, optimizer, strategy="parity", rest=rest, save_steps=2) as run:
        for step in range(1, 5):
            optimizer.zero_grad()
            model(input_ids=rows[:4], labels=rows[:4]).loss.backward()
            optimizer.step()
            if step == 4:
                spoil(model)
            run.step(step)
    return directory / "checkpoint-4"


def resumed(directory: Path, rest: str) -> Contents:
    """What a run goes on with."""
    model = build_llama(width=64, dropout=0.0, seed=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with llmtailor.Run(directory, model, optimizer, strategy="parity", rest=rest, save_steps=2) as run:
        assert run.resume() == 4
    state = snapshot_optimizer(model, optimizer)
    return {**snapshot_model(model), **{f"state.{name}": value for name, value in state.items()}}


@pytest.mark.parametrize("rest", ["q8", "q4", "compact", "compact4"])
def test_export_of_a_run_in_codes_is_what_it_resumes_with(rest: str, tmp_path: Path) -> None:
    checkpoint = train_in_codes(tmp_path / "run", rest)
    in_codes = {layer.name for layer in open_checkpoint(checkpoint).manifest.layers if layer.encoding is not None}
    assert {"layers.0", "layers.2"} <= in_codes
    catalog = open_catalog(checkpoint)
    refs = [*catalog.weights.values(), *(ref for state in catalog.states.values() for ref in state.tensors.values())]
    assert {ref.codec for ref in refs if isinstance(ref, CodedTensor)} == {
        POLICIES[rest].weights,
        POLICIES[rest].first,
        POLICIES[rest].second,
    }
    expected = resumed(tmp_path / "run", rest)
    for to in ("tailored", "hf"):
        llmtailor.export(checkpoint, tmp_path / to, to=to, weights_only=to == "hf")
    assert verify_checkpoint(tmp_path / "tailored").is_good
    assert_same_bits(contents(tmp_path / "tailored"), expected)
    weights = {key: value for key, value in expected.items() if not key.startswith("state.")}
    assert_same_bits(contents(tmp_path / "hf"), weights)


def test_a_run_in_codes_with_weights_that_are_no_numbers_can_be_read(tmp_path: Path) -> None:
    """They cannot be coded, so they stay exact; everything else of the layer is in codes."""

    def spoil(model: torch.nn.Module) -> None:
        with torch.no_grad():
            model.get_parameter("model.layers.0.self_attn.q_proj.weight")[0, 0] = float("inf")

    checkpoint = train_in_codes(tmp_path / "run", "compact", spoil)
    assert verify_checkpoint(checkpoint).is_good
    llmtailor.export(checkpoint, tmp_path / "out")
    assert_same_bits(contents(tmp_path / "out"), resumed(tmp_path / "run", "compact"))
