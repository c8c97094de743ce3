"""A process that forks gloo ranks which die, or are stopped, in the middle of a save; torch is imported once.

Reads one JSON object a line and forks its ranks. Each opens the run, resumes, trains a step and saves it; trains one
more and saves that with something going wrong, while nobody trains on: a collective of a dead rank's peers would fail.
If ``goes_on`` names a file, the ranks wait for it, and train and save twice more.

    directory, framework ("fsdp" | "ddp"), size, strategy, goes_on
    victim, how ("kill" | "stop" | "mount" | "mount at open"), where ("files" | "messages" | "seconds"), at

Ranks print JSON lines: ``{"rank": 1, "event": "failed", "step": 4, "kind": "rank-late", "text": ..., "secs": ...}``.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from llmtailor import ranks as ranks_module
from llmtailor.errors import SaveFailedWarning, WriteError
from llmtailor.integrations.torch_loop import Run
from llmtailor.storage import LocalFileSystem
from llmtailor.writer import ballot as ballot_module

WIDTH = 16
SAVE_SECS = 60.0
TIMEOUT_SECS = 1.0
"""Of the save in which something goes wrong."""
GRACE_SECS = 1.0
MESSAGES = ("set", "get", "add", "delete_key")


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(23, WIDTH)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.head = torch.nn.Linear(WIDTH, 23)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return self.head(x).clone()


class Trap:
    """What goes wrong on this rank, once it is set: at the n-th operation on files, or message, from then on."""

    def __init__(self) -> None:
        self.counts = {"files": 0, "messages": 0}
        self._spring: Callable[[], None] | None = None
        self._where = ""
        self._at = 0
        self._mutex = threading.Lock()

    def set(self, where: str, at: float, spring: Callable[[], None]) -> None:
        if where == "seconds":
            threading.Timer(at, spring).start()
            return
        self._where, self._at, self._spring = where, int(at), spring

    def count(self, where: str) -> None:
        with self._mutex:
            self.counts[where] += 1
            is_here = self._spring is not None and where == self._where and self.counts[where] == self._at
        if is_here and self._spring is not None:
            self._spring()


def watch(trap: Trap) -> None:
    """Count what this rank does to files, and the messages it sends."""

    def counted(where: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            trap.count(where)
            return method(*arguments)

        return call

    for name, method in list(vars(LocalFileSystem).items()):
        if not name.startswith("_") and not isinstance(method, staticmethod):
            setattr(LocalFileSystem, name, counted("files", method))
    connect = ranks_module._connect

    class Counted:
        def __init__(self, store: Any) -> None:
            self._store = store

        def __getattr__(self, name: str) -> Any:
            method = getattr(self._store, name)
            return counted("messages", method) if name in MESSAGES else method

    ranks_module._connect = lambda store, prefix: Counted(connect(store, prefix))


def say(**fields: Any) -> None:
    os.write(1, (json.dumps({"rank": dist.get_rank(), **fields}) + "\n").encode())


def build(framework: str) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model: torch.nn.Module = Model()
    if framework == "ddp":
        model = torch.nn.parallel.DistributedDataParallel(model)
    else:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for layer in model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2, foreach=False)


def train_step(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    tokens = torch.randint(0, 23, (2, 7))
    torch.nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()).backward()
    optimizer.step()
    optimizer.zero_grad()


def save(run: Run, step: int) -> None:
    """Save, and say what becomes of it."""
    started = time.monotonic()
    try:
        handle = run.save(step)
        say(event="returned", step=step, secs=time.monotonic() - started)
        handle.result(2 * SAVE_SECS)
    except WriteError as err:
        what = {"kind": err.kind, "text": str(err)}
        say(event="failed", step=step, secs=time.monotonic() - started, **what)
    except BaseException as err:
        say(event="broken", step=step, kind=type(err).__name__, text=str(err)[:500])
    else:
        say(event="saved", step=step, secs=time.monotonic() - started)


def set_trap(trap: Trap, command: dict[str, Any], run: Run) -> None:
    ballots = run._checkpointer._ballots
    assert ballots is not None
    ballots._timeout_secs = TIMEOUT_SECS
    ballot_module._GRACE_SECS, ballot_module._VISIBLE_SECS = GRACE_SECS, GRACE_SECS / 2
    trap.counts = {"files": 0, "messages": 0}
    if dist.get_rank() != command.get("victim"):
        return
    number = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}.get(command["how"])
    if number is None:
        mount_over(Path(command["directory"]))
    else:
        trap.set(command["where"], command["at"], lambda: os.kill(os.getpid(), number))


def leave_namespace() -> None:
    """What is mounted from now on is seen by this process alone; before it has threads, for each has its own."""
    call_libc("unshare", 0x20000)
    call_libc("mount", b"none", b"/", None, (1 << 18) | (1 << 14), None)


def mount_over(directory: Path) -> None:
    """From now on this process finds another directory there, which is a run's, too."""
    other = Path(tempfile.mkdtemp(dir=directory.parent))
    (other / "_staging").mkdir()
    call_libc("mount", bytes(other), bytes(directory), None, 1 << 12, None)


