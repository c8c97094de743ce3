"""How fast are codes made on a GPU, against the copy that they make smaller?

Strips of fp32 numbers on one CUDA device, every codec, fused (Triton): bytes of input by time of the device; beside
them the copy of the same bytes to pinned host memory, which binds an exact save. Then saves of a Llama with AdamW while
it trains: how long training is held up, and how long the capture takes, exactly and as codes.

    python benchmarks/gpu_codecs.py [million elements] [repeats] [hidden size]
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bench_codecs import make_values, strips
from bench_coded_save import RESTS, make_run
from environment import publish
from gpu_save import TrainingLoop
from models import llama_of_35_layers
from turns import spread, take_turns

from llmtailor.codecs.encoding import KERNELS
from llmtailor.codecs.kernels import Kernels
from llmtailor.codecs.stored import BLOCK_NUMEL


def device_secs(call: Callable[[], object]) -> float:
    """Time by the device's clock."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def measure_kernels(numel: int, repeats: int) -> dict[str, Any]:
    device = torch.device("cuda")
    kernels = Kernels()
    kernels.compile([(codec, torch.float32, device) for codec in KERNELS], 2**31)
    source, pinned = torch.randn(numel, device=device), torch.empty(numel, pin_memory=True)
    turns = {"copy_to_pinned": lambda: device_secs(lambda: pinned.copy_(source, non_blocking=True))}
    for codec in KERNELS:
        values, base = (None if each is None else each.to(device) for each in make_values(codec, numel))
        strip = kernels.strip_numel(device)
        pairs = [
            (each.view(-1, BLOCK_NUMEL), None if of_base is None else of_base.view(-1, BLOCK_NUMEL))
            for each, of_base in zip(strips(values, strip, numel), strips(base, strip, numel), strict=True)
        ]
        turns[f"{codec}_encode"] = lambda codec=codec, pairs=pairs: device_secs(  # type: ignore[misc]
            lambda: [kernels.get(codec, each)(each, of_base) for each, of_base in pairs]
        )
    with torch.no_grad():
        for turn in turns.values():
            turn()
        samples = take_turns(turns, repeats)
    nbytes = numel * 4
    rows: dict[str, Any] = {"are_fused": kernels.are_fused}
    for name, secs in samples.items():
        rows |= spread(name, [nbytes / 1e9 / each for each in secs], unit="gb_per_sec", digits=2)
    for codec in KERNELS:
        share = rows[f"{codec}_encode_gb_per_sec_median"] / rows["copy_to_pinned_gb_per_sec_median"]
        rows[f"{codec}_share_of_copy"] = round(share, 3)
    return rows


def measure_saves(hidden_size: int, repeats: int) -> dict[str, Any]:
    model, optimizer = llama_of_35_layers(hidden_size, vocab_size=16032, device="cuda")
    loop = TrainingLoop(model, optimizer, num_tokens=4096)
    rows: dict[str, Any] = {"hidden_size": hidden_size}
    with tempfile.TemporaryDirectory() as directory:
        for rest in ("exact", *RESTS):
            ours = make_run(Path(directory), rest, model, optimizer)
            ours.save_durably()
            loop.cost(ours)
            ours.all_stats.clear()
            costs = [loop.cost(ours) for _ in range(repeats)]
            rows |= spread(f"{rest}_host_stall", [each.host_stall for each in costs], digits=4)
            rows |= spread(f"{rest}_lost", [each.lost for each in costs], digits=4)
            captures = [each.capture_secs for each in ours.all_stats]
            rows[f"{rest}_capture_secs_median"] = round(statistics.median(captures), 4)
            ours.close()
    return rows


def main() -> None:
    if not torch.cuda.is_available():
        print("skipped: torch sees no CUDA device", file=sys.stderr)
        return
    millions, repeats, hidden_size = [int(text) for text in sys.argv[1:]] + [256, 7, 1024][len(sys.argv) - 1 :]
    rows = {"device": torch.cuda.get_device_name(), "cuda": torch.version.cuda, "repeats": repeats}
    rows |= measure_kernels(millions * 2**20, repeats)
    publish("gpu_codecs", {**rows, **measure_saves(hidden_size, repeats)})


if __name__ == "__main__":
    main()
