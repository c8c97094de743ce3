"""How fast are codes made on a GPU, against the copy that they make smaller?

Strips of fp32 numbers on one CUDA device, every codec, fused (Triton): bytes of input by time of the device; beside
them the copy of the same bytes to pinned host memory, which binds an exact save, and the copy within the device. In
strips as long as those of a save, and in others: a launch takes the same time for any of them.
Then the whole way of a layer, a block of Llama-3.1-8B, from live tensors to codes in host memory, by the clock on the
wall, beside the copy of the layer to pinned memory; with what codes are relative to read back from the disk.

    python benchmarks/gpu_codecs.py [million elements] [repeats]
"""

from __future__ import annotations

import functools
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bench_codecs import layer_ways, make_values, strips
from environment import publish
from models import llama
from turns import spread, take_turns

from llmtailor.codecs.encoding import KERNELS
from llmtailor.codecs.kernels import Kernels
from llmtailor.codecs.stored import BLOCK_NUMEL
from llmtailor.writer.devices import Lanes, fence

OTHER_STRIPS = (2**22, 2**24, 2**25, 2**26)


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
    own = kernels.strip_numel(device)
    rows: dict[str, Any] = {"are_fused": kernels.are_fused, "strip_elements": own}
    with torch.no_grad():
        for codec in KERNELS:
            values, base = make_values(codec, numel, device)
            encode = functools.partial(encode_in_strips, kernels, codec, values, base)
            rows[f"{codec}_device_bytes"] = peak_nbytes(functools.partial(encode, own, own))
            for strip in {own, *OTHER_STRIPS}:
                name = f"{codec}_encode" if strip == own else f"{codec}_encode_{strip // 2**20}m"
                turns[name] = functools.partial(device_secs, functools.partial(encode, strip, numel))
        for turn in turns.values():
            turn()
        samples = take_turns(turns, repeats)
    nbytes = numel * 4
    for name, secs in samples.items():
        rows |= spread(name, [nbytes / 1e9 / each for each in secs], unit="gb_per_sec", digits=2)
    for name in turns.keys() - {"copy_to_pinned", "copy_on_device"}:
        for copy in ("copy_to_pinned", "copy_on_device"):
            share = rows[f"{name}_gb_per_sec_median"] / rows[f"{copy}_gb_per_sec_median"]
            rows[f"{name}_share_of_{copy}"] = round(share, 3)
    return rows


def encode_in_strips(
    kernels: Kernels, codec: str, values: torch.Tensor, base: torch.Tensor | None, strip: int, numel: int
) -> None:
    pairs = zip(strips(values, strip, numel), strips(base, strip, numel), strict=True)
    for each, of_base in pairs:
        blocks = each.view(-1, BLOCK_NUMEL)
        kernels.get(codec, blocks)(blocks, None if of_base is None else of_base.view(-1, BLOCK_NUMEL))


def peak_nbytes(call: Callable[[], object]) -> int:
    """Memory of the device that a call takes on top of what is there."""
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    return torch.cuda.max_memory_allocated() - before


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


def main() -> None:
    if not torch.cuda.is_available():
        print("skipped: torch sees no CUDA device", file=sys.stderr)
        return
    millions, repeats = [int(text) for text in sys.argv[1:]] + [256, 7][len(sys.argv) - 1 :]
    rows: dict[str, Any] = {"cuda": torch.version.cuda, "repeats": repeats}
    for measure in (functools.partial(measure_kernels, millions * 2**20), measure_layers):
        rows |= measure(repeats)
        publish("gpu_codecs", rows)  # what was measured stays, should the machine be needed elsewhere


if __name__ == "__main__":
    main()
