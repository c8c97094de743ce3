"""Measures how layers move, without a copy of the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import numpy.typing as npt
import torch

from ..drift import LayerDrift, LayerSums, to_drift
from ..layers import Layer
from ..live_state import LiveLayers
from ..manifest import TensorRecord
from .picks import Chooser, LayerPicks, pick_entries
from .reading import Entries, Floats, Hyper, hyper_parameters, read_entries, sum_up

__all__ = ["START", "AddUp", "Look", "Monitor"]

AddUp = Callable[[npt.NDArray[np.float32]], npt.NDArray[np.float32]]
"""What all ranks pass, added up; the same on each."""


_NONE: Mapping[str, float] = MappingProxyType({})


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """The picked entries at one moment."""

    picks: Mapping[str, LayerPicks]
    """By layer."""
    entries: Mapping[str, Entries]
    """By layer: of its weights, then of its masters."""

    @property
    def weights(self) -> dict[str, Floats]:
        """By layer: all that was picked, a copy."""
        return {layer: entries.weights.copy() for layer, entries in self.entries.items()}


class Monitor:
    """Looks at a few thousand entries of each layer and remembers what they were when the layer was saved.

    Called by the training thread. On several ranks each looks at what it writes; the sums are then added up.
    """

    def __init__(self) -> None:
        self._chooser = Chooser()
        self._saved: dict[int, dict[str, Floats]] = {}
        """Step of a save -> layer -> its picked weights then."""

    def look(self, live: LiveLayers) -> Look:
        """Read the picked entries; waits for the devices that they are on."""
        records = {record.fqn: record for record in live.tensors}
        picks = {layer.name: self._pick(layer, live, records) for layer in live.layers}
        with torch.no_grad():
            together = read_entries([each for layer in picks.values() for each in layer.all])
        entries: dict[str, Entries] = {}
        at = first = 0
        for name, layer in picks.items():
            end = at + sum(each.indices.numel() for each in layer.all)
            entries[name] = together.part(slice(at, end), slice(first, first + len(layer.all)))
            at, first = end, first + len(layer.all)
        return Look(picks=picks, entries=entries)

    def _pick(self, layer: Layer, live: LiveLayers, records: Mapping[str, TensorRecord]) -> LayerPicks:
        of_layer = [records[fqn] for fqn in layer.fqns if fqn in records]
        num_entries = sum(record.meta.numel for record in of_layer if _is_parameter(record))
        return pick_entries(live.images.get(layer.name), records, max(1, num_entries), self._chooser)

    def measure(
        self,
        look: Look,
        live: LiveLayers,
        saved_steps: Mapping[str, int],
        gradients: Mapping[str, float] = _NONE,
        add_up: AddUp | None = None,
    ) -> dict[str, LayerDrift]:
        """How each layer moved since it was saved.

        Args:
            look: Now.
            live: What was looked at.
            saved_steps: Layer -> step of the save that it is compared with. A layer of which nothing is known of that
                save is compared with what it is now, then and later.
            gradients: By fqn: sum of squares of the latest gradient that is here.
            add_up: Called once on each of several ranks; None for one alone.
        """
        hyper = hyper_parameters(live.optimizers)
        own = [
            sums.values()
            for name, picks in look.picks.items()
            for sums in _sum_up(picks, look.entries[name], self._find(look, name, saved_steps), hyper, gradients)
        ]
        table = np.array(own, dtype=np.float64).reshape(len(own), -1)
        if add_up is not None:
            table = add_up(table.astype(np.float32)).astype(np.float64)
        sums = [LayerSums.of_values(row.tolist()) for row in table]
        # A parameter's master says more than its rounding.
        chosen = [
            masters if masters.trainable else weights for weights, masters in zip(sums[::2], sums[1::2], strict=True)
        ]
        return {name: to_drift(each) for name, each in zip(look.picks, chosen, strict=True)}

    def _find(self, look: Look, name: str, saved_steps: Mapping[str, int]) -> Floats:
        known = self._saved.setdefault(saved_steps.get(name, START), {})
        if name not in known or known[name].shape != look.entries[name].weights.shape:
            known[name] = look.entries[name].weights.copy()
        return known[name]

    def note_save(self, step: int, weights: Mapping[str, Floats], saved_steps: Mapping[str, int]) -> None:
        """Remember what was looked at as what is saved at a step, whichever layers that will be.

        Args:
            step: Of the save.
            weights: What was picked at it, by layer.
            saved_steps: As for ``measure``; what is older is forgotten, but for the last one, since a save that is
                compared with may be in flight and fail.
        """
        needed: dict[int, dict[str, Floats]] = {}
        for name in weights:
            at = saved_steps.get(name, START)
            known = sorted(each for each in self._saved if each <= at and name in self._saved[each])
            for each in known[-2:]:
                needed.setdefault(each, {})[name] = self._saved[each][name]
        needed[step] = dict(weights)
        self._saved = needed

    def references(self, saved_steps: Mapping[str, int]) -> dict[str, tuple[int, Floats]]:
        """Layer -> the step it is compared with, and its picked weights then; those that are known."""
        found = ((name, step, self._saved.get(step, {}).get(name)) for name, step in saved_steps.items())
        return {name: (step, values) for name, step, values in found if values is not None}

    def begin(self, references: Mapping[str, tuple[int, Floats]]) -> None:
        """Forget all but this: the training goes on from another state."""
        self._saved = {}
        for name, (step, values) in references.items():
            self._saved.setdefault(step, {})[name] = values


START = -1
"""In place of a step: the state that training began with."""


def _sum_up(
    picks: LayerPicks, entries: Entries, saved: Floats, hyper: Mapping[str, Hyper], gradients: Mapping[str, float]
) -> tuple[LayerSums, LayerSums]:
    """Of a layer's weights, and of its masters."""
    border, number = sum(each.indices.numel() for each in picks.weights), len(picks.weights)
    weights = entries.part(slice(0, border), slice(0, number))
    masters = entries.part(slice(border, None), slice(number, None))
    return (
        sum_up(picks.weights, weights, saved[:border], hyper, gradients),
        sum_up(picks.masters, masters, saved[border:], hyper, gradients),
    )


def _is_parameter(record: TensorRecord) -> bool:
    return record.kind == "parameter" and record.tied_to is None
