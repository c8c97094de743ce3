"""Saves that were planned after one which then fails: what they hold is what they say, or they fail, too."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import pytest
import torch

from llmtailor.checkpointer import Checkpointer
from llmtailor.errors import SaveFailedWarning, WriteError
from llmtailor.manifest import Manifest
from llmtailor.storage import LocalFileSystem
from llmtailor.strategies import SaveContext
from llmtailor.verify import verify_checkpoint
from llmtailor.writer import LayerImage, SaveHandle


class OneBadSync(LocalFileSystem):
    """Syncs when it is let to; the first one fails then, if that was asked for."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.is_bad = False

    def fsync(self, descriptor: int) -> None:
        assert self.gate.wait(60), "nobody opened the gate"
        is_bad, self.is_bad = self.is_bad, False
        if is_bad:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        super().fsync(descriptor)


class Training:
    """Two saves may be in flight; a save writes the layers in ``chosen``, and those it must."""

    def __init__(self, directory: Path) -> None:
        torch.manual_seed(0)
        self.disk = OneBadSync()
        self.chosen = ["first"]
        self.model = torch.nn.ModuleDict({"first": torch.nn.Linear(4, 4), "second": torch.nn.Linear(4, 4)})
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        for parameter in self.model.parameters():
            parameter.grad = torch.ones_like(parameter)
        self.optimizer.step()
        self.checkpointer = Checkpointer(directory, strategy=self.choose, max_in_flight=2, filesystem=self.disk)

    def choose(self, context: SaveContext) -> list[str]:
        return self.chosen

    def save(self, step: int) -> SaveHandle:
        return self.checkpointer.save(step, self.model, [self.optimizer], lambda directory: None)


@pytest.mark.filterwarnings("ignore::llmtailor.errors.SaveFailedWarning")
@pytest.mark.parametrize("change", ["type", "buffer", "optimizer"])
def test_a_layer_that_changed_since_is_not_linked_from_before_the_save_that_failed(tmp_path: Path, change: str) -> None:
    training = Training(tmp_path / "run")
    training.disk.gate.set()
    training.save(1).result()
    if change == "type":
        training.model["second"].to(torch.bfloat16)
    elif change == "buffer":
        training.model["second"].register_buffer("seen", torch.zeros(3))
    else:
        training.optimizer = torch.optim.AdamW(training.model.parameters())
    training.disk.gate.clear()
    training.disk.is_bad = True
    failing, following = training.save(2), training.save(3)
    training.disk.gate.set()
    with pytest.raises(WriteError, match="Input/output error"):
        failing.result()
    with pytest.raises(WriteError) as caught:
        following.result()
    assert caught.value.kind == "parent-failed"
    try:
        path = training.save(4).result()
    except WriteError:  # two had failed; the save was begun all the same
        training.checkpointer.drain()
        path = tmp_path / "run" / "checkpoint-4"
    assert verify_checkpoint(path).is_good
    training.checkpointer.close()


def test_the_first_save_fails_while_the_second_is_planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training = Training(tmp_path / "run")
    training.disk.is_bad = True
    first = training.save(1)
    lineage = training.checkpointer._lineage
    plan_with = lineage.parent_to_plan_with

    def answer_slowly() -> Manifest | None:
        parent = plan_with()
        training.disk.gate.set()
        with pytest.raises(WriteError):
            first.result(60)
        return parent

    monkeypatch.setattr(lineage, "parent_to_plan_with", answer_slowly)
    with pytest.warns(SaveFailedWarning, match="checkpoint-1 was not saved"):
        path = training.save(2).result()
    assert verify_checkpoint(path).is_good
    training.checkpointer.close()


def test_files_of_a_save_in_flight_are_listed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not once for each layer that may be linked from it: that took seconds for thousands of layers."""
    training = Training(tmp_path / "run")
    training.model.update({f"more_{n}": torch.nn.Linear(2, 2) for n in range(20)})
    num_listed = 0
    names = LayerImage.names.fget
    assert names is not None

    def count(image: LayerImage) -> tuple[str, ...]:
        nonlocal num_listed
        num_listed += 1
        return names(image)  # type: ignore[no-any-return]

    first = training.save(1)
    monkeypatch.setattr(LayerImage, "names", property(count))
    second = training.save(2)
    assert num_listed <= 2 * len(training.model)
    training.disk.gate.set()
    first.result()
    assert verify_checkpoint(second.result()).is_good
    training.checkpointer.close()
