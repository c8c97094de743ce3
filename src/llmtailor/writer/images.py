"""What each new layer file will hold, decided before a byte moves."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from ..formats.safetensors import Layout, plan_layout
from ..state_keys import NOTES_KEY
from ..tensor_bytes import host_bytes, meta_of

__all__ = ["FileImage", "LayerImage", "optimizer_image", "weights_image"]


@dataclass(frozen=True, slots=True, kw_only=True)
class FileImage:
    """A safetensors file that is not written yet: its layout and the live tensors that will fill it."""

    name: str
    """Relative to the checkpoint."""
    layout: Layout
    tensors: tuple[torch.Tensor, ...]
    """In the layout's order; live, not copied."""

    def chunks(self) -> Iterator[memoryview]:
        """The file's bytes in order; each tensor is copied to the host only when it is asked for."""
        yield memoryview(self.layout.prefix)
        for tensor in self.tensors:
            yield host_bytes(tensor)


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerImage:
    """The files of a layer that is to be written."""

    layer: str
    weights: FileImage
    optimizer: FileImage | None
    update_count: int | None

    @property
    def files(self) -> tuple[FileImage, ...]:
        return (self.weights,) if self.optimizer is None else (self.weights, self.optimizer)

    @property
    def nbytes(self) -> int:
        return sum(file.layout.nbytes for file in self.files)


def weights_image(stem: str, tensors: Mapping[str, torch.Tensor]) -> FileImage:
    """The weights file of a layer; ``tensors`` by fqn."""
    return _image(f"model-{stem}.safetensors", tensors, {})


def optimizer_image(stem: str, tensors: Mapping[str, torch.Tensor], notes: Mapping[str, object]) -> FileImage | None:
    """The optimizer file of a layer; both mappings by ``state.<fqn>.<leaf>``. None if the layer has no state."""
    if not tensors and not notes:
        return None
    metadata = {NOTES_KEY: json.dumps(dict(sorted(notes.items())))} if notes else {}
    return _image(f"optimizer/{stem}.safetensors", tensors, metadata)


def _image(name: str, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> FileImage:
    metas = [(key, meta_of(tensor)) for key, tensor in tensors.items()]
    # transformers refuses a file without this key. Source: transformers 5.23, modeling_utils.py (load_state_dict).
    layout = plan_layout(metas, {"format": "pt", **metadata})
    return FileImage(name=name, layout=layout, tensors=tuple(tensors[stored.name] for stored in layout.tensors))
