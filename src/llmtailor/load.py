"""From a checkpoint back into live objects: weights, and optimizer state by parameter name.

    plan_load      names, shapes, types, sizes and headers of all files are checked; nothing is changed
    plan_targets   the same for a caller that has memory of its own
    fill           files are read once, several at a time: digested and put into place piece by piece

However many ranks saved, and however tensors are cut here (``DTensor``): each rank fills what it holds, from the files
that have something for it, and talks to no other.

Optimizer state goes into memory of its own and becomes the optimizer's when its file's digest is right. Weights go
straight into the model: a digest that turns out wrong is of bytes that are there already, and all that can be done
is to load another checkpoint over them.
"""

from __future__ import annotations

import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .checkpoint import Checkpoint, require_optimizer
from .errors import IncompatibleError, IncompleteError, TailorError
from .layer_opening import SavedState, SavedTensors, Wanted, open_states, open_weights, states_by_parameter
from .layer_reading import CodedLayer, LayerReading
from .local_parts import is_dtensor, local_part, memory_of
from .manifest import FileRecord, LayerRecord
from .model_state import ModelState, check_model
from .optimizer_check import check_state
from .optimizer_state import (
    ParameterGroup,
    load_groups,
    load_parameter_state,
    new_state_tensor,
    parameter_names,
    shared_parameter,
    unwrap_optimizer,
)
from .shards import Shard, whole_shard
from .state_keys import split_state_key, state_key
from .storage import read_files
from .tensor_bytes import meta_of, torch_dtype
from .tensor_filling import Target, Targets
from .tensors import TensorMeta

