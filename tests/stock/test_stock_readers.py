"""Programs that know nothing of LLMTailor read every checkpoint, composite ones too."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from llmtailor import Run
from llmtailor.checkpoint import Checkpoint, open_checkpoint
from resume.composites import expected_composite
from stock.architectures import ARCHITECTURES
from tiny_models import Snapshot, assert_same, snapshot_model, snapshot_optimizer

STEPS = (1, 2, 3, 4)

# torch warns that it reads in one process, which is what we ask for.
alone = pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized:UserWarning")


class SavedRun:
    """A run of four saves, and what the model and the optimizer were at each."""

    def __init__(self, directory: Path, model: torch.nn.Module, strategy: str) -> None:
        self.directory = directory
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        self.models: dict[int, Snapshot] = {}
        self.optimizers: dict[int, dict[str, Any]] = {}
        with Run(directory, model, self.optimizer, strategy=strategy, save_steps=1) as run:
            for step in STEPS:
                self._train(model)
                run.step(step)
                self.models[step] = snapshot_model(model)
                self.optimizers[step] = snapshot_optimizer(model, self.optimizer)

    def _train(self, model: torch.nn.Module) -> None:
        # Any gradient will do: readers do not care what the model was taught.
        generator = torch.Generator().manual_seed(3)
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        self.optimizer.step()

    def checkpoints(self) -> Iterable[Checkpoint]:
        return (open_checkpoint(self.directory / f"checkpoint-{step}") for step in STEPS)

    def expected(self, checkpoint: Checkpoint) -> tuple[Snapshot, dict[str, Any]]:
        return expected_composite(checkpoint.manifest, self.models, self.optimizers)


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("strategy", ["parity", "filter(first=1, last=1, every=2)"])
def test_from_pretrained_reads_every_checkpoint(name: str, strategy: str, tmp_path: Path) -> None:
    architecture = ARCHITECTURES[name]
    saved = SavedRun(tmp_path, architecture.build(), strategy)
    num_steps = set()
    for checkpoint in saved.checkpoints():
        num_steps.add(len({layer.step for layer in checkpoint.manifest.layers}))
        expected, _ = saved.expected(checkpoint)
        loaded, report = architecture.reader.from_pretrained(
            checkpoint.path, output_loading_info=True, dtype=next(iter(expected.values())).dtype
        )
        problems = {key: sorted(map(str, value)) for key, value in report.items() if value}
        assert not problems
        found = snapshot_model(loaded)
        assert_same({fqn: found[fqn] for fqn in expected}, expected)
    assert max(num_steps) > 1, "no checkpoint was a composite"


@alone
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_distributed_checkpoint_reads_weights_and_optimizer(name: str, tmp_path: Path) -> None:
    saved = SavedRun(tmp_path, ARCHITECTURES[name].build(), "parity")
    for checkpoint in saved.checkpoints():
        weights, moments = saved.expected(checkpoint)
        held = {tensor.fqn for tensor in checkpoint.manifest.tensors if tensor.tied_to is None}
        assert_same(_read_distributed(checkpoint.path, weights, held), {fqn: weights[fqn] for fqn in held})
        state = {f"state.{key}": value for key, value in moments.items()}
        assert_same(_read_distributed(checkpoint.path / "optimizer", state, state), state)


def _read_distributed(directory: Path, like: dict[str, torch.Tensor], names: Iterable[str]) -> dict[str, torch.Tensor]:
    target = {name: torch.full_like(like[name], 7) for name in names}
    dcp.load(target, storage_reader=dcp.HuggingFaceStorageReader(str(directory)), no_dist=True)
    return target


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_distributed_checkpoint_lists_exactly_the_tensors_held(name: str, tmp_path: Path) -> None:
    saved = SavedRun(tmp_path, ARCHITECTURES[name].build(), "parity")
    checkpoint = list(saved.checkpoints())[-1]
    reader = dcp.HuggingFaceStorageReader(str(checkpoint.path))
    listed = set(reader.read_metadata().state_dict_metadata)
    assert listed == {tensor.fqn for tensor in checkpoint.manifest.tensors if tensor.tied_to is None}
