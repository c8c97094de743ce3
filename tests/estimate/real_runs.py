"""Tiny models and real runs of them, to hold estimates against."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
)

import llmtailor
from llmtailor.checkpoint import open_checkpoint
from llmtailor.estimate import ModelTensors, read_model_tensors
from llmtailor.manifest import Manifest

NUM_SAVES = 6
CONFIGS = Path(__file__).parent / "configs"

_LLAMA_SIZES: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
MODELS: dict[str, Callable[[], PretrainedConfig]] = {
    "gpt2": lambda: GPT2Config(vocab_size=512, n_embd=64, n_layer=4, n_head=4, n_positions=32),
    "llama": lambda: LlamaConfig(**_LLAMA_SIZES, tie_word_embeddings=False),
    "tied llama": lambda: LlamaConfig(**_LLAMA_SIZES, tie_word_embeddings=True),
    "qwen2": lambda: Qwen2Config(**_LLAMA_SIZES, tie_word_embeddings=True),
    "gemma": lambda: GemmaConfig(**_LLAMA_SIZES, head_dim=16, tie_word_embeddings=True),
}


def build(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(MODELS[name]())
    return model


def tensors_of(name: str, directory: Path) -> ModelTensors:
    """A model as it is told from its configuration alone."""
    MODELS[name]().save_pretrained(directory / "config")
    return read_model_tensors(str(directory / "config"))


def train(
    directory: Path,
    model: torch.nn.Module,
    make_optimizer: Callable[[Iterable[torch.nn.Parameter]], torch.optim.Optimizer] = torch.optim.AdamW,
    *,
    num_saves: int = NUM_SAVES,
    **options: Any,
) -> list[Manifest]:
    """Train with a save at every step; manifests of the checkpoints that are left, oldest first."""
    optimizer = make_optimizer([each for each in model.parameters() if each.requires_grad])
    with llmtailor.Run(directory, model, optimizer, save_steps=1, **options) as run:
        run.resume()
        for step in range(1, num_saves + 1):
            tokens = torch.randint(0, 512, (2, 6), generator=torch.Generator().manual_seed(step))
            model(input_ids=tokens, labels=tokens).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            run.step(step)
    steps = sorted(int(path.name.partition("-")[2]) for path in directory.glob("checkpoint-*"))
    return [open_checkpoint(directory / f"checkpoint-{step}").manifest for step in steps]


def layer_nbytes(manifest: Manifest) -> dict[str, int]:
    """Layer -> bytes of its files in a checkpoint."""
    return {layer.name: sum(file.bytes for file in layer.files) for layer in manifest.layers}


def written_nbytes(manifest: Manifest) -> int:
    """Of the files of layers that a save wrote."""
    return sum(layer.written_nbytes(manifest.step) for layer in manifest.layers)


def disk_nbytes(directory: Path) -> int:
    """Of all files of layers in a run; a file of several names counts once."""
    files = {path.stat().st_ino: path.stat().st_size for path in directory.glob("checkpoint-*/**/*.safetensors")}
    return sum(files.values())
