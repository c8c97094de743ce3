"""What one save will write and what it will link, decided before a byte moves.

Pure but for looking at tensors' shapes: the live state, the checkpoint before, and the strategy go in; images of the
files to write, records of the files to link, and the reasons come out. ``estimate`` is this plan, printed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from .errors import WriteError
from .layers import Layer, file_stem
from .live_state import LiveLayers
from .manifest import FileRecord, LayerRecord, Manifest, OptimizerRecord, TensorRecord
from .strategies import Choice, LayerStatus, SaveContext, Strategy, choose_layers
from .writer import LayerImage, WrittenLayer

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
    """Of the layers that are written; held, see ``LayerImage.hold``."""
    previous: Mapping[str, LayerRecord]
    """Layer -> its record in the checkpoint before, where its files can be linked."""

    @property
    def nbytes(self) -> int:
        """Bytes of the files that are written."""
        return sum(image.nbytes for image in self.images)

    @property
    def num_files(self) -> int:
        """Files that are made, links included."""
        return sum(len(image.files) for image in self.images) + len(self.links)

    def rebase(self, parent: Manifest | None) -> SavePlan:
        """The same plan after the checkpoint that is its parent in the end.

        A save may be planned while the one before is in flight. When its turn to be committed comes, that one is
        published, or it failed: then layers which were to be linked from it are linked from the one before.

        Raises:
            WriteError: A layer that is not written is in no checkpoint.
        """
        records = {} if parent is None else {layer.name: layer for layer in parent.layers}
        kept = [choice.layer for choice in self.choices if not choice.is_saved]
        if missing := [layer for layer in kept if layer not in records]:
            raise WriteError(
                "layers of this save were to come from a save that failed",
                kind="parent-failed",
                layer=missing[0],
                expected="a checkpoint that holds it",
                found=f"none, for {len(missing)} layers",
                hint="the next save writes all layers",
            )
        return replace(self, previous={layer: records[layer] for layer in kept})

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
    live: LiveLayers,
    *,
    step: int,
    contents: Contents,
    strategy: Strategy,
    parent: Manifest | None,
    is_linkable: Callable[[FileRecord], bool],
) -> SavePlan:
    """Decide one save.

    Args:
        live: The live state.
        step: Optimizer steps done.
        contents: Whether optimizer state is saved.
        strategy: Chooses among the layers; those without earlier files are written anyhow.
        parent: The checkpoint before, or None.
        is_linkable: Whether a file of the parent is still there, unharmed as far as can be seen at once.

    Raises:
        InvalidInputError: The strategy names no layer.
    """
    previous = {} if parent is None else _find_linkable(parent, live, contents, is_linkable)
    save_index = 0 if parent is None else parent.save_index + 1
    statuses = tuple(
        LayerStatus(
            name=layer.name,
            kind=layer.kind,
            stack=layer.stack,
            index=layer.index,
            nbytes=live.images[layer.name].nbytes,
            saved_step=previous[layer.name].step if layer.name in previous else None,
        )
        for layer in live.layers
    )
    choices = choose_layers(strategy, SaveContext(step=step, save_index=save_index, layers=statuses))
    return SavePlan(
        step=step,
        save_index=save_index,
        contents=contents,
        strategy=strategy.text,
        tensors=live.tensors,
        optimizers=live.optimizers,
        layers=live.layers,
        choices=choices,
        images=tuple(live.images[choice.layer].hold() for choice in choices if choice.is_saved),
        previous=previous,
    )


def _find_linkable(
    parent: Manifest, live: LiveLayers, contents: Contents, is_linkable: Callable[[FileRecord], bool]
) -> dict[str, LayerRecord]:
    """Layers of the parent whose files still stand for the same tensors and the same optimizers."""
    if parent.contents != contents or [each.name for each in parent.optimizers] != [
        each.name for each in live.optimizers
    ]:
        return {}
    now, then = _schema_by_layer(live.tensors), _schema_by_layer(parent.tensors)
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
