"""What only DeepSpeed's own planner understands of a checkpoint: the rest of the files' trees."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..torch_files import Tree

__all__ = ["Flat", "Native"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Flat:
    """One flat tensor: a group at stages 1 and 2, a sub-group at stage 3."""

    parameters: tuple[tuple[str, int], ...]
    """fqn and numel, in the order they lie in."""
    paddings: tuple[int, ...]
    """Elements of alignment after each; zeros at stage 3."""
    group: int
    """The optimizer's parameter group it belongs to."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Native:
    """A DeepSpeed checkpoint, but for its tensors."""

    tag: str
    """Name of the directory with the ranks' files."""
    stage: int
    """1, 2 or 3."""
    optim: tuple[Mapping[str, Tree], ...]
    """Content of each rank's file of optimizer states."""
    model: Mapping[str, Tree]
    """Content of the file of model states of rank 0."""
    model_paths: tuple[Path, ...]
    """The files of model states: one at stages 1 and 2, one for each rank at stage 3."""
    flats: tuple[Flat, ...]
    raw_names: Mapping[str, str]
    """Canonical name -> name in the files, where they differ."""
    has_bf16_name: bool
    """Whether the files of optimizer states are called bf16_zero_..."""
    has_weights_files: bool
    """Whether model.safetensors was beside."""

    @property
    def ranks(self) -> int:
        return len(self.optim)

    def groups(self) -> Sequence[Sequence[Flat]]:
        """The flat tensors of each of the optimizer's groups."""
        count = 1 + max((flat.group for flat in self.flats), default=-1)
        return [[flat for flat in self.flats if flat.group == index] for index in range(count)]
