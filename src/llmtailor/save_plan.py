"""What one save will write and what it will link, decided before a byte moves.

Pure but for looking at tensors' shapes: the live state, the checkpoint before, and the strategy go in; images of the
files to write, records of the files to link, and the reasons come out. ``estimate`` is this plan, printed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from .layers import Layer, file_stem
from .manifest import FileRecord, GroupRecord, LayerRecord, Manifest, OptimizerRecord, TensorRecord
from .model_state import ModelState
from .optimizer_state import (
    ParameterNames,
    ParameterState,
    layer_update_count,
    optimizer_class,
    parameter_names,
    read_groups,
    read_state,
    unwrap_optimizer,
)
from .state_keys import state_key
from .strategies import Choice, LayerStatus, SaveContext, Strategy, choose_layers
from .writer import LayerImage, WrittenLayer, optimizer_image, weights_image

__all__ = ["Contents", "SavePlan", "encode_index", "plan_save"]

Contents = Literal["full", "weights"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SavePlan:
    """One save, decided."""

    step: int
    save_index: int
    contents: Contents
    strategy: str
    """As the user would write it."""
    tensors: tuple[TensorRecord, ...]
    optimizers: tuple[OptimizerRecord, ...]
    layers: tuple[Layer, ...]
    """Those that have a tensor to save, in model order."""
    choices: tuple[Choice, ...]
    """One per layer, in the same order."""
    images: tuple[LayerImage, ...]
    """Of the layers that are written."""
    previous: Mapping[str, LayerRecord]
    """Layer -> its record in the checkpoint before, where its files can be linked."""

    @property
    def links(self) -> tuple[FileRecord, ...]:
        """Files of the layers that are not written."""
        kept = (self.previous[choice.layer] for choice in self.choices if not choice.is_saved)
        return tuple(file for layer in kept for file in layer.files)

    def record_layers(self, written: Mapping[str, WrittenLayer]) -> tuple[LayerRecord, ...]:
        """The manifest's layers, once the files are written.

        Args:
            written: Layer -> the files it was written to; exactly the layers of ``images``.
        """
        return tuple(
            self._record(layer, choice, written[layer.name])
            if choice.is_saved
            else self.previous[layer.name].model_copy(update={"reason": choice.reason})
            for layer, choice in zip(self.layers, self.choices, strict=True)
        )

    def _record(self, layer: Layer, choice: Choice, written: WrittenLayer) -> LayerRecord:
        return LayerRecord(
            name=layer.name,
            kind=layer.kind.value,
            stack=layer.stack,
            index=layer.index,
            step=self.step,
            save_index=self.save_index,
            update_count=written.update_count,
            reason=choice.reason,
            drift=None,
            weights=written.weights,
            optimizer=written.optimizer,
        )


def plan_save(
    state: ModelState,
    optimizers: Sequence[torch.optim.Optimizer],
    *,
    step: int,
    contents: Contents,
    strategy: Strategy,
    parent: Manifest | None,
    is_linkable: Callable[[FileRecord], bool],
) -> SavePlan:
    """Decide one save.

    Args:
        state: The live model.
        optimizers: The live optimizers; left out with contents "weights".
        step: Optimizer steps done.
        contents: Whether optimizer state is saved.
        strategy: Chooses among the layers; those without earlier files are written anyhow.
        parent: The checkpoint before, or None.
        is_linkable: Whether a file of the parent is still there, unharmed as far as can be seen at once.

    Raises:
        UnsupportedError: Some state cannot be saved.
        InvalidInputError: The strategy names no layer.
    """
    names = parameter_names(state.parameters())
    live = [unwrap_optimizer(optimizer) for optimizer in optimizers] if contents == "full" else []
    records = tuple(_record_optimizer(optimizer, names) for optimizer in live)
    layers = tuple(layer for layer in state.layers if any(fqn in state.tensors for fqn in layer.fqns))
    images = _plan_images(layers, state, {fqn: each for one in live for fqn, each in read_state(one, names).items()})
    previous = {} if parent is None else _find_linkable(parent, state.records, records, contents, is_linkable)
    save_index = 0 if parent is None else parent.save_index + 1
    statuses = tuple(
        LayerStatus(
            name=layer.name,
            kind=layer.kind,
            stack=layer.stack,
            index=layer.index,
            nbytes=images[layer.name].nbytes,
            saved_step=previous[layer.name].step if layer.name in previous else None,
        )
        for layer in layers
    )
    choices = choose_layers(strategy, SaveContext(step=step, save_index=save_index, layers=statuses))
    return SavePlan(
        step=step,
        save_index=save_index,
        contents=contents,
        strategy=strategy.text,
        tensors=state.records,
        optimizers=records,
        layers=layers,
        choices=choices,
        images=tuple(images[choice.layer] for choice in choices if choice.is_saved),
        previous=previous,
    )


def _record_optimizer(optimizer: torch.optim.Optimizer, names: ParameterNames) -> OptimizerRecord:
    groups = tuple(
        GroupRecord(parameters=group.parameters, options=dict(group.options)) for group in read_groups(optimizer, names)
    )
    return OptimizerRecord.model_validate({"class": optimizer_class(optimizer), "groups": groups})


def _plan_images(
    layers: Sequence[Layer], state: ModelState, states: Mapping[str, ParameterState]
) -> dict[str, LayerImage]:
    images = {}
    for layer in layers:
        fqns = [fqn for fqn in layer.fqns if fqn in state.tensors]
        of_layer = {fqn: states[fqn] for fqn in fqns if fqn in states}
        tensors = {
            state_key(fqn, leaf): value for fqn, each in of_layer.items() for leaf, value in each.tensors.items()
        }
        notes = {state_key(fqn, leaf): note for fqn, each in of_layer.items() for leaf, note in each.notes.items()}
        stem = file_stem(layer)
        images[layer.name] = LayerImage(
            layer=layer.name,
            weights=weights_image(stem, {fqn: state.tensors[fqn] for fqn in fqns}),
            optimizer=optimizer_image(stem, tensors, notes),
            update_count=layer_update_count(of_layer.values()),
        )
    return images


def _find_linkable(
    parent: Manifest,
    tensors: Sequence[TensorRecord],
    optimizers: Sequence[OptimizerRecord],
    contents: Contents,
    is_linkable: Callable[[FileRecord], bool],
) -> dict[str, LayerRecord]:
    """Layers of the parent whose files still stand for the same tensors and the same optimizers."""
    if parent.contents != contents or [each.name for each in parent.optimizers] != [each.name for each in optimizers]:
        return {}
    now, then = _schema_by_layer(tensors), _schema_by_layer(parent.tensors)
    return {
        layer.name: layer
        for layer in parent.layers
        if now.get(layer.name) == then[layer.name] and all(is_linkable(file) for file in layer.files)
    }


def _schema_by_layer(records: Sequence[TensorRecord]) -> dict[str, list[TensorRecord]]:
    schema: dict[str, list[TensorRecord]] = {}
    for record in records:
        schema.setdefault(record.layer, []).append(record)
    return schema


def encode_index(plan: SavePlan) -> str:
    """The index by which stock tools find each tensor's file, as JSON.

    Source: transformers 5.23, modeling_utils.py (save_pretrained; keys ``metadata.total_size``, ``weight_map``).
    """
    held = [record for record in plan.tensors if record.tied_to is None]
    stems = {layer.name: file_stem(layer) for layer in plan.layers}
    weight_map = {record.fqn: f"model-{stems[record.layer]}.safetensors" for record in held}
    total = sum(record.meta.nbytes for record in held)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    return json.dumps(index, indent=2) + "\n"
