"""A process that forks trainers, to be killed by the test: torch is imported once, not once for each kill.

Reads ``<strategy> <directory> <steps> <pace>`` lines; for each it forks a child that resumes the run and trains on,
saving at every step. With ``<strategy>+<rest>`` the model is wide enough for codes. At the pace "patient" it waits for
each save; "lazy" it trains on, and another thread waits, so that steps and several saves are under way at any time.
Prints the child's pid at once and ``ack <step>`` when a save is acknowledged; ``done <digest>`` at the end, the digest
being of all weights and optimizer state; ``lost <text>`` if anything raises.
"""

from __future__ import annotations

import hashlib
import os
import queue
import sys
import tempfile
import threading

import torch

from llmtailor.integrations.torch_loop import Run
from llmtailor.writer import SaveHandle

WIDTH = 40  # large enough for matrices that are captured while training goes on
WIDTH_FOR_CODES = 96
OPTIONS = {"patient": {}, "lazy": {"max_in_flight": 2, "pool_nbytes": 2**17}}


class Block(torch.nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.attn = torch.nn.Linear(width, width)
        self.mlp = torch.nn.Sequential(torch.nn.Linear(width, 48), torch.nn.Dropout(0.1), torch.nn.Linear(48, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.mlp(torch.tanh(self.attn(x)))


class Model(torch.nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed_tokens = torch.nn.Embedding(32, width)
        self.layers = torch.nn.ModuleList(Block(width) for _ in range(6))
        self.norm = torch.nn.LayerNorm(width)
        self.lm_head = torch.nn.Linear(width, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed_tokens(x)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(self.norm(x))


def say(text: str) -> None:
    os.write(1, f"{text}\n".encode())


def state_digest(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> str:
    digest = hashlib.sha256()
    for tensor in model.state_dict().values():
        digest.update(tensor.numpy().tobytes())
    for parameter in model.parameters():
        for key in ("step", "exp_avg", "exp_avg_sq"):
            digest.update(optimizer.state[parameter][key].numpy().tobytes())
    return digest.hexdigest()


def acknowledge(handles: queue.SimpleQueue[SaveHandle | None]) -> None:
    """Wait for saves, oldest first, and say so; a failed one ends the process."""
    while (handle := handles.get()) is not None:
        try:
            handle.result()
        except BaseException as err:
            say(f"lost {type(err).__name__}: {' '.join(str(err).split())}")
            os._exit(1)
        say(f"ack {handle.step}")


def train(strategy: str, directory: str, steps: int, pace: str) -> None:
    strategy, _, rest = strategy.partition("+")
    torch.manual_seed(0)
    model = Model(WIDTH_FOR_CODES if rest else WIDTH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 1000)
    run = Run(
        directory,
        model,
        optimizer,
        scheduler=scheduler,
        strategy=strategy,
        rest=rest or "skip",
        save_steps=1,
        keep=4,
        **OPTIONS[pace],
    )
    batches = run.batches(torch.utils.data.DataLoader(torch.arange(640).view(80, 8) % 32, batch_size=4, shuffle=True))
    step = run.resume()
    handles: queue.SimpleQueue[SaveHandle | None] = queue.SimpleQueue()
    watcher = threading.Thread(target=acknowledge, args=(handles,), daemon=True)
    watcher.start()
    while step < steps:
        for batch in batches:
            loss = torch.nn.functional.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
            step += 1
            handle = run.save(step)
            handles.put(handle)
            if pace == "patient":
                handle.result()
            if step == steps:
                break
    run.close()
    handles.put(None)
    watcher.join()
    say(f"done {state_digest(model, optimizer)}")


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        # What torch imports on first use is imported here, once.
        train("full", scratch, 2, "lazy")
    with tempfile.TemporaryDirectory() as scratch:
        train("parity+q8", scratch, 2, "lazy")
    for line in sys.stdin:
        strategy, directory, steps, pace = line.split()
        pid = os.fork()
        if pid == 0:
            try:
                train(strategy, directory, int(steps), pace)
            except BaseException as err:
                say(f"lost {type(err).__name__}: {' '.join(str(err).split())}")
            os._exit(0)
        say(f"pid {pid}")
        os.waitpid(pid, 0)
        say("ended")


if __name__ == "__main__":
    main()
