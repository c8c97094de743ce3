"""What each new layer file will hold, decided before a byte moves."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import torch

from ..codecs import MIN_NUMEL, Component, component_of
from ..formats.safetensors import Layout, plan_layout
from ..formats.tailored.shards import encode_shards
from ..layers import part_suffix
from ..local_parts import is_dtensor, memory_of
from ..shards import Shards, whole_shard
from ..state_keys import NOTES_KEY, split_state_key
from ..tensor_bytes import meta_of

__all__ = [
    "FileImage",
    "LayerImage",
    "Part",
    "Rounded",
    "find_masters",
    "optimizer_image",
    "plan_image",
    "weights_image",
]


@dataclass(frozen=True, slots=True)
class Rounded:
    """A tensor whose elements, each as the nearest BF16 (ties to even), are the bytes."""

    tensor: torch.Tensor
    """F32."""

    @property
    def nbytes(self) -> int:
        return self.tensor.nbytes // 2


Part: TypeAlias = memoryview | torch.Tensor | Rounded
"""Bytes, or a tensor whose elements in row-major order are the bytes."""

_NO_SHARDS: Shards = {}
# Below this a copy at once costs less than looking after the tensor until it is copied.
_MAX_SMALL_NBYTES = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class FileImage:
    """A safetensors file that is not written yet: its layout and what will fill it."""

    name: str
    """Relative to the checkpoint."""
    layout: Layout
    tensors: tuple[torch.Tensor, ...]
    """In the layout's order; live, not copied. A ``DTensor`` stands for its part here, which ``hold`` takes instead."""
    are_lazy: tuple[bool, ...]
    """Of each tensor: nothing but an optimizer's step changes it."""
    rank: int | None = None
    """Whose part of a layer it is; None for a whole file."""
    wholes: tuple[torch.Tensor, ...] = ()
    """Of each tensor that is held: the live one, or the ``DTensor`` that it is the part of."""
    rounded: frozenset[str] = frozenset()
    """Names of F32 tensors that the file is to hold as BF16."""

    @property
    def nbytes(self) -> int:
        return self.layout.nbytes

    @property
    def parts(self) -> Sequence[Part]:
        """The file from its first byte to its last."""
        pairs = zip(self.layout.tensors, map(memory_of, self.tensors), strict=True)
        tensors = (Rounded(tensor) if stored.name in self.rounded else tensor for stored, tensor in pairs)
        return (memoryview(self.layout.prefix), *tensors)

    @property
    def referred(self) -> Sequence[tuple[torch.Tensor, torch.Tensor | None]]:
        """Tensors that ``hold`` did not copy, each with the ``DTensor`` that it is the part of, if there is one."""
        wholes = [whole if is_dtensor(whole) else None for whole in self.wholes or self.tensors]
        held = zip(map(memory_of, self.tensors), wholes, self.are_lazy, strict=True)
        return [(tensor, whole) for tensor, whole, is_lazy in held if _is_referred(tensor, is_lazy)]

    def hold(self) -> FileImage:
        """The same image, ready to be captured while forward and backward run.

        Large tensors that only an optimizer's step changes are referred to. A detached tensor stays what it is when the
        module is moved and gets other memory. What forward may change (buffers), and what is small, is copied at once.
        """
        pairs = zip(self.tensors, self.are_lazy, strict=True)
        return replace(self, tensors=tuple(_hold(tensor, is_lazy) for tensor, is_lazy in pairs), wholes=self.tensors)


def _hold(tensor: torch.Tensor, is_lazy: bool) -> torch.Tensor:
    held = memory_of(tensor).detach()
    return held if _is_referred(tensor, is_lazy) else held.clone()


def _is_referred(tensor: torch.Tensor, is_lazy: bool) -> bool:
    return is_lazy and tensor.nbytes > _MAX_SMALL_NBYTES


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerImage:
    """The files of a layer that this rank is to write; one at least."""

    layer: str
    weights: FileImage | None
    """None where other ranks write the weights."""
    optimizer: FileImage | None
    """None where other ranks write the optimizer state, or there is none."""
    masters: Mapping[str, str] = field(default_factory=dict)
    """See ``find_masters``."""

    @property
    def files(self) -> tuple[FileImage, ...]:
        return tuple(file for file in (self.weights, self.optimizer) if file is not None)

    @property
    def whole_weights(self) -> FileImage:
        """The weights file of a layer that is in whole files, all written by this rank."""
        assert self.weights is not None, self.layer
        assert self.weights.rank is None, self.layer
        return self.weights

    @property
    def sources(self) -> tuple[FileImage, ...]:
        """Live tensors, as the files they will be."""
        return self.files

    @property
    def names(self) -> tuple[str, ...]:
        """Of the files."""
        return tuple(file.name for file in self.files)

    @property
    def nbytes(self) -> int:
        """About what is written: masters that are not their weights' are written in full."""
        return sum(file.nbytes for file in self.files) - sum(each.nbytes for each in self.weights_to_pack_with.values())

    @property
    def weights_to_pack_with(self) -> Mapping[str, torch.Tensor]:
        """By ``state.<fqn>.<leaf>``: the live weight that a master may be packed with, see ``packing``."""
        if not self.masters:
            return {}
        weights = self.whole_weights
        tensors = {stored.name: tensor for stored, tensor in zip(weights.layout.tensors, weights.tensors, strict=True)}
        pairs = ((key, tensors[fqn]) for fqn, key in self.masters.items())
        return {key: each for key, each in pairs if each.dtype == torch.bfloat16 and each.numel() >= MIN_NUMEL}

    def hold(self) -> LayerImage:
        """As ``FileImage.hold``."""
        weights = None if self.weights is None else self.weights.hold()
        optimizer = None if self.optimizer is None else self.optimizer.hold()
        return replace(self, weights=weights, optimizer=optimizer)

    def count_updates(self) -> int | None:
        """The largest update count among the layer's parameters; None if none of them counts, or not in files here.

        Waits for the device where the counts are there (fused, capturable), so no training thread may ask for it.
        """
        if self.optimizer is None:
            return None
        counts = (
            int(memory_of(tensor).item())
            for stored, tensor in zip(self.optimizer.layout.tensors, self.optimizer.tensors, strict=True)
            if split_state_key(stored.name)[1] == "step" and stored.meta.numel == 1
        )
        return max(counts, default=None)


