"""Methods that take turns: each repetition runs every one of them once, so that a noisy machine is noisy for all.

Buffered writers and loaders need fresh memory, and what that costs depends on the machine more than on them: a virtual
machine that returns free memory to its host (free page reporting) gets every page anew, at a second per GB, whenever
the last use is more than a second ago, as between two saves; a machine of one's own does not. So calls are timed under
a condition, the same for all methods:

* ``held``: the machine has touched enough free memory just before;
* ``returned``: free memory was left alone for some seconds, and what returns it has returned it.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar, get_args

import torch

SampleT = TypeVar("SampleT")
Memory = Literal["held", "returned"]
CONDITIONS: tuple[Memory, ...] = get_args(Memory)
RETURN_SECS = 3.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One timed call."""

    secs: float
    cpu_secs: float
    """Of all threads of this process, and of the children it waited for."""


def timed(call: Callable[[], object], *, memory: Memory, fresh_nbytes: int) -> Sample:
    """Time a call under a condition; ``fresh_nbytes`` is the memory it may need.

    Everything dirty is on the disk before it starts, so nobody pays for another's writes.
    """
    os.sync()
    if memory == "held":
        hold_memory(fresh_nbytes)
    else:
        time.sleep(RETURN_SECS)
    before, start = _cpu_secs(), time.perf_counter()
    call()
    secs = time.perf_counter() - start
    return Sample(secs=secs, cpu_secs=_cpu_secs() - before)


def hold_memory(nbytes: int) -> None:
    """Touch so much free memory that the next who needs some gets it at once."""
    torch.empty(nbytes, dtype=torch.uint8).fill_(1)


def take_turns(turns: Mapping[str, Callable[[], SampleT]], repeats: int) -> dict[str, list[SampleT]]:
    """Samples by method; the next repetition starts with the next method, so that each follows each in time."""
    samples: dict[str, list[SampleT]] = {name: [] for name in turns}
    names = list(turns)
    for repeat in range(repeats):
        first = repeat % len(names)
        for name in names[first:] + names[:first]:
            samples[name].append(turns[name]())
    return samples


def spread(name: str, values: Sequence[float], *, unit: str = "secs", digits: int = 3) -> dict[str, float]:
    """Rows: median, best and worst."""
    return {
        f"{name}_{unit}_median": round(statistics.median(values), digits),
        f"{name}_{unit}_min": round(min(values), digits),
        f"{name}_{unit}_max": round(max(values), digits),
    }


def _cpu_secs() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system
