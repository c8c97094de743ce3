"""What does a merge cost, whole command, in each format, against ``cp -r`` and fsync, and against ``torch.load``?

As large as the case on which the original LLMTailor took 118 s and 8 GiB for a parity merge (`cp -r` took 1 s there,
loading one checkpoint 1.4 to 3.5 s): a Llama of 150 M parameters, 2.1 GB with ZeRO-3 on 2 ranks; here of 32 blocks, so
that 35 layers can come from 35 sources. Sources: two checkpoints of random numbers in each format; for 35 sources, 35
directories of links to them, so that all are opened and parsed while the bytes stay the same. Durable: fsync is
included on both sides. All methods take turns; the sources are not in the page cache when one begins. Peak memory is
measured once more on checkpoints of more than 3 GB.

    python benchmarks/bench_merge.py [blocks] [repeats] [blocks for memory]
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from environment import publish

import llmtailor

NUM_SOURCES = 35
FORMATS: dict[str, dict[str, Any]] = {
    "deepspeed_zero3": {"to": "deepspeed", "zero_stage": 3, "ranks": 2},
    "deepspeed_zero2": {"to": "deepspeed", "zero_stage": 2, "ranks": 2},
    "hf": {"to": "hf"},
    "dcp": {"to": "dcp", "ranks": 2},
    "tailored": {"to": "tailored"},
}


def make_checkpoint(directory: Path, blocks: int, step: int) -> None:
    """A checkpoint as the Trainer writes it in one process: bf16 weights, AdamW, random numbers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(step)
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=blocks,
        num_attention_heads=9,
        num_key_value_heads=3,
    )
    model = LlamaForCausalLM(config)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW([{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}])
    for parameter in model.parameters():
        optimizer.state[parameter] = {
            "step": torch.tensor(float(step)),
            "exp_avg": torch.randn_like(parameter),
            "exp_avg_sq": torch.rand_like(parameter),
        }
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda step: 1.0] * 2)
    model.save_pretrained(directory, max_shard_size="100GB")
    torch.save(optimizer.state_dict(), directory / "optimizer.pt")
    torch.save(schedule.state_dict(), directory / "scheduler.pt")
    state = {"global_step": step, "max_steps": 1000, "log_history": [], "epoch": 0.5, "stateful_callbacks": {}}
    (directory / "trainer_state.json").write_text(json.dumps(state))


def make_sources(root: Path, name: str, masters: Path, blocks: int) -> list[Path]:
    """Two checkpoints of a format, steps 100 and 200."""
    paths = []
    for step in (100, 200):
        path = root / name / f"checkpoint-{step}"
        path.parent.mkdir(exist_ok=True)
        llmtailor.export(masters / f"checkpoint-{step}", path, **FORMATS[name])
        paths.append(path)
    return paths


def link_copies(sources: Sequence[Path], root: Path, count: int) -> list[Path]:
    """Directories whose files are those of the sources in turn."""
    copies = []
    for number in range(count):
        copy = root / f"checkpoint-{number + 1}"
        shutil.copytree(sources[number % len(sources)], copy, copy_function=os.link)
        copies.append(copy)
    return copies


def write_recipe(path: Path, sources: Sequence[Path], blocks: int) -> Path:
    """Layers from the sources in turn, blocks and auxiliary layers alike; training goes on from the last source."""
    layers = [*(f"layers.{index}" for index in range(blocks)), "embed_tokens", "norm", "lm_head"]
    lines = [f'  "{layer}": {sources[i % len(sources)]}' for i, layer in enumerate(layers)]
    path.write_text(f"base: {sources[0]}\nstate_from: {sources[1]}\nlayers:\n" + "\n".join(lines) + "\n")
    return path


# Of this program's own pages alone: what the kernel reports to a parent counts the parent's before exec, too.
MEASURED = """
import resource, sys
from llmtailor.cli.main import app
try:
    app(sys.argv[1:])
finally:
    own = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
    print("peak", max(own, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss), file=sys.stderr)
"""
EMPTY = """
print("peak", next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def run_cli(*arguments: str | Path) -> tuple[float, int]:
    """Seconds and peak bytes of a command; of its children the largest counts."""
    start = time.perf_counter()
    finished = subprocess.run(
        [sys.executable, "-c", MEASURED, *map(str, arguments)], capture_output=True, text=True, check=False
    )
    secs = time.perf_counter() - start
    if finished.returncode:
        raise RuntimeError(finished.stderr)
    return secs, int(finished.stderr.split()[-1]) * 1024


def interpreter_nbytes() -> int:
    """Peak bytes of a Python that does nothing."""
    finished = subprocess.run([sys.executable, "-c", EMPTY], capture_output=True, text=True, check=True)
    return int(finished.stdout.split()[-1]) * 1024


def copy_and_sync(source: Path, target: Path) -> None:
    subprocess.run(["cp", "-r", str(source), str(target)], check=True)
    for path in [*target.rglob("*"), target, target.parent]:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


LOAD = """
import sys, pathlib, torch
from safetensors.torch import load_file
loaded = []
for path in sorted(pathlib.Path(sys.argv[1]).rglob("*")):
    if path.suffix in (".pt", ".bin") and path.name != "training_args.bin":
        loaded.append(torch.load(path, map_location="cpu", weights_only=False))
    elif path.suffix == ".safetensors":
        loaded.append(load_file(path))
