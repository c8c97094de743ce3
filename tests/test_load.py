from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from faults import flip_bit, overwrite
from llmtailor import Run
from llmtailor.checkpoint import Checkpoint, open_checkpoint
from llmtailor.checkpointer import Checkpointer
from llmtailor.errors import FormatError, IncompatibleError, IntegrityError, NotFoundError, UnsupportedError
from llmtailor.formats.safetensors import plan_layout
from llmtailor.load import load_model, load_optimizers, plan_load
from llmtailor.manifest import MANIFEST_NAME, FileRecord, digest_of, encode_manifest
from llmtailor.model_state import read_model
from llmtailor.storage import file_reading
from llmtailor.tensors import TensorMeta
from tiny_models import assert_same, snapshot_model, snapshot_optimizer


def build() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2))


@pytest.fixture
def saved(tmp_path: Path) -> Checkpoint:
    model = build()
    checkpointer = Checkpointer(tmp_path)
    path = checkpointer.save(1, model, [torch.optim.SGD(model.parameters())], lambda directory: None).result()
    checkpointer.close()
    return open_checkpoint(path)


def replace_last_layer(saved: Checkpoint, tensors: list[tuple[str, TensorMeta]]) -> Checkpoint:
    """Another weights file for the last layer, with a manifest whose digests are right: a writer's mistake."""
    layout = plan_layout(tensors, {"format": "pt"})
    content = layout.prefix + bytes(layout.nbytes - len(layout.prefix))
    last = saved.manifest.layers[-1]
    path = saved.path / last.weights.path
    path.unlink()
    path.write_bytes(content)
    record = FileRecord(path=last.weights.path, bytes=len(content), digest=digest_of(content))
    layers = (*saved.manifest.layers[:-1], last.model_copy(update={"weights": record}))
    (saved.path / MANIFEST_NAME).unlink()
    (saved.path / MANIFEST_NAME).write_bytes(encode_manifest(saved.manifest.model_copy(update={"layers": layers}))[0])
    return open_checkpoint(saved.path)


WEIGHT, BIAS = ("2.weight", TensorMeta(dtype="F32", shape=(2, 3))), ("2.bias", TensorMeta(dtype="F32", shape=(2,)))


@pytest.mark.parametrize(
    ("tensors", "fqn"),
    [
        ([WEIGHT], "2.bias"),
        ([WEIGHT, BIAS, ("2.more", BIAS[1])], "2.more"),
        ([WEIGHT, ("2.bias", TensorMeta(dtype="F64", shape=(2,)))], "2.bias"),
        ([("2.weight", TensorMeta(dtype="F32", shape=(3, 2))), BIAS], "2.weight"),
    ],
    ids=["missing", "surplus", "type", "shape"],
)
def test_weights_file_that_does_not_hold_its_layer_is_refused_before_anything_is_changed(
    saved: Checkpoint, tensors: list[tuple[str, TensorMeta]], fqn: str
) -> None:
    wrong = replace_last_layer(saved, tensors)
    model = build()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(7)
    with pytest.raises(FormatError) as caught:
        load_model(wrong, read_model(model))
    assert (caught.value.kind, caught.value.fqn) == ("schema", fqn)
    assert all(bool((parameter == 7).all()) for parameter in model.parameters())


def fill_with_sevens(model: torch.nn.Module) -> None:
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.fill_(7)


def test_weights_come_back(saved: Checkpoint) -> None:
    model, expected = build(), build()
    fill_with_sevens(model)
    load_model(saved, read_model(model))
    assert_same(snapshot_model(model), snapshot_model(expected))


# A model whose tensors are of every kind


