"""Adaptive strategies in real trainings: what lies in the checkpoints they leave."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import llmtailor
from llmtailor.checkpoint import open_checkpoint
from llmtailor.errors import InvalidInputError
from llmtailor.manifest import Manifest
from llmtailor.strategies import Budget, Monitored, parse_strategy
from llmtailor.verify import verify_checkpoint

NUM_BLOCKS = 6


def build(optimizer: type[torch.optim.Optimizer] = torch.optim.AdamW) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = torch.nn.Module()
    model.layers = torch.nn.ModuleList(torch.nn.Sequential(torch.nn.Linear(8, 8)) for _ in range(NUM_BLOCKS))
    model.lm_head = torch.nn.Linear(8, 4)
    # The first blocks learn slowly, and one not at all.
    groups = [{"params": list(block.parameters()), "lr": 1e-3 * 2**i} for i, block in enumerate(model.layers)]
    model.layers[2].requires_grad_(False)
    return model, optimizer([*groups, {"params": list(model.lm_head.parameters())}], lr=1e-3)


def train(directory: Path, strategy: str, *, until: int, save_steps: int = 2) -> None:
    """Go on from where the run is, if it is anywhere."""
    model, optimizer = build()
    run = llmtailor.Run(directory, model, optimizer, strategy=strategy, save_steps=save_steps)
    for step in range(run.resume() + 1, until + 1):
        hidden = torch.ones(3, 8)
        for block in model.layers:
            hidden = hidden + torch.tanh(block(hidden))
        model.lm_head(hidden).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        run.step(step)
    run.close()


def manifests(directory: Path) -> dict[int, Manifest]:
    paths = [*directory.glob("checkpoint-*")]
    assert all(verify_checkpoint(path).is_good for path in paths)
    opened = [open_checkpoint(path).manifest for path in paths]
    return {manifest.step: manifest for manifest in sorted(opened, key=lambda manifest: manifest.step)}


def written(manifest: Manifest) -> set[str]:
    return {layer.name for layer in manifest.layers if layer.step == manifest.step}


def nbytes_of(manifest: Manifest, layers: set[str]) -> int:
    files = [file for layer in manifest.layers if layer.name in layers for file in (layer.weights, layer.optimizer)]
    return sum(file.bytes for file in files if file is not None)


ENDS = {"layers.0", f"layers.{NUM_BLOCKS - 1}", "lm_head"}


def test_budget_by_importance_writes_what_was_measured_to_matter(tmp_path: Path) -> None:
    train(tmp_path, "budget(0.7)", until=12)
    saves = manifests(tmp_path)
    first, *later = saves.values()
    everything = {layer.name for layer in first.layers}
    assert written(first) == everything
    for manifest in later:
        assert written(manifest) >= ENDS
        # Frozen, it never moves.
        assert "layers.2" not in written(manifest)
        assert {layer.reason for layer in manifest.layers if layer.step == manifest.step} == {"strategy"}
        # Of its tensors; headers of files come on top.
        assert nbytes_of(manifest, written(manifest)) < 0.8 * nbytes_of(first, everything)
    # The faster a block learns, the more often it is written.
    counts = [sum(f"layers.{i}" in written(manifest) for manifest in later) for i in (1, 3, 4)]
    assert counts == sorted(counts)
    assert counts[0] < counts[-1]


def test_resumed_run_writes_what_one_that_went_on_does(tmp_path: Path) -> None:
    strategy = 'budget(0.7, by="age", max_age=9)'
    train(tmp_path / "whole", strategy, until=20)
    train(tmp_path / "cut", strategy, until=9)
    train(tmp_path / "cut", strategy, until=20)
    whole, cut = manifests(tmp_path / "whole"), manifests(tmp_path / "cut")
    assert [*cut] == [*whole] == [*range(2, 21, 2)]
    for step in whole:
        assert [(layer.step, layer.reason) for layer in cut[step].layers] == [
            (layer.step, layer.reason) for layer in whole[step].layers
        ]


def test_budget_per_step_says_when_to_save(tmp_path: Path) -> None:
    # A block is 72 weights, the head 36; with two moments and counts of steps that is 872 and 440 bytes in F32. A save
    # takes 2 * 872 + 440 of layers that are always written and 872 of the others: 3056 bytes.
    train(tmp_path, 'budget_per_step("1kB", by="drift")', until=13, save_steps=1000)
    saves = manifests(tmp_path)
    assert [*saves] == [4, 8, 12]
    assert all(written(manifest) >= ENDS for manifest in saves.values())


def test_budget_that_is_too_small_is_said_at_the_first_save(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError) as caught:
        train(tmp_path, "budget(0.1)", until=2)
    assert caught.value.kind == "budget-too-small"
    assert not list(tmp_path.glob("checkpoint-*"))


def test_optimizer_without_second_moments_is_said_at_the_first_save(tmp_path: Path) -> None:
    model, optimizer = build(torch.optim.SGD)
    run = llmtailor.Run(tmp_path, model, optimizer, strategy=Budget(0.9), save_steps=1)
    run.resume()
    model.lm_head(model.layers[1](torch.ones(8))).sum().backward()
    optimizer.step()
    with pytest.raises(InvalidInputError, match=r"layers\.1") as caught:
        run.step(1)
    assert caught.value.kind == "no-importance"
    run.close()


def test_strategy_of_a_run_stands_in_its_checkpoints(tmp_path: Path) -> None:
    train(tmp_path, "monitored(0.1, end=0.001, decay=3)", until=2)
    (manifest,) = manifests(tmp_path).values()
    assert parse_strategy(manifest.strategy) == Monitored(0.1, end=0.001, decay=3)
