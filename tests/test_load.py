from __future__ import annotations

from pathlib import Path

import pytest
import torch

from llmtailor.checkpoint import Checkpoint, open_checkpoint
from llmtailor.checkpointer import Checkpointer
from llmtailor.errors import FormatError
from llmtailor.formats.safetensors import plan_layout
from llmtailor.load import load_model
from llmtailor.manifest import MANIFEST_NAME, FileRecord, digest_of, encode_manifest
from llmtailor.model_state import read_model
from llmtailor.tensors import TensorMeta


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


def test_weights_come_back(saved: Checkpoint) -> None:
    model, expected = build(), build()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(7)
    load_model(saved, read_model(model))
    for found, wanted in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.equal(found, wanted)
