"""How long do ``llmtailor ls`` and ``show`` take to answer, process start included?

A run of 8 parity checkpoints of a Llama of 35 layers (32 blocks, 291 tensors, as Llama-3.1-8B has). Wall-clock time of
the whole command, interleaved.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from environment import publish
from models import llama_of_35_layers

from llmtailor.checkpointer import Checkpointer

REPEATS = 15
NUM_CHECKPOINTS = 8


def make_run(directory: str) -> None:
    model, optimizer = llama_of_35_layers(hidden_size=64, vocab_size=512)
    checkpointer = Checkpointer(directory, strategy="parity")
    for step in range(1, NUM_CHECKPOINTS + 1):
        checkpointer.save(step, model, [optimizer], lambda directory: None).result()
    checkpointer.close()


def main() -> None:
    program = str(Path(sys.executable).with_name("llmtailor"))
    with tempfile.TemporaryDirectory() as directory:
        make_run(directory)
        commands = {
            "ls": [program, "ls", directory],
            "ls_json": [program, "ls", directory, "--json"],
            "show": [program, "show", directory],
            "bare_python": [sys.executable, "-c", "pass"],
        }
        secs: dict[str, list[float]] = {name: [] for name in commands}
        for _ in range(REPEATS):
            for name, command in commands.items():
                start = time.perf_counter()
                subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
                secs[name].append(time.perf_counter() - start)
    rows: dict[str, object] = {"checkpoints": NUM_CHECKPOINTS, "layers": 35, "repeats": REPEATS}
    for name, values in secs.items():
        rows[f"{name}_secs_median"] = round(statistics.median(values), 3)
        rows[f"{name}_secs_max"] = round(max(values), 3)
    publish("cli", rows)


if __name__ == "__main__":
    main()
