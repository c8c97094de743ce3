"""LLMTailor behind the same calls as its peers."""

from __future__ import annotations

import itertools
import shutil
import threading
from pathlib import Path
from typing import Any

import torch

import llmtailor


class Tailored:
    """A run whose saves take turns with those of others; a save's directory is removed in ``clean``.

    ``options`` are those of ``llmtailor.Run``.
    """

    def __init__(self, root: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer, **options: Any) -> None:
        self._root = root
        # It removes what may go itself, and a little later than it says that a save is done.
        self._has_retention = "keep" in options
        self._run = llmtailor.Run(root, model, optimizer, **options)
        self._steps = itertools.count(1)
        self._done = threading.Event()
        self.handle: Any = None
        self.all_stats: list[Any] = []
        """Of each save that was cleaned up, what the run itself says that it cost."""

    def save(self) -> None:
        self._done.clear()
        self.handle = self._run.save(next(self._steps))
        threading.Thread(target=self._wait).start()

    def _wait(self) -> None:
        try:
            self.handle.result()
        finally:
            self._done.set()

    def before_update(self) -> None:
        """Nothing: the run holds back the optimizer's step itself."""

    def is_done(self) -> bool:
        return self._done.is_set()

    def wait(self) -> None:
        if self.handle is not None:
            self.handle.result()

    def save_durably(self) -> None:
        self.handle = self._run.save(next(self._steps))
        self.handle.result()

    def clean(self) -> None:
        self.wait()
        if self.handle is not None:
            self.all_stats.append(self.handle.stats)
            self.handle = None
        if not self._has_retention:
            self._remove_all()

    def close(self) -> None:
        self.clean()
        self._run.close()
        self._remove_all()

    def _remove_all(self) -> None:
        for path in self._root.glob("checkpoint-*"):
            shutil.rmtree(path)
