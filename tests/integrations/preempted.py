"""A training process that is told to end: ``preempted.py <loop|trainer> <directory> <options as JSON>``.

Says ``saving <step>`` when a save has begun, on a disk that takes its time.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch

from llmtailor import Run
from llmtailor.storage import LocalFileSystem


def say(text: str) -> None:
    os.write(1, f"{text}\n".encode())


def write_slowly(filesystem: LocalFileSystem, descriptor: int, buffer: memoryview, offset: int) -> None:
    time.sleep(0.05)
    os.pwrite(descriptor, buffer, offset)


def loop(directory: str, slow_step: float, **options: Any) -> None:
    model = torch.nn.Linear(8, 8)
    optimizer = torch.optim.AdamW(model.parameters())
    run = Run(directory, model, optimizer, **options)
    for step in range(1, 10_000):
        model(torch.ones(8)).sum().backward()
        optimizer.step()
        if run.step(step) is not None:
            say(f"saving {step}")
        if step == 1:
            say("sleeping")
        time.sleep(slow_step)


def trainer(directory: str, slow_step: float, **options: Any) -> None:
    # Imported here: a plain loop starts several times as fast without.
    from transformers import TrainerCallback

    from llmtailor.integrations.transformers import tailor
    from tiny_models import build_trainer

    class Sayer(TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            say(f"saving {state.global_step}")

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            time.sleep(slow_step)

    arguments = {"max_steps": 10_000, "enable_jit_checkpoint": options.pop("jit", False)}
    arguments["save_steps"] = options.pop("save_steps")
    tailor(build_trainer(Path(directory), callbacks=[Sayer()], **arguments), **options).train()
    say("train returned")


if __name__ == "__main__":
    LocalFileSystem.write_at = write_slowly  # type: ignore[method-assign]
    {"loop": loop, "trainer": trainer}[sys.argv[1]](sys.argv[2], **json.loads(sys.argv[3]))
