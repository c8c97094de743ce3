"""The state of a training as layers and images of their files, at every save; read anew only where it changed.

Most saves find the same tensors as the one before, with other values. What follows from names, types and shapes (the
schema, the layouts, the headers) is then the same, and takes most of the time that a save holds training up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from .layers import Layer, file_stem
from .manifest import GroupRecord, OptimizerRecord, TensorRecord
from .model_state import ModelReader, ModelState
from .optimizer_state import (
    ParameterNames,
    ParameterState,
    StateReader,
    optimizer_class,
    parameter_names,
    read_groups,
    unwrap_optimizer,
)
from .state_keys import state_key
from .writer import LayerImage, find_masters, optimizer_image, weights_image

__all__ = ["LiveLayers", "LiveReader"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveLayers:
    """What there is to save."""

    tensors: tuple[TensorRecord, ...]
    optimizers: tuple[OptimizerRecord, ...]
    layers: tuple[Layer, ...]
    """Those that have a tensor to save, in model order."""
    images: Mapping[str, LayerImage]
    """By layer; of live tensors, not held."""


class LiveReader:
    """Reads one training again and again.

    Args:
        split_experts: As in ``layers.map_module``.
        overrides: As in ``layers.map_module``.
    """

    def __init__(self, *, split_experts: bool = False, overrides: Mapping[str, Sequence[str]] | None = None) -> None:
        self._model = ModelReader(split_experts=split_experts, overrides=overrides)
        self._optimizers: list[StateReader] = []
        self._state: ModelState | None = None
        self._images: dict[str, tuple[list[ParameterState], LayerImage]] = {}

    def read_model(self, module: torch.nn.Module) -> ModelState:
        """The model: its layers, schema and live tensors."""
        return self._model.read(module)

    def read(self, module: torch.nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> LiveLayers:
        """All that is to be saved.

        Args:
            module: The bare model.
            optimizers: Its optimizers; none to save weights alone.

        Raises:
            UnsupportedError, IncompatibleError: Some state cannot be saved.
        """
        state = self.read_model(module)
        names = parameter_names(state.parameters())
        readers = self._readers([unwrap_optimizer(optimizer) for optimizer in optimizers])
        states = {fqn: each for reader in readers for fqn, each in reader.read(names).items()}
        layers = tuple(layer for layer in state.layers if any(fqn in state.tensors for fqn in layer.fqns))
        if state is not self._state:
            self._state, self._images = state, {}
        return LiveLayers(
            tensors=state.records,
            optimizers=tuple(_record_optimizer(reader.optimizer, names) for reader in readers),
            layers=layers,
            images={layer.name: self._image(layer, state, states) for layer in layers},
        )

    def _readers(self, optimizers: Sequence[torch.optim.Optimizer]) -> list[StateReader]:
        known = {id(reader.optimizer): reader for reader in self._optimizers}
        self._optimizers = [known.get(id(optimizer)) or StateReader(optimizer) for optimizer in optimizers]
        return self._optimizers

    def _image(self, layer: Layer, state: ModelState, states: Mapping[str, ParameterState]) -> LayerImage:
        fqns = [fqn for fqn in layer.fqns if fqn in state.tensors]
        found = [states[fqn] for fqn in fqns if fqn in states]
        known = self._images.get(layer.name)
        if known is not None and len(known[0]) == len(found) and all(map(_is, known[0], found)):
            return known[1]
        image = _plan_image(layer, state, {fqn: states[fqn] for fqn in fqns if fqn in states})
        self._images[layer.name] = found, image
        return image


def _is(one: object, other: object) -> bool:
    return one is other


def _plan_image(layer: Layer, state: ModelState, states: Mapping[str, ParameterState]) -> LayerImage:
    tensors = {state_key(fqn, leaf): value for fqn, each in states.items() for leaf, value in each.tensors.items()}
    notes = {state_key(fqn, leaf): note for fqn, each in states.items() for leaf, note in each.notes.items()}
    stem = file_stem(layer)
    weights = weights_image(stem, {fqn: state.tensors[fqn] for fqn in layer.fqns if fqn in state.tensors})
    optimizer = optimizer_image(stem, tensors, notes)
    masters = find_masters(weights, optimizer)
    return LayerImage(layer=layer.name, weights=weights, optimizer=optimizer, masters=masters)


def _record_optimizer(optimizer: torch.optim.Optimizer, names: ParameterNames) -> OptimizerRecord:
    groups = tuple(
        GroupRecord(parameters=group.parameters, options=dict(group.options)) for group in read_groups(optimizer, names)
    )
    return OptimizerRecord.model_validate({"class": optimizer_class(optimizer), "groups": groups})