def find_masters(weights: FileImage | None, optimizer: FileImage | None) -> dict[str, str]:
    """16-bit weights whose optimizer keeps one F32 master: fqn -> ``state.<fqn>.<leaf>`` of the master.

    None in a layer of which one file is in parts, or is written by another rank.
    """
    if weights is None or optimizer is None or weights.rank is not None or optimizer.rank is not None:
        return {}
    halves = {
        stored.name: tensor
        for stored, tensor in zip(weights.layout.tensors, weights.tensors, strict=True)
        if stored.meta.dtype in ("BF16", "F16")
    }
    found: dict[str, list[str]] = defaultdict(list)
    if any("|" in stored.name for stored in optimizer.layout.tensors):
        return {}  # might be taken for arrays of codes
    for stored, tensor in zip(optimizer.layout.tensors, optimizer.tensors, strict=True):
        fqn = split_state_key(stored.name)[0]
        if component_of(stored.name) is not Component.MASTER or fqn not in halves or stored.meta.dtype != "F32":
            continue
        if tensor.shape == halves[fqn].shape and tensor.device == halves[fqn].device:
            found[fqn].append(stored.name)
    return {fqn: keys[0] for fqn, keys in found.items() if len(keys) == 1}


def weights_image(
    stem: str,
    tensors: Mapping[str, torch.Tensor],
    *,
    shards: Shards = _NO_SHARDS,
    rank: int | None = None,
    rounded: Collection[str] = (),
) -> FileImage:
    """The weights file of a layer.

    Args:
        stem: Of the layer; see ``layers.file_stem``.
        tensors: By fqn.
        shards: Of those that are not held whole; by fqn.
        rank: Whose part of the layer it is; None for a whole file.
        rounded: See ``plan_image``.
    """
    name = f"model-{stem}{_suffix(rank)}.safetensors"
    image = plan_image(name, tensors, _encode(tensors, shards), are_lazy=torch.nn.Parameter, rounded=rounded)
    return replace(image, rank=rank)


def optimizer_image(
    stem: str,
    tensors: Mapping[str, torch.Tensor],
    notes: Mapping[str, object],
    *,
    shards: Shards = _NO_SHARDS,
    rank: int | None = None,
) -> FileImage | None:
    """The optimizer file of a layer; None if there is nothing in it.

    Args:
        stem: Of the layer; see ``layers.file_stem``.
        tensors: By ``state.<fqn>.<leaf>``.
        notes: By the same.
        shards: Of those that are not held whole; by the same.
        rank: Whose part of the layer it is; None for a whole file.
    """
    if not tensors and not notes:
        return None
    metadata = {NOTES_KEY: json.dumps(dict(sorted(notes.items())))} if notes else {}
    name = f"optimizer/{stem}{_suffix(rank)}.safetensors"
    image = plan_image(name, tensors, {**metadata, **_encode(tensors, shards)}, are_lazy=torch.Tensor)
    return replace(image, rank=rank)


def _suffix(rank: int | None) -> str:
    return "" if rank is None else part_suffix(rank)


def _encode(tensors: Mapping[str, torch.Tensor], shards: Shards) -> dict[str, str]:
    if not shards:
        return {}
    return encode_shards({name: shards.get(name) or whole_shard(tensor.shape) for name, tensor in tensors.items()})


def plan_image(
    name: str,
    tensors: Mapping[str, torch.Tensor],
    metadata: Mapping[str, str],
    *,
    are_lazy: type[torch.Tensor] | tuple[()],
    rounded: Collection[str] = (),
) -> FileImage:
    """A file of these tensors.

    Args:
        name: Relative to the checkpoint.
        tensors: By name in the file; of a ``DTensor`` the part that is here goes into it.
        metadata: Of the file.
        are_lazy: The class of those that nothing but an optimizer's step changes.
        rounded: Names of F32 tensors that go into it as BF16.
    """
    metas = [(key, meta_of(memory_of(tensor))) for key, tensor in tensors.items()]
    metas = [(key, replace(meta, dtype="BF16") if key in rounded else meta) for key, meta in metas]
    # transformers refuses a file without this key. Source: transformers 5.23, modeling_utils.py (load_state_dict).
    layout = plan_layout(metas, {"format": "pt", **metadata})
    ordered = tuple(tensors[stored.name] for stored in layout.tensors)
    return FileImage(
        name=name,
        layout=layout,
        tensors=ordered,
        are_lazy=tuple(isinstance(tensor, are_lazy) for tensor in ordered),
        rounded=frozenset(rounded),
    )
