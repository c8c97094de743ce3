"""Holds optimizers back until the state that they are about to change is captured."""

from __future__ import annotations

import weakref

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from .monitor import GradientNorms
from .writer import Engine

__all__ = ["hold_back"]


def hold_back(engine: Engine, gradients: GradientNorms | None) -> RemovableHandle:
    """Have every optimizer of the process wait before each step, until the handle is removed or the engine is gone.

    For all optimizers: one that the run was not told of may change its model, too. Source: torch 2.13,
    optim/optimizer.py (register_optimizer_step_pre_hook, profile_hook_step): called by every subclass's ``step``.

    Args:
        engine: Captures; not kept alive by this.
        gradients: Told of each step then; None if nobody asked.
    """
    live_engine = weakref.ref(engine)

    def wait(optimizer: torch.optim.Optimizer, *_: object) -> None:
        live = live_engine()
        if live is None:
            return
        live.wait_until_captured()
        if gradients is not None:
            gradients.note(optimizer)

    return register_optimizer_step_pre_hook(wait)
