"""Accelerate's own ``save_state`` and ``load_state`` under DeepSpeed, with our checkpoints behind its engine.

python accelerate_engine.py DIRECTORY        one process per rank
"""

from __future__ import annotations

import os
import sys
from typing import Any

import deepspeed
import deepspeed.comm.torch
import torch
from accelerate import Accelerator, DeepSpeedPlugin

from llmtailor.integrations.deepspeed import install

CONFIG = {
    "train_micro_batch_size_per_gpu": 2,
    "gradient_accumulation_steps": 1,
    "zero_optimization": {"stage": 2},
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
    "bf16": {"enabled": True},
}


def train_step(accelerator: Accelerator, model: Any, optimizer: Any) -> None:
    tokens = torch.randint(0, 64, (2,))
    accelerator.backward(torch.nn.functional.cross_entropy(model(tokens).float(), tokens))
    optimizer.step()
    optimizer.zero_grad()


def main(directory: str) -> None:
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # it would be compiled, see merge/
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    deepspeed.init_distributed(dist_backend="gloo")
    accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=CONFIG))
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Embedding(64, 16), *(torch.nn.Linear(16, 16) for _ in range(2)))
    module.append(torch.nn.Linear(16, 64))
    model, optimizer = accelerator.prepare(module, torch.optim.AdamW(module.parameters(), lr=1e-2))
    with install(model, strategy=lambda context: {"0"}) as run:
        for _ in range(2):
            train_step(accelerator, model, optimizer)
            accelerator.save_state(directory)
            assert run.last_save is not None
            run.last_save.result(60)
    saved = [parameter.detach().clone() for parameter in model.module.parameters()]
    train_step(accelerator, model, optimizer)
    with run:
        accelerator.load_state(directory)
    assert model.global_steps == 2
    # The newest, whose layers of the step before were linked: those went back a step.
    same = [torch.equal(one, other) for one, other in zip(saved, model.module.parameters(), strict=True)]
    assert any(same)
    assert not all(same)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
