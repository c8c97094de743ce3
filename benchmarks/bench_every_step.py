"""What is left of a training loop's throughput when it saves at every step?

A Llama of 35 layers in fp32 with AdamW, 0.6 GB of state. Blocks of steps without a save take turns with blocks that
save at every step, 50 steps of each in all; for ``torch.save``, synchronous and without fsync, a few. A block ends when
its last save is done. LLMTailor keeps two checkpoints, so that removing the older ones is in its time, too.

    python benchmarks/bench_every_step.py [hidden size] [repeats] [tokens] [steps per block]
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import peers
import torch
from environment import publish
from loops import TrainingLoop
from models import llama_of_35_layers
from ours import Tailored
from turns import take_turns

TORCH_STEPS = 2


def step_secs(loop: TrainingLoop, saver: peers.Saver | None, steps: int) -> float:
    """Seconds per step of a block."""
    os.sync()
    loop.iterate()
    start = time.perf_counter()
    for _ in range(steps):
        loop.iterate(saver, save=saver is not None)
    if saver is not None:
        saver.wait()
    secs = time.perf_counter() - start
    if saver is not None:
        saver.clean()
    return secs / steps


def main() -> None:
    numbers = [int(text) for text in sys.argv[1:]] + [320, 5, 96, 10][len(sys.argv) - 1 :]
    hidden_size, repeats, num_tokens, steps = numbers
    model, optimizer = llama_of_35_layers(hidden_size, vocab_size=8016)
    loop = TrainingLoop(model, optimizer, num_tokens=num_tokens)
    with tempfile.TemporaryDirectory(dir=os.environ.get("BENCH_DIRECTORY")) as name:
        directory = Path(name)
        ours = Tailored(directory / "run", model, optimizer, keep=2)
        torch_save = peers.BlockingSaver(
            directory / "torch",
            lambda path: torch.save(peers.nested_state(model, optimizer), path / "state.pt"),
        )
        for saver in (None, ours, torch_save):
            step_secs(loop, saver, 1)
        samples = take_turns(
            {
                "no_save": lambda: step_secs(loop, None, steps),
                "llmtailor": lambda: step_secs(loop, ours, steps),
                "torch_save": lambda: step_secs(loop, torch_save, TORCH_STEPS),
            },
            repeats,
        )
        ours.close()
        torch_save.close()
    rows: dict[str, Any] = {
        "repeats": repeats,
        "hidden_size": hidden_size,
        "tokens": num_tokens,
        "bytes": peers.nbytes_of(peers.flat_state(model, optimizer)),
        "steps": {"no_save": steps * repeats, "llmtailor": steps * repeats, "torch_save": TORCH_STEPS * repeats},
    }
    medians = {name: statistics.median(values) for name, values in samples.items()}
    for name, values in samples.items():
        rows[f"{name}_secs_per_step_median"] = round(medians[name], 3)
        rows[f"{name}_secs_per_step_min"] = round(min(values), 3)
        rows[f"{name}_secs_per_step_max"] = round(max(values), 3)
        rows[f"{name}_share_of_throughput"] = round(medians["no_save"] / medians[name], 3)
    publish("every_step", rows)


if __name__ == "__main__":
    main()
