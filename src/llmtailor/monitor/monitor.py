"""Measures how layers move, without a copy of the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import numpy.typing as npt
import torch

from ..drift import LayerDrift, LayerSums, to_drift
from ..live_state import LiveLayers
from ..manifest import TensorRecord
from ..writer import LayerImage
from .picks import LayerPicks, ParameterPicks, pick_entries
from .reading import Entries, Floats, hyper_parameters, read_entries, sum_up

__all__ = ["START", "AddUp", "Look", "Monitor"]

AddUp = Callable[[npt.NDArray[np.float32]], npt.NDArray[np.float32]]
"""What all ranks pass, added up; the same on each."""


_NONE: Mapping[str, float] = MappingProxyType({})


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """The picked entries at one moment."""

    layers: tuple[str, ...]
    sets: tuple[tuple[ParameterPicks, ...], ...]
    """Two for each layer: its weights, its masters."""
    entries: Entries
    borders: tuple[int, ...]
    """Where in the entries each layer begins, and the end."""

    def weights_of(self, number: int) -> Floats:
        """Of a layer, by its number."""
        return self.entries.weights[self.borders[number] : self.borders[number + 1]]


class Monitor:
    """Looks at a few thousand entries of each layer and remembers what they were when the layer was saved.

    Called by the training thread. On several ranks each looks at what it writes; the sums are then added up.
    """

    def __init__(self) -> None:
        self._known: dict[str, tuple[LayerImage | None, LayerPicks]] = {}
        self._saved: dict[int, dict[str, Floats]] = {}
        """Step of a save -> layer -> its picked weights then."""

    def look(self, live: LiveLayers) -> Look:
        """Read the picked entries; waits for the devices that they are on."""
        records = {record.fqn: record for record in live.tensors}
        picks = {layer.name: self._pick(layer.name, layer.fqns, live, records) for layer in live.layers}
        self._known = {name: self._known[name] for name in picks}
        sets = tuple(each for layer in picks.values() for each in (layer.weights, layer.masters))
        parameters = [each for one in sets for each in one]
        sizes = [sum(each.indices.numel() for each in one) for one in sets]
        borders = np.cumsum([0, *(sizes[n] + sizes[n + 1] for n in range(0, len(sizes), 2))])
        with torch.no_grad():
            entries = read_entries(parameters)
        return Look(layers=tuple(picks), sets=sets, entries=entries, borders=tuple(borders.tolist()))

    def _pick(
        self, name: str, fqns: tuple[str, ...], live: LiveLayers, records: Mapping[str, TensorRecord]
    ) -> LayerPicks:
        image = live.images.get(name)
        known = self._known.get(name)
        if known is None or known[0] is not image:
            num_entries = sum(records[fqn].meta.numel for fqn in fqns if fqn in records and _is_parameter(records[fqn]))
            self._known[name] = known = image, pick_entries(image, records, max(1, num_entries))
        return known[1]

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
        saved = np.concatenate(
            [np.zeros(0, np.float32), *(self._find(look, n, saved_steps) for n in range(len(look.layers)))]
        )
        own = sum_up(look.sets, look.entries, saved, hyper_parameters(live.optimizers), gradients)
        table = np.array([each.values() for each in own], dtype=np.float64).reshape(len(own), -1)
        if add_up is not None:
            table = add_up(table.astype(np.float32)).astype(np.float64)
        sums = [LayerSums.of_values(row.tolist()) for row in table]
        # A parameter's master says more than its rounding.
        chosen = [
            masters if masters.trainable else weights for weights, masters in zip(sums[::2], sums[1::2], strict=True)
        ]
        return {name: to_drift(each) for name, each in zip(look.layers, chosen, strict=True)}

    def _find(self, look: Look, number: int, saved_steps: Mapping[str, int]) -> Floats:
        name = look.layers[number]
        now = look.weights_of(number)
        known = self._saved.setdefault(saved_steps.get(name, START), {})
        if name not in known or known[name].shape != now.shape:
            known[name] = now.copy()
        return known[name]

    def note_save(self, step: int, look: Look, saved_steps: Mapping[str, int]) -> None:
        """Remember what was looked at as what is saved at a step, whichever layers that will be.

        Args:
            step: Of the save.
            look: At it.
            saved_steps: As for ``measure``; what is older is forgotten, but for the last one, since a save that is
                compared with may be in flight and fail.
        """
        needed: dict[int, dict[str, Floats]] = {}
        for name in look.layers:
            at = saved_steps.get(name, START)
            known = sorted(each for each in self._saved if each <= at and name in self._saved[each])
            for each in known[-2:]:
                needed.setdefault(each, {})[name] = self._saved[each][name]
        needed[step] = {name: look.weights_of(number).copy() for number, name in enumerate(look.layers)}
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


def _is_parameter(record: TensorRecord) -> bool:
    return record.kind == "parameter" and record.tied_to is None
