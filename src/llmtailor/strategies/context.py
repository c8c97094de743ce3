"""What a strategy is told at a save, and what it must answer."""

from __future__ import annotations

import difflib
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..drift import LayerDrift
from ..errors import InvalidInputError
from ..layers import LayerKind

__all__ = ["DEFAULT_MAX_AGE", "LayerStatus", "SaveContext", "Strategy", "check_names"]

DEFAULT_MAX_AGE = 1000
"""In optimizer steps; of strategies by which a layer may wait for ever, where the user gives no bound."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerStatus:
    """A layer as it stands before a save."""

    name: str
    kind: LayerKind
    stack: str | None
    """Name of the block's stack; None unless a block."""
    index: int | None
    """The block's number in its stack; None unless a block."""
    nbytes: int
    """What writing it costs: weights and optimizer state."""
    saved_step: int | None
    """Step at which it was last written; None if never."""
    drift: LayerDrift | None = None
    """How it moved since; None if nobody measures."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveContext:
    """A save that is about to happen."""

    step: int
    """Optimizer steps done."""
    save_index: int
    """Saves of the run before this one; 0 for the first."""
    previous_step: int | None = None
    """Step of the save before; None for the first."""
    layers: tuple[LayerStatus, ...]
    """All layers, in model order."""

    def __post_init__(self) -> None:
        late = [layer.name for layer in self.layers if layer.saved_step is not None and layer.saved_step > self.step]
        assert not late, f"saved after step {self.step}: {late}"
        assert self.previous_step is None or self.previous_step <= self.step

    def is_first(self, layer: LayerStatus) -> bool:
        """There is nothing saved of the layer that could be kept."""
        return self.save_index == 0 or layer.saved_step is None

    def age_of(self, layer: LayerStatus) -> float:
        """Steps since the layer was saved; infinite if it never was."""
        return math.inf if layer.saved_step is None else self.step - layer.saved_step


class Strategy(ABC):
    """Decides which layers are written at a save. Pure: the same context gives the same answer.

    Subclasses are frozen dataclasses.
    """

    max_age: int | None
    """A layer older than this many optimizer steps is written whatever ``select`` says; None, or a strategy without it:
    no such bound."""

    @property
    def needs_drift(self) -> bool:
        """Every layer's ``drift`` has to be measured before ``select`` is asked."""
        return False

    def must_write(self, layer: LayerStatus, context: SaveContext) -> bool:
        """Whether ``choose_layers`` writes the layer whatever ``select`` says: it was never saved, or is too old."""
        # Not by a value in this class: a dataclass would take it for the default of a ``max_age`` that has none.
        max_age: int | None = getattr(self, "max_age", None)
        return context.is_first(layer) or (max_age is not None and context.age_of(layer) > max_age)

    @abstractmethod
    def select(self, context: SaveContext) -> frozenset[str]:
        """Names of the layers to write. ``choose_layers`` adds those never written and those too old."""

    def interval(self, layers: Sequence[LayerStatus]) -> int | None:
        """Optimizer steps between two saves, where the strategy decides that too; None leaves it to the caller."""
        return None

    @property
    @abstractmethod
    def text(self) -> str:
        """Canonical text (``filter(first=2, last=2, every=5)``), which ``parse_strategy`` reads back."""


def check_names(names: Iterable[object], context: SaveContext) -> frozenset[str]:
    """The names as a set.

    Raises:
        InvalidInputError: Some are no layers of the context; names them all, and layers called nearly so.
    """
    known = [layer.name for layer in context.layers]
    chosen = list(names)
    # A function of the user's may return anything, also what has no hash.
    looked_up = frozenset(known)
    unknown = [name for name in chosen if not isinstance(name, str) or name not in looked_up]
    if unknown:
        near = difflib.get_close_matches(str(unknown[0]), known, n=3)
        raise InvalidInputError(
            f"a strategy chose what is not a layer: {', '.join(map(repr, unknown))}",
            kind="unknown-layer",
            layer=str(unknown[0]),
            expected=f"names of the {len(known)} layers",
            hint=f"did you mean {', '.join(near)}?" if near else f"layers are {', '.join(known[:5])}, ...",
        )
    return frozenset(str(name) for name in chosen)