def call_libc(name: str, *arguments: Any) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, name)(*arguments):
        say(event="no mounts", text=os.strerror(ctypes.get_errno()))
        os._exit(0)


def unmount(directory: Path) -> None:
    ctypes.CDLL(None).umount2(bytes(directory), 2)


def meet(rank: int, size: int, ports: tuple[int, int]) -> dist.TCPStore:
    """Rank 0 takes a free port, and tells the others through a pipe."""
    if rank:
        return dist.TCPStore("127.0.0.1", int(os.read(ports[0], 6)), size, False, timedelta(seconds=60))
    store = dist.TCPStore("127.0.0.1", 0, size, True, timedelta(seconds=60), wait_for_workers=False)
    os.write(ports[1], f"{store.port:6d}".encode() * (size - 1))
    return store


def train(command: dict[str, Any], rank: int, ports: tuple[int, int]) -> None:
    size, directory = command["size"], Path(command["directory"])
    store = meet(rank, size, ports)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    trap = Trap()
    watch(trap)
    torch.manual_seed(rank)
    if command.get("how", "").startswith("mount") and rank == command["victim"]:
        leave_namespace()
        if command["how"] == "mount at open":
            mount_over(directory)
    model, optimizer = build(command["framework"])
    try:
        run = Run(
            directory,
            model,
            optimizer,
            strategy=command.get("strategy", "parity"),
            save_steps=1,
            keep=3,
            commit_timeout_secs=SAVE_SECS,
        )
    except BaseException as err:
        say(event="refused", kind=getattr(err, "kind", ""), text=str(err))
        return
    step = run.resume()
    say(event="resumed", step=step)
    train_step(model, optimizer)
    save(run, step + 1)
    train_step(model, optimizer)
    dist.barrier()
    set_trap(trap, command, run)
    save(run, step + 2)
    if rank == command.get("victim") and run._checkpointer._ballots is not None:
        # Still alive, so it ends as others do: it may keep the store, and its peers have not heard the verdict yet.
        run._checkpointer._ballots.part()
    say(event="counted", **trap.counts)
    if goes_on := command.get("goes_on"):
        while not os.path.exists(goes_on):
            time.sleep(0.02)
        if command["how"] == "mount" and rank == command["victim"]:
            unmount(directory)
        run._checkpointer._ballots._timeout_secs = SAVE_SECS  # type: ignore[union-attr]
        for more in (3, 4):
            train_step(model, optimizer)
            save(run, step + more)
    # Without ``close``: nobody waits for the peers of the dead.


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", SaveFailedWarning)
    for line in sys.stdin:
        command = json.loads(line)
        pids = []
        ports = os.pipe()
        others, parent = os.pipe()
        for rank in range(command["size"]):
            pid = os.fork()
            if pid == 0:
                os.close(parent)
                try:
                    train(command, rank, ports)
                except BaseException as err:
                    os.write(1, (json.dumps({"rank": rank, "event": "lost", "text": repr(err)[:500]}) + "\n").encode())
                if rank == 0:  # it keeps the store, and others may still be listening
                    os.read(others, 1)
                os._exit(0)
            pids.append(pid)
        for end in (others, *ports):
            os.close(end)
        os.write(1, (json.dumps({"event": "started", "pids": pids}) + "\n").encode())
        for pid in pids[1:]:
            os.waitpid(pid, 0)
        os.close(parent)
        os.waitpid(pids[0], 0)
        os.write(1, (json.dumps({"event": "ended"}) + "\n").encode())


if __name__ == "__main__":
    main()
