"""A training loop and a matrix loop, timed from the outside, with a saver or without.

Free memory is held before each save (``turns.py``), which favours savers that need fresh memory.
"""

from __future__ import annotations

import os
import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch
from peers import Saver
from turns import hold_memory

# Without a save, before each save, for their median.
_IDLE_STEPS = 3
_IDLE_PRODUCTS = 40


@dataclass(frozen=True, slots=True, kw_only=True)
class Iteration:
    """Of a training loop; the save comes first, as it follows the update before."""

    secs: float
    save_secs: float = 0.0
    """In the call that saves."""
    wait_secs: float = 0.0
    """From the end of backward to the optimizer's first own instruction."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What one save cost a loop."""

    stall_secs: float
    """The loop stood still."""
    lost_secs: float
    """Longer than the same iterations without a save: the stall, and what the save took away from the rest."""
    written_secs: float
    """From the call until the save was found done, at the end of an iteration."""
    iteration_secs: float
    """Without a save."""


class TrainingLoop:
    """Forward, backward, AdamW on random tokens."""

    def __init__(self, model: Any, optimizer: torch.optim.Optimizer, *, num_tokens: int) -> None:
        self._model, self._optimizer = model, optimizer
        self._tokens = torch.randint(0, model.config.vocab_size, (1, num_tokens))
        self._entered = 0.0

    def _enter(self, *args: object) -> None:
        self._entered = time.perf_counter()

    def iterate(self, saver: Saver | None = None, *, save: bool = False) -> Iteration:
        start = time.perf_counter()
        if saver is not None and save:
            saver.save()
        saved = time.perf_counter()
        self._model(input_ids=self._tokens, labels=self._tokens).loss.backward()
        done = time.perf_counter()
        if saver is not None:
            saver.before_update()
        # Registered anew each time, so that it comes after every hook by which a saver may hold the update back.
        hook = self._optimizer.register_step_pre_hook(self._enter)
        self._optimizer.step()
        hook.remove()
        self._optimizer.zero_grad()
        return Iteration(secs=time.perf_counter() - start, save_secs=saved - start, wait_secs=self._entered - done)

    def cost(self, saver: Saver, *, fresh_nbytes: int) -> Cost:
        """One save, and iterations until it is done; before it, with everything written, some without a save."""
        os.sync()
        alone = [self.iterate() for _ in range(1 + _IDLE_STEPS)][1:]
        iteration_secs = statistics.median(each.secs for each in alone)
        wait_secs = statistics.median(each.wait_secs for each in alone)
        hold_memory(fresh_nbytes)
        beside = [self.iterate(saver, save=True)]
        while not saver.is_done():
            beside.append(self.iterate(saver))
        total = sum(each.secs for each in beside)
        saver.clean()
        return Cost(
            stall_secs=sum(each.save_secs + each.wait_secs - wait_secs for each in beside),
            lost_secs=total - len(beside) * iteration_secs,
            written_secs=total,
            iteration_secs=iteration_secs,
        )


class MatrixLoop:
    """Products of matrices, all cores, nothing changed that a save reads."""

    def __init__(self, size: int) -> None:
        self._a, self._b = torch.rand(size, size), torch.rand(size, size)
        self._out = torch.empty(size, size)

    def _product_secs(self) -> float:
        start = time.perf_counter()
        torch.mm(self._a, self._b, out=self._out)
        return time.perf_counter() - start

    def cost(self, saver: Saver, *, fresh_nbytes: int) -> Cost:
        """Products while one save is in flight, against products of the moment before."""
        os.sync()
        hold_memory(fresh_nbytes)
        alone = statistics.median([self._product_secs() for _ in range(_IDLE_PRODUCTS)])
        start = time.perf_counter()
        saver.save()
        saved = time.perf_counter()
        count = 0
        while not saver.is_done():
            self._product_secs()
            count += 1
        secs = time.perf_counter() - start
        saver.clean()
        return Cost(stall_secs=saved - start, lost_secs=secs - count * alone, written_secs=secs, iteration_secs=alone)
