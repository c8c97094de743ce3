"""A layer that is to be written as codes: what its files will hold, as far as that is known before it is encoded."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import torch

from ..codecs import (
    BASE_KEY,
    CODES_KEY,
    MAX_SHARE,
    STATE_BASE_KEY,
    Component,
    Rest,
    StoredCodes,
    component_of,
    record_codes,
)
from ..state_keys import NOTES_KEY
from .images import FileImage, LayerImage, plan_image, weights_image

__all__ = ["Base", "CodedImage", "code_layer", "codes_image", "rounded_image"]

Base: TypeAlias = Literal["exact", "rounded", "none"]
"""What the weights file is to the codes; see ``EncodingRecord``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CodedImage:
    """The codes of a layer, planned."""

    live: LayerImage
    """The layer as it would be written exactly: what is encoded, and what is written if that fails."""
    rest: Rest
    codes: Mapping[str, StoredCodes]
    """By key: what the codes file is to hold. Masters, and weights that are to be their rounding, as they are written
    if the weights are just that."""

    @property
    def layer(self) -> str:
        return self.live.layer

    @property
    def sources(self) -> tuple[FileImage, ...]:
        """Live tensors, as the files they would be exactly."""
        return self.live.files

    @property
    def is_relative_to_state(self) -> bool:
        """True if the codes need the layer's exact optimizer file beside them."""
        return any(self.codes[key].base == "exact" for key in self.live.masters.values())

    @property
    def weights_of_masters(self) -> Mapping[str, tuple[str, torch.Tensor]]:
        """Of each master that is not kept as it is, by key: fqn and live tensor of its weight."""
        weights = self.live.whole_weights
        tensors = {stored.name: tensor for stored, tensor in zip(weights.layout.tensors, weights.tensors, strict=True)}
        coded = {key: fqn for fqn, key in self.live.masters.items() if self.codes[key].codec != "exact"}
        return {key: (fqn, tensors[fqn]) for key, fqn in coded.items()}

    @property
    def base(self) -> Base:
        if self.rest.is_relative:
            return "exact"
        return "rounded" if any(each.base == "rounded" for each in self.codes.values()) else "none"

    @property
    def name(self) -> str:
        """Of the codes file."""
        return f"codes/{self.stem}.safetensors"

    @property
    def stem(self) -> str:
        return self.live.whole_weights.name.removeprefix("model-").removesuffix(".safetensors")

    @property
    def names(self) -> tuple[str, ...]:
        """Of all files that are written unless encoding fails."""
        return (self.name,) if self.base == "exact" else (self.live.whole_weights.name, self.name)

    @property
    def nbytes(self) -> int:
        """About what is written."""
        # The header of the codes file names what those of the layer's own files name.
        headers = sum(len(file.layout.prefix) for file in self.sources)
        codes = headers + sum(each.nbytes for each in self.codes.values())
        return codes if self.base == "exact" else codes + self.weights_nbytes

    @property
    def weights_nbytes(self) -> int:
        """Of the weights file, if it is written anew."""
        of_weights = (each for key, each in self.codes.items() if component_of(key) is Component.WEIGHTS)
        halved = sum(each.meta.nbytes // 2 for each in of_weights if each.base == "rounded")
        return self.live.whole_weights.nbytes - halved

    def hold(self) -> CodedImage:
        """As ``LayerImage.hold``."""
        return replace(self, live=self.live.hold())

    def tensors(self) -> Iterator[tuple[str, StoredCodes, torch.Tensor]]:
        """What is to be encoded, weights in file order first."""
        for file in self.sources:
            for stored, tensor in zip(file.layout.tensors, file.tensors, strict=True):
                if stored.name in self.codes:
                    yield stored.name, self.codes[stored.name], tensor


def code_layer(live: LayerImage, rest: Rest) -> CodedImage | None:
    """Plan the codes of a layer; None if they would not be worth it."""
    if any(stored.name.startswith("state.") for stored in live.whole_weights.layout.tensors):
        return None  # in a codes file nobody could tell such weights from optimizer state
    planned: dict[str, StoredCodes] = {}
    metas = {stored.name: stored.meta for stored in live.whole_weights.layout.tensors}
    weights = {key: metas[fqn] for fqn, key in live.masters.items()}
    for file in live.files:
        for stored in file.layout.tensors:
            codes = rest.codes_for(stored.name, stored.meta, weight=weights.get(stored.name))
            if codes.codec == "xor" and stored.name in live.masters:
                codes = replace(codes, codec="round")
            # Weights that go into the weights file as they are need no place in the codes file.
            is_there = component_of(stored.name) is Component.WEIGHTS and not rest.is_relative
            if not is_there or codes.base == "rounded":
                planned[stored.name] = codes
    coded = CodedImage(live=live, rest=rest, codes=planned)
    return coded if coded.nbytes < MAX_SHARE * live.nbytes else None


def codes_image(
    coded: CodedImage,
    codes: Mapping[str, StoredCodes],
    arrays: Mapping[str, torch.Tensor],
    base: str | None,
    state_base: str | None,
) -> FileImage:
    """The codes file.

    Args:
        coded: The layer, planned.
        codes: By key, as it was encoded in the end.
        arrays: By name in the file.
        base: Digest of the weights file they are relative to.
        state_base: Digest of the optimizer file that masters are relative to.
    """
    optimizer = coded.live.optimizer
    notes = None if optimizer is None else optimizer.layout.metadata.get(NOTES_KEY)
    told = {CODES_KEY: record_codes(codes), NOTES_KEY: notes, BASE_KEY: base, STATE_BASE_KEY: state_base}
    metadata = {key: text for key, text in told.items() if text is not None}
    return plan_image(coded.name, arrays, metadata, are_lazy=())


def rounded_image(coded: CodedImage, rounded: Collection[str]) -> FileImage:
    """The weights file with some tensors, by fqn, rounded while they are captured."""
    weights = coded.live.whole_weights
    tensors = {stored.name: tensor for stored, tensor in zip(weights.layout.tensors, weights.tensors, strict=True)}
    return weights_image(coded.stem, tensors, rounded=rounded)
