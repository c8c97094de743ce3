"""Freeze layers that have stopped moving, from the front: backward gets shorter, and saves write them no more.

Every few steps the run says how large each layer's next update is. A layer whose updates have fallen below a share of
the largest they ever were is frozen, if all layers before it are; the idea is FreezeOut's (Brock et al., 2017). Which
layers are frozen is saved with the run, and so is what they had moved at their fastest.

    python examples/freeze_still_layers.py [directory]
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import llmtailor
from llmtailor.drift import LayerDrift
from llmtailor.layers import map_module

STEPS = 120
LOOK_EVERY = 10
STILL = 0.35
"""Share of its fastest updates below which a layer has stopped moving."""


class Freezer:
    """Freezes layers of a model; an object with state, which the run saves and resumes."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._model = model
        self._layers = map_module(model)
        self.fastest: dict[str, float] = {}
        self.frozen: list[str] = []

    def look(self, drifts: Mapping[str, LayerDrift]) -> None:
        """Take note of a measurement, and freeze the next layer if it has stopped moving."""
        updates = {name: drift.update for name, drift in drifts.items() if drift.update is not None}
        for name, update in updates.items():
            self.fastest[name] = max(update, self.fastest.get(name, 0.0))
        *blocks, _, _ = self._layers  # the norm and the head learn to the end
        following = next((layer.name for layer in blocks if layer.name not in self.frozen), None)
        if following is not None and updates[following] < STILL * self.fastest[following]:
            self._freeze([following])

    def _freeze(self, names: Iterable[str]) -> None:
        for layer in self._layers:
            if layer.name in names:
                self.frozen.append(layer.name)
                for fqn in layer.fqns:
                    self._model.get_parameter(fqn).requires_grad_(False)

    def state_dict(self) -> dict[str, Any]:
        return {"fastest": self.fastest, "frozen": self.frozen}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.fastest = dict(state["fastest"])
        self._freeze([name for name in state["frozen"] if name not in self.frozen])


def build() -> tuple[torch.nn.Module, torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=176, num_hidden_layers=4, num_attention_heads=4
    )
    model = AutoModelForCausalLM.from_config(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    return model, optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)


def batches(start: int) -> Iterable[torch.Tensor]:
    """Bytes of this very file, in pieces."""
    text = torch.tensor(list(Path(__file__).read_bytes()))
    for step in range(start, STEPS):
        generator = torch.Generator().manual_seed(step)
        places = torch.randint(0, len(text) - 33, (8,), generator=generator).tolist()
        yield torch.stack([text[place : place + 33] for place in places])


def main(directory: str, last_step: int = STEPS) -> None:
    model, optimizer, scheduler = build()
    freezer = Freezer(model)
    with llmtailor.Run(
        directory,
        model,
        optimizer,
        scheduler=scheduler,
        state={"freezer": freezer},
        strategy="top_k(3, first=0, last=0)",
        save_steps=20,
    ) as run:
        step = run.resume()
        for tokens in batches(step):
            loss = model(input_ids=tokens, labels=tokens).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
            step += 1
            if step % LOOK_EVERY == 0:
                freezer.look(run.measure(step))
                print(f"step {step:3}  loss {loss.item():.3f}  frozen: {', '.join(freezer.frozen) or 'nothing'}")
            run.step(step)
            if step == last_step:
                break


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "runs/freeze_still_layers")
