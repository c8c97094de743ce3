"""A learning rate for each layer, so that all layers move at the same pace.

Every few steps the run says how large each layer's next update is, relative to its weights. Layers that are about to
move faster than the median get a lower rate, slower ones a higher one, within limits. The idea is that of LARS and
LAMB (a trust ratio for each layer); here it costs a measurement now and then, and works with any optimizer whose state
tells its updates.

    python examples/layer_learning_rates.py [directory]
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Iterable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import llmtailor
from llmtailor.layers import map_module

STEPS = 60
ADJUST_EVERY = 10
LR = 1e-3
LIMITS = (0.5, 2.0)
"""Of a layer's rate, relative to ``LR``."""


def build() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=176, num_hidden_layers=4, num_attention_heads=4
    )
    model = AutoModelForCausalLM.from_config(config)
    # One parameter group for each layer, which remembers whose it is: options of groups are saved and resumed.
    groups = [
        {"params": [model.get_parameter(fqn) for fqn in layer.fqns], "layer": layer.name} for layer in map_module(model)
    ]
    return model, torch.optim.AdamW(groups, lr=LR)


def adjust(optimizer: torch.optim.Optimizer, updates: dict[str, float]) -> None:
    """Set each layer's rate so that its updates become as large as the median layer's."""
    median = statistics.median(updates.values())
    for group in optimizer.param_groups:
        pace = updates[group["layer"]] / (group["lr"] / LR)  # at the rate LR
        group["lr"] = LR * min(max(median / pace, LIMITS[0]), LIMITS[1])


def batches(start: int) -> Iterable[torch.Tensor]:
    """Bytes of this very file, in pieces."""
    text = torch.tensor(list(Path(__file__).read_bytes()))
    for step in range(start, STEPS):
        generator = torch.Generator().manual_seed(step)
        places = torch.randint(0, len(text) - 33, (8,), generator=generator).tolist()
        yield torch.stack([text[place : place + 33] for place in places])


def main(directory: str) -> None:
    model, optimizer = build()
    with llmtailor.Run(directory, model, optimizer, strategy="budget(0.6)", save_steps=20, monitor=True) as run:
        step = run.resume()
        for tokens in batches(step):
            loss = model(input_ids=tokens, labels=tokens).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            if step % ADJUST_EVERY == 0:
                drifts = run.measure(step)
                updates = {layer: drift.update for layer, drift in drifts.items() if drift.update is not None}
                pace = max(updates.values()) / min(updates.values())
                adjust(optimizer, updates)
                print(f"step {step:3}  loss {loss.item():.3f}  fastest layer / slowest {pace:.1f}")
            run.step(step)
    for group in optimizer.param_groups:
        print(f"{group['layer']:14} lr {group['lr']:.2e}")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "runs/layer_learning_rates")
