"""A copy of what a save is to write, in host memory, so that training may go on; and the decision that it follows."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

import torch

from ...local_parts import LocalPart
from ...save_plan import SavePlan
from .state_layers import NamedState, Part
from .state_names import Entry

__all__ = ["STAGED_KEY", "HostMemory", "StagedState", "stage_state"]

STAGED_KEY = "llmtailor.staged"
"""The one key of a state dict that was staged; its value is a ``StagedState``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StagedState:
    """What ``TailorWriter.stage`` returns, for ``TailorPlanner``."""

    named: NamedState
    """Its tensors are in host memory; those of layers that are not written are left out."""
    plan: SavePlan | None
    """None if the step was not known: then all is staged, and the planner decides."""
    parent: str | None
    """Digest of the checkpoint that the plan follows."""


class HostMemory:
    """Memory that is used again by the next save, for fresh pages are what a copy costs most.

    As much as the last save used; blocks of a model are alike, so it does not matter which it was. Called by the thread
    that stages and by the one that writes, in turn.
    """

    def __init__(self) -> None:
        self._free: dict[tuple[torch.Size, torch.dtype], list[torch.Tensor]] = {}

    def take(self, like: torch.Tensor) -> torch.Tensor:
        """Memory for a tensor, contiguous; pinned where that is on a CUDA device."""
        found = self._free.get((like.shape, like.dtype))
        if found:
            return found.pop()
        return torch.empty(like.shape, dtype=like.dtype, pin_memory=like.is_cuda)

    def give_back(self, staged: NamedState) -> None:
        """What ``stage_state`` copied is written."""
        self.drop()
        for part in staged.parts.values():
            tensor = part.local.tensor
            if not tensor.is_meta:
                self._free.setdefault((tensor.shape, tensor.dtype), []).append(tensor)

    def drop(self) -> None:
        self._free.clear()


def stage_state(named: NamedState, names: frozenset[str], memory: HostMemory) -> NamedState:
    """Copy tensors to host memory; called by the training thread.

    Args:
        named: Live.
        names: Of the tensors of layers that are copied; the others are left out. Of the rest all are copied.
        memory: Where to.
    """
    devices: set[torch.device] = set()

    def copy_part(local: LocalPart) -> LocalPart:
        source = local.tensor.detach()
        host = memory.take(source)
        host.copy_(source, non_blocking=source.is_cuda)
        if source.is_cuda:
            devices.add(source.device)
        return replace(local, tensor=host)

    parts = {
        name: replace(part, local=copy_part(part.local)) if name in names else _without_memory(part)
        for name, part in named.parts.items()
    }
    entries = tuple(_stage_entry(entry) for entry in named.entries)
    for device in devices:
        torch.cuda.synchronize(device)
    return replace(named, parts=parts, entries=entries)


def _without_memory(part: Part) -> Part:
    tensor = torch.empty(part.local.tensor.shape, dtype=part.local.tensor.dtype, device="meta")
    return replace(part, local=replace(part.local, tensor=tensor))


def _stage_entry(entry: Entry) -> Entry:
    if entry.role != "rest":
        # Its parts are staged; of itself whether it is a tensor matters.
        return replace(entry, value=torch.empty(0, device="meta") if isinstance(entry.value, torch.Tensor) else None)
    return replace(entry, value=_copy_value(entry.value))


def _copy_value(value: object) -> Any:
    if isinstance(value, torch.Tensor):
        held = value.detach().clone()
        return held.cpu() if type(held) is torch.Tensor else held
    return copy.deepcopy(value)
