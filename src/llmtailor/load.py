"""From a checkpoint back into live objects: weights, and optimizer state by parameter name.

    plan_load   names, shapes, types, sizes and headers of all files are checked; nothing is changed
    fill        every file is read once, several at a time: digested and put into place piece by piece

Optimizer state goes into memory of its own and becomes the optimizer's when its file's digest is right. Weights go
straight into the model: a digest that turns out wrong is of bytes that are there already, and all that can be done
is to load another checkpoint over them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .checkpoint import Checkpoint, require_optimizer
from .codecs import StoredCodes
from .errors import FormatError, IncompatibleError, TailorError
from .formats.safetensors import read_header
from .formats.tailored import LayerCodes, read_codes_header, read_packed, state_metas
from .layer_reading import CheckedFile, CodedLayer, LayerReading, PlainFile, Tensors
from .manifest import EncodingRecord, FileRecord, LayerRecord
from .model_state import ModelState, check_model
from .optimizer_check import check_state
from .optimizer_state import (
    ParameterGroup,
    load_groups,
    load_parameter_state,
    new_state_tensor,
    parameter_names,
    unwrap_optimizer,
)
from .state_keys import NOTES_KEY, split_state_key, state_key
from .storage import read_files
from .strict_json import parse_object
from .tensor_bytes import torch_dtype
from .tensors import TensorMeta
from .verify import check_layer_header, open_published

__all__ = [
    "Load",
    "load_model",
    "load_optimizers",
    "plan_load",
    "plan_model",
    "plan_optimizers",
    "say_partly_loaded",
]

_PARTLY_LOADED = (
    "the model and its optimizers were partly overwritten, their values are not to be used: load another checkpoint, "
    "or build them anew"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """A load about which everything was checked that can be without the tensors' bytes. Nothing was changed yet."""

    checkpoint: Checkpoint
    layers: tuple[LayerReading, ...]
    begin: Callable[[], None]
    """What has to be done before the first file is read."""
    live: tuple[torch.Tensor, ...]
    """What is filled in place."""

    def fill(self, on_file: Callable[[FileRecord], None] = lambda record: None) -> None:
        """Read every file and put its bytes into place.

        Args:
            on_file: Called before each file is read, for a progress bar; by one thread at a time.

        Raises:
            IntegrityError, FormatError, NotFoundError: A file changed or is gone. What is live was partly
                overwritten.
            OSError: The device failed. What is live was partly overwritten.
        """

        def begin(item: LayerReading) -> None:
            for record in item.records:
                on_file(record)

        # Before and after: whoever copies these tensors meanwhile sees that they are not what they were.
        torch.autograd.graph.increment_version(self.live)
        try:
            self.begin()
            read_files(
                self.layers,
                lambda item: sum(record.bytes for record in item.records),
                lambda item, reader: item.read(reader),
                on_begin=begin,
                on_done=lambda item, tensors: item.install(tensors),
            )
        except (TailorError, OSError) as err:
            say_partly_loaded(err)
            raise
        finally:
            torch.autograd.graph.increment_version(self.live)


def say_partly_loaded(err: Exception) -> None:
    """Have an error say that live values were overwritten before it came up; once is enough."""
    if not isinstance(err, TailorError):
        if _PARTLY_LOADED not in getattr(err, "__notes__", ()):
            err.add_note(_PARTLY_LOADED)
    elif _PARTLY_LOADED not in (err.hint or ""):
        err.hint = "; ".join(filter(None, [_PARTLY_LOADED, err.hint]))


def plan_load(checkpoint: Checkpoint, state: ModelState, optimizers: Sequence[torch.optim.Optimizer]) -> Load:
    """Check that a checkpoint can be loaded into a model and its optimizers; changes nothing.

    Raises:
        IncompleteError, IncompatibleError, FormatError, IntegrityError, NotFoundError: As ``plan_model`` and
            ``plan_optimizers``.
    """
    check_model(state, checkpoint.manifest.tensors, path=checkpoint.path)
    of_optimizers = plan_optimizers(checkpoint, state, optimizers)
    of_model = plan_model(checkpoint, state)
    return Load(
        checkpoint=checkpoint,
        layers=_join(of_model.layers, of_optimizers.layers),
        begin=of_optimizers.begin,
        live=of_model.live,
    )


