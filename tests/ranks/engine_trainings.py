"""Real DeepSpeed engines with our checkpoints, on several gloo ranks. One process per rank.

python engine_trainings.py begin DIRECTORY CASE...     trains each case to the end; again with saves, to STOP; then dies
python engine_trainings.py resume DIRECTORY CASE...    loads each and trains to the end
python engine_trainings.py reshard DIRECTORY CASE...   the same on another number of ranks
python engine_trainings.py stock DIRECTORY CASE...     loads what was exported, without us, and trains to the end

A case is ``zero<stage>-<strategy>-<dtype>[-accumulate]``. Rank 0 writes digests of the gathered state, by name.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import deepspeed
import deepspeed.comm.torch
import torch
import torch.distributed as dist

from llmtailor.integrations.deepspeed import install
from llmtailor.zero import read_zero
from ranks.loop_trainings import digests, report
from ranks.zero_states import Job, _build_engine, _step, assemble

STEPS = 6
SAVES = (2, 4)
STOP = 5


def build(case: str, *, seed: int = 0) -> Any:
    framework, _, dtype = case.split("-")[:3]
    config = {"gradient_accumulation_steps": 2} if "accumulate" in case else {}
    return _build_engine(Job(out="", stage=int(framework[-1]), dtype=dtype, config=config), seed=seed)


def train_step(engine: Any, step: int) -> float:
    every = engine.gradient_accumulation_steps()
    return sum(_step(engine, step * every + micro) for micro in range(every))


def gather(engine: Any) -> dict[str, str]:
    """Digests of the whole state by name, on every rank."""
    state = read_zero(engine)
    own = {name: (part.tensor.detach().clone(), part.shard) for name, part in state.parts.items()}
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, own)
    return digests(assemble(state.metas, everywhere))


def options(case: str) -> dict[str, Any]:
    return {
        "strategy": case.split("-")[1],
        "commit_timeout_secs": 60,
        "spread_layers": "zero2" in case,
        "monitor": "-full-" in case,
    }


def begin(directory: Path, case: str) -> None:
    engine, losses, truth = build(case), [], {}
    for step in range(STEPS):
        losses.append(train_step(engine, step))
        if step + 1 in SAVES:
            truth[step + 1] = gather(engine)
    report(directory / f"{case}.straight.json", {"losses": losses, "final": gather(engine)})
    report(directory / f"{case}.truth.json", truth)
    engine = build(case)
    run = install(engine, **options(case))
    assert engine.load_checkpoint(str(directory / case)) == (None, None)
    for step in range(STOP):
        train_step(engine, step)
        if step + 1 in SAVES:
            engine.save_checkpoint(str(directory / case), client_state={"step": step + 1})
    assert run.last_save is not None
    assert bool(run.metrics) == ("-full-" in case)
    run.last_save.result(60)


def resume(directory: Path, case: str, name: str) -> None:
    engine = build(case, seed=7)
    with install(engine, **options(case)):
        path, client_state = engine.load_checkpoint(str(directory / case))
        assert path is not None
        assert client_state is not None
        loaded = gather(engine)
        losses = []
        for step in range(client_state["step"], STEPS):
            losses.append(train_step(engine, step))
        final = gather(engine)
        engine.save_checkpoint(str(directory / case), tag="last", client_state={"step": STEPS})
    start = client_state["step"]
    report(directory / f"{case}.{name}.json", {"start": start, "loaded": loaded, "losses": losses, "final": final})


def load_stock(directory: Path, case: str) -> None:
    """What was exported to DeepSpeed, by DeepSpeed's own code."""
    engine = build(case, seed=7)
    path, client_state = engine.load_checkpoint(str(directory / case))
    assert path is not None
    loaded = gather(engine)
    losses = [train_step(engine, step) for step in range(client_state["step"], STEPS)]
    report(directory / f"{case}.stock.json", {"loaded": loaded, "losses": losses, "final": gather(engine)})


def main() -> None:
    verb, directory, cases = sys.argv[1], Path(sys.argv[2]), sys.argv[3:]
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # it would be compiled, see merge/
    torch.set_num_threads(1)
    deepspeed.init_distributed(dist_backend="gloo")
    for case in cases:
        if verb == "begin":
            begin(directory, case)
        elif verb == "stock":
            load_stock(directory, case)
        else:
            resume(directory, case, "resumed" if verb == "resume" else f"resharded-{dist.get_world_size()}")
    dist.barrier()
    if verb == "begin":
        os.kill(os.getpid(), signal.SIGKILL)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
