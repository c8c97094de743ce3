"""Trainings of which some layers are saved as codes, and what each of their checkpoints has to be."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from coded_runs import CODECS, check_layers
from llmtailor.checkpoint import open_checkpoint
from llmtailor.codecs.kernels import Kernels
from llmtailor.load import plan_load
from llmtailor.manifest import LayerRecord
from llmtailor.model_state import read_model
from llmtailor.strategies import SaveContext
from llmtailor.verify import verify_checkpoint
from tiny_models import Snapshot
from writer.trainings import OPTIMIZERS, Model, Training, state_of

# Of ``Model``: the others have no tensor of 4096 elements, which codes are for.
BLOCKS = [f"layers.{index}" for index in range(4)]
# Of a training that goes as fast as these 4 bits are not as near as they should be.
Q4, COMPACT4 = (
    f"codes(weights={codec}, first=int4, second=log4, weights_limit=1, first_limit=1, second_limit=1)"
    for codec in ("delta4", "tail4")
)
EXACT_WEIGHTS = "codes(weights=exact, first=int8, second=log8)"
CODECS_OF = {**CODECS, Q4: CODECS["q4"], COMPACT4: CODECS["compact4"], EXACT_WEIGHTS: ("exact", "int8", "log8")}


def in_turn(context: SaveContext) -> list[str]:
    """One block, or the embedding, at a time."""
    return [["embed_tokens", "layers.0"], ["layers.1"], ["layers.2", "norm"], ["layers.3"]][context.save_index % 4]


def nothing(context: SaveContext) -> list[str]:
    """All but the first save are codes alone."""
    return []


def new_training(directory: Path, *, rest: str = "q8", strategy: Any = "parity", **how: Any) -> Training:
    options = {"rest": rest, "strategy": strategy, **how.pop("options", {})}
    return Training(directory=directory / "run", options=options, **how)


def layers_of(path: Path) -> dict[str, LayerRecord]:
    return {layer.name: layer for layer in open_checkpoint(path).manifest.layers}


def coded_layers(path: Path) -> set[str]:
    return {name for name, layer in layers_of(path).items() if layer.encoding is not None}


def check(training: Training, path: Path, codecs: tuple[str, str, str] | None = None) -> Snapshot:
    """The whole checkpoint is what it has to be; gives what a resume must load."""
    report = verify_checkpoint(path)
    assert report.is_good, report.problems
    manifest = open_checkpoint(path).manifest
    truth = check_layers(path, manifest, training.states, codecs)
    assert truth.keys() == training.states[manifest.step].keys(), "something is not in the checkpoint"
    assert manifest.is_current
    return truth


class EncoderGate:
    """Holds the capture thread up before some kernel; training goes on meanwhile."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, num_let_through: int = 0) -> None:
        self._open = threading.Event()
        self._reached = threading.Event()
        self._num_let_through = num_let_through
        get = Kernels.get

        def wait_and_get(kernels: Kernels, codec: str, values: torch.Tensor) -> Any:
            self._num_let_through -= 1
            if self._num_let_through < 0:
                self._reached.set()
                assert self._open.wait(60), "nobody opened the gate"
            return get(kernels, codec, values)

        monkeypatch.setattr(Kernels, "get", wait_and_get)

    def wait_until_reached(self) -> None:
        assert self._reached.wait(60), "nothing was encoded"

    def open(self) -> None:
        self._open.set()


def load(training: Training, path: Path) -> Snapshot:
    """What a resume finds in a model and an optimizer that know nothing of the save."""
    fresh = Model().to(training.device, training.dtype)
    with torch.no_grad():
        for tensor in fresh.state_dict().values():
            tensor.fill_(7)
    optimizer = OPTIMIZERS[training.optimizer_name](fresh.parameters())
    plan_load(open_checkpoint(path), read_model(fresh), [optimizer]).fill()
    return state_of(fresh, optimizer)