def load_model(checkpoint: Checkpoint, state: ModelState) -> None:
    """Copy the weights and buffers of a checkpoint into a model, bit for bit.

    Args:
        checkpoint: Where from.
        state: The live model, as ``read_model`` gives it; its tensors are filled in place, on their devices.

    Raises:
        IncompatibleError, FormatError, IntegrityError, NotFoundError: As ``plan_model``, and ``Load.fill``, which says
            so where values were changed.
    """
    plan_model(checkpoint, state).fill()


def plan_model(checkpoint: Checkpoint, state: ModelState) -> Load:
    """Check that the weights and buffers of a checkpoint can be loaded into a model; changes nothing.

    Raises:
        IncompatibleError: Another model: names, shapes, element types or ties differ.
        FormatError: A file does not hold the tensors of its layer.
        IntegrityError, NotFoundError: A file has another size, or is gone.
    """
    manifest = checkpoint.manifest
    check_model(state, manifest.tensors, path=checkpoint.path)
    # A tensor that is missing from its file would silently keep the value the model happens to have.
    layers = [_weights_of(checkpoint, layer, state) for layer in manifest.layers]
    return Load(checkpoint=checkpoint, layers=tuple(layers), begin=lambda: None, live=tuple(state.tensors.values()))


def _join(of_model: Sequence[LayerReading], of_optimizers: Sequence[LayerReading]) -> tuple[LayerReading, ...]:
    """Every file once: weights and state of a coded layer are in one."""
    coded = {each.layer: each for each in of_optimizers if isinstance(each, CodedLayer)}
    joined: list[LayerReading] = []
    for each in of_model:
        partner = coded.pop(each.layer, None)
        if partner is None:
            joined.append(each)
        else:
            joined.append(each.join(partner) if isinstance(each, CodedLayer) else partner.join(each))
    plain = [each for each in of_optimizers if not isinstance(each, CodedLayer)]
    return (*joined, *plain, *coded.values())


def _weights_of(checkpoint: Checkpoint, layer: LayerRecord, state: ModelState) -> LayerReading:
    if layer.encoding is None:
        file = _open_file(checkpoint, layer, layer.weights)
        tensors = {name: state.tensors[name] for name in file.header.tensors}
        return PlainFile(layer=layer.name, file=file, find_targets=lambda: tensors, install=lambda tensors: None)
    codes, held = _open_codes(checkpoint, layer, layer.encoding)
    # Weights may be the rounding of masters, which are relative to those of then.
    files, packed = _open_plain(checkpoint, layer, held, has_weights=True, has_state=held.is_relative_to_state)
    wanted = {name: state.tensors[name] for name in {*files[0].header.tensors, *held.weights}}
    return CodedLayer(
        layer=layer.name,
        codes=codes,
        stored={**held.weights, **held.states},
        packed=packed,
        plain=files,
        find_targets=lambda: wanted,
        install=lambda tensors: None,
    )


def _open_plain(
    checkpoint: Checkpoint, layer: LayerRecord, codes: LayerCodes | None, *, has_weights: bool, has_state: bool
) -> tuple[tuple[CheckedFile, ...], Mapping[str, StoredCodes]]:
    """A layer's weights and optimizer file, as far as they are wanted and there, and what the latter has in pieces.

    Masters in pieces are relative to the weights file, so it is there if they are.
    """
    optimizer = _open_file(checkpoint, layer, layer.optimizer, codes) if layer.optimizer and has_state else None
    packed = {} if optimizer is None else read_packed(optimizer.path, optimizer.header)
    weights = _open_file(checkpoint, layer, layer.weights, codes) if has_weights or packed else None
    return tuple(file for file in (weights, optimizer) if file is not None), packed


def _open_file(
    checkpoint: Checkpoint, layer: LayerRecord, record: FileRecord, codes: LayerCodes | None = None
) -> CheckedFile:
    """A layer's weights or optimizer file, its header checked."""
    path = checkpoint.path / record.path
    with open_published(checkpoint.path, record) as descriptor:
        header, prefix = read_header(descriptor, path)
    check_layer_header(path, checkpoint.manifest, layer, record, header, codes)
    return CheckedFile(checkpoint=checkpoint.path, record=record, header=header, prefix=prefix)


def _open_codes(checkpoint: Checkpoint, layer: LayerRecord, encoding: EncodingRecord) -> tuple[CheckedFile, LayerCodes]:
    """A layer's codes file, and what it holds."""
    path = checkpoint.path / encoding.codes.path
    with open_published(checkpoint.path, encoding.codes) as descriptor:
        header, prefix = read_header(descriptor, path)
    codes = read_codes_header(path, header, checkpoint.manifest, layer)
    return CheckedFile(checkpoint=checkpoint.path, record=encoding.codes, header=header, prefix=prefix), codes


