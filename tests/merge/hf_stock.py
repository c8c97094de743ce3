"""A Hugging Face checkpoint read by the stock libraries alone, by name: nothing here knows LLMTailor."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from transformers import Trainer

Tensors = dict[str, torch.Tensor]


def stock_model(directory: Path) -> Any:
    """The model of ``config.json``, with weights of its own."""
    config = transformers.AutoConfig.from_pretrained(directory)
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")


def read_weights(directory: Path) -> Tensors:
    index = directory / "model.safetensors.index.json"
    if (directory / "model.safetensors").exists():
        return load_file(directory / "model.safetensors")
    if (directory / "pytorch_model.bin").exists():
        return dict(torch.load(directory / "pytorch_model.bin", weights_only=True))
    files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    found: Tensors = {}
    for file in files:
        found |= load_file(directory / file)
    return found


def read_optimizer(directory: Path) -> dict[str, Any]:
    return dict(torch.load(directory / "optimizer.pt", weights_only=True))


def read_states(directory: Path) -> dict[str, dict[str, Any]]:
    """fqn -> state, by the groups that the stock Trainer makes of the stock model."""
    model = stock_model(directory)
    decayed = set(Trainer.get_decay_parameter_names(None, model))
    names = [name for name, _ in model.named_parameters()]
    ordered = [name for name in names if name in decayed] + [name for name in names if name not in decayed]
    optimizer = read_optimizer(directory)
    positions = [position for group in optimizer["param_groups"] for position in group["params"]]
    assert len(positions) == len(ordered)
    named = zip(positions, ordered, strict=True)
    return {name: optimizer["state"][position] for position, name in named if position in optimizer["state"]}


def everything(directory: Path) -> Tensors:
    """All tensors of weights and optimizer by name."""
    weights = {f"weight {name}": tensor for name, tensor in read_weights(directory).items()}
    states = {
        f"state {name} {leaf}": tensor
        for name, state in read_states(directory).items()
        for leaf, tensor in state.items()
    }
    return weights | states


def digests(directory: Path) -> dict[str, str]:
    """Of every file, to see that nothing was touched."""
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }
