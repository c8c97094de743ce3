"""Copies from CUDA devices, beside what they compute: one stream for each device, and events to wait for.

training thread   fence() ----------------> an event behind the optimizer's last update
capture thread    lanes.start(fences)       our streams wait for it, the training's stream does not wait for us
                  with lanes.of(tensor): copies are queued
                  lanes.events() ---------> a piece is in host memory when these have passed
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeAlias

import torch

__all__ = ["Fences", "Lanes", "fence"]

Fences: TypeAlias = Mapping[torch.device, torch.cuda.Event]


def fence(tensors: Iterable[torch.Tensor]) -> Fences:
    """Mark what the device has to have done before the tensors may be copied.

    Called by the training thread, whose current stream the optimizer's update was queued on.
    """
    devices = {tensor.device for tensor in tensors if tensor.is_cuda}
    return {device: torch.cuda.current_stream(device).record_event() for device in devices}


class Lanes:
    """The streams that copies are queued on; for the capture thread."""

    def __init__(self) -> None:
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def start(self, fences: Fences) -> None:
        """Let the next copies wait for what came before the save."""
        for device, event in fences.items():
            if device not in self._streams:
                self._streams[device] = torch.cuda.Stream(device)
            self._streams[device].wait_event(event)

    def of(self, tensor: torch.Tensor) -> contextlib.AbstractContextManager[object]:
        """Queue what is copied from a tensor on its device's stream; host memory has none."""
        return torch.cuda.stream(self._streams[tensor.device]) if tensor.is_cuda else contextlib.nullcontext()

    def events(self) -> Sequence[torch.cuda.Event]:
        """Of all that is queued now."""
        return [stream.record_event() for stream in self._streams.values()]

    def synchronize(self) -> None:
        """Wait until everything queued is in host memory."""
        for stream in self._streams.values():
            stream.synchronize()