__all__ = [
    "Load",
    "SavedState",
    "Target",
    "Targets",
    "load_model",
    "load_optimizers",
    "plan_load",
    "plan_model",
    "plan_optimizers",
    "plan_targets",
    "read_saved_states",
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

        # A layer's state is in the files of several ranks, and becomes the optimizer's when all of them are read.
        unread = Counter(item.install for item in self.layers)

        def done(item: LayerReading, _: None) -> None:
            unread[item.install] -= 1
            if not unread[item.install]:
                item.install()

        # Before and after: whoever copies these tensors meanwhile sees that they are not what they were.
        torch.autograd.graph.increment_version(self.live)
        try:
            self.begin()
            read_files(
                self.layers,
                lambda item: sum(record.bytes for record in item.records),
                lambda item, reader: item.read(reader),
                on_begin=begin,
                on_done=done,
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
    check_model(state, checkpoint.manifest, path=checkpoint.path)
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
    check_model(state, manifest, path=checkpoint.path)
    layers = [each for layer in manifest.layers for each in _weights_of(checkpoint, layer, state)]
    # A DTensor and its part each count their changes.
    parts = [memory_of(tensor) for tensor in state.tensors.values() if is_dtensor(tensor)]
    return Load(checkpoint=checkpoint, layers=tuple(layers), begin=lambda: None, live=(*state.tensors.values(), *parts))


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


def _weights_of(checkpoint: Checkpoint, layer: LayerRecord, state: ModelState) -> tuple[LayerReading, ...]:
    saved = open_weights(checkpoint, layer)
    targets = {fqn: [_target_of(state.tensors[fqn])] for fqn in saved.metas}
    return saved.plan(_wanted(targets), lambda: targets, lambda: None)


def _target_of(tensor: torch.Tensor) -> Target:
    part = local_part(tensor)
    return Target(tensor=part.tensor, shard=part.shard)


def _wanted(targets: Targets) -> Wanted:
    return {name: [target.shard for target in each] for name, each in targets.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Home:
    """Where the state of a parameter belongs."""

    optimizer: torch.optim.Optimizer
    parameter: torch.Tensor
    fqn: str

    def shard_of(self, leaf: str, saved: SavedState) -> Shard:
        """What of a leaf belongs here; see ``new_state_tensor``."""
        shape = saved.metas[leaf].shape
        is_cut = leaf not in saved.notes and leaf != "step" and shape == tuple(self.parameter.shape)
        return local_part(self.parameter).shard if is_cut else whole_shard(shape)

    def make_tensors(self, saved: SavedState) -> dict[str, torch.Tensor]:
        """Memory for the state, by leaf."""
        return {leaf: self._make_tensor(leaf, meta, saved.notes) for leaf, meta in saved.metas.items()}

    def _make_tensor(self, leaf: str, meta: TensorMeta, notes: Mapping[str, Any]) -> torch.Tensor:
        dtype = torch_dtype(meta.dtype)
        if leaf in notes:  # becomes a Python number
            return torch.empty(meta.shape, dtype=dtype, device="cpu")
        return new_state_tensor(self.optimizer, self.parameter, leaf, meta.shape, dtype)

    def reserve(self) -> None:
        """Have the state stand where it belongs, whatever file is done first."""
        self.optimizer.state.setdefault(self.parameter, {})

    def take(self, tensors: Mapping[str, torch.Tensor], notes: Mapping[str, Any]) -> None:
        """Make it the state."""
        load_parameter_state(self.optimizer, self.parameter, self.fqn, tensors, notes, is_placed=True)


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
    found = _open_layers(checkpoint)
    saved = {fqn: each for layer in found for fqn, each in states_by_parameter(layer).items()}
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
    arriving = [_ArrivingStates(layer, homes) for layer in found]
    layers = [each.plan() for each in arriving]

    def begin() -> None:
        for optimizer, groups in zip(live, records, strict=True):
            load_groups(optimizer, names, groups)
        for fqn, home in homes.items():
            if fqn in saved:
                home.reserve()
            else:
                home.take({}, {})
        for each, readings in zip(arriving, layers, strict=True):
            if not readings:  # this rank holds nothing of it, but that there is state
                each.install()

    return Load(checkpoint=checkpoint, layers=tuple(each for layer in layers for each in layer), begin=begin, live=())


def _open_layers(checkpoint: Checkpoint) -> list[SavedTensors]:
    """The optimizer state of each layer that has some."""
    layers = checkpoint.manifest.layers
    return [open_states(checkpoint, layer) for layer in layers if layer.optimizer_files or layer.encoding is not None]


def _find_homes(
    state: ModelState, optimizers: Sequence[torch.optim.Optimizer], records: Sequence[Sequence[ParameterGroup]]
) -> dict[str, _Home]:
    homes: dict[str, _Home] = {}
    for optimizer, groups in zip(optimizers, records, strict=True):
        for fqn in (fqn for group in groups for fqn in group.parameters):
            if fqn in homes:
                raise shared_parameter(fqn)
            homes[fqn] = _Home(optimizer=optimizer, parameter=state.tensors[fqn], fqn=fqn)
    return homes


class _ArrivingStates:
    """Optimizer state of a layer while it is read, from however many files.

    Args:
        saved: The layer's state.
        homes: By fqn; state of other parameters is left where it is.
    """

    def __init__(self, saved: SavedTensors, homes: Mapping[str, _Home]) -> None:
        self._saved = saved
        self._homes = homes
        self._states = {fqn: each for fqn, each in states_by_parameter(saved).items() if fqn in homes}
        self._making = threading.Lock()
        self._tensors: dict[str, dict[str, torch.Tensor]] | None = None
        """By fqn and leaf; None before a file of the layer is read, and when all are."""

    def plan(self) -> tuple[LayerReading, ...]:
        wanted = {
            state_key(fqn, leaf): [self._homes[fqn].shard_of(leaf, each)]
            for fqn, each in self._states.items()
            for leaf in each.metas
        }
        return self._saved.plan(wanted, self._find_targets, self.install)

    def install(self) -> None:
        tensors, self._tensors = self._make_tensors(), None
        for fqn, saved in self._states.items():
            self._homes[fqn].take(tensors[fqn], saved.notes)

    def _make_tensors(self) -> dict[str, dict[str, torch.Tensor]]:
        with self._making:
            if self._tensors is None:
                self._tensors = {fqn: self._homes[fqn].make_tensors(saved) for fqn, saved in self._states.items()}
            return self._tensors

    def _find_targets(self) -> Targets:
        return {
            state_key(fqn, leaf): [_target_of(tensor)]
            for fqn, tensors in self._make_tensors().items()
            for leaf, tensor in tensors.items()
        }


def read_saved_states(checkpoint: Checkpoint) -> dict[str, SavedState]:
    """Which optimizer state a checkpoint holds: by fqn, of each parameter that has some. Reads headers alone.

    Raises:
        FormatError: A file does not hold the state of its layer, or its parts do not make up a tensor.
        IntegrityError, NotFoundError: A file has another size, or is gone.
    """
    return {fqn: each for layer in _open_layers(checkpoint) for fqn, each in states_by_parameter(layer).items()}


def plan_targets(checkpoint: Checkpoint, targets: Targets) -> Load:
    """Check that a checkpoint can fill memory that is not a model's or an optimizer's; changes nothing.

    For callers with buffers of their own (DeepSpeed's flat partitions). Files without anything for them are not read.

    Args:
        checkpoint: Where from; its layers may be whole, in parts, or in codes.
        targets: By name in the files: fqn for a weight or buffer (not a tied one), ``state.<fqn>.<leaf>`` for state, as
            ``read_saved_states`` lists it. Element types are as saved: nothing is cast.

    Returns:
        ``fill`` fills the targets.

    Raises:
        IncompleteError: The checkpoint has no such tensor.
        IncompatibleError: A target is of another element type or whole shape.
        FormatError: A file does not hold its layer, or its parts do not make up a tensor.
        IntegrityError, NotFoundError: A file has another size, or is gone.
    """
    layer_of = {tensor.fqn: tensor.layer for tensor in checkpoint.manifest.tensors if tensor.tied_to is None}
    weights: dict[str, dict[str, Sequence[Target]]] = defaultdict(dict)
    states: dict[str, dict[str, Sequence[Target]]] = defaultdict(dict)
    for name, each in targets.items():
        is_weight = name in layer_of
        fqn = name if is_weight else split_state_key(name)[0]
        if fqn not in layer_of:
            raise _no_such_tensor(checkpoint, name)
        if each:
            (weights if is_weight else states)[layer_of[fqn]][name] = each
    of_model: list[LayerReading] = []
    of_optimizers: list[LayerReading] = []
    for layer in checkpoint.manifest.layers:
        for wanted, open_layer, readings in (
            (weights[layer.name], open_weights, of_model),
            (states[layer.name], open_states, of_optimizers),
        ):
            if wanted:
                readings += _readings_of(checkpoint, open_layer(checkpoint, layer), wanted)
    live = tuple(target.tensor for each in targets.values() for target in each)
    return Load(checkpoint=checkpoint, layers=_join(of_model, of_optimizers), begin=lambda: None, live=live)


def _readings_of(checkpoint: Checkpoint, saved: SavedTensors, targets: Targets) -> Iterable[LayerReading]:
    for name, each in targets.items():
        if name not in saved.metas:
            raise _no_such_tensor(checkpoint, name)
        for target in each:
            found = TensorMeta(dtype=meta_of(target.tensor).dtype, shape=target.shard.shape)
            if found != saved.metas[name]:
                raise IncompatibleError(
                    "what a tensor is to be loaded into is of another element type or shape",
                    kind="other-tensor",
                    path=checkpoint.path,
                    layer=saved.layer,
                    fqn=name,
                    expected=f"{saved.metas[name]}, as saved",
                    found=str(found),
                )
    return saved.plan(_wanted(targets), lambda: targets, lambda: None)


def _no_such_tensor(checkpoint: Checkpoint, name: str) -> IncompleteError:
    return IncompleteError(
        "the checkpoint has no such tensor",
        kind="missing-tensor",
        path=checkpoint.path,
        fqn=name,
        expected="the fqn of a weight, or state.<fqn>.<leaf> of optimizer state",
    )
