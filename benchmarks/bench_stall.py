"""How long does a save hold training up, and what does it take away from the compute beside it?

A Llama of 35 layers in fp32 with AdamW, more than 1 GB, trained on all cores. Methods take turns: some steps without a
save, then one save at the start of a step and steps until it is done. Measured from the outside:

* stall: the time in the call that saves, and the time between backward and the optimizer's own first instruction
  (a saver that still reads the state has to hold the update back);
* lost: how much longer the steps took than as many without a save, so stall and slow-down; the same for a loop of
  matrix products, in which nothing holds anything back.

``torch.save`` is called as a training script does, without fsync, so that less is asked of it than of the others; all
else is durable when it is done. DCP: called as its documentation shows, and with all that ``peers.AsyncDCP`` can add.
Every method has saved once before; free memory is held (``turns.py``). The interval in the rows is that from which on
``lost`` is less than 1 % of the training time.

    python benchmarks/bench_stall.py [hidden size] [repeats] [tokens]
"""

from __future__ import annotations

import functools
import math
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import peers
import torch
from environment import publish
from loops import Cost, MatrixLoop, TrainingLoop
from models import llama_of_35_layers
from ours import Tailored
from turns import spread, take_turns

MATRIX_SIZE = 1024


def savers(
    root: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer, rows: dict[str, Any]
) -> dict[str, peers.Saver]:
    def state() -> dict[str, Any]:
        return peers.nested_state(model, optimizer)

    methods: dict[str, peers.Saver] = {
        "llmtailor": Tailored(root / "run", model, optimizer),
        "torch_save": peers.BlockingSaver(root / "torch", lambda path: torch.save(state(), path / "state.pt")),
        "dcp_as_documented": peers.PlainAsyncDCP(root / "plain", state),
        "dcp_thread": peers.AsyncDCP(root / "thread", state, process=False, threads=2),
        "dcp_process": peers.AsyncDCP(root / "process", state, process=True, threads=2),
    }
    deepspeed, rows["deepspeed_fast"] = peers.find_deepspeed()
    if deepspeed is not None:
        methods["deepspeed_fast"] = peers.BlockingSaver(root / "deepspeed", lambda path: deepspeed.write(state(), path))
    return methods


def compare(costs: dict[str, list[Cost]]) -> dict[str, Any]:
    """Rows: each method, then ours as a share of each."""
    rows: dict[str, Any] = {}
    for name, values in costs.items():
        rows |= spread(f"{name}_stall", [each.stall_secs for each in values], digits=4)
        rows |= spread(f"{name}_lost", [each.lost_secs for each in values])
        rows[f"{name}_written_secs_median"] = round(statistics.median(each.written_secs for each in values), 2)
    for name in costs.keys() - {"llmtailor"}:
        for what in ("stall", "lost"):
            ours, theirs = (rows[f"{each}_{what}_secs_median"] for each in ("llmtailor", name))
            rows[f"{what}_share_of_{name}"] = round(ours / theirs, 3)
    return rows


def intervals(costs: dict[str, list[Cost]], step_secs: float) -> dict[str, Any]:
    """From which interval on a method costs less than 1 % of the training time."""
    rows: dict[str, Any] = {}
    for name, values in costs.items():
        lost_secs = max(0.0, statistics.median(each.lost_secs for each in values))
        rows[f"{name}_costs_1_percent_at_secs"] = round(100 * lost_secs, 1)
        rows[f"{name}_costs_1_percent_at_steps"] = max(1, math.ceil(100 * lost_secs / step_secs))
    return rows


def main() -> None:
    hidden_size, repeats, num_tokens = [int(text) for text in sys.argv[1:]] + [448, 5, 64][len(sys.argv) - 1 :]
    model, optimizer = llama_of_35_layers(hidden_size, vocab_size=8016)
    nbytes = peers.nbytes_of(peers.flat_state(model, optimizer))
    rows: dict[str, Any] = {"repeats": repeats, "hidden_size": hidden_size, "tokens": num_tokens, "bytes": nbytes}
    training, matrices = TrainingLoop(model, optimizer, num_tokens=num_tokens), MatrixLoop(MATRIX_SIZE)
    with tempfile.TemporaryDirectory(dir=os.environ.get("BENCH_DIRECTORY")) as directory:
        methods = savers(Path(directory), model, optimizer, rows)
        on_training = functools.partial(training.cost, fresh_nbytes=nbytes * 3 // 2)
        on_products = functools.partial(matrices.cost, fresh_nbytes=nbytes * 3 // 2)
        for saver in methods.values():
            on_training(saver)
        ours = methods["llmtailor"]
        assert isinstance(ours, Tailored)
        ours.all_stats.clear()
        costs = take_turns({name: functools.partial(on_training, saver) for name, saver in methods.items()}, repeats)
        step_secs = statistics.median(each.iteration_secs for values in costs.values() for each in values)
        rows["training"] = {
            "step_secs_median": round(step_secs, 3),
            **spread("llmtailor_stall_by_its_own_account", [each.stall_secs for each in ours.all_stats], digits=4),
            **compare(costs),
            **intervals(costs, step_secs),
        }
        costs = take_turns({name: functools.partial(on_products, saver) for name, saver in methods.items()}, repeats)
        rows["matrix_products"] = compare(costs)
        for saver in methods.values():
            saver.close()
    publish("stall", rows)


if __name__ == "__main__":
    main()
