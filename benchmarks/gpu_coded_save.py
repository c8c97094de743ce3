"""What does a save as codes cost a training loop on a GPU, against the same save exactly?

A Llama of 8 blocks in fp32 (matrix products in TF32) with AdamW on one CUDA device, some 6 GB of state. After one exact
save, every save of the methods beside ``exact`` writes all layers as codes (a strategy that chooses none). Steps
without a save, one save at the start of a step, steps until it is done; what is measured as in ``gpu_save.py``. Also
how long the capture takes, which holds back the next update, and what was written.

    python benchmarks/gpu_coded_save.py [hidden size] [repeats] [tokens]
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import peers
import torch
from bench_coded_save import RESTS, make_run
from environment import publish
from gpu_save import TrainingLoop
from models import llama
from turns import spread


def measure(root: Path, rest: str, model: Any, optimizer: Any, loop: TrainingLoop, repeats: int) -> dict[str, Any]:
    ours = make_run(root, rest, model, optimizer)
    ours.save_durably()  # the exact one that codes are relative to
    loop.cost(ours)  # kernels are compiled, memory is pinned
    ours.all_stats.clear()
    costs = [loop.cost(ours) for _ in range(repeats)]
    rows: dict[str, Any] = {}
    for what in ("host_stall", "lost", "written"):
        rows |= spread(f"{rest}_{what}", [getattr(each, what) for each in costs], digits=4)
    rows |= spread(f"{rest}_capture", [each.capture_secs for each in ours.all_stats], digits=4)
    rows[f"{rest}_written_bytes"] = round(statistics.median(each.written_nbytes for each in ours.all_stats))
    rows[f"{rest}_step_secs_median"] = round(statistics.median(each.step for each in costs), 4)
    ours.close()
    return rows


def main() -> None:
    if not torch.cuda.is_available():
        print("skipped: torch sees no CUDA device", file=sys.stderr)
        return
    hidden_size, repeats, num_tokens = [int(text) for text in sys.argv[1:]] + [2048, 5, 4096][len(sys.argv) - 1 :]
    torch.set_float32_matmul_precision("high")
    model, optimizer = llama(hidden_size, vocab_size=16032, num_blocks=8, device="cuda")
    rows: dict[str, Any] = {
        "cuda": torch.version.cuda,
        "repeats": repeats,
        "hidden_size": hidden_size,
        "tokens": num_tokens,
        "bytes": peers.nbytes_of(peers.flat_state(model, optimizer)),
    }
    loop = TrainingLoop(model, optimizer, num_tokens=num_tokens)
    with tempfile.TemporaryDirectory(dir=os.environ.get("BENCH_DIRECTORY")) as name:
        for rest in ("exact", *RESTS):
            rows |= measure(Path(name), rest, model, optimizer, loop, repeats)
            for what in ("host_stall", "lost", "capture", "written"):
                share = rows[f"{rest}_{what}_secs_median"] / rows[f"exact_{what}_secs_median"]
                rows[f"{rest}_{what}_share_of_exact"] = round(share, 3)
            publish("gpu_coded_save", rows)  # what was measured stays, should the machine be needed elsewhere


if __name__ == "__main__":
    main()
