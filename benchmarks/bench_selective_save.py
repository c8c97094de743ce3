"""What do two parity saves write against two full ones, and what does publishing cost when nothing is written?

A Llama of 35 layers (32 blocks, embedding, norm, head) in the proportions of Llama-3.1-8B, AdamW in fp32. The publish
row takes the time of a save that links every layer, less the time in which some fsync was running.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from typing import Any

import torch
from environment import publish
from models import llama_of_35_layers

from llmtailor.checkpointer import Checkpointer
from llmtailor.storage import LocalFileSystem
from llmtailor.strategies import Custom

REPEATS = 7


class TimedFileSystem:
    """Notes when an fsync was running."""

    def __init__(self) -> None:
        self._inner = LocalFileSystem()
        self.intervals: list[tuple[float, float]] = []

    def __getattr__(self, name: str) -> Any:
        call = getattr(self._inner, name)
        if name not in ("fsync", "fsync_directory"):
            return call

        def timed(*args: Any) -> Any:
            start = time.perf_counter()
            try:
                return call(*args)
            finally:
                self.intervals.append((start, time.perf_counter()))

        return timed

    def busy_secs(self) -> float:
        """Length of the union of the intervals."""
        total, reached = 0.0, 0.0
        for start, end in sorted(self.intervals):
            total += max(0.0, end - max(start, reached))
            reached = max(reached, end)
        return total


def written_by_two(strategy: str, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> int:
    with tempfile.TemporaryDirectory() as directory:
        checkpointer = Checkpointer(directory, strategy=strategy)
        # The first save of any run is full; the two after it are what the strategy is about.
        handles = [checkpointer.save(step, model, [optimizer], lambda directory: None) for step in (1, 2, 3)]
        checkpointer.close()  # waits for them
        return sum(handle.stats.written_nbytes for handle in handles[1:])


def publish_secs(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> tuple[list[float], list[float]]:
    beyond, total = [], []
    with tempfile.TemporaryDirectory() as directory:
        filesystem = TimedFileSystem()
        nothing = Custom(lambda context: [], max_age=10_000)
        checkpointer = Checkpointer(directory, strategy=nothing, filesystem=filesystem)  # type: ignore[arg-type]
        checkpointer.save(0, model, [optimizer], lambda directory: None).result()
        for step in range(1, REPEATS + 1):
            filesystem.intervals.clear()
            start = time.perf_counter()
            handle = checkpointer.save(step, model, [optimizer], lambda directory: None)
            handle.result()
            secs = time.perf_counter() - start
            assert handle.stats.num_layers == 35
            assert handle.stats.num_layers_written == 0
            total.append(secs)
            beyond.append(secs - filesystem.busy_secs())
        checkpointer.close()
    return beyond, total


def main() -> None:
    # Llama-3.1-8B at a sixteenth of its width, and a vocabulary that keeps the head's share of the bytes.
    model, optimizer = llama_of_35_layers(hidden_size=256, vocab_size=8016)
    full, parity = (written_by_two(strategy, model, optimizer) for strategy in ("full", "parity"))
    beyond, total = publish_secs(model, optimizer)
    publish(
        "selective_save",
        {
            "layers": 35,
            "two_full_saves_bytes": full,
            "two_parity_saves_bytes": parity,
            "parity_share_of_full": round(parity / full, 4),
            "publish_nothing_written_repeats": REPEATS,
            "publish_nothing_written_ms_beyond_fsync_median": round(1e3 * statistics.median(beyond), 1),
            "publish_nothing_written_ms_beyond_fsync_max": round(1e3 * max(beyond), 1),
            "publish_nothing_written_ms_total_median": round(1e3 * statistics.median(total), 1),
        },
    )


if __name__ == "__main__":
    main()
