"""A training loader that Lightning's Trainer asks for its position."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from .batches import Batches

__all__ = ["TrainLoader"]


class TrainLoader:
    """The training loader as the Trainer uses it, with a position that the Trainer saves and restores.

    Everything but that is the loader's own, also what is set: the Trainer gives it a ``worker_init_fn``.

    Args:
        loader: May be iterated again and again.
        on_fetch: Called for each batch of an epoch that begins anew.
        count_ahead: How many batches were fetched and not trained on yet; below 0 if the epoch is used up.

    Source: lightning 2.6, pytorch/utilities/combined_loader.py (_state_dicts, _load_state_dicts).
    """

    _OWN = frozenset({"_loader", "_batches", "_on_fetch", "_count_ahead", "_is_replayed"})

    def __init__(self, loader: Any, *, on_fetch: Callable[[], None], count_ahead: Callable[[], int]) -> None:
        self._loader = loader
        self._batches: Batches[Any] = Batches(loader)
        self._on_fetch = on_fetch
        self._count_ahead = count_ahead
        self._is_replayed = False

    def __iter__(self) -> Iterator[Any]:
        is_new, self._is_replayed = not self._is_replayed, False
        for batch in self._batches:
            if is_new:
                self._on_fetch()
            yield batch

    def __len__(self) -> int:
        return len(self._loader)

    def __getattr__(self, name: str) -> Any:
        if name in self._OWN:  # not set yet: this is a copy in the making
            raise AttributeError(name)
        return getattr(self._loader, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self._OWN:
            object.__setattr__(self, name, value)
        else:
            setattr(self._loader, name, value)

    def state_dict(self) -> dict[str, Any]:
        ahead = self._count_ahead()
        state = self._batches.state_dict()
        return {**state, "num_used": 0 if ahead < 0 else state["num_used"] - ahead}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._batches.load_state_dict(state_dict)  # and the generators that the loader has of its own
        self._is_replayed = state_dict["num_used"] > 0
        if not self._is_replayed:
            # Between two epochs there is nothing to go back to; the next one begins as any does.
            self._batches = Batches(self._loader)
