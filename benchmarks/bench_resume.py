"""How fast does a run resume from a cold disk, against loading the same bytes with safetensors and with torch?

A Llama of 35 layers in fp32 with AdamW, more than 1 GB. LLMTailor: ``Run.resume()`` into a new model and a new
optimizer, with every digest verified, from a full checkpoint and from a composite whose layers come from two saves.
Peers: ``load_file`` and one byte of each page read, and ``torch.load``; into new memory, nothing verified, no model. No
page of a file is in the page cache when a call begins (checked with mincore); free memory is held (``turns.py``). All
take turns.

    python benchmarks/bench_resume.py [hidden size] [repeats]
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import functools
import io
import mmap
import os
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peers
import torch
from environment import publish
from models import llama_of_35_layers
from safetensors.torch import load_file, save_file
from turns import Sample, spread, take_turns, timed

import llmtailor


def empty_cache(directory: Path) -> None:
    """Of these files alone; what is mapped or dirty would stay, so that is checked."""
    os.sync()
    for path in (path for path in directory.rglob("*") if path.is_file()):
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
        assert num_cached_pages(path) == 0, f"{path} stays in the page cache"


def num_cached_pages(path: Path) -> int:
    nbytes = path.stat().st_size
    if nbytes == 0:
        return 0
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        view = np.frombuffer(mapped, dtype=np.uint8)
        pages = np.empty(-(-nbytes // mmap.PAGESIZE), dtype=np.uint8)
        failed = ctypes.CDLL(None, use_errno=True).mincore(
            ctypes.c_void_p(view.ctypes.data), ctypes.c_size_t(nbytes), ctypes.c_void_p(pages.ctypes.data)
        )
        del view
    assert not failed, os.strerror(ctypes.get_errno())
    return int((pages & 1).sum())


def write_files(directory: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for name, strategy, steps in (("full", "full", [1]), ("composite", "parity", [1, 2])):
        with llmtailor.Run(directory / name, model, optimizer, strategy=strategy) as run:
            for step in steps:
                run.save(step).result()
    for name in ("safetensors", "torch"):
        (directory / name).mkdir()
    save_file(peers.flat_state(model, optimizer), directory / "safetensors" / "state.safetensors")
    torch.save(peers.nested_state(model, optimizer), directory / "torch" / "state.pt")


def resume(directory: Path, model: torch.nn.Module, measure: Callable[[Callable[[], object]], Sample]) -> Sample:
    """Only the call that resumes is timed; model and optimizer are there, without state."""
    new = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in new.parameters():
            parameter.zero_()
    optimizer = torch.optim.AdamW(new.parameters(), lr=1e-4)
    with llmtailor.Run(directory, new, optimizer) as run, contextlib.redirect_stderr(io.StringIO()):
        sample = measure(run.resume)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(new.parameters(), model.parameters(), strict=True))
    assert len(optimizer.state) == len(list(new.parameters()))
    return sample


def load_and_touch(path: Path) -> int:
    return sum(int(tensor.flatten().view(torch.uint8)[:: mmap.PAGESIZE].sum()) for tensor in load_file(path).values())


def measure(name: str, directory: Path, model: torch.nn.Module, *, fresh_nbytes: int) -> Sample:
    files = directory / name

    def timed_cold(call: Callable[[], object]) -> Sample:
        empty_cache(files)
        return timed(call, memory="held", fresh_nbytes=fresh_nbytes)

    if name == "safetensors":
        return timed_cold(lambda: load_and_touch(files / "state.safetensors"))
    if name == "torch":
        return timed_cold(lambda: torch.load(files / "state.pt"))
    return resume(files, model, timed_cold)


def compare(samples: dict[str, list[Sample]], nbytes: int) -> dict[str, Any]:
    rows: dict[str, Any] = {}
    medians = {name: statistics.median(each.secs for each in values) for name, values in samples.items()}
    for name, values in samples.items():
        rows |= spread(name, [each.secs for each in values])
        rows[f"{name}_gb_per_sec"] = round(nbytes / 1e9 / medians[name], 2)
        cpu_secs = statistics.median(each.cpu_secs for each in values)
        rows[f"{name}_cpu_secs_per_gb"] = round(cpu_secs / (nbytes / 1e9), 3)
    for peer in ("safetensors", "torch"):
        rows[f"full_times_faster_than_{peer}"] = round(medians[peer] / medians["full"], 2)
    rows["composite_secs_by_full"] = round(medians["composite"] / medians["full"], 3)
    return rows


def main() -> None:
    hidden_size, repeats = [int(text) for text in sys.argv[1:]] + [448, 5][len(sys.argv) - 1 :]
    model, optimizer = llama_of_35_layers(hidden_size, vocab_size=8016)
    optimizer.zero_grad()
    nbytes = peers.nbytes_of(peers.flat_state(model, optimizer))
    rows: dict[str, Any] = {"repeats": repeats, "hidden_size": hidden_size, "bytes": nbytes}
    with tempfile.TemporaryDirectory(dir=os.environ.get("BENCH_DIRECTORY")) as name:
        directory = Path(name)
        write_files(directory, model, optimizer)
        call = functools.partial(measure, directory=directory, model=model, fresh_nbytes=nbytes * 3 // 2)
        names = ("full", "composite", "safetensors", "torch")
        samples = take_turns({name: functools.partial(call, name) for name in names}, repeats)
    publish("resume", rows | compare(samples, nbytes))


if __name__ == "__main__":
    main()
