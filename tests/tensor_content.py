"""A tensor's bytes in row-major order, and back: what tests compare with."""

from __future__ import annotations

import torch

from llmtailor.tensor_bytes import torch_dtype
from llmtailor.tensors import TensorMeta


def host_bytes(tensor: torch.Tensor) -> bytes:
    """The elements as bytes, of any plain tensor."""
    values = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous().clone()
    return values.as_strided((values.numel(),), (1,)).view(torch.uint8).numpy().tobytes()


def tensor_from_bytes(content: bytes | bytearray | memoryview, meta: TensorMeta) -> torch.Tensor:
    """A new tensor of these bytes."""
    if not content:
        return torch.empty(meta.shape, dtype=torch_dtype(meta.dtype))
    flat = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    return flat.view(torch_dtype(meta.dtype)).reshape(meta.shape)