@dataclass(frozen=True, slots=True, kw_only=True)
class _SavedState:
    """Optimizer state of one parameter, still in its file."""

    metas: Mapping[str, TensorMeta]
    """By leaf."""
    notes: Mapping[str, Any]
    """By leaf."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _SavedLayer:
    """Optimizer state of a layer, still in its optimizer file or in codes."""

    states: Mapping[str, _SavedState]
    """By fqn."""
    read: Callable[[Callable[[], Tensors], Callable[[Tensors], None]], LayerReading]
    """With targets and what is done with them when they are filled."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Home:
    """Where the state of a parameter belongs."""

    optimizers: Sequence[torch.optim.Optimizer]
    """One, but for a parameter that several update; each has state of its own."""
    parameter: torch.Tensor
    fqn: str

    def make_tensors(self, saved: _SavedState) -> dict[str, torch.Tensor]:
        """Memory for the state, by leaf."""
        return {leaf: self._make_tensor(leaf, meta, saved.notes) for leaf, meta in saved.metas.items()}

    def _make_tensor(self, leaf: str, meta: TensorMeta, notes: Mapping[str, Any]) -> torch.Tensor:
        dtype = torch_dtype(meta.dtype)
        if leaf in notes:  # becomes a Python number
            return torch.empty(meta.shape, dtype=dtype)
        return new_state_tensor(self.optimizers[0], self.parameter, leaf, meta.shape, dtype)

    def reserve(self) -> None:
        """Have the state stand where it belongs, whatever file is done first."""
        for optimizer in self.optimizers:
            optimizer.state.setdefault(self.parameter, {})

    def take(self, tensors: Mapping[str, torch.Tensor], notes: Mapping[str, Any]) -> None:
        """Make it the state; all but the first optimizer copy the tensors."""
        for optimizer in self.optimizers:
            is_first = optimizer is self.optimizers[0]
            load_parameter_state(optimizer, self.parameter, self.fqn, tensors, notes, is_placed=is_first)


