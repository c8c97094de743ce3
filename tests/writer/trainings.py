"""Tiny trainings at full speed, whose every save is compared with a copy taken at the same moment."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from llmtailor.checkpoint import open_checkpoint
from llmtailor.checkpointer import Checkpointer
from llmtailor.writer import SaveHandle
from llmtailor.writer.copying import ImageReader
from tiny_models import Snapshot, assert_same

# Its matrices are large enough to be referred to, not copied at once: see images._MAX_SMALL_NBYTES.
WIDTH = 48


class Block(torch.nn.Module):
    """Has parameters, and buffers that forward changes."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = torch.nn.Linear(WIDTH, WIDTH)
        self.mlp = torch.nn.Linear(WIDTH, 2 * WIDTH)
        self.norm = torch.nn.BatchNorm1d(2 * WIDTH)
        self.register_buffer("seen", torch.zeros(2 * WIDTH, WIDTH))
        self.back = torch.nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.relu(self.norm(self.mlp(torch.tanh(self.attn(x)))))
        if self.training:
            with torch.no_grad():
                self.seen.add_(hidden.detach().T @ x.detach())
        return x + self.back(hidden)


class Model(torch.nn.Module):
    def __init__(self, *, max_norm: float | None = None) -> None:
        super().__init__()
        self.embed_tokens = torch.nn.Embedding(64, WIDTH, max_norm=max_norm)
        self.layers = torch.nn.ModuleList(Block() for _ in range(4))
        self.norm = torch.nn.LayerNorm(WIDTH)
        self.lm_head = torch.nn.Linear(WIDTH, 64)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(self.norm(x))


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "foreach": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, foreach=True),
    "fused": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, fused=True),
    "plain": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, foreach=False),
    "amsgrad": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, amsgrad=True),
    "momentum": lambda parameters: torch.optim.SGD(parameters, lr=1e-2, momentum=0.9),
}


@dataclass(kw_only=True)
class Training:
    """A training, and what its state was at each save."""

    directory: Path
    optimizer_name: str = "foreach"
    dtype: torch.dtype = torch.float32
    options: dict[str, Any] = field(default_factory=dict)
    model: torch.nn.Module = field(default_factory=Model)
    states: dict[int, Snapshot] = field(default_factory=dict)
    handles: list[SaveHandle] = field(default_factory=list)
    step: int = 0

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        for parameter in self.model.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        self.model.to(self.dtype)
        self.optimizer = OPTIMIZERS[self.optimizer_name](self.model.parameters())
        self.checkpointer = Checkpointer(self.directory, **self.options)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def backward(self) -> None:
        """Forward and backward of a batch of its own."""
        tokens = torch.randint(0, 64, (8,), generator=torch.Generator().manual_seed(self.step)).to(self.device)
        self.optimizer.zero_grad()
        torch.nn.functional.cross_entropy(self.model(tokens).float(), tokens.roll(1)).backward()

    def train(self, num_steps: int = 1) -> None:
        for _ in range(num_steps):
            self.backward()
            self.optimizer.step()
            self.step += 1

    def state(self) -> Snapshot:
        return state_of(self.model, self.optimizer)

    def save(self) -> SaveHandle:
        self.states[self.step] = self.state()
        handle = self.checkpointer.save(self.step, self.model, [self.optimizer], write_small_file)
        self.handles.append(handle)
        return handle

    def close(self) -> None:
        self.checkpointer.close()

    def check(self, path: Path) -> None:
        """Every layer of a checkpoint is what it was when it was saved, bit for bit."""
        manifest = open_checkpoint(path).manifest
        for layer in manifest.layers:
            for file in layer.files:
                found = safetensors.torch.load_file(path / file.path)
                expected = {name: self.states[layer.step][name] for name in found}
                assert_same(found, expected)
        held = {name for file in path.rglob("*.safetensors") for name in safetensors.torch.load_file(file)}
        assert held == set(self.states[manifest.step]), "something is not in the checkpoint"


def state_of(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> Snapshot:
    """A copy in host memory of all that a checkpoint holds, by the names in its files."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    state = {name: copy_of(tensor) for name, tensor in model.state_dict().items()}
    for parameter, leaves in optimizer.state.items():
        for leaf, value in leaves.items():
            if isinstance(value, torch.Tensor):
                state[f"state.{names[parameter]}.{leaf}"] = copy_of(value)
    return state


def copy_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu", copy=True)


def write_small_file(directory: Path) -> None:
    (directory / "scheduler.pt").write_bytes(b"small")


class Gate:
    """Holds the capture thread up before its first, or a later, copy; training goes on meanwhile."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, num_let_through: int = 0) -> None:
        self._open = threading.Event()
        self._reached = threading.Event()
        self._num_let_through = num_let_through
        fill = ImageReader.fill

        def wait_and_fill(reader: ImageReader, piece: Any, nbytes: int) -> None:
            if self._num_let_through > 0:
                self._num_let_through -= 1
            else:
                self._reached.set()
                assert self._open.wait(60), "nobody opened the gate"
            fill(reader, piece, nbytes)

        monkeypatch.setattr(ImageReader, "fill", wait_and_fill)

    def wait_until_reached(self) -> None:
        assert self._reached.wait(60), "nothing was captured"

    def open(self) -> None:
        self._open.set()
