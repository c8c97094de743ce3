"""Did something change the state between the moment of a save and its copy?

An optimizer's step is made to wait, see ``checkpointer``. Anything else that changes a parameter in the meantime
(weights of an average swapped in, clipping, ``load_state_dict``) would tear the checkpoint, so it is noticed, as far as
it can be:

- torch counts the changes of a tensor in place;
- writes through ``.data``, and fused optimizers, are not counted: a few bytes of each tensor in host memory are noted
  at the save and compared;
- memory that was taken away or exchanged is seen by its address.

What is left: a write through ``.data`` that misses the sample, or that goes to a device.

Operations on a ``DTensor`` are counted by it, and not by the part of it that is here; what is written to the part alone
is counted by that. So both are looked at. Forward and backward change neither: FSDP2 gathers into other memory.

Source: torch 2.13, docs/source/notes/autograd.rst (In-place correctness checks: version counters); a fused AdamW step
and writes through ``.data`` leave the counter as it is, as does any operation on a DTensor that of its local tensor
(dispatched below ADInplaceOrView, which counts): seen with torch 2.13.
"""

from __future__ import annotations

from ctypes import string_at
from dataclasses import dataclass

import torch

__all__ = ["Watch", "watch"]

# Bytes at each of the places that are looked at.
_SAMPLE_NBYTES = 32


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Watch:
    """A tensor as it was when it was to be saved."""

    tensor: torch.Tensor
    whole: torch.Tensor
    """The ``DTensor`` that it is the part of; itself, if it is plain."""
    versions: tuple[int | None, int | None]
    """Of both."""
    address: int
    sample: bytes | None

    def has_moved(self) -> bool:
        """True if the tensor's memory was freed or exchanged: it must not be read."""
        storage = self.tensor.untyped_storage()
        return self.tensor.data_ptr() != self.address or storage.nbytes() == 0

    def has_changed(self) -> bool:
        """True if it is known not to be what it was."""
        if self.has_moved():
            return True
        return _versions(self.tensor, self.whole) != self.versions or _sample(self.tensor, self.address) != self.sample


def watch(tensor: torch.Tensor, whole: torch.Tensor | None = None) -> Watch:
    """Note what a tensor is now; waits for no device.

    Args:
        tensor: Plain, of at least 32 bytes.
        whole: The ``DTensor`` that it is the part of, or nothing.
    """
    address = tensor.data_ptr()
    whole = tensor if whole is None else whole
    return Watch(
        tensor=tensor,
        whole=whole,
        versions=_versions(tensor, whole),
        address=address,
        sample=_sample(tensor, address),
    )


def _versions(tensor: torch.Tensor, whole: torch.Tensor) -> tuple[int | None, int | None]:
    own = _version(tensor)
    return own, own if whole is tensor else _version(whole)


def _version(tensor: torch.Tensor) -> int | None:
    # Tensors made in inference mode count nothing.
    return None if tensor.is_inference() else tensor._version


def _sample(tensor: torch.Tensor, address: int) -> bytes | None:
    # Straight from memory: by a view of each tensor it would take several times as long, and training waits for it.
    # A tensor whose memory was taken away has no address.
    if not address or not tensor.is_cpu or not tensor.is_contiguous():
        return None
    last = tensor.nbytes - _SAMPLE_NBYTES
    return b"".join([string_at(address + place, _SAMPLE_NBYTES) for place in (0, last // 3, last // 3 * 2, last)])