def load_optimizers(checkpoint: Checkpoint, state: ModelState, optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """Put optimizer state and hyper-parameters back, by parameter name, whatever the grouping or order is now.

    Args:
        checkpoint: Where from.
        state: The live model the optimizers work on.
        optimizers: In the order in which they were saved.

    Raises:
        IncompleteError, IncompatibleError, FormatError, IntegrityError, NotFoundError: As ``plan_optimizers``, and
            ``Load.fill``, which says so where values were changed.
    """
    plan_optimizers(checkpoint, state, optimizers).fill()


def plan_optimizers(checkpoint: Checkpoint, state: ModelState, optimizers: Sequence[torch.optim.Optimizer]) -> Load:
    """Check that the optimizer state of a checkpoint can be loaded; changes nothing.

    Raises:
        IncompleteError: The checkpoint holds weights alone.
        IncompatibleError: Number or class of the optimizers, parameters, shapes or options differ.
        FormatError: A file does not hold the state of its layer, or one that cannot be understood.
        IntegrityError, NotFoundError: A file has another size, or is gone.
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
    live = [unwrap_optimizer(optimizer) for optimizer in optimizers]
    records = [
        [ParameterGroup(parameters=group.parameters, options=group.options) for group in record.groups]
        for record in manifest.optimizers
    ]
    found = [_open_states(checkpoint, layer) for layer in manifest.layers if layer.optimizer or layer.encoding]
    saved = {fqn: each for layer in found for fqn, each in layer.states.items()}
    for optimizer, record, groups in zip(live, manifest.optimizers, records, strict=True):
        fqns = [fqn for group in groups for fqn in group.parameters]
        metas = {fqn: saved[fqn].metas if fqn in saved else {} for fqn in fqns}
        notes = {fqn: saved[fqn].notes for fqn in fqns if fqn in saved}
        try:
            check_state(optimizer, names, metas, groups, record.name, notes=notes)
        except IncompatibleError as err:
            err.path = str(checkpoint.path)
            raise
    homes = _find_homes(state, live, records)

    def begin() -> None:
        for optimizer, groups in zip(live, records, strict=True):
            load_groups(optimizer, names, groups)
        for fqn, home in homes.items():
            if fqn in saved:
                home.reserve()
            else:
                home.take({}, {})

    return Load(checkpoint=checkpoint, layers=tuple(_states_of(layer, homes) for layer in found), begin=begin, live=())


def _find_homes(
    state: ModelState, optimizers: Sequence[torch.optim.Optimizer], records: Sequence[Sequence[ParameterGroup]]
) -> dict[str, _Home]:
    owners: dict[str, list[torch.optim.Optimizer]] = defaultdict(list)
    for optimizer, groups in zip(optimizers, records, strict=True):
        for fqn in (fqn for group in groups for fqn in group.parameters):
            owners[fqn].append(optimizer)
    return {fqn: _Home(optimizers=each, parameter=state.tensors[fqn], fqn=fqn) for fqn, each in owners.items()}


def _states_of(layer: _SavedLayer, homes: Mapping[str, _Home]) -> LayerReading:
    ours = {fqn: saved for fqn, saved in layer.states.items() if fqn in homes}

    def find_targets() -> Tensors:
        made = {fqn: homes[fqn].make_tensors(saved) for fqn, saved in ours.items()}
        return {state_key(fqn, leaf): tensor for fqn, tensors in made.items() for leaf, tensor in tensors.items()}

    def install(tensors: Tensors) -> None:
        for fqn, saved in ours.items():
            homes[fqn].take({leaf: tensors[state_key(fqn, leaf)] for leaf in saved.metas}, saved.notes)

    return layer.read(find_targets, install)


def _open_states(checkpoint: Checkpoint, layer: LayerRecord) -> _SavedLayer:
    """Optimizer state of each parameter of a layer that has some, in its codes if it has those."""
    if layer.encoding is not None:
        codes, held = _open_codes(checkpoint, layer, layer.encoding)
        # Masters may be relative to weights; whether or not they are, a later save links the optimizer file.
        has_weights = any(stored.base == "rounded" for stored in held.states.values())
        files, packed = _open_plain(checkpoint, layer, held, has_weights=has_weights, has_state=True)
        metas, notes = {key: stored.meta for key, stored in held.states.items()}, held.notes
        return _SavedLayer(
            states=_by_parameter(metas, notes, checkpoint, layer, codes.path),
            read=lambda targets, install: CodedLayer(
                layer=layer.name,
                codes=codes,
                stored={**held.weights, **held.states},
                packed=packed,
                plain=files,
                find_targets=targets,
                install=install,
            ),
        )
    files, packed = _open_plain(checkpoint, layer, None, has_weights=False, has_state=True)
    file = files[-1]
    text = file.header.metadata.get(NOTES_KEY)
    of_file = parse_object(text.encode(), what="notes of an optimizer file", path=file.path) if text else {}

    def read(targets: Callable[[], Tensors], install: Callable[[Tensors], None]) -> LayerReading:
        if not packed:
            return PlainFile(layer=layer.name, file=file, find_targets=targets, install=install)
        return CodedLayer(
            layer=layer.name,
            codes=None,
            stored={},
            packed=packed,
            plain=files,
            find_targets=targets,
            install=install,
        )

    metas = state_metas(file.header, packed)
    return _SavedLayer(states=_by_parameter(metas, of_file, checkpoint, layer, file.path), read=read)


def _by_parameter(
    metas: Mapping[str, TensorMeta],
    notes: Mapping[str, Any],
    checkpoint: Checkpoint,
    layer: LayerRecord,
    path: Path,
) -> Mapping[str, _SavedState]:
    fqns = {tensor.fqn for tensor in checkpoint.manifest.tensors if tensor.layer == layer.name}
    metas_of: dict[str, dict[str, TensorMeta]] = defaultdict(dict)
    notes_of: dict[str, dict[str, Any]] = defaultdict(dict)
    for name in [*metas, *notes]:
        fqn, leaf = split_state_key(name)
        if fqn not in fqns:
            raise FormatError(
                "an optimizer file holds state of a parameter that is not of its layer",
                kind="schema",
                path=path,
                fqn=name,
            )
        if name in metas:
            metas_of[fqn][leaf] = metas[name]
        if name in notes:
            notes_of[fqn][leaf] = notes[name]
    return {
        fqn: _SavedState(metas=metas_of[fqn], notes=notes_of[fqn]) for fqn in sorted(metas_of.keys() | notes_of.keys())
    }
