"""Trainings whose optimizer keeps fp32 masters of 16-bit weights go on from what was saved of them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import llmtailor
from coded_checkpoints import read_tensors, write_arrays, write_manifest
from formats.simple_writer import load_ref
from llmtailor.checkpoint import open_checkpoint
from llmtailor.codecs import CODES_KEY
from llmtailor.errors import FormatError, IntegrityError
from llmtailor.formats import open_catalog
from llmtailor.formats.safetensors import open_file
from llmtailor.load import load_model, load_optimizers, plan_load
from llmtailor.model_state import read_model
from llmtailor.strategies import SaveContext
from llmtailor.tensor_refs import CodedTensor
from llmtailor.tensors import TensorMeta
from llmtailor.verify import verify_checkpoint
from master_adamw import LEAF, fresh, load, new_training, weights_that_are_not_rounded_masters
from tiny_models import Snapshot, assert_same
from writer.test_masters import set_halves
from writer.trainings import Training

RESTS = ("q8", "q4", "compact", "compact4")
WEIGHT = "layers.0.mlp.weight"
MASTER = f"state.{WEIGHT}.{LEAF}"


def in_turn(context: SaveContext) -> list[str]:
    return [["embed_tokens", "layers.0"], ["layers.1"], ["layers.2", "norm"], ["layers.3"]][context.save_index % 4]


def train_and_save(directory: Path, num_saves: int, **how: Any) -> tuple[Training, Path]:
    training = new_training(directory, **how)
    for _ in range(num_saves):
        training.train()
        training.save()
    path = training.handles[-1].result()
    training.close()
    return training, path


# Exactly


@pytest.mark.parametrize("strategy", ["full", "parity"])
def test_training_goes_on_bit_for_bit(tmp_path: Path, strategy: str) -> None:
    training, path = train_and_save(tmp_path, 3, strategy=strategy)
    resumed = load(path, training)
    manifest = open_checkpoint(path).manifest
    expected = {
        key: training.states[layer.step][key]
        for layer in manifest.layers
        for key in training.states[3]
        if key.removeprefix("state.").startswith(f"{layer.name}.")
    }
    assert_same(resumed.state(), expected)
    if strategy == "full":
        for each in (training, resumed):
            each.train(3)
        assert_same(resumed.state(), training.state())


def load_apart(path: Path, training: Training) -> Training:
    """The model alone, then the optimizer alone."""
    resumed, checkpoint = fresh(training), open_checkpoint(path)
    load_optimizers(checkpoint, read_model(resumed.model), [resumed.optimizer])
    assert all(not parameter.any() for parameter in resumed.model.parameters()), "it touched the model"
    load_model(checkpoint, read_model(resumed.model))
    return resumed


@pytest.mark.parametrize("rest", [None, *RESTS])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_model_and_optimizer_can_be_loaded_apart(tmp_path: Path, rest: str | None, dtype: torch.dtype) -> None:
    how = {} if rest is None else {"rest": rest, "strategy": in_turn}
    training, path = train_and_save(tmp_path, 3, dtype=dtype, **how)
    assert_same(load_apart(path, training).state(), load(path, training).state())


def test_the_model_alone_needs_no_optimizer_file_of_an_exact_layer(tmp_path: Path) -> None:
    training, path = train_and_save(tmp_path, 1)
    shutil.rmtree(path / "optimizer")
    resumed = fresh(training)
    load_model(open_checkpoint(path), read_model(resumed.model))
    model = {key: value for key, value in training.states[1].items() if not key.startswith("state.")}
    assert_same({key: value for key, value in resumed.state().items() if not key.startswith("state.")}, model)


def test_strided_weights_and_masters_are_filled(tmp_path: Path) -> None:
    training, path = train_and_save(tmp_path, 3, rest="q8", strategy="parity")
    expected = load(path, training).state()
    resumed, checkpoint = fresh(training), open_checkpoint(path)
    for parameter in resumed.model.parameters():
        if parameter.dim() == 2:
            parameter.data = torch.zeros(parameter.shape[::-1], dtype=parameter.dtype).T
    plan_load(checkpoint, read_model(resumed.model), [resumed.optimizer]).fill()
    assert_same(resumed.state(), expected)


# Nearly


@pytest.mark.parametrize("rest", RESTS)
def test_training_goes_on_from_codes(tmp_path: Path, rest: str) -> None:
    """Weights are what their masters round to, at once and ever after; the next saves are as good as any."""
    training, path = train_and_save(tmp_path, 4, rest=rest, strategy=in_turn)
    resumed = load(path, training)
    state = resumed.state()
    assert not weights_that_are_not_rounded_masters(state)
    error = (state[MASTER].double() - training.states[4][MASTER].double()).norm() / state[MASTER].double().norm()
    assert 0 < error < 1e-2
    again = new_training(tmp_path / "again", rest=rest, strategy=in_turn)
    again.model, again.optimizer, again.step = resumed.model, resumed.optimizer, 4
    again.checkpointer.begin(open_checkpoint(path))
    again.save().result()
    again.train()
    last = again.save().result()
    again.close()
    report = verify_checkpoint(last)
    assert report.is_good, report.problems
    assert not weights_that_are_not_rounded_masters(load(last, training).state())


@pytest.mark.parametrize("rest", ["q8", "q4"])
def test_codes_are_relative_to_packed_masters(tmp_path: Path, rest: str) -> None:
    """Were they taken for something else, the weights would be far off."""
    training, path = train_and_save(tmp_path, 2, rest=rest, strategy=lambda context: [])
    layer = next(each for each in open_checkpoint(path).manifest.layers if each.name == "layers.0")
    assert layer.optimizer is not None
    assert f"{MASTER}|codes" in read_tensors(path / layer.optimizer.path)
    found = load(path, training).state()
    assert (found[MASTER] - training.states[2][MASTER]).abs().max() < 1e-3
    assert (training.states[1][MASTER] - training.states[2][MASTER]).abs().max() > 5e-3


# Elsewhere


@pytest.mark.parametrize("rest", [None, *RESTS])
def test_exports_hold_what_a_resume_loads(tmp_path: Path, rest: str | None) -> None:
    how = {} if rest is None else {"rest": rest, "strategy": in_turn}
    training, path = train_and_save(tmp_path, 4, **how)
    expected = training.states[4] if rest is None else load(path, training).state()
    catalog = open_catalog(path)
    assert isinstance(catalog.states[WEIGHT].tensors[LEAF], CodedTensor)
    llmtailor.export(path, tmp_path / "checkpoint-4", to="tailored")
    assert verify_checkpoint(tmp_path / "checkpoint-4").is_good
    assert_same(load(tmp_path / "checkpoint-4", training).state(), expected)
    llmtailor.export(path, tmp_path / "hf", to="hf", weights_only=True)
    refs = open_catalog(tmp_path / "hf").weights
    model = {key: value for key, value in expected.items() if not key.startswith("state.")}
    assert_same({fqn: load_ref(ref) for fqn, ref in refs.items()}, model)


def test_exports_tell_halves_above_and_below_a_weight(tmp_path: Path) -> None:
    training = new_training(tmp_path)
    training.train()
    set_halves(training, torch.arange(0x3F80, 0x3F80 + 64))
    path = training.save().result()
    training.close()
    llmtailor.export(path, tmp_path / "checkpoint-1", to="tailored")
    assert_same(load(tmp_path / "checkpoint-1", training).state(), training.states[1])


# Damage


def change_optimizer_file(path: Path, change: Any) -> None:
    """Have ``layers.0`` have another optimizer file, published as if a save had written it."""
    layers = list(open_checkpoint(path).manifest.layers)
    index = next(index for index, each in enumerate(layers) if each.name == "layers.0")
    record = layers[index].optimizer
    assert record is not None
    file = open_file(path / record.path)
    arrays = {name: (stored.meta, bytes(file.tensor_bytes(name))) for name, stored in file.header.tensors.items()}
    metadata = dict(file.header.metadata)
    del file
    change(arrays, metadata)
    written = write_arrays(path / record.path, arrays, metadata).model_copy(update={"path": record.path})
    layers[index] = layers[index].model_copy(update={"optimizer": written})
    write_manifest(path, layers)


def _bad_ties(arrays: Any, metadata: Any) -> None:
    arrays[f"{MASTER}|ties"] = (TensorMeta(dtype="I64", shape=(1,)), (2**40).to_bytes(8, "little"))


def _no_tie(arrays: Any, metadata: Any) -> None:
    arrays[f"{MASTER}|codes"] = (arrays[f"{MASTER}|codes"][0], bytes(arrays[f"{MASTER}|codes"][0].nbytes))
    arrays[f"{MASTER}|ties"] = (TensorMeta(dtype="I64", shape=(1,)), (7).to_bytes(8, "little"))


def _no_ties(arrays: Any, metadata: Any) -> None:
    del arrays[f"{MASTER}|ties"]


def _both(arrays: Any, metadata: Any) -> None:
    arrays[MASTER] = (TensorMeta(dtype="F32", shape=(96, 48)), bytes(4 * 96 * 48))


def _renamed(other: str) -> Any:
    def change(arrays: Any, metadata: Any) -> None:
        metadata[CODES_KEY] = metadata[CODES_KEY].replace(MASTER, other)
        for name in ("codes", "ties"):
            arrays[f"{other}|{name}"] = arrays.pop(f"{MASTER}|{name}")

    return change


def _other_codec(arrays: Any, metadata: Any) -> None:
    metadata[CODES_KEY] = metadata[CODES_KEY].replace("tail16", "tail8")


def _other_shape(arrays: Any, metadata: Any) -> None:
    metadata[CODES_KEY] = metadata[CODES_KEY].replace("[96,48]", "[48,96]")


DAMAGE = {
    "ties elsewhere": _bad_ties,
    "a tie that is none": _no_tie,
    "no ties": _no_ties,
    "in full, too": _both,
    "of another layer": _renamed(f"state.layers.1.mlp.weight.{LEAF}"),
    "no master": _renamed(f"state.{WEIGHT}.exp_avg"),
    "of a weight that has another shape": _other_shape,
    "another codec": _other_codec,
}


@pytest.mark.parametrize("name", DAMAGE)
def test_packed_masters_that_make_no_sense_are_refused(tmp_path: Path, name: str) -> None:
    training, path = train_and_save(tmp_path, 1)
    change_optimizer_file(path, lambda arrays, metadata: None)
    assert verify_checkpoint(path).is_good, "it is the change that is found"
    change_optimizer_file(path, DAMAGE[name])
    assert not verify_checkpoint(path).is_good
    with pytest.raises(FormatError):
        load(path, training)
    with pytest.raises(FormatError):
        llmtailor.export(path, tmp_path / "out", to="tailored")
    assert not (tmp_path / "out").exists()


def test_codes_that_are_relative_to_another_optimizer_file_are_refused(tmp_path: Path) -> None:
    """Weights alone do not tell: they stay what they are while masters change."""
    training, path = train_and_save(tmp_path, 2, rest="q8", strategy=lambda context: [])
    change_optimizer_file(
        path, lambda arrays, metadata: arrays.update({f"state.{WEIGHT}.more": arrays[f"{MASTER}|ties"]})
    )
    with pytest.raises(IntegrityError) as caught:
        load(path, training)
    assert (caught.value.kind, caught.value.layer) == ("codes-base", "layers.0")
    assert not verify_checkpoint(path).is_good


def test_the_states_that_are_compared_are_different_ones(tmp_path: Path) -> None:
    training, _ = train_and_save(tmp_path, 2)
    one, other = training.states[1], training.states[2]
    assert _differ(one, other) > {WEIGHT, MASTER}


def _differ(one: Snapshot, other: Snapshot) -> set[str]:
    return {key for key in one if not torch.equal(one[key], other[key])}
