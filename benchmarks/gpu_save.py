"""What does a save cost a training loop on a GPU?

A Llama of 35 layers in fp32 with AdamW on one CUDA device, 5 GB of state. Methods take turns: steps without a save, one
save at the start of a step, steps until it is done. On the host: the time in the call that saves and between backward
and the optimizer's own first instruction. On the device, by events in the training's stream: how much longer the steps
took than as many without a save, which is what counts: within a step the host is ahead of the device. LLMTailor copies
to pinned memory in a stream of its own while forward and backward go on: what may remain is the part of the copy that
they cannot hide. ``torch.save`` is called as a training script does; DCP as in ``peers.AsyncDCP``, with pinned memory.

    python benchmarks/gpu_save.py [hidden size] [repeats] [tokens]
"""

from __future__ import annotations

import functools
import os
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peers
import torch
from environment import publish
from models import llama_of_35_layers
from ours import Tailored
from turns import spread, take_turns

IDLE_STEPS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One step of training; the save comes first."""

    save_secs: float
    wait_secs: float
    start: torch.cuda.Event
    computed: torch.cuda.Event
    """Behind the last kernel of backward."""
    end: torch.cuda.Event

    @property
    def device_secs(self) -> float:
        return self.start.elapsed_time(self.end) / 1e3

    @property
    def compute_secs(self) -> float:
        return self.start.elapsed_time(self.computed) / 1e3


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Of one save, in seconds."""

    host_stall: float
    lost: float
    """By the device's clock, over all steps until the save was done."""
    lost_in_first: float
    """The same, in the step that began with the save."""
    written: float
    step: float
    """Without a save."""
    compute: float
    """Forward and backward of a step without a save."""


class TrainingLoop:
    """Forward, backward, AdamW on random tokens; timed by events in its own stream."""

    def __init__(self, model: Any, optimizer: torch.optim.Optimizer, *, num_tokens: int) -> None:
        self._model, self._optimizer = model, optimizer
        self._tokens = torch.randint(0, model.config.vocab_size, (1, num_tokens), device="cuda")
        self._entered = 0.0

    def _enter(self, *args: object) -> None:
        self._entered = time.perf_counter()

    def step(self, saver: peers.Saver | None = None, *, save: bool = False) -> Step:
        start = _event()
        called = time.perf_counter()
        if saver is not None and save:
            saver.save()
        saved = time.perf_counter()
        self._model(input_ids=self._tokens, labels=self._tokens).loss.backward()
        computed, done = _event(), time.perf_counter()
        if saver is not None:
            saver.before_update()
        # Registered anew each time, so that it comes after every hook by which a saver may hold the update back.
        hook = self._optimizer.register_step_pre_hook(self._enter)
        self._optimizer.step()
        hook.remove()
        self._optimizer.zero_grad()
        end = _event()
        end.synchronize()  # so that steps are not queued far beyond the end of a save
        return Step(save_secs=saved - called, wait_secs=self._entered - done, start=start, computed=computed, end=end)

    def cost(self, saver: peers.Saver) -> Cost:
        os.sync()
        alone = [self.step() for _ in range(IDLE_STEPS + 1)][1:]
        step_secs = statistics.median(each.device_secs for each in alone)
        wait_secs = statistics.median(each.wait_secs for each in alone)
        began = time.perf_counter()
        beside = [self.step(saver, save=True)]
        while not saver.is_done():
            beside.append(self.step(saver))
        written_secs = time.perf_counter() - began
        saver.clean()
        return Cost(
            host_stall=sum(each.save_secs + each.wait_secs - wait_secs for each in beside),
            lost=sum(each.device_secs for each in beside) - len(beside) * step_secs,
            lost_in_first=beside[0].device_secs - step_secs,
            written=written_secs,
            step=step_secs,
            compute=statistics.median(each.compute_secs for each in alone),
        )


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def copy_secs(ours: Tailored) -> float:
    """The copy to host memory with nothing beside it: the most that a step could have to hide."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    ours.save()
    ours.handle.captured()
    secs = time.perf_counter() - start
    ours.clean()
    return secs


def savers(root: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, peers.Saver]:
    def state() -> dict[str, Any]:
        return peers.nested_state(model, optimizer)

    return {
        "llmtailor": Tailored(root / "run", model, optimizer),
        "torch_save": peers.BlockingSaver(root / "torch", lambda path: torch.save(state(), path / "state.pt")),
        "dcp_thread": peers.AsyncDCP(root / "thread", state, process=False, threads=2),
        "dcp_process": peers.AsyncDCP(root / "process", state, process=True, threads=2),
    }


def compare(costs: dict[str, list[Cost]]) -> dict[str, Any]:
    """Rows: each method, then ours as a share of each."""
    rows: dict[str, Any] = {}
    for name, values in costs.items():
        for what in ("host_stall", "lost", "lost_in_first", "written"):
            rows |= spread(f"{name}_{what}", [getattr(each, what) for each in values], digits=4)
    for name in costs.keys() - {"llmtailor"}:
        for what in ("host_stall", "lost"):
            ours, theirs = (rows[f"{each}_{what}_secs_median"] for each in ("llmtailor", name))
            rows[f"{what}_share_of_{name}"] = round(ours / theirs, 3)
    return rows


def main() -> None:
    if not torch.cuda.is_available():
        print("skipped: torch sees no CUDA device", file=sys.stderr)
        return
    hidden_size, repeats, num_tokens = [int(text) for text in sys.argv[1:]] + [1024, 5, 4096][len(sys.argv) - 1 :]
    model, optimizer = llama_of_35_layers(hidden_size, vocab_size=16032, device="cuda")
    nbytes = peers.nbytes_of(peers.flat_state(model, optimizer))
    loop = TrainingLoop(model, optimizer, num_tokens=num_tokens)
    with tempfile.TemporaryDirectory(dir=os.environ.get("BENCH_DIRECTORY")) as directory:
        methods = savers(Path(directory), model, optimizer)
        for saver in methods.values():
            loop.cost(saver)  # pools are pinned, the process started
        ours = methods["llmtailor"]
        assert isinstance(ours, Tailored)
        alone = [copy_secs(ours) for _ in range(repeats)]
        costs = take_turns({name: functools.partial(loop.cost, saver) for name, saver in methods.items()}, repeats)
        for saver in methods.values():
            saver.close()
    own = costs["llmtailor"]
    compute_secs, copied_secs = statistics.median(each.compute for each in own), statistics.median(alone)
    publish(
        "gpu_save",
        {
            "cuda": torch.version.cuda,
            "repeats": repeats,
            "hidden_size": hidden_size,
            "tokens": num_tokens,
            "bytes": nbytes,
            "step_secs_median": round(statistics.median(each.step for each in own), 4),
            "forward_backward_secs_median": round(compute_secs, 4),
            "llmtailor_copy_alone_secs_median": round(copied_secs, 4),
            "llmtailor_copy_alone_gb_per_sec": round(nbytes / 1e9 / copied_secs, 1),
            "llmtailor_copy_that_cannot_be_hidden_secs": round(max(0.0, copied_secs - compute_secs), 4),
            **compare(costs),
        },
    )


if __name__ == "__main__":
    main()
