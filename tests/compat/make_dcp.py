"""Writes data/torch-2.13.0-dcp: small real checkpoints of torch.distributed.checkpoint, transformers and accelerate.

    for case in <CASES>: PYTHONPATH=tests python tests/compat/make_dcp.py <case>

Made with torch 2.13.0, transformers 5.23.0 and accelerate 1.15.0. A case is one launch of its ranks.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import _version
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard

from merge.dcp_trainings import (
    build_model,
    build_trainer,
    let_accelerate_shard_on_the_cpu,
    saving_at,
    shard,
    train,
)

ROOT = Path(__file__).parent / "data" / "torch-2.13.0-dcp"


class Block(torch.nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = torch.nn.Linear(width, 2 * width)
        self.down = torch.nn.Linear(2 * width, width, bias=False)


class Net(torch.nn.Module):
    """Small, with a bias shorter than three ranks, a buffer, and a parameter that is not trained."""

    def __init__(self) -> None:
        super().__init__()
        self.tok_embeddings = torch.nn.Embedding(10, 4)
        self.layers = torch.nn.ModuleList([Block(4)])
        self.norm = torch.nn.LayerNorm(4)
        self.output = torch.nn.Linear(4, 2)
        self.register_buffer("freqs", torch.arange(6.0))
        self.norm.bias.requires_grad_(False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.tok_embeddings(tokens)
        for block in self.layers:
            hidden = hidden + block.down(torch.relu(block.up(hidden)))
        return self.output(self.norm(hidden))


def trained_net(num_steps: int, dim: int = 0) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = Net()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    fully_shard(model, mesh=mesh, shard_placement_fn=lambda parameter: Shard(min(dim, parameter.ndim - 1)))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=torch.tensor(0.01), betas=(0.8, 0.9), foreach=False)
    for _ in range(num_steps):
        model(torch.arange(8).view(2, 4)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def trained_llama(*, tied: bool) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    model, optimizer = shard(build_model(num_layers=1, tied=tied))
    train(model, optimizer, 0, 2)
    return model, optimizer


def save_llama(path: Path, *, tied: bool) -> None:
    weights, states = get_state_dict(*trained_llama(tied=tied))
    dcp.save({"model": weights, "optim": states}, checkpoint_id=path)


def save_old(path: Path) -> None:
    # What torch wrote before 2.4: param_groups is one value.
    _version._derived_version = "2_3"
    weights, states = get_state_dict(*trained_net(1))
    dcp.save({"model": weights, "optim": states}, checkpoint_id=path)


def save_titan(path: Path) -> None:
    """As torchtitan does: weights under their bare names, the rest beside them."""
    model, optimizer = trained_net(3)
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    weights, states = get_state_dict(model, optimizer, options=options)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    counts = {"step": torch.tensor(3, dtype=torch.int32), "ntokens_seen": torch.tensor(96, dtype=torch.int64)}
    state: dict[str, Any] = {**weights, "optimizer": states, "train_state": counts}
    scheduled = {key: value for key, value in scheduler.state_dict().items() if key != "lr_lambdas"}
    dcp.save({**state, "lr_scheduler": scheduled}, checkpoint_id=path / "step-3")


def save_app(path: Path) -> None:
    """As torch's tutorial does, and sharded by columns."""
    weights, states = get_state_dict(*trained_net(2, dim=1))
    dcp.save({"app": {"model": weights, "optim": states}}, checkpoint_id=path)


def save_weights(path: Path) -> None:
    model, _ = trained_net(0)
    dcp.save(get_model_state_dict(model), checkpoint_id=path)


def save_trainer(path: Path) -> None:
    trainer = build_trainer(path, num_layers=1)
    trainer.add_callback(saving_at(2))
    trainer.args.max_steps = 2
    trainer.train()
    if dist.get_rank() == 0:
        (path / "checkpoint-2" / "training_args.bin").unlink(missing_ok=True)


CASES: dict[str, tuple[int, Callable[[Path], None]]] = {
    "loop": (2, lambda path: save_llama(path, tied=False)),
    "tied": (3, lambda path: save_llama(path, tied=True)),
    "titan": (3, save_titan),
    "app": (2, save_app),
    "old": (2, save_old),
    "weights": (2, save_weights),
    "trainer": (2, save_trainer),
    "tied-trainer-full": (2, save_trainer),
}


def main() -> None:
    case = sys.argv[1]
    num_ranks, save = CASES[case]
    if "RANK" not in os.environ:
        shutil.rmtree(ROOT / case, ignore_errors=True)
        ROOT.mkdir(parents=True, exist_ok=True)
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_ranks}"]
        subprocess.run([*launcher, __file__, case], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        return
    let_accelerate_shard_on_the_cpu()
    dist.init_process_group("gloo")
    # .metadata has the path it was saved to.
    os.chdir(ROOT)
    save(Path(case))
    # A rank that is gone too soon makes the others abort, with everything written.
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
