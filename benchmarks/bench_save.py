"""How fast is a durable full save, against others' writers and against the disk itself?

A Llama of 35 layers in fp32 with AdamW, more than 2 GB in 873 tensors. Every method writes the same tensors to the same
file system and returns when they would survive a power failure: files and directories synced, for LLMTailor also
digests, manifest and rename. What a method keeps from save to save (LLMTailor's pool, DeepSpeed's buffer, the slab of
the raw write) was used by a save before. Before each: everything dirty synced, the others' files removed, free memory
in one of two conditions (``turns.py``). CPU time is that of the process, all threads; the kernel's own writeback, which
buffered writers need, is not in it.

    python benchmarks/bench_save.py [hidden size] [repeats]
"""

from __future__ import annotations

import functools
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peers
import torch
from environment import publish
from models import llama_of_35_layers
from ours import Tailored
from turns import CONDITIONS, Memory, Sample, spread, take_turns, timed

Measure = Callable[[Memory], Sample]


def measures(
    directory: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer, rows: dict[str, Any]
) -> dict[str, Measure]:
    """The peers and the disk, by name."""
    flat, nested = peers.flat_state(model, optimizer), peers.nested_state(model, optimizer)
    nbytes = peers.nbytes_of(flat)
    rows.update(bytes=nbytes, tensors=len(flat))
    writers: dict[str, Callable[[Path], object]] = {
        "safetensors": lambda target: peers.save_safetensors(flat, target),
        "torch_save": lambda target: peers.save_torch(nested, target),
        "dcp_1_thread": lambda target: peers.save_dcp(nested, target, 1),
        "dcp_2_threads": lambda target: peers.save_dcp(nested, target, 2),
        "raw_disk": peers.RawDisk(nbytes).write,
    }
    deepspeed, rows["deepspeed_fast"] = peers.find_deepspeed()
    if deepspeed is not None:
        writers["deepspeed_fast"] = lambda target: deepspeed.write(nested, target)

    def measure(write: Callable[[Path], object], memory: Memory) -> Sample:
        target = directory / "peer"
        target.mkdir()
        sample = timed(lambda: write(target), memory=memory, fresh_nbytes=nbytes * 3 // 2)
        shutil.rmtree(target)
        return sample

    return {name: functools.partial(measure, write) for name, write in writers.items()}


def compare(samples: dict[str, list[Sample]], nbytes: int) -> dict[str, Any]:
    """Rows: each method, then ours against each, by medians and by the best of each."""
    rows: dict[str, Any] = {}
    medians = {name: statistics.median(each.secs for each in values) for name, values in samples.items()}
    bests = {name: min(each.secs for each in values) for name, values in samples.items()}
    for name, values in samples.items():
        rows |= spread(name, [each.secs for each in values])
        rows[f"{name}_gb_per_sec"] = round(nbytes / 1e9 / medians[name], 2)
        cpu_secs = statistics.median(each.cpu_secs for each in values)
        rows[f"{name}_cpu_secs_per_gb"] = round(cpu_secs / (nbytes / 1e9), 3)
    for name in samples:
        if name != "llmtailor":
            rows[f"times_faster_than_{name}"] = round(medians[name] / medians["llmtailor"], 2)
            rows[f"times_faster_than_{name}_by_best"] = round(bests[name] / bests["llmtailor"], 2)
    return rows


def drop_slower_dcp(turns: dict[str, Measure], rows: dict[str, Any]) -> None:
    """Threads help DCP on some machines: only the better one takes turns."""
    secs = {name: turns[name]("held").secs for name in ("dcp_1_thread", "dcp_2_threads")}
    rows["dcp_warm_up_secs"] = {name: round(value, 3) for name, value in secs.items()}
    slower = max(secs, key=lambda name: secs[name])
    del turns[slower]
    best = min(secs, key=lambda name: secs[name])
    rows["dcp"] = best
    turns["dcp"] = turns.pop(best)


def main() -> None:
    hidden_size, repeats = [int(text) for text in sys.argv[1:]] + [608, 5][len(sys.argv) - 1 :]
    rows: dict[str, Any] = {"repeats": repeats, "hidden_size": hidden_size}
    model, optimizer = llama_of_35_layers(hidden_size, vocab_size=16032)
    with tempfile.TemporaryDirectory(dir=os.environ.get("BENCH_DIRECTORY")) as name:
        directory = Path(name)
        turns = measures(directory, model, optimizer, rows)
        ours = Tailored(directory / "run", model, optimizer)

        def measure_ours(memory: Memory) -> Sample:
            sample = timed(ours.save_durably, memory=memory, fresh_nbytes=rows["bytes"] * 3 // 2)
            ours.clean()
            return sample

        drop_slower_dcp(turns, rows)
        turns = {"llmtailor": measure_ours} | turns
        for name in turns.keys() & {"llmtailor", "deepspeed_fast", "raw_disk"}:
            turns[name]("held")
        for memory in CONDITIONS:
            samples = take_turns({name: functools.partial(turn, memory) for name, turn in turns.items()}, repeats)
            rows[f"memory_{memory}"] = compare(samples, rows["bytes"])
        ours.close()
    publish("save", rows)


if __name__ == "__main__":
    main()
