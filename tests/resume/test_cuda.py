"""Training on a CUDA device: what comes after a resume is what would have come without it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import llmtailor
from llmtailor.checkpoint import open_checkpoint
from llmtailor.integrations.transformers import tailor
from resume.test_trainer_resume import assert_same_outcome
from resume.trainings import STOP, Training
from tiny_models import (
    BatchRecorder,
    KeepStates,
    assert_same,
    build_llama,
    build_trainer,
    snapshot_model,
    snapshot_optimizer,
)
from writer.trainings import OPTIMIZERS

pytestmark = pytest.mark.gpu

SAVE, END = 4, 8


class Loop:
    """Dropout, data and the optimizer's state are all of the device."""

    def __init__(self, directory: Path, optimizer_name: str, seed: int, **options: Any) -> None:
        self.model: Any = build_llama(width=64).cuda().train()
        self.optimizer = OPTIMIZERS[optimizer_name](self.model.parameters())
        torch.manual_seed(seed)
        self.run = llmtailor.Run(directory, self.model, self.optimizer, save_steps=SAVE, **options)
        self.step = self.run.resume()
        self.losses: list[float] = []

    def train(self, until: int) -> Loop:
        while self.step < until:
            tokens = torch.randint(0, 64, (2, 8), device="cuda")
            loss = self.model(input_ids=tokens, labels=tokens).loss
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.losses.append(loss.item())
            self.step += 1
            self.run.step(self.step)
        self.run.close()
        return self


@pytest.mark.parametrize("optimizer_name", OPTIMIZERS)
def test_a_run_goes_on_bit_for_bit(tmp_path: Path, optimizer_name: str) -> None:
    whole = Loop(tmp_path / "whole", optimizer_name, seed=5).train(END)
    Loop(tmp_path / "halves", optimizer_name, seed=5).train(SAVE)
    resumed = Loop(tmp_path / "halves", optimizer_name, seed=99)
    assert resumed.step == SAVE
    resumed.train(END)
    assert resumed.losses == whole.losses[SAVE:]
    assert_same(snapshot_model(resumed.model), snapshot_model(whole.model))
    found, expected = (snapshot_optimizer(each.model, each.optimizer) for each in (resumed, whole))
    assert_same(found, expected)


@pytest.mark.parametrize("options", [{}, {"bf16": True}, {"optim": "adamw_torch_fused"}], ids=["fp32", "bf16", "fused"])
def test_a_trainer_goes_on_bit_for_bit(tmp_path: Path, options: dict[str, Any]) -> None:
    def prepare(directory: Path, stop: int | None = None) -> Training:
        batches, states = BatchRecorder(), KeepStates()
        model = build_llama()
        batches.watch(model)
        trainer = build_trainer(directory, model=model, stop=stop, callbacks=[states], use_cpu=False, **options)
        return Training(trainer=tailor(trainer), batches=batches, states=states)

    whole = prepare(tmp_path / "whole")
    whole.trainer.train()
    prepare(tmp_path / "halves", STOP).trainer.train()
    torch.manual_seed(987)
    resumed = prepare(tmp_path / "halves")
    resumed.trainer.train(resume_from_checkpoint=True)
    assert resumed.trainer.args.device.type == "cuda"
    assert_same_outcome(resumed.outcome(since=STOP), whole.outcome(since=STOP))


@pytest.mark.parametrize("strategy", ["parity", "budget(0.8)"])
def test_layers_move_on_a_device_as_on_a_cpu(tmp_path: Path, strategy: str) -> None:
    """The same gradients on both: what is measured, and so what is chosen, is the same."""
    found: dict[str, list[dict[str, float]]] = {}
    for device in ("cpu", "cuda"):
        model = build_llama(width=64).to(device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        generator = torch.Generator().manual_seed(3)
        with llmtailor.Run(tmp_path / device, model, optimizer, monitor=True, strategy=strategy) as run:
            found[device] = []
            for step in range(1, 7):
                for index, parameter in enumerate(model.parameters()):
                    noise = torch.randn(parameter.shape, generator=generator)
                    parameter.grad = (noise * (index + 1)).to(device)
                optimizer.step()
                run.save(step)
                found[device].append(run.metrics)
    for ours, theirs in zip(found["cuda"], found["cpu"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3)
    on_device, on_host = (
        {layer.name: layer.step for layer in open_checkpoint(tmp_path / device / "checkpoint-6").manifest.layers}
        for device in ("cuda", "cpu")
    )
    assert on_device == on_host
    assert len(set(on_host.values())) > 1, "nothing was chosen"
