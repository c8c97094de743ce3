"""Real trainings with ``Run`` on several gloo ranks: DDP, FSDP2, tensor parallelism. One process per rank.

python loop_trainings.py begin DIRECTORY CASE...     trains each case to the end; again with saves, to STOP; dies
python loop_trainings.py resume DIRECTORY CASE...    resumes each and trains to the end
python loop_trainings.py reshard DIRECTORY CASE...   resumes each on another number of ranks, writes what was loaded

A case is ``<framework>-<strategy>-<dtype>``. Rank 0 writes digests of the gathered state, by name, as JSON.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from llmtailor import Run

STEPS = 6
SAVES = (2, 4)
STOP = 5


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width + 2)
        self.down = nn.Linear(2 * width + 2, width, bias=False)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.dropout(self.down(torch.relu(self.up(self.norm(x)))))


class Model(nn.Module):
    def __init__(self, width: int = 18) -> None:
        super().__init__()
        self.embed = nn.Embedding(23, width)
        self.layers = nn.ModuleList(Block(width) for _ in range(3))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 23)
        self.register_buffer("scale", torch.ones(3))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens) * self.scale[0]
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


def build(framework: str, dtype: str, width: int = 18) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The model of a case, wrapped or sharded, and its optimizer."""
    torch.manual_seed(0)
    model: nn.Module = Model(width).to(torch.bfloat16 if dtype == "bf16" else torch.float32)
    size = dist.get_world_size()
    if framework == "ddp":
        model = nn.parallel.DistributedDataParallel(model)
    elif framework in ("fsdp", "hsdp"):
        mesh = (
            init_device_mesh("cpu", (size,))
            if framework == "fsdp"
            else init_device_mesh("cpu", (size // 2, 2), mesh_dim_names=("replicate", "shard"))
        )
        for layer in model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    elif framework in ("tp", "fsdp_tp"):
        mesh = init_device_mesh("cpu", (size // 2, 2), mesh_dim_names=("dp", "tp"))
        for layer in model.layers:
            parallelize_module(layer, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
            if framework == "fsdp_tp":
                fully_shard(layer, mesh=mesh["dp"])
        if framework == "fsdp_tp":
            fully_shard(model, mesh=mesh["dp"])
    else:
        raise ValueError(framework)
    named = list(model.named_parameters())
    groups = [
        {"params": [p for _, p in named if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for _, p in named if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return model, torch.optim.AdamW(groups, lr=1e-2, foreach=False)


def build_case(case: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    framework, _, dtype = case.split("-")[:3]
    return build(framework, dtype, 96 if "q8" in case else 18)  # codes make nothing of small tensors


def seed_rank(framework: str) -> None:
    """Ranks that hold pieces of the same matrices (tensor parallelism) get the same data and dropout."""
    group = {"tp": 0, "fsdp_tp": dist.get_rank() // 2}.get(framework, dist.get_rank())
    torch.manual_seed(100 + group)
    random.seed(100 + group)


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: Any) -> float:
    # Data and dropout follow the generators, so only a resume that restores them goes on the same way.
    tokens = torch.randint(0, 23, (2, 7))
    logits = model(tokens)
    loss = nn.functional.cross_entropy(logits.float().flatten(0, 1), tokens.flatten())
    loss.backward()
    optimizer.step()
    scheduler.step()
    optimizer.zero_grad()
    return float(loss.detach())


def gather(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The whole state by name, on every rank."""
    inner = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    found: dict[str, torch.Tensor] = {}
    for name, tensor in [*inner.named_parameters(), *inner.named_buffers()]:
        found[name] = whole(tensor)
        for leaf, value in sorted(optimizer.state.get(tensor, {}).items()):
            found[f"state.{name}.{leaf}"] = whole(value)
    return found


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def digests(state: dict[str, torch.Tensor]) -> dict[str, str]:
    return {
        name: f"{tensor.dtype}{list(tensor.shape)}"
        + hashlib.sha256(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()[:16]
        for name, tensor in state.items()
    }


def report(path: Path, content: Any) -> None:
    if dist.get_rank() == 0:
        path.write_text(json.dumps(content))


def run_options(case: str) -> dict[str, Any]:
    strategy = case.split("-")[1]
    options: dict[str, Any] = {"strategy": strategy, "save_steps": 2, "commit_timeout_secs": 60}
    if case.endswith("-spread"):
        options["spread_layers"] = True
    if "-q8" in case:
        options["rest"] = "q8"
    return options


def begin(directory: Path, case: str) -> None:
    framework = case.split("-")[0]
    seed_rank(framework)
    model, optimizer = build_case(case)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=10)
    seed_rank(framework)
    losses, truth = [], {}
    for step in range(STEPS):
        losses.append(train_step(model, optimizer, scheduler))
        if step + 1 in SAVES:
            truth[step + 1] = digests(gather(model, optimizer))
    report(directory / f"{case}.straight.json", {"losses": losses, "final": digests(gather(model, optimizer))})
    report(directory / f"{case}.truth.json", truth)
    model, optimizer = build_case(case)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=10)
    seed_rank(framework)
    run = Run(directory / case, model, optimizer, scheduler=scheduler, **run_options(case))
    assert run.resume() == 0
    handle = None
    for step in range(STOP):
        train_step(model, optimizer, scheduler)
        handle = run.step(step + 1) or handle
    assert handle is not None
    handle.result(60)


def resume(directory: Path, case: str, *, same_world: bool) -> None:
    torch.manual_seed(7)
    model, optimizer = build_case(case)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=10)
    with Run(directory / case, model, optimizer, scheduler=scheduler, **run_options(case)) as run:
        start = run.resume(random_state=same_world)
        loaded = digests(gather(model, optimizer))
        everywhere: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everywhere, loaded)
        assert all(each == loaded for each in everywhere)
        losses = []
        for step in range(start, STEPS):
            losses.append(train_step(model, optimizer, scheduler))
            run.step(step + 1)
        final = digests(gather(model, optimizer))
    name = "resumed" if same_world else f"resharded-{dist.get_world_size()}"
    report(directory / f"{case}.{name}.json", {"start": start, "loaded": loaded, "losses": losses, "final": final})


def main() -> None:
    verb, directory, cases = sys.argv[1], Path(sys.argv[2]), sys.argv[3:]
    dist.init_process_group("gloo")
    for case in cases:
        if verb == "begin":
            begin(directory, case)
        else:
            resume(directory, case, same_world=verb == "resume")
    dist.barrier()
    if verb == "begin":
        os.kill(os.getpid(), signal.SIGKILL)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
