"""Which checkpoints may go. Pure; deleting is somebody else's."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

__all__ = ["Kept", "choose_removals"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """A checkpoint as retention sees it."""

    step: int
    is_consistent: bool
    """All layers were saved at this step."""


def choose_removals(
    checkpoints: Sequence[Kept], *, limit: int | None, pinned: Collection[int] = (), keep_consistent: bool = True
) -> tuple[int, ...]:
    """Steps to remove so that at most ``limit`` checkpoints are left, oldest first.

    The newest is never removed, nor a pinned one (the best model's), nor, with ``keep_consistent``, the newest whose
    layers are all of one step. They count towards the limit; where they alone exceed it, they stay, as transformers
    does with the best model.

    Args:
        checkpoints: All published checkpoints of the run, in any order.
        limit: How many to keep; None or <= 0 keeps all (transformers' meaning of ``save_total_limit``).
        pinned: Steps that must stay.
        keep_consistent: Whether to protect the newest consistent checkpoint.

    Source: transformers 5.23, trainer_utils.py (rotate_checkpoints).
    """
    if limit is None or limit <= 0 or not checkpoints:
        return ()
    ordered = sorted(checkpoints, key=lambda checkpoint: checkpoint.step)
    protected = {ordered[-1].step, *pinned}
    if keep_consistent:
        protected.update([checkpoint.step for checkpoint in ordered if checkpoint.is_consistent][-1:])
    excess = len(ordered) - max(limit, len(protected & {checkpoint.step for checkpoint in ordered}))
    removable = [checkpoint.step for checkpoint in ordered if checkpoint.step not in protected]
    return tuple(removable[: max(0, excess)])
