"""A process that forks short lives of trainings, each of which ends in its own way: torch is imported once.

Reads ``<life> <directory>`` lines. For each it forks a child that plays the life and then ends as a script does, at
its last line or by an exception, with all that an interpreter does at its end. Its output goes to
``<directory>/output``; ``ended <status>`` is printed when it is over.
"""

from __future__ import annotations

import errno
import gc
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from llmtailor.checkpointer import Checkpointer
from llmtailor.storage import LocalFileSystem
from writer.trainings import Training

# What a script has at its top level lives until the interpreter ends.
TOP_LEVEL: list[Any] = []


class Disk(LocalFileSystem):
    """Slow, so that a save is in flight when its process ends; and full from then on, if told to."""

    def __init__(self, *, secs: float = 0.02, fails: BaseException | None = None) -> None:
        self.secs = secs
        self.fails = fails

    def write_at(self, descriptor: int, buffer: memoryview, offset: int) -> None:
        time.sleep(self.secs)
        if self.fails is not None:
            raise self.fails
        super().write_at(descriptor, buffer, offset)


FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def begin(directory: Path, **disk: Any) -> Training:
    """A training with one checkpoint published and another in flight."""
    filesystem = Disk(secs=0)
    training = Training(directory=directory / "run", options={"filesystem": filesystem})
    training.train()
    training.save().result()
    filesystem.__init__(**disk)  # type: ignore[misc]
    training.train()
    training.save()
    return training


def returns(directory: Path) -> None:
    TOP_LEVEL.append(begin(directory))


def returns_from_a_function(directory: Path) -> None:
    begin(directory)


def raises(directory: Path) -> None:
    TOP_LEVEL.append(begin(directory))
    raise ValueError("in the training loop")


def raises_in_a_function(directory: Path) -> None:
    training = begin(directory)
    raise ValueError(f"in step {training.step}")


def exits(directory: Path) -> None:
    TOP_LEVEL.append(begin(directory))
    sys.exit(3)


def save_fails(directory: Path) -> None:
    TOP_LEVEL.append(begin(directory, fails=FULL))


def save_fails_in_a_function(directory: Path) -> None:
    begin(directory, fails=FULL)


def save_fails_for_a_fault_of_ours(directory: Path) -> None:
    TOP_LEVEL.append(begin(directory, fails=ZeroDivisionError("a bug")))


def save_fails_after_two_were_told(directory: Path) -> None:
    """Somebody knows; closing says it again."""
    TOP_LEVEL.append(begin(directory, fails=FULL))
    TOP_LEVEL[0].checkpointer.drain()
    TOP_LEVEL[0].checkpointer.collect()


def interrupted(directory: Path) -> None:
    TOP_LEVEL.append(begin(directory))
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(10)


def forgotten_in_a_cycle(directory: Path) -> None:
    """As a Trainer and its callbacks: only the collector finds it."""
    training = begin(directory)
    training.itself = training  # type: ignore[attr-defined]
    del training
    gc.collect()
    again = Checkpointer(directory / "run")
    assert again.find() is not None
    again.close()


def forgotten_and_found_by_a_thread_of_the_engine(directory: Path) -> None:
    """The collector runs in whatever thread allocates; it must not wait for itself."""

    class CollectingDisk(Disk):
        num_collections = 3

        def write_at(self, descriptor: int, buffer: memoryview, offset: int) -> None:
            if is_forgotten.is_set() and self.num_collections:
                self.num_collections -= 1
                gc.collect()
            super().write_at(descriptor, buffer, offset)

    gc.disable()
    is_forgotten = threading.Event()
    training = Training(directory=directory / "run", options={"filesystem": CollectingDisk(secs=0)})
    training.train()
    training.save().result()
    training.train()
    training.checkpointer._tiers.run._filesystem.secs = 0.02  # type: ignore[attr-defined]
    training.save()
    training.itself = training  # type: ignore[attr-defined]
    del training
    is_forgotten.set()
    end = time.monotonic() + 20
    while time.monotonic() < end:
        try:
            again = Checkpointer(directory / "run")
        except Exception:
            time.sleep(0.05)
            continue
        assert again.find() is not None
        again.close()
        return
    sys.stderr.write("the lock was never released\n")
    os._exit(70)


