"""Where a plain loop is in its data, so that a resumed run sees the batches it would have seen.

A loader that keeps its own state (``state_dict``, as torchdata's ``StatefulDataLoader``) is asked for it. For any other
the epoch is replayed: the random state at its start is put back, as many batches are drawn as training had used, and
then the random state of the checkpoint is restored. Shuffling comes out the same, by the global generator or by one
that the loader or its sampler was given.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any, Generic, TypeVar

import torch

from .small_files import capture_rng, restore_host_rng, restore_rng

__all__ = ["Batches"]

BatchT = TypeVar("BatchT")


class Batches(Generic[BatchT]):
    """A loader that knows its position. Iterating is one epoch, or what is left of it after a resume.

    ``epoch`` counts the epochs begun before the current one, also those left by ``break``, so a resumed loop goes on
    with ``for epoch in range(batches.epoch, num_epochs)``.
    """

    def __init__(self, loader: Iterable[BatchT]) -> None:
        self._loader = loader
        self._is_stateful = hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict")
        self.epoch = 0
        self.num_used = 0
        """Batches of this epoch that training has taken."""
        self._epoch_rng: dict[str, Any] | None = None
        self._is_resumed = False
        self._is_under_way = False
        """An epoch was begun, and not ended."""

    def __iter__(self) -> Iterator[BatchT]:
        # A plain loader that was saved between two epochs begins the next one as it would have.
        if self._is_resumed and (self.num_used or self._is_stateful):
            batches = self._replay()
        else:
            if self._is_under_way:  # left by ``break``
                self.epoch += 1
            self.num_used = 0
            self._epoch_rng = None if self._is_stateful else capture_rng() | _capture_generators(self._loader)
            batches = iter(self._loader)
        self._is_resumed = False
        self._is_under_way = True
        for batch in batches:
            self.num_used += 1
            yield batch
        self._is_under_way = False
        self.epoch += 1
        self.num_used = 0
        self._epoch_rng = None

    def __len__(self) -> int:
        return len(self._loader)  # type: ignore[arg-type]

    def _replay(self) -> Iterator[BatchT]:
        if self.num_used == 0:
            return self._start_next_epoch()
        now = capture_rng()
        if self._epoch_rng is not None:
            # Loaders draw on the host; the devices may be others than at the save.
            restore_host_rng(self._epoch_rng)
            _restore_generators(self._loader, self._epoch_rng["generators"])
        batches = iter(self._loader)
        for _ in range(0 if self._is_stateful else self.num_used):
            next(batches, None)
        restore_rng(now)
        return batches

    def _start_next_epoch(self) -> Iterator[BatchT]:
        """After a save between two epochs; a loader with its own state may first have to end its old one."""
        now = capture_rng()
        batches = iter(self._loader)
        first = list(itertools.islice(batches, 1))
        if not first:
            restore_rng(now)
            return iter(self._loader)
        return itertools.chain(first, batches)

    def state_dict(self) -> dict[str, Any]:
        """Epoch, batches used, and what is needed to draw the rest of the epoch again."""
        state: dict[str, Any] = {"epoch": self.epoch, "num_used": self.num_used, "epoch_rng": self._epoch_rng}
        state |= _capture_generators(self._loader)
        if self._is_stateful:
            state["loader"] = self._loader.state_dict()  # type: ignore[attr-defined]
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved position; the next iteration is the rest of that epoch."""
        self.epoch, self.num_used = state["epoch"], state["num_used"]
        self._epoch_rng = state["epoch_rng"]
        self._is_resumed, self._is_under_way = True, False
        _restore_generators(self._loader, state["generators"])
        if self._is_stateful:
            self._loader.load_state_dict(state["loader"])  # type: ignore[attr-defined]


def _capture_generators(loader: Any) -> dict[str, Any]:
    return {"generators": [generator.get_state() for generator in _generators(loader)]}


def _restore_generators(loader: Any, states: list[torch.Tensor]) -> None:
    for generator, state in zip(_generators(loader), states, strict=True):
        generator.set_state(state)


def _generators(loader: Any) -> list[torch.Generator]:
    """The generators of their own that a DataLoader and its samplers draw from.

    Source: torch 2.13, utils/data/dataloader.py and sampler.py (attribute ``generator``).
    """
    batch_sampler = getattr(loader, "batch_sampler", None)
    owners = (loader, getattr(loader, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None))
    found = (getattr(owner, "generator", None) for owner in owners)
    return list(dict.fromkeys(each for each in found if isinstance(each, torch.Generator)))