class Mixed(torch.nn.Module):
    """Large and small, strided, of several types, buffers, a scalar, one that is empty, one that is frozen."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first = torch.nn.Linear(70, 90, dtype=torch.bfloat16)
        self.norm = torch.nn.BatchNorm1d(5)
        self.norm.running_mean += seed
        self.strided = torch.nn.Parameter(torch.randn(50, 60).t())
        self.image = torch.nn.Conv2d(3, 4, 5).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.scale = torch.nn.Parameter(torch.randn(()))
        self.empty = torch.nn.Parameter(torch.empty(0, 3))
        self.frozen = torch.nn.Parameter(torch.randn(9), requires_grad=False)


def adam(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=0.1, amsgrad=True)


def sgd(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def adafactor(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adafactor(model.parameters(), lr=0.1)


def trained(make: Callable[[torch.nn.Module], torch.optim.Optimizer], seed: int) -> tuple[Mixed, torch.optim.Optimizer]:
    model = Mixed(seed)
    optimizer = make(model)
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.numel():  # Adafactor divides by the number of elements
            parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    return model, optimizer


def save(directory: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> Checkpoint:
    checkpointer = Checkpointer(directory)
    path = checkpointer.save(1, model, [optimizer], lambda directory: None).result()
    checkpointer.close()
    return open_checkpoint(path)


@pytest.fixture(params=[2**23, 4096], ids=["one piece", "many pieces"])
def _pieces(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_reading, "PIECE_NBYTES", request.param)


def strides(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    states = optimizer.state.values()
    return [{leaf: t.stride() for leaf, t in state.items() if isinstance(t, torch.Tensor)} for state in states]


@pytest.mark.usefixtures("_pieces")
@pytest.mark.parametrize("make", [adam, sgd, adafactor])
@pytest.mark.parametrize("was_trained", [True, False])
def test_everything_comes_back_bit_for_bit(make: Any, was_trained: bool, tmp_path: Path) -> None:
    model, optimizer = trained(make, seed=1)
    saved = save(tmp_path, model, optimizer)
    other, live = trained(make, seed=2)
    if not was_trained:
        live = make(other)
    plan_load(saved, read_model(other), [live]).fill()
    model, optimizer = trained(make, seed=1)
    assert_same(snapshot_model(other), snapshot_model(model))
    assert_same(snapshot_optimizer(other, live), snapshot_optimizer(model, optimizer))
    assert strides(live) == strides(optimizer)
    for each in (optimizer, live):
        for parameter in each.param_groups[0]["params"]:
            parameter.grad = torch.ones_like(parameter) if parameter.requires_grad and parameter.numel() else None
        each.step()
    assert_same(snapshot_model(other), snapshot_model(model))


def test_state_that_was_not_saved_is_gone(tmp_path: Path) -> None:
    model = Mixed(1)
    saved = save(tmp_path, model, adam(model))
    other, live = trained(adam, seed=2)
    load_optimizers(saved, read_model(other), [live])
    assert not live.state


def test_parameter_in_two_optimizers_is_refused(tmp_path: Path) -> None:
    """Its two states would have one name."""
    model, first = trained(adam, seed=1)
    checkpointer = Checkpointer(tmp_path)
    with pytest.raises(UnsupportedError) as caught:
        checkpointer.save(1, model, [first, adam(model)], lambda directory: None)
    checkpointer.close()
    assert caught.value.kind == "shared-parameter"
    assert caught.value.fqn in dict(model.named_parameters())


def test_whoever_watches_a_tensor_sees_that_it_is_written_to(saved: Checkpoint) -> None:
    model = build()
    seen: list[int] = []
    versions = [parameter._version for parameter in model.parameters()]
    plan_load(saved, read_model(model), [torch.optim.SGD(model.parameters())]).fill(
        lambda record: seen.append(min(parameter._version for parameter in model.parameters()))
    )
    assert min(seen) > max(versions)
    assert min(parameter._version for parameter in model.parameters()) > max(seen)


# What can be checked is checked before anything is changed


def break_last(saved: Checkpoint, how: str) -> None:
    record = saved.manifest.layers[-1].optimizer
    assert record is not None
    path = saved.path / record.path
    if how == "gone":
        path.unlink()
    elif how == "size":
        overwrite(path, path.read_bytes() + b"0")
    elif how == "header":
        flip_bit(path, 8 * 9)
    else:
        text = path.read_bytes()
        overwrite(path, text.replace(b'.exp_avg"', b'.exp_avh"', 1))


@pytest.mark.parametrize(
    ("how", "error"),
    [
        ("gone", NotFoundError),
        ("size", IntegrityError),
        ("header", FormatError),
        ("leaf", IncompatibleError),
    ],
)
def test_nothing_is_changed_when_the_last_file_cannot_be_loaded(
    how: str, error: type[Exception], tmp_path: Path
) -> None:
    model, optimizer = trained(adam, seed=1)
    saved = save(tmp_path, model, optimizer)
    break_last(saved, how)
    other, live = trained(adam, seed=2)
    live.param_groups[0]["lr"] = 0.7
    before = snapshot_model(other), snapshot_optimizer(other, live)
    with pytest.raises(error) as caught:
        plan_load(saved, read_model(other), [live])
    assert "not to be used" not in str(caught.value)
    assert_same(snapshot_model(other), before[0])
    assert_same(snapshot_optimizer(other, live), before[1])
    assert live.param_groups[0]["lr"] == 0.7


# What turns out wrong while it is read


@pytest.mark.usefixtures("_pieces")
@pytest.mark.parametrize("kind", ["weights", "optimizer"])
@pytest.mark.parametrize("place", ["first byte", "last byte"])
def test_wrong_bytes_are_found_at_the_end_and_the_values_said_to_be_unusable(
    kind: str, place: str, tmp_path: Path
) -> None:
    model, optimizer = trained(adam, seed=1)
    saved = save(tmp_path, model, optimizer)
    record = getattr(saved.manifest.layers[0], kind)
    flip_bit(saved.path / record.path, 8 * (4096 if place == "first byte" else record.bytes - 1))
    with pytest.raises(IntegrityError) as caught:
        plan_load(saved, read_model(model), [optimizer]).fill()
    assert (caught.value.kind, caught.value.expected) == ("digest", record.digest)
    assert caught.value.path == str(saved.path / record.path)
    assert "not to be used" in str(caught.value)


def test_state_with_wrong_bytes_is_not_given_to_the_optimizer(tmp_path: Path) -> None:
    model, optimizer = trained(adam, seed=1)
    saved = save(tmp_path, model, optimizer)
    other, live = trained(adam, seed=2)
    before = snapshot_optimizer(other, live)
    for layer in saved.manifest.layers:
        if layer.optimizer is not None:
            flip_bit(saved.path / layer.optimizer.path, 8 * (layer.optimizer.bytes - 1))
    with pytest.raises(IntegrityError):
        load_optimizers(saved, read_model(other), [live])
    assert_same(snapshot_optimizer(other, live), before)


def test_file_that_was_exchanged_after_the_check_is_refused_before_its_tensors_are_touched(tmp_path: Path) -> None:
    """Its own digest is right, so nothing but the header tells that the bytes do not belong where they would go."""
    model, optimizer = trained(adam, seed=1)
    saved = save(tmp_path / "one", model, optimizer)
    plan = plan_load(saved, read_model(model), [optimizer])
    path = saved.path / saved.manifest.layers[0].weights.path
    content = path.read_bytes()
    text = content[:4096].replace(b'"pt"', b'"tp"')
    assert text != content[:4096]
    overwrite(path, text + content[4096:])
    before = snapshot_model(model)
    with pytest.raises(IntegrityError) as caught:
        plan.fill()
    assert "header changed" in str(caught.value)
    held = [t.fqn for t in saved.manifest.tensors if t.layer == saved.manifest.layers[0].name]
    after = snapshot_model(model)
    assert_same({fqn: after[fqn] for fqn in held}, {fqn: before[fqn] for fqn in held})


def test_file_that_is_gone_when_it_is_read(tmp_path: Path) -> None:
    model, optimizer = trained(adam, seed=1)
    saved = save(tmp_path, model, optimizer)
    plan = plan_load(saved, read_model(model), [optimizer])
    shutil.rmtree(saved.path / "optimizer")
    with pytest.raises(NotFoundError) as caught:
        plan.fill()
    assert "not to be used" in str(caught.value)


def test_memory_of_what_was_loaded_can_still_be_resized(tmp_path: Path) -> None:
    """As offloading does; torch refuses it for a tensor that was ever given to numpy by ``numpy()``."""
    model = torch.nn.Linear(64, 64)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(64)).sum().backward()
    optimizer.step()
    with Run(tmp_path, model, optimizer) as run:
        run.save(1).result()
        assert run.resume() == 1
    for tensor in (model.weight.data, optimizer.state[model.weight]["exp_avg"]):
        tensor.untyped_storage().resize_(0)