"""


def load_with_torch(source: Path) -> float:
    """Seconds to load one checkpoint as a framework does, without the start of Python and torch."""
    code = LOAD.replace("loaded = []", "loaded = []\nimport time\nstart = time.perf_counter()") + (
        "print(time.perf_counter() - start)"
    )
    finished = subprocess.run([sys.executable, "-c", code, str(source)], capture_output=True, text=True, check=True)
    return float(finished.stdout.split()[-1])


def empty_cache(sources: Sequence[Path]) -> None:
    """Of the sources alone: programs stay in memory, as on any machine that is used."""
    os.sync()
    for path in (path for source in sources for path in source.rglob("*") if path.is_file()):
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def size_of(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def measure_format(root: Path, name: str, sources: Sequence[Path], blocks: int, repeats: int) -> dict[str, Any]:
    """Rows of one format: medians of runs that take turns."""
    out = root / "out"
    many = link_copies(sources, root / f"{name}-many", NUM_SOURCES)
    recipes = {
        "merge_2_sources": write_recipe(root / f"{name}-2.yaml", sources, blocks),
        "merge_35_sources": write_recipe(root / f"{name}-35.yaml", many, blocks),
    }
    peaks: dict[str, int] = {}

    def merge(row: str) -> float:
        secs, peaks[row] = run_cli("merge", recipes[row], out, "--quiet")
        return secs

    def copy() -> float:
        start = time.perf_counter()
        copy_and_sync(sources[1], out)
        return time.perf_counter() - start

    methods: dict[str, Callable[[], float]] = {
        "cp_and_fsync": copy,
        **{row: lambda row=row: merge(row) for row in recipes},
        "load_with_torch": lambda: load_with_torch(sources[1]),
        "plan_35_sources": lambda: run_cli("plan", recipes["merge_35_sources"], "--json")[0],
    }
    if name == "dcp":
        del methods["load_with_torch"]  # its files are not torch.save's
    secs: dict[str, list[float]] = {method: [] for method in methods}
    for _ in range(repeats):
        for method, call in methods.items():
            empty_cache(sources)
            secs[method].append(call())
            shutil.rmtree(out, ignore_errors=True)
    medians = {method: statistics.median(values) for method, values in secs.items()}
    rows: dict[str, Any] = {"bytes": size_of(sources[1])}
    for method, values in secs.items():
        rows[f"{method}_secs_median"] = round(medians[method], 3)
        rows[f"{method}_secs_min"], rows[f"{method}_secs_max"] = round(min(values), 3), round(max(values), 3)
    for row, peak in peaks.items():
        rows[f"{row}_times_faster_than_cp"] = round(medians["cp_and_fsync"] / medians[row], 2)
        if "load_with_torch" in medians:
            rows[f"{row}_times_faster_than_load"] = round(medians["load_with_torch"] / medians[row], 2)
        rows[f"{row}_peak_mib_above_interpreter"] = round((peak - interpreter_nbytes()) / 2**20, 1)
    return rows


def measure_memory(root: Path, name: str, sources: Sequence[Path], blocks: int) -> dict[str, Any]:
    out = root / "out"
    recipe = write_recipe(root / f"{name}-memory.yaml", sources, blocks)
    secs, peak = run_cli("merge", recipe, out, "--quiet")
    nbytes = size_of(out)
    shutil.rmtree(out)
    return {
        "bytes": nbytes,
        "secs": round(secs, 2),
        "peak_mib_above_interpreter": round((peak - interpreter_nbytes()) / 2**20, 1),
    }


def main() -> None:
    numbers = [int(text) for text in sys.argv[1:]] + [32, 3, 64][len(sys.argv) - 1 :]
    blocks, repeats, many_blocks = numbers
    rows: dict[str, Any] = {"repeats": repeats, "blocks": blocks}
    with tempfile.TemporaryDirectory(dir=os.environ.get("BENCH_DIRECTORY")) as directory:
        for number, size in enumerate((blocks, many_blocks)):
            masters = Path(directory) / f"masters-{number}"
            for step in (100, 200):
                make_checkpoint(masters / f"checkpoint-{step}", size, step)
            for name in FORMATS:
                root = Path(directory) / f"{name}-{number}"
                root.mkdir()
                sources = make_sources(root, name, masters, size)
                if number == 0:
                    rows[name] = measure_format(root, name, sources, size, repeats)
                else:
                    rows[name]["memory"] = measure_memory(root, name, sources, size)
                shutil.rmtree(root)
                print(name, json.dumps(rows[name], indent=2), file=sys.stderr)
            shutil.rmtree(masters)
        publish("merge", rows)


if __name__ == "__main__":
    main()
