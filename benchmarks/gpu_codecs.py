"""How fast are codes made on a GPU, against the copy that they make smaller?

Strips of fp32 numbers on one CUDA device, every codec, fused (Triton): bytes of input by time of the device; beside
them the copy of the same bytes to pinned host memory, which binds an exact save, and the copy within the device. Then
the whole way of a layer, from live tensors to codes in host memory, by the clock on the wall, beside the copy of the
layer to pinned memory. Then saves of a Llama with AdamW while it trains: how long training is held up, and how long the
capture takes, exactly and as codes.

    python benchmarks/gpu_codecs.py [million elements] [repeats] [hidden size]
"""

from __future__ import annotations

import functools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bench_codecs import layer_ways, make_values, strips
from bench_coded_save import RESTS, make_run
from environment import publish
from gpu_save import TrainingLoop
from models import llama, llama_of_35_layers
from turns import spread, take_turns

from llmtailor.codecs.encoding import KERNELS
from llmtailor.codecs.kernels import Kernels
from llmtailor.codecs.stored import BLOCK_NUMEL
from llmtailor.writer.devices import Lanes, fence


def device_secs(call: Callable[[], object]) -> float:
    """Time by the device's clock."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def measure_kernels(numel: int, repeats: int) -> dict[str, Any]:
    device = torch.device("cuda", torch.cuda.current_device())
    kernels = Kernels()
    kernels.compile([(codec, torch.float32, device) for codec in KERNELS], 2**31)
    source, pinned = torch.randn(numel, device=device), torch.empty(numel, pin_memory=True)
    target = torch.empty_like(source)
    turns = {
        "copy_to_pinned": lambda: device_secs(lambda: pinned.copy_(source, non_blocking=True)),
        "copy_on_device": lambda: device_secs(lambda: target.copy_(source)),
    }
    for codec in KERNELS:
        values, base = make_values(codec, numel, device)
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
        for copy in ("copy_to_pinned", "copy_on_device"):
            share = rows[f"{codec}_encode_gb_per_sec_median"] / rows[f"{copy}_gb_per_sec_median"]
            rows[f"{codec}_share_of_{copy}"] = round(share, 3)
    return rows


def wall_secs(call: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def measure_layers(repeats: int) -> dict[str, Any]:
    model, optimizer = llama(4096, vocab_size=512, num_blocks=2, device="cuda")  # blocks of Llama-3.1-8B
    lanes = Lanes()
    lanes.start(fence(model.parameters()))
    with tempfile.TemporaryDirectory() as directory:
        ways = layer_ways(Path(directory), model, optimizer, lanes)
        nbytes = ways["q8"].nbytes
        source = torch.empty(nbytes, dtype=torch.uint8, device="cuda")
        pinned = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
        turns = {name: functools.partial(wall_secs, way.encode) for name, way in ways.items()}
        turns["copy_to_pinned"] = lambda: wall_secs(lambda: pinned.copy_(source, non_blocking=True))
        samples = take_turns(turns, repeats)
    rows: dict[str, Any] = {"layer_bytes": nbytes}
    for name, secs in samples.items():
        rows |= spread(f"layer_{name}", [nbytes / 1e9 / each for each in secs], unit="gb_per_sec", digits=2)
    for name in ways:
        share = rows[f"layer_{name}_gb_per_sec_median"] / rows["layer_copy_to_pinned_gb_per_sec_median"]
        rows[f"layer_{name}_share_of_copy_to_pinned"] = round(share, 3)
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
    for measure in (
        functools.partial(measure_kernels, millions * 2**20),
        measure_layers,
        functools.partial(measure_saves, hidden_size),
    ):
        rows |= measure(repeats)
        publish("gpu_codecs", rows)  # what was measured stays, should the machine be needed elsewhere


if __name__ == "__main__":
    main()
