"""How much memory do saves take: of a large state through a small pool, and after 500 saves of a small one?

More than 2 GB through a pool of 256 MB: the highest resident memory of the process while it saves, above what it had
with model and optimizer in memory and all code loaded. Then 500 durable saves of a small model with ``keep=2``:
resident memory every ten saves, the line through the second half of them, and its median step.

    python benchmarks/bench_memory.py [hidden size] [saves]
"""

from __future__ import annotations

import gc
import itertools
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import peers
from environment import publish
from models import llama_of_35_layers
from ours import Tailored

POOL_NBYTES = 256 * 10**6
LARGE_SAVES = 3
EVERY = 10


def memory_nbytes(what: str) -> int:
    """``VmRSS``, resident now, or ``VmHWM``, the most there ever was, or since it was forgotten."""
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(what))


def forget_peak() -> None:
    """Source: Linux, Documentation/filesystems/proc.rst (clear_refs)."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def measure_large(directory: Path, hidden_size: int) -> dict[str, Any]:
    """Rows of large saves through a small pool."""
    model, optimizer = llama_of_35_layers(hidden_size, vocab_size=16032)
    gc.collect()
    before = memory_nbytes("VmRSS")
    forget_peak()
    ours = Tailored(directory / "large", model, optimizer, pool_nbytes=POOL_NBYTES)
    for _ in range(LARGE_SAVES):
        ours.save_durably()
        ours.clean()
    peak = memory_nbytes("VmHWM") - before
    ours.close()
    return {
        "large_bytes": peers.nbytes_of(peers.flat_state(model, optimizer)),
        "large_saves": LARGE_SAVES,
        "pool_bytes": POOL_NBYTES,
        "large_peak_bytes_above_state": peak,
        "large_peak_by_pool": round(peak / POOL_NBYTES, 3),
        "large_bytes_kept_after_close": memory_nbytes("VmRSS") - before,
    }


def measure_many(directory: Path, saves: int) -> dict[str, Any]:
    """Rows of many small saves."""
    model, optimizer = llama_of_35_layers(hidden_size=32, vocab_size=512)
    ours = Tailored(directory / "many", model, optimizer, keep=2)
    resident = []
    for number in range(1, saves + 1):
        ours.save_durably()
        if number % EVERY == 0:
            resident.append(memory_nbytes("VmRSS"))
    ours.close()
    half = resident[len(resident) // 2 :]
    slope = statistics.linear_regression(range(len(half)), half).slope / EVERY
    steps = [after - before for before, after in itertools.pairwise(half)]
    return {
        "many_saves": saves,
        "many_bytes": peers.nbytes_of(peers.flat_state(model, optimizer)),
        "many_growth_bytes_per_save": round(slope),
        # A leak is in every step; the allocator taking another arena is in one.
        "many_growth_bytes_per_save_median": round(statistics.median(steps) / EVERY),
        "many_growth_bytes_in_second_half": half[-1] - half[0],
        "many_resident_mib": [round(value / 2**20, 1) for value in resident[:: max(1, len(resident) // 10)]],
    }


def main() -> None:
    hidden_size, saves = [int(text) for text in sys.argv[1:]] + [608, 500][len(sys.argv) - 1 :]
    with tempfile.TemporaryDirectory(dir=os.environ.get("BENCH_DIRECTORY")) as name:
        directory = Path(name)
        rows = measure_many(directory, saves)  # first, so that all code is loaded when the large saves begin
        rows |= measure_large(directory, hidden_size)
    publish("memory", rows)


if __name__ == "__main__":
    main()
