"""Exact layers whose optimizer keeps masters: what BF16 weights say of them already is not written again."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from ..codecs import CODES_KEY, StoredCodes, array_name, record_codes
from ..codecs.encoding import split_master
from ..tensor_bytes import meta_of
from .copying import flat_elements, strips
from .devices import Lanes
from .images import FileImage, LayerImage, plan_image
from .scratch import Scratch

__all__ = ["pack_masters"]


def pack_masters(
    image: LayerImage, scratch: Scratch, lanes: Lanes, check_readable: Callable[[], None]
) -> tuple[FileImage, ...]:
    """The files of a layer, its masters packed where they round to their weights.

    Args:
        image: The layer, held.
        scratch: What the files refer to, until it is used again.
        lanes: Streams for tensors on devices.
        check_readable: Called before each piece of a tensor is read; raises if that must not be.

    Raises:
        MemoryError: There is not enough of it.
    """
    optimizer, weights = image.optimizer, image.weights_to_pack_with
    if optimizer is None or not weights:
        return image.files
    is_pinned = any(weight.is_cuda for weight in weights.values())
    scratch.reserve((2 * weight.numel() for weight in weights.values()), is_pinned=is_pinned)
    codes: dict[str, StoredCodes] = {}
    tensors: dict[str, torch.Tensor] = {}
    for stored, tensor in zip(optimizer.layout.tensors, optimizer.tensors, strict=True):
        key = stored.name
        arrays: Mapping[str, torch.Tensor] | None = None
        if key in weights:
            with lanes.of(tensor):
                arrays = _pack(tensor, weights[key], scratch, check_readable)
        if arrays is None:
            tensors[key] = tensor
        else:
            codes[key] = StoredCodes(codec="tail16", meta=meta_of(tensor))
            tensors.update({array_name(key, name): array for name, array in arrays.items()})
    if not codes:
        return image.files
    metadata = {**optimizer.layout.metadata, CODES_KEY: record_codes(codes)}
    return image.whole_weights, plan_image(optimizer.name, tensors, metadata, are_lazy=())


def _pack(
    master: torch.Tensor, weight: torch.Tensor, scratch: Scratch, check_readable: Callable[[], None]
) -> Mapping[str, torch.Tensor] | None:
    """The arrays of a master; None if it has to stay as it is."""
    codes = scratch.take("I16", master.numel())
    ties: list[torch.Tensor] = []
    num_ties = 0
    max_ties = StoredCodes(codec="tail16", meta=meta_of(master)).max_ties
    for start, stop in strips(master, 0, master.numel()):
        check_readable()
        with torch.no_grad():
            found = split_master(flat_elements(master, start, stop), flat_elements(weight, start, stop))
        num_ties += 0 if found is None else found[1].numel()
        if found is None or num_ties > max_ties:
            return None
        codes[start:stop].copy_(found[0])
        ties.append(found[1].cpu() + start)
    return {"codes": codes, "ties": torch.cat(ties)}