def forks_in_the_middle(directory: Path) -> None:
    """A child that trains and ends as scripts do: it neither waits for saves of its parent nor ends them."""
    training = begin(directory, secs=0.1)
    TOP_LEVEL.append(training)
    pid = os.fork()
    if pid == 0:
        signal.alarm(20)
        training.train(3)
        training.checkpointer.wait_until_captured()
        assert training.checkpointer.drain(5)
        return
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0, status
    try:
        Checkpointer(directory / "run")
    except Exception as err:
        assert type(err).__name__ == "LockedError"  # noqa: PT017
    else:
        raise AssertionError("the child let go of the run")
    training.train()


def loads_data_in_other_processes(directory: Path) -> None:
    """Workers are forked and ended while saves are in flight."""
    signal.alarm(60)
    training = begin(directory)
    TOP_LEVEL.append(training)
    data = torch.utils.data.TensorDataset(torch.arange(32))
    for epoch in range(2):
        for _ in torch.utils.data.DataLoader(data, batch_size=8, num_workers=2, multiprocessing_context="fork"):
            training.train()
            training.save()
        assert epoch in (0, 1)


def collects_memory(directory: Path) -> None:
    """500 saves: memory, descriptors and threads stay where they are."""
    training = Training(directory=directory / "run", options={"keep": 2})
    seen = []
    for number in range(550):
        training.train()
        training.states.clear()
        training.handles.clear()
        training.save()
        if number % 50 == 49:
            training.checkpointer.drain()
            gc.collect()
            seen.append((memory("VmRSS"), len(os.listdir("/proc/self/fd")), threading.active_count()))
    sys.stdout.write(f"seen {seen}\n")
    training.close()
    sys.stdout.write(f"after {len(os.listdir('/proc/self/fd'))} {threading.active_count()}\n")


def saves_much_with_little(directory: Path) -> None:
    """A state of 500 MB, a pool of 64 MiB."""
    torch.set_num_threads(1)
    model = torch.nn.Sequential(*(torch.nn.Linear(2048, 1024, bias=False) for _ in range(20)))
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
    for parameter in model.parameters():
        parameter.grad = torch.ones(1).expand_as(parameter)
    optimizer.step()
    checkpointer = Checkpointer(directory / "run", pool_nbytes=64 * 2**20)
    nbytes = sum(3 * parameter.nbytes for parameter in model.parameters())
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts here
    before = memory("VmHWM")
    for step in (1, 2):
        checkpointer.save(step, model, [optimizer], lambda path: None).result()
    sys.stdout.write(f"grown {memory('VmHWM') - before} {nbytes}\n")
    checkpointer.close()


def memory(key: str) -> int:
    """Bytes, as Linux counts them. Source: Linux, Documentation/filesystems/proc.rst (status)."""
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key))


LIVES: dict[str, Callable[[Path], None]] = {
    each.__name__: each
    for each in (
        returns,
        returns_from_a_function,
        raises,
        raises_in_a_function,
        exits,
        save_fails,
        save_fails_in_a_function,
        save_fails_for_a_fault_of_ours,
        save_fails_after_two_were_told,
        interrupted,
        forgotten_in_a_cycle,
        forgotten_and_found_by_a_thread_of_the_engine,
        forks_in_the_middle,
        loads_data_in_other_processes,
        collects_memory,
        saves_much_with_little,
    )
}


def main() -> None:
    torch.set_num_threads(1)
    for line in sys.stdin:
        life, directory = line.split()
        pid = os.fork()
        if pid == 0:
            output = os.open(Path(directory) / "output", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(output, 1)
            os.dup2(output, 2)
            os.close(output)
            LIVES[life](Path(directory))
            return
        _, status = os.waitpid(pid, 0)
        os.write(1, f"ended {os.waitstatus_to_exitcode(status)}\n".encode())


if __name__ == "__main__":
    main()
