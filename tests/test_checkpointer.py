from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llmtailor import pruning
from llmtailor.checkpoint import open_checkpoint
from llmtailor.checkpointer import Checkpointer
from llmtailor.errors import (
    InvalidInputError,
    SaveFailedWarning,
    SupersededWarning,
    UnsupportedError,
    WriteError,
)
from llmtailor.manifest import MANIFEST_NAME
from llmtailor.storage import LocalFileSystem, list_checkpoints
from llmtailor.verify import verify_checkpoint
from llmtailor.writer import SaveHandle


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = torch.nn.Linear(4, 4)
        self.mlp = torch.nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.mlp(self.attn(x))


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = torch.nn.Embedding(8, 4)
        self.layers = torch.nn.ModuleList(Block() for _ in range(4))
        self.norm = torch.nn.LayerNorm(4)
        self.lm_head = torch.nn.Linear(4, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed_tokens(x)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(self.norm(x))


class Training:
    """A model, its optimizer, and a run of checkpoints in a directory."""

    def __init__(self, directory: Path, **options: Any) -> None:
        torch.manual_seed(0)
        self.directory = directory
        self.model = Model()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        self.checkpointer = Checkpointer(directory, **options)

    def save(self, step: int, **options: Any) -> SaveHandle:
        """Train a step, save, and wait until all that follows is done."""
        self.model(torch.arange(8)).sum().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        small = options.pop("write_small_files", lambda directory: None)
        handle = self.checkpointer.save(step, self.model, [self.optimizer], small, **options)
        assert self.checkpointer.drain(60)
        return handle

    def steps_by_layer(self, step: int) -> dict[str, int]:
        manifest = open_checkpoint(self.directory / f"checkpoint-{step}").manifest
        return {layer.name: layer.step for layer in manifest.layers}


@pytest.fixture
def parity(tmp_path: Path) -> Iterator[Training]:
    training = Training(tmp_path / "run", strategy="parity")
    yield training
    training.checkpointer.close()


def test_parity_writes_half_and_links_the_rest(parity: Training) -> None:
    for step in (1, 2, 3):
        parity.save(step).result()
    assert parity.steps_by_layer(3) == {
        "embed_tokens": 2,
        "layers.0": 3,
        "layers.1": 2,
        "layers.2": 3,
        "layers.3": 2,
        "norm": 3,
        "lm_head": 3,
    }
    old, new = (parity.directory / f"checkpoint-{step}/optimizer/layers.001.safetensors" for step in (2, 3))
    assert old.stat().st_ino == new.stat().st_ino


def test_manifests_form_a_chain(parity: Training) -> None:
    for step in (1, 2):
        parity.save(step)
    first, second = (open_checkpoint(parity.directory / f"checkpoint-{step}") for step in (1, 2))
    assert first.manifest.parent is None
    assert second.manifest.parent is not None
    assert (second.manifest.parent.step, second.manifest.parent.digest) == (1, first.digest)
    assert second.manifest.run_id == first.manifest.run_id


def test_a_step_is_saved_once(parity: Training) -> None:
    assert parity.save(1) is parity.save(1)
    assert open_checkpoint(parity.directory / "checkpoint-1").manifest.save_index == 0


def test_step_that_goes_backwards_is_refused(parity: Training) -> None:
    parity.save(5)
    with pytest.raises(InvalidInputError) as caught:
        parity.save(4)
    assert caught.value.kind == "step-order"


@pytest.mark.parametrize("step", [np.int64(3), np.uint8(3), torch.tensor(3)], ids=repr)
def test_whole_numbers_of_other_libraries_are_steps(parity: Training, step: Any) -> None:
    path = parity.save(step).result()
    assert path.name == "checkpoint-3"
    assert type(open_checkpoint(path).manifest.step) is int
    assert parity.save(3).path == path


@pytest.mark.parametrize("step", [1.0, True, -1, "1", None, np.float32(1)], ids=repr)
def test_steps_that_are_none_are_refused_before_anything_is_done(parity: Training, step: Any) -> None:
    with pytest.raises(InvalidInputError) as caught:
        parity.save(step)
    assert caught.value.kind == "step-type"
    assert type(step).__name__ in str(caught.value)
    assert parity.save(1).error is None


def test_layers_whose_earlier_files_are_gone_are_written(parity: Training) -> None:
    parity.save(1)
    (parity.directory / "checkpoint-1/optimizer/layers.000.safetensors").unlink()
    parity.save(2)
    assert parity.steps_by_layer(2)["layers.0"] == 2
    assert parity.steps_by_layer(2)["layers.2"] == 1
    assert verify_checkpoint(parity.directory / "checkpoint-2").is_good


def test_save_after_somebody_removed_the_newest_is_whole(parity: Training) -> None:
    parity.save(1)
    shutil.rmtree(parity.directory / "checkpoint-1")
    parity.save(2)
    assert set(parity.steps_by_layer(2).values()) == {2}
    assert verify_checkpoint(parity.directory / "checkpoint-2").is_good


@pytest.mark.parametrize("strategy", ["full", "parity", "filter(first=1, last=1, every=2)"])
@pytest.mark.parametrize("doomed", range(1, 7))
def test_removing_any_checkpoint_leaves_the_others_whole(tmp_path: Path, strategy: str, doomed: int) -> None:
    training = Training(tmp_path, strategy=strategy)
    for step in range(1, 7):
        training.save(step)
    training.checkpointer.close()
    shutil.rmtree(tmp_path / f"checkpoint-{doomed}")
    entries = list_checkpoints(tmp_path)
    assert len(entries) == 5
    assert all(verify_checkpoint(entry.path).is_good for entry in entries)


def test_layer_whose_schema_changed_is_written(parity: Training) -> None:
    parity.save(1)
    parity.model.layers[0].attn.weight.requires_grad_(False)
    parity.save(2)
    assert parity.steps_by_layer(2)["layers.0"] == 2


def test_weights_after_a_full_save_link_nothing_with_optimizer_state(parity: Training) -> None:
    parity.save(1)
    handle = parity.save(2, contents="weights")
    assert set(parity.steps_by_layer(2).values()) == {2}
    assert not (handle.result() / "optimizer").exists()


def test_run_that_follows_a_checkpoint_elsewhere_is_a_run_of_its_own(parity: Training, tmp_path: Path) -> None:
    parity.save(1)
    origin = open_checkpoint(parity.directory / "checkpoint-1")
    fork = Training(tmp_path / "fork", strategy="parity")
    fork.checkpointer.begin(origin)
    fork.save(2)
    fork.checkpointer.close()
    manifest = open_checkpoint(tmp_path / "fork/checkpoint-2").manifest
    assert manifest.run_id != origin.manifest.run_id
    assert manifest.parent is not None
    assert manifest.parent.digest == origin.digest
    shutil.rmtree(parity.directory)
    assert verify_checkpoint(tmp_path / "fork/checkpoint-2").is_good


def test_keep_removes_the_oldest_but_not_the_consistent_one(tmp_path: Path) -> None:
    training = Training(tmp_path, strategy="parity", keep=3)
    for step in range(1, 7):
        training.save(step)
    training.checkpointer.close()
    assert [entry.step for entry in list_checkpoints(tmp_path)] == [1, 5, 6]


def test_retention_that_cannot_read_only_warns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training = Training(tmp_path, keep=1)
    training.save(1)

    def fail(path: Path) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(pruning, "read_manifest", fail)
    handle = training.save(2)
    with pytest.warns(SaveFailedWarning, match="could not be removed"):
        training.checkpointer.close()
    assert handle.error is None
    assert [entry.step for entry in list_checkpoints(tmp_path)] == [1, 2]


def test_checkpoint_the_format_cannot_describe_is_refused(parity: Training) -> None:
    def write(directory: Path) -> None:
        (directory / "README.md").touch()
        (directory / "readme.md").touch()

    parity.save(1)
    handle = parity.save(2, write_small_files=write)
    with pytest.raises(UnsupportedError) as caught:
        handle.result()
    assert caught.value.kind == "manifest-schema"
    assert os.listdir(parity.directory / "_staging") == ["lock"]
    # It is not a fault of the disk that may pass: the next call of the training thread raises it.
    with pytest.raises(UnsupportedError):
        parity.save(3)
    assert parity.save(4).error is None


def test_what_goes_wrong_in_the_trainer_is_not_ours_to_hide(parity: Training) -> None:
    def write(directory: Path) -> None:
        raise KeyError("a bug of a callback")

    with pytest.raises(KeyError):
        parity.save(1, write_small_files=write)
    assert os.listdir(parity.directory / "_staging") == ["lock"]


def test_failed_saves_warn_then_raise_and_then_recover(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training = Training(tmp_path)
    training.save(1)

    def full(filesystem: LocalFileSystem, descriptor: int, nbytes: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(LocalFileSystem, "allocate", full)
        handle = training.save(2)
        with pytest.raises(WriteError):
            handle.result()
        with pytest.warns(SaveFailedWarning, match="checkpoint-2 was not saved"):
            training.save(3)
        # Two failed: the third is begun all the same, and the caller learns of it.
        with pytest.warns(SaveFailedWarning, match="checkpoint-3 was not saved"), pytest.raises(WriteError) as caught:
            training.save(4)
        assert caught.value.kind == "no-space"
        with pytest.warns(SaveFailedWarning, match="checkpoint-4"), pytest.raises(WriteError):
            training.checkpointer.close()
    assert [entry.step for entry in list_checkpoints(tmp_path)] == [1]

    again = Checkpointer(tmp_path)
    again.begin(again.find())
    again.save(4, training.model, [training.optimizer], lambda directory: None).result()
    again.close()


def test_run_that_died_before_its_first_save_names_what_it_set_aside(tmp_path: Path) -> None:
    (tmp_path / "_checkpoint-7.superseded").mkdir()
    (tmp_path / "_checkpoint-7.superseded" / MANIFEST_NAME).touch()
    checkpointer = Checkpointer(tmp_path)
    with pytest.warns(SupersededWarning, match=r"_checkpoint-7\.superseded.* rename it to checkpoint-7"):
        assert checkpointer.find() is None
    checkpointer.close()


def test_unknown_strategy_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError):
        Checkpointer(tmp_path / "run", strategy="paritty")  # codespell:ignore
    assert not (tmp_path / "run").exists()
