"""From a checkpoint back into live objects: weights, and optimizer state by parameter name.

Each layer file is mapped, digested and only then copied from, one layer at a time. Names, shapes and types are all
checked before anything is changed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .checkpoint import Checkpoint, require_optimizer
from .errors import FormatError, IncompatibleError
from .formats.safetensors import OpenFile
from .manifest import LayerRecord
from .model_state import ModelState, check_model
from .optimizer_check import check_state
from .optimizer_state import (
    ParameterGroup,
    load_groups,
    load_parameter_state,
    parameter_names,
    unwrap_optimizer,
)
from .state_keys import NOTES_KEY, split_state_key
from .strict_json import parse_object
from .tensor_bytes import tensor_from_bytes
from .tensors import TensorMeta
from .verify import check_weights_header, open_verified

__all__ = ["load_model", "load_optimizers"]


def load_model(checkpoint: Checkpoint, state: ModelState) -> None:
    """Copy the weights and buffers of a checkpoint into a model, bit for bit.

    Args:
        checkpoint: Where from.
        state: The live model, as ``read_model`` gives it; its tensors are filled in place, on their devices.

    Raises:
        IncompatibleError: Another model: names, shapes, element types or ties differ. Nothing was changed.
        FormatError: A file does not hold the tensors of its layer. Nothing was changed.
        IntegrityError, NotFoundError: A file changed or is gone; layers before it may have been loaded.
    """
    manifest = checkpoint.manifest
    check_model(state, manifest.tensors, path=checkpoint.path)
    for layer in manifest.layers:
        # A tensor that is missing from its file would silently keep the value the model happens to have.
        check_weights_header(checkpoint.path, manifest, layer)
    for layer in manifest.layers:
        opened = open_verified(checkpoint.path, layer.weights)
        with torch.no_grad():
            for name, stored in opened.header.tensors.items():
                state.tensors[name].copy_(tensor_from_bytes(opened.tensor_bytes(name), stored.meta))


@dataclass(frozen=True, slots=True)
class _SavedState:
    """Optimizer state of one parameter, still in its file."""

    opened: OpenFile
    names: Mapping[str, str]
    """Leaf -> name in the file."""
    notes: Mapping[str, Any]
    """By leaf."""

    def metas(self) -> dict[str, TensorMeta]:
        return {leaf: self.opened.header.tensors[name].meta for leaf, name in self.names.items()}

    def tensors(self) -> dict[str, torch.Tensor]:
        return {
            leaf: tensor_from_bytes(self.opened.tensor_bytes(name), self.opened.header.tensors[name].meta)
            for leaf, name in self.names.items()
        }


def load_optimizers(checkpoint: Checkpoint, state: ModelState, optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """Put optimizer state and hyper-parameters back, by parameter name, whatever the grouping or order is now.

    Args:
        checkpoint: Where from.
        state: The live model the optimizers work on.
        optimizers: In the order in which they were saved.

    Raises:
        IncompleteError: The checkpoint holds weights alone.
        IncompatibleError: Number or class of the optimizers, parameters, shapes or options differ. Nothing was
            changed.
        IntegrityError, NotFoundError: A file changed or is gone. Nothing was changed.
    """
    manifest = checkpoint.manifest
    require_optimizer(checkpoint)
    if len(optimizers) != len(manifest.optimizers):
        raise IncompatibleError(
            "the number of optimizers differs",
            kind="optimizer-mismatch",
            path=checkpoint.path,
            expected=f"{len(manifest.optimizers)}, as saved: {', '.join(each.name for each in manifest.optimizers)}",
            found=len(optimizers),
        )
    names = parameter_names(state.parameters())
    saved = {fqn: each for layer in manifest.layers for fqn, each in _read_layer(checkpoint, layer)}
    live = [unwrap_optimizer(optimizer) for optimizer in optimizers]
    records = [
        [ParameterGroup(parameters=group.parameters, options=group.options) for group in record.groups]
        for record in manifest.optimizers
    ]
    for optimizer, record, groups in zip(live, manifest.optimizers, records, strict=True):
        fqns = [fqn for group in groups for fqn in group.parameters]
        metas = {fqn: saved[fqn].metas() if fqn in saved else {} for fqn in fqns}
        notes = {fqn: saved[fqn].notes for fqn in fqns if fqn in saved}
        try:
            check_state(optimizer, names, metas, groups, record.name, notes=notes)
        except IncompatibleError as err:
            err.path = str(checkpoint.path)
            raise
    parameters = dict(state.parameters())
    for optimizer, groups in zip(live, records, strict=True):
        load_groups(optimizer, names, groups)
        for fqn in (fqn for group in groups for fqn in group.parameters):
            each = saved.get(fqn)
            tensors = {} if each is None else each.tensors()
            load_parameter_state(optimizer, parameters[fqn], fqn, tensors, {} if each is None else each.notes)


def _read_layer(checkpoint: Checkpoint, layer: LayerRecord) -> Iterator[tuple[str, _SavedState]]:
    """Optimizer state of each parameter of a layer that has some."""
    if layer.optimizer is None:
        return
    opened = open_verified(checkpoint.path, layer.optimizer)
    path = checkpoint.path / layer.optimizer.path
    fqns = {tensor.fqn for tensor in checkpoint.manifest.tensors if tensor.layer == layer.name}
    text = opened.header.metadata.get(NOTES_KEY)
    notes = parse_object(text.encode(), what="notes of an optimizer file", path=path) if text else {}
    names: dict[str, dict[str, str]] = defaultdict(dict)
    notes_of: dict[str, dict[str, Any]] = defaultdict(dict)
    for name in [*opened.header.tensors, *notes]:
        fqn, leaf = split_state_key(name)
        if fqn not in fqns:
            raise FormatError(
                "an optimizer file holds state of a parameter that is not of its layer",
                kind="schema",
                path=path,
                fqn=name,
            )
        if name in opened.header.tensors:
            names[fqn][leaf] = name
        if name in notes:
            notes_of[fqn][leaf] = notes[name]
    for fqn in sorted(names.keys() | notes_of.keys()):
        yield fqn, _SavedState(opened, names[fqn], notes_of[fqn])
