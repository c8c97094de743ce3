"""Whatever bit of a checkpoint is wrong, a resume that loads while it reads ends with the values of the one before."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from faults import flip_bit, memory_directory
from llmtailor.checkpoint import Checkpoint
from llmtailor.checkpointer import Checkpointer
from llmtailor.errors import IntegrityError, QuarantineWarning
from llmtailor.load import plan_load
from llmtailor.manifest import MANIFEST_NAME
from llmtailor.model_state import read_model
from llmtailor.resume import Fill, load_named, load_resumable
from llmtailor.storage import RunDirectory
from tiny_models import Snapshot, assert_same, build_llama, snapshot_model, snapshot_optimizer

KINDS = {
    "manifest": MANIFEST_NAME,
    "small file": "note.txt",
    "weights": "model-layers.001.safetensors",
    "optimizer": "optimizer/layers.001.safetensors",
}
# Where something is said: after it a header is spaces, as far as its page goes.
HEADER_NBYTES = 1200
FLIPS_PER_KIND = 40


def write_note(directory: Path) -> None:
    (directory / "note.txt").write_text("small, and not a layer's\n")


class Live:
    """A model and its optimizer, as a loop has them."""

    def __init__(self, seed: int) -> None:
        self.model = build_llama(num_layers=2, seed=seed)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        self.state = read_model(self.model)

    def train(self) -> None:
        for parameter in self.model.parameters():
            parameter.grad = torch.randn_like(parameter)
        self.optimizer.step()

    def plan(self, found: Checkpoint) -> Fill:
        return plan_load(found, self.state, [self.optimizer]).fill

    def snapshot(self) -> Snapshot:
        return snapshot_model(self.model) | snapshot_optimizer(self.model, self.optimizer)


@pytest.fixture(scope="module")
def pristine() -> Iterator[tuple[Path, dict[int, Snapshot]]]:
    """A run with two checkpoints that share no inode, and what was saved in them."""
    live, snapshots = Live(seed=0), {}
    with memory_directory() as directory:
        checkpointer = Checkpointer(directory / "run")
        for step in (5, 6):
            live.train()
            snapshots[step] = live.snapshot()
            checkpointer.save(step, live.model, [live.optimizer], write_note).result()
        checkpointer.close()
        yield directory / "run", snapshots


@pytest.mark.parametrize("kind", KINDS)
def test_single_flipped_bits(pristine: tuple[Path, dict[int, Snapshot]], kind: str) -> None:
    path, snapshots = pristine
    newest, live = path / "checkpoint-6", Live(seed=3)
    chance = random.Random(kind)
    num_bits = 8 * (newest / KINDS[kind]).stat().st_size
    bits = {0, 63, 64, num_bits - 1}
    bits |= {chance.randrange(num_bits) for _ in range(FLIPS_PER_KIND)}
    bits |= {chance.randrange(min(num_bits, 8 * HEADER_NBYTES)) for _ in range(FLIPS_PER_KIND)}
    run = RunDirectory(path)
    for bit in sorted(bits):
        flip_bit(newest / KINDS[kind], bit)
        with pytest.raises(IntegrityError):
            load_named(newest, live.plan)
        with pytest.warns(QuarantineWarning, match=rf"checkpoint-6 does not verify \({KINDS[kind]}: "):
            found = load_resumable(run, live.plan)
        assert found is not None
        assert found.manifest.step == 5
        assert_same(live.snapshot(), snapshots[5])
        bad = path / "_checkpoint-6.bad"
        (bad / "tailor-reason.txt").unlink()
        bad.rename(newest)
        flip_bit(newest / KINDS[kind], bit)
    found = load_resumable(run, live.plan)
    assert found is not None
    assert found.manifest.step == 6
    assert_same(live.snapshot(), snapshots[6])
    run.close()


def test_none_is_left(pristine: tuple[Path, dict[int, Snapshot]], tmp_path: Path) -> None:
    shutil.copytree(pristine[0], tmp_path / "run")
    for step in (5, 6):
        file = tmp_path / f"run/checkpoint-{step}" / KINDS["weights"]
        flip_bit(file, 8 * file.stat().st_size - 1)
    run = RunDirectory(tmp_path / "run")
    with pytest.warns(QuarantineWarning), pytest.raises(IntegrityError) as caught:
        load_resumable(run, Live(seed=3).plan)
    run.close()
    assert caught.value.kind == "none-verifies"
    assert "not to be used" in str(caught.value)
