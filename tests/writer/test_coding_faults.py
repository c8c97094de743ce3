"""Bases that are gone, memory that is not to be had, state that changes too early: never a wrong code."""

from __future__ import annotations

import errno
import itertools
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from faults import open_descriptors, overwrite
from llmtailor.checkpointer import Checkpointer
from llmtailor.codecs.kernels import Kernels
from llmtailor.errors import IntegrityError, SaveFailedWarning, TailorError, WriteError
from llmtailor.storage import FileReader, list_checkpoints
from llmtailor.writer import coding, scratch
from llmtailor.writer.coding import LayerEncoder
from llmtailor.writer.host_memory import HostMemory
from writer.coded_trainings import (
    EncoderGate,
    check,
    coded_layers,
    layers_of,
    new_training,
    nothing,
)
from writer.test_changes_during_capture import CHANGES
from writer.trainings import Gate, write_small_file

# Bases that are not what they were


def lose(path: Path) -> None:
    path.unlink()


def cut_off(path: Path) -> None:
    overwrite(path, path.read_bytes()[:-1])


def make_a_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def empty_the_header(path: Path) -> None:
    content = path.read_bytes()
    overwrite(path, (2).to_bytes(8, "little") + b"{}" + content[10:])


def rename_a_tensor(path: Path) -> None:
    overwrite(path, path.read_bytes().replace(b"mlp.weight", b"mlp.weighs"))


