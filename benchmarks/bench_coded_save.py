"""What does a save cost when layers are written as codes, against the same save exactly?

A Llama of 35 layers in fp32 with AdamW, more than 1 GB, trained on all cores. After one exact save, every save of the
methods beside ``exact`` writes all layers as codes (a strategy that chooses none). Methods take turns; as in
``bench_stall.py``: the time training stands still, the training time lost, the time until the checkpoint is durable
beside training; and a durable save alone, with nothing beside it. Then a resume, cold, into a model that exists. At
last the highest resident memory of the process while it saves through a pool that is smaller than a save, above what it
had before the first: the pool and the codes of one layer; the most of three runs. What torch's compiler takes, once in
a process, is a row of its own.

    python benchmarks/bench_coded_save.py [hidden size] [repeats] [tokens]
"""

from __future__ import annotations

import functools
import gc
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peers
import torch
from bench_memory import forget_peak, memory_nbytes
from bench_stall import intervals
from environment import publish
from loops import Cost, TrainingLoop
from models import llama_of_35_layers
from ours import Tailored
from turns import spread, take_turns

import llmtailor
from llmtailor.codecs.encoding import KERNELS
from llmtailor.codecs.kernels import Kernels

RESTS = ("q8", "q4", "compact", "compact4")
NONE: Callable[[llmtailor.strategies.SaveContext], list[str]] = lambda context: []  # noqa: E731
POOL_NBYTES = 256 * 10**6


def make_run(
    root: Path, rest: str, model: torch.nn.Module, optimizer: torch.optim.Optimizer, **options: Any
) -> Tailored:
    if rest == "exact":
        return Tailored(root / rest, model, optimizer, keep=1, **options)
    strategy = llmtailor.strategies.Custom(NONE, max_age=10**9)
    return Tailored(
        root / rest, model, optimizer, keep=1, keep_consistent=False, strategy=strategy, rest=rest, **options
    )


def save_alone(ours: Tailored) -> float:
    """A durable save with nothing beside it."""
    os.sync()
    start = time.perf_counter()
    ours.save_durably()
    secs = time.perf_counter() - start
    ours.clean()
    return secs


def compare(costs: dict[str, list[Cost]], alone: dict[str, list[float]]) -> dict[str, Any]:
    """Rows: each method, then each as a share of the exact one."""
    rows: dict[str, Any] = {}
    for name, values in costs.items():
        rows |= spread(f"{name}_stall", [each.stall_secs for each in values], digits=4)
        rows |= spread(f"{name}_lost", [each.lost_secs for each in values])
        rows |= spread(f"{name}_written", [each.written_secs for each in values], digits=2)
        rows |= spread(f"{name}_alone", alone[name])
    for name in RESTS:
        for what in ("stall", "lost", "written", "alone"):
            coded, exact = (rows[f"{each}_{what}_secs_median"] for each in (name, "exact"))
            rows[f"{name}_{what}_share_of_exact"] = round(coded / exact, 3)
    return rows


def compiler_nbytes() -> int:
    """Memory that a process takes when it compiles kernels for the first time."""
    gc.collect()
    before = memory_nbytes("VmRSS")
    Kernels().compile([(codec, torch.float32, torch.device("cpu")) for codec in KERNELS], 2**31)
    return memory_nbytes("VmRSS") - before


def measure_memory(
    directory: Path, rest: str, model: torch.nn.Module, optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """Rows: the most memory that saves of three runs took, through a pool that is smaller than they."""
    peaks = []
    for number in range(3):
        gc.collect()
        before = memory_nbytes("VmRSS")
        ours = make_run(directory / f"memory-{number}", rest, model, optimizer, pool_nbytes=POOL_NBYTES)
        forget_peak()
        for _ in range(4):  # the first is exact
            ours.save_durably()
        peaks.append(memory_nbytes("VmHWM") - before)
        layers = llmtailor.open_checkpoint(ours.handle.result()).manifest.layers
        ours.close()
    largest = max((layer.encoding.codes.bytes for layer in layers if layer.encoding is not None), default=0)
    return {
        f"{rest}_peak_bytes_above_state": max(peaks),
        f"{rest}_largest_codes_bytes": largest,
        f"{rest}_peak_by_pool_and_largest_codes": round(max(peaks) / (POOL_NBYTES + largest), 3),
    }


def resume_secs(directory: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> float:
    """A resume from the newest checkpoint, whose files are not in the page cache (they went around it)."""
    with llmtailor.Run(directory, model, optimizer) as run:
        start = time.perf_counter()
        assert run.resume() > 0
        return time.perf_counter() - start


def main() -> None:
    hidden_size, repeats, num_tokens = [int(text) for text in sys.argv[1:]] + [448, 5, 64][len(sys.argv) - 1 :]
    model, optimizer = llama_of_35_layers(hidden_size, vocab_size=8016)
    nbytes = peers.nbytes_of(peers.flat_state(model, optimizer))
    rows: dict[str, Any] = {"repeats": repeats, "hidden_size": hidden_size, "tokens": num_tokens, "bytes": nbytes}
    rows["compiler_bytes"] = compiler_nbytes()
    training = TrainingLoop(model, optimizer, num_tokens=num_tokens)
    measure = functools.partial(training.cost, fresh_nbytes=nbytes * 3 // 2)
    with tempfile.TemporaryDirectory(dir=os.environ.get("BENCH_DIRECTORY")) as name:
        root = Path(name)
        runs = {rest: make_run(root, rest, model, optimizer) for rest in ("exact", *RESTS)}
        for ours in runs.values():
            ours.save_durably()  # the exact one that codes are relative to
            ours.clean()
            measure(ours)  # kernels are compiled, pools there
            ours.all_stats.clear()
        costs = take_turns({rest: functools.partial(measure, ours) for rest, ours in runs.items()}, repeats)
        alone = take_turns({rest: functools.partial(save_alone, ours) for rest, ours in runs.items()}, repeats)
        step_secs = statistics.median(each.iteration_secs for values in costs.values() for each in values)
        rows["step_secs_median"] = round(step_secs, 3)
        for rest, ours in runs.items():
            written = [each.written_nbytes for each in ours.all_stats]
            rows[f"{rest}_written_bytes"] = round(statistics.median(written))
            rows[f"{rest}_capture_secs_median"] = round(
                statistics.median(each.capture_secs for each in ours.all_stats), 3
            )
            ours.clean()
            ours._run.close()
        rows |= {**compare(costs, alone), **intervals(costs, step_secs)}
        for rest in runs:
            rows |= spread(f"{rest}_resume", [resume_secs(root / rest, model, optimizer) for _ in range(3)])
        for rest in runs:
            rows |= measure_memory(root, rest, model, optimizer)
    publish("coded_save", rows)


if __name__ == "__main__":
    main()
