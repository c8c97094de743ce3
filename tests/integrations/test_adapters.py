"""Models with PEFT's adapters: what the adapters hold and do not train is saved and restored, too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, Trainer

from llmtailor import Run
from llmtailor.checkpoint import open_checkpoint
from llmtailor.errors import StrategyIgnoredWarning
from llmtailor.integrations.transformers import tailor
from llmtailor.local_parts import Seat
from llmtailor.model_state import read_model
from llmtailor.verify import verify_checkpoint
from llmtailor.zero import ZeroReader
from tiny_models import assert_same, build_llama, build_trainer, snapshot_model

peft = pytest.importorskip("peft")

# peft 0.21 still says "gradient_checkpointing" to transformers.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")


def config(**options: Any) -> Any:
    return peft.LoraConfig(**({"r": 2, "target_modules": ["q_proj", "v_proj"]} | options))


def adapt(seed: int, adapter: Any) -> Any:
    """The same base whatever the seed, as when it is read from disk; the adapter is drawn anew."""
    base = build_llama()
    torch.manual_seed(seed)
    return peft.get_peft_model(base, adapter)


def build_half_frozen(seed: int) -> Any:
    model = adapt(seed, config())
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_B" in name)
    return model


def build_two(seed: int) -> Any:
    model = adapt(seed, config())
    model.add_adapter("other", config(r=3))
    return model


def build_vera(seed: int) -> Any:
    return adapt(seed, peft.VeraConfig(r=2, target_modules=["q_proj"], projection_prng_key=seed))


def train_and_save(directory: Path, model: nn.Module, inputs: dict[str, torch.Tensor]) -> None:
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=1e-2)
    with Run(directory, model, optimizer) as run:
        model.train()
        output = model(**inputs)
        (output if isinstance(output, torch.Tensor) else output.loss).sum().backward()
        optimizer.step()
        run.save(1)


def resume(directory: Path, model: nn.Module) -> None:
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=1e-2)
    with Run(directory, model, optimizer) as run:
        assert run.resume() == 1


@pytest.mark.parametrize("build", [build_half_frozen, build_two, build_vera], ids=["frozen", "inactive", "projections"])
def test_new_process_gets_all_of_the_adapters(build: Any, tmp_path: Path) -> None:
    rows = torch.arange(6).view(1, 6)
    trained = build(1)
    train_and_save(tmp_path, trained, {"input_ids": rows, "labels": rows})

    resumed = build(2)
    resume(tmp_path, resumed)

    assert_same(snapshot_model(resumed), snapshot_model(trained))
    names = {tensor.fqn for tensor in open_checkpoint(tmp_path / "checkpoint-1").manifest.tensors}
    assert not [name for name in names if "base_layer" in name or "embed_tokens" in name], (
        "the base is not ours to copy"
    )
    assert verify_checkpoint(tmp_path / "checkpoint-1").is_good


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.norm = nn.BatchNorm1d(8)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.norm(self.linear(rows)).square()
        return result


def build_normed() -> Any:
    torch.manual_seed(0)
    return peft.get_peft_model(Normed(), peft.LoraConfig(r=2, target_modules=["linear"], modules_to_save=["norm"]))


def test_statistics_of_modules_to_save(tmp_path: Path) -> None:
    trained = build_normed()
    train_and_save(tmp_path, trained, {"rows": torch.randn(16, 8) * 3 + 2})
    resumed = build_normed()
    resume(tmp_path, resumed)
    assert_same(snapshot_model(resumed), snapshot_model(trained))
    assert resumed.base_model.model.norm.modules_to_save.default.running_mean.abs().sum() > 0


@pytest.mark.parametrize("build", [build_half_frozen, build_two, build_vera], ids=["frozen", "inactive", "projections"])
def test_deepspeed_saves_the_same_tensors(build: Any) -> None:
    model = build(1)
    reader = ZeroReader(None, seat=Seat())
    assert reader.read_model(model).records == read_model(model).records


# ---- Adapters that transformers puts into its own models ----


def build_own(base: Path, seed: int) -> Any:
    model = AutoModelForCausalLM.from_pretrained(base)
    torch.manual_seed(seed)
    model.add_adapter(config())
    return model


def test_adapter_of_transformers(tmp_path: Path) -> None:
    build_llama().save_pretrained(tmp_path / "base")

    def make(seed: int, stop: int | None) -> Trainer:
        return tailor(
            build_trainer(tmp_path / "run", model=build_own(tmp_path / "base", seed), stop=stop, max_steps=10)
        )

    make(1, 5).train()
    resumed = make(2, None)
    resumed.train(resume_from_checkpoint=True)

    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "run/checkpoint-10")
    assert_same(snapshot_model(loaded), snapshot_model(resumed.model))
    files = {path.name for path in (tmp_path / "run/checkpoint-10").iterdir()}
    assert "adapter_model.safetensors" in files
    assert not {"model.safetensors.index.json", "model-embed_tokens.safetensors"} & files, "the base is left out"
    assert verify_checkpoint(tmp_path / "run/checkpoint-10").is_good


def test_adapter_of_transformers_is_saved_whole(tmp_path: Path) -> None:
    build_llama().save_pretrained(tmp_path / "base")
    trainer = tailor(
        build_trainer(tmp_path / "run", model=build_own(tmp_path / "base", 1), max_steps=10), strategy="parity"
    )
    with pytest.warns(StrategyIgnoredWarning, match="adapters") as told:
        trainer.train()
    assert sum(each.category is StrategyIgnoredWarning for each in told) == 1, "once, not at every save"
    assert open_checkpoint(tmp_path / "run/checkpoint-10").manifest.is_consistent