DAMAGES = {
    "missing": (lose, "missing-file"),
    "another size": (cut_off, "file-size"),
    "no file": (make_a_directory, "not-regular"),
    "no header": (empty_the_header, None),
    "another tensor": (rename_a_tensor, "schema"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_base_that_is_gone_costs_one_save(fast_directory: Path, monkeypatch: pytest.MonkeyPatch, damage: str) -> None:
    """It was there when the save was planned."""
    training = new_training(fast_directory)
    training.train()
    first = training.save().result()
    training.train()
    with monkeypatch.context() as patch:
        gate = Gate(patch)
        handle = training.save()
        gate.wait_until_reached()
        harm, kind = DAMAGES[damage]
        harm(first / "model-layers.000.safetensors")
        gate.open()
        with pytest.raises(TailorError) as caught:
            handle.result()
    assert kind is None or caught.value.kind == kind
    assert str(first / "model-layers.000.safetensors") in str(caught.value)
    with pytest.warns(SaveFailedWarning, match="checkpoint-2 was not saved; training goes on"):
        training.checkpointer.collect()
    before = open_descriptors()
    if damage in ("missing", "another size", "no file"):
        # Seen when the next save is planned: the layer is written exactly, and may be a base again.
        training.train()
        path = training.save().result()
        assert layers_of(path)["layers.0"].reason == "first save"
        check(training, path)
        for expected in ({"layers.1", "layers.3"}, {"layers.0", "layers.2"}):
            training.train()
            path = training.save().result()
            assert coded_layers(path) == expected
            check(training, path)
    assert open_descriptors() <= before
    try:
        training.close()
    except TailorError:
        assert damage not in ("missing", "another size", "no file")


def test_a_device_that_fails_under_a_base_costs_one_save(fast_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As any fault of storage does: what is raised of it would end the training."""
    training = new_training(fast_directory)
    training.train()
    training.save().result()
    training.train()

    def fail(*_: Any) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(FileReader, "read_piece", fail)
        with pytest.raises(WriteError) as caught:
            training.save().result()
    assert caught.value.kind == "io"
    with pytest.warns(SaveFailedWarning, match="training goes on"):
        training.checkpointer.collect()
    training.train()
    check(training, training.save().result())
    training.close()


@pytest.mark.parametrize("error", [MemoryError("no"), torch.OutOfMemoryError("CUDA out of memory")], ids=repr)
def test_memory_that_cannot_be_had_costs_one_save(
    fast_directory: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    training = new_training(fast_directory)
    training.train()
    training.save().result()
    training.train()

    def fail(*_: Any) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(Kernels, "get", fail)
        with pytest.raises(WriteError) as caught:
            training.save().result()
    assert caught.value.kind == ("host-memory" if isinstance(error, MemoryError) else "device-memory")
    with pytest.warns(SaveFailedWarning, match="training goes on"):
        training.checkpointer.collect()
    training.train()
    check(training, training.save().result())
    training.close()


def test_scratch_memory_that_cannot_be_had_costs_one_save(
    fast_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = new_training(fast_directory)
    training.train()
    training.save().result()
    training.train()
    with monkeypatch.context() as patch:
        patch.setattr(scratch, "HostMemory", lambda nbytes: HostMemory(2**62))  # the kernel says it in its own words
        with pytest.raises(WriteError) as caught:
            training.save().result()
    assert caught.value.kind == "host-memory"
    with pytest.warns(SaveFailedWarning, match="training goes on"):
        training.checkpointer.collect()
    training.train()
    check(training, training.save().result())
    training.close()


# Changes that come too early


@pytest.mark.parametrize(
    ("moment", "change"),
    [
        *(("before", change) for change in CHANGES if change != "embedding with a norm"),
        *(
            (moment, change)
            for moment in ("within", "after")
            for change in ("in place", "through .data", "fused update by hand", "freed")
        ),
    ],
)
def test_a_change_during_capture_fails_a_save_of_codes(
    fast_directory: Path, monkeypatch: pytest.MonkeyPatch, moment: str, change: str
) -> None:
    """Before the first layer is encoded, between two of them, or when the last one is."""
    training = new_training(fast_directory, strategy=nothing)
    training.train()
    training.save().result()
    training.train()
    gate: Any
    match moment:
        case "before":
            gate = Gate(monkeypatch)
        case "within":
            gate = EncoderGate(monkeypatch, num_let_through=15)
        case _:
            gate = Gate(monkeypatch, num_let_through=9)  # of 10 pieces
    handle = training.save()
    gate.wait_until_reached()
    make, name = CHANGES[change]
    make(training)
    gate.open()
    with pytest.raises(IntegrityError) as caught:
        handle.result()
    assert caught.value.kind == "changed-during-capture"
    assert caught.value.fqn == name
    with pytest.warns(SaveFailedWarning, match="checkpoint-2 was not saved"):
        training.checkpointer.collect()
    assert [entry.step for entry in list_checkpoints(training.directory)] == [1]
    if change in {"freed", "other memory"}:
        training.model.lm_head = torch.nn.Linear(48, 64)
        training.optimizer = torch.optim.AdamW(training.model.parameters())
    training.train()
    later = training.save()
    assert later.state != "capturing", "from now on the state is captured before a save returns"
    check(training, later.result())
    training.close()


@pytest.mark.parametrize("name", ["attn", "mlp"])
def test_memory_that_is_freed_between_encoding_and_copying_is_not_read(
    fast_directory: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Tensors that stay exact are copied into the codes file after the layer is encoded."""
    training = new_training(fast_directory, strategy=nothing)
    training.train()
    training.save().result()
    training.train()
    encode = LayerEncoder.encode
    weight = training.model.layers[1].get_submodule(name).weight

    def encode_and_free(encoder: LayerEncoder, coded: Any, *args: Any) -> Any:
        encoded = encode(encoder, coded, *args)
        if coded.layer == "layers.1":
            weight.untyped_storage().resize_(0)
        return encoded

    monkeypatch.setattr(LayerEncoder, "encode", encode_and_free)
    with pytest.raises(IntegrityError) as caught:
        training.save().result()
    assert (caught.value.kind, caught.value.fqn) == ("changed-during-capture", f"layers.1.{name}.weight")
    with pytest.warns(SaveFailedWarning):
        training.checkpointer.collect()
    with pytest.raises(IntegrityError):
        training.close()


def test_memory_of_a_large_tensor_that_is_freed_while_it_is_encoded_is_not_read_any_more(
    fast_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is looked at anew after every 2^21 elements, not only before the first."""
    model = torch.nn.Linear(2**11, 2**11, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model.weight.grad = torch.ones_like(model.weight)
    optimizer.step()
    saver = Checkpointer(fast_directory / "run", rest="q8", strategy=nothing)
    saver.save(1, model, [optimizer], write_small_file).result()
    copy_strip, done = coding._copy_strip, itertools.count(1)

    def copy_and_free(*args: Any) -> None:
        copy_strip(*args)
        # Two arrays for each of 64 strips of 2^15: the last moment before it is looked at again.
        if next(done) == 2 * 64:
            model.weight.untyped_storage().resize_(0)

    monkeypatch.setattr(coding, "_copy_strip", copy_and_free)
    handle = saver.save(2, model, [optimizer], write_small_file)
    with pytest.raises(IntegrityError) as caught:
        handle.result()
    assert next(done) == 2 * 64 + 1, "more of it was read"
    assert caught.value.kind == "changed-during-capture"
    with pytest.warns(SaveFailedWarning):
        saver.collect()
    with pytest.raises(IntegrityError):
        saver.close()
