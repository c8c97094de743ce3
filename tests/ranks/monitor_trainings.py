"""Measures how layers move on several gloo ranks, and how they did in truth: what all ranks hold, gathered.

python monitor_trainings.py DIRECTORY CASE...

A case is ``ddp``, ``ddp-spread`` or ``fsdp``. Rank 0 writes ``<case>.json``; every rank prints what it measured.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from llmtailor import Run
from llmtailor.strategies import Custom, SaveContext
from ranks.loop_trainings import build

STEPS = 6


def choose_two(context: SaveContext) -> list[str]:
    """The two layers that moved furthest."""
    moved = sorted(context.layers, key=lambda layer: -layer.drift.relative)  # type: ignore[union-attr, operator]
    return [layer.name for layer in moved[:2]]


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone().double()


def snapshot(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name.removeprefix("module."): whole(each) for name, each in model.named_parameters()}


def norm(tensors: list[torch.Tensor]) -> float:
    return math.sqrt(sum(float(each.square().sum()) for each in tensors))


def main(directory: Path, case: str) -> None:
    model, optimizer = build(case.partition("-")[0], "fp32", width=72)
    options: dict[str, Any] = {"spread_layers": True} if case.endswith("spread") else {}
    run = Run(
        directory / case, model, optimizer, strategy=Custom(choose_two), save_steps=2, monitor="gradients", **options
    )
    run.resume()
    start = snapshot(model)
    truth: dict[str, float] = {}
    choices = []
    for step in range(1, STEPS + 1):
        torch.manual_seed(100 * step)  # the same batch on every rank
        tokens = torch.randint(0, 23, (4, 6))
        torch.nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()).backward()
        gradients = {name.removeprefix("module."): whole(p.grad) for name, p in model.named_parameters()}  # type: ignore[arg-type]
        optimizer.step()
        optimizer.zero_grad()
        if step == 2:  # before the first save: since the start
            now = snapshot(model)
            names = {name: name.rpartition(".")[0] for name in now}
            layers = {name: ".".join(each.split(".")[:2]) if "layers" in each else each for name, each in names.items()}
            for layer in set(layers.values()):
                own = [name for name in now if layers[name] == layer]
                truth[layer] = norm([now[name] - start[name] for name in own]) / norm([start[name] for name in own])
                truth[f"gradient/{layer}"] = norm([gradients[name] for name in own])
        handle = run.step(step)
        if step == 2:
            first = run.metrics
        if handle is not None:
            choices.append(sorted(layer.name for layer in _manifest(handle.result()).layers if layer.step == step))
    run.close()
    sys.stdout.write(json.dumps({"case": case, "first": first, "choices": choices}) + "\n")
    if dist.get_rank() == 0:
        (directory / f"{case}.json").write_text(json.dumps({"truth": truth, "first": first, "choices": choices}))


def _manifest(path: Path) -> Any:
    from llmtailor import open_checkpoint

    return open_checkpoint(path).manifest


if __name__ == "__main__":
    dist.init_process_group("gloo")
    for each in sys.argv[2:]:
        main(Path(sys.argv[1]), each)
    dist.destroy_process_group()
