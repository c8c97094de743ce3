"""What a DeepSpeed engine must remember beside tensors: counters, loss scale, schedules. The same on every rank.

Source:
    DeepSpeed 0.19.8, runtime/engine.py (_common_checkpoint_state, _load_checkpoint), runtime/fp16/loss_scaler.py,
    runtime/zero/stage_1_and_2.py and stage3.py (state_dict).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["load_rest", "read_rest"]

_COUNTERS = ("global_steps", "global_samples", "micro_steps", "skipped_steps")
# What update_scale changes; the others are configuration.
_SCALE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def read_rest(engine: Any) -> dict[str, Any]:
    """A tree of numbers, texts and what the schedules' own ``state_dict`` have; called on any rank, talks to none."""
    zero = engine.optimizer
    tree: dict[str, Any] = {name: int(getattr(engine, name)) for name in _COUNTERS}
    tree["overflow"] = bool(zero.overflow)
    if (scaler := getattr(zero, "loss_scaler", None)) is not None:
        scale = {name: getattr(scaler, name) for name in _SCALE if hasattr(scaler, name)}
        tree["loss_scaler"] = {"dynamic": bool(scaler.dynamic), **scale}
    tree.update({name: part.state_dict() for name, part in _parts(engine).items()})
    return tree


def load_rest(engine: Any, tree: Mapping[str, Any], *, with_schedule: bool = True) -> None:
    """Set an engine to what ``read_rest`` gave, as it is before a step: gradients that were saved up are not kept.

    Parts that the engine does not have now, or the saved one did not have, are left alone; so is a loss scale that
    is dynamic in only one of the two.

    Args:
        engine: The engine.
        tree: As ``read_rest`` gave it.
        with_schedule: Load the learning rate schedule too.
    """
    zero = engine.optimizer
    for name in _COUNTERS:
        setattr(engine, name, tree[name])
    every = engine.gradient_accumulation_steps()
    engine.micro_steps = tree["micro_steps"] // every * every
    zero.overflow = tree["overflow"]
    scaler, scale = getattr(zero, "loss_scaler", None), tree.get("loss_scaler")
    if scaler is not None and scale is not None and scale["dynamic"] == bool(scaler.dynamic):
        for name in _SCALE:
            if name in scale:
                setattr(scaler, name, scale[name])
    for name, part in _parts(engine).items():
        if name in tree and (with_schedule or name != "lr_scheduler"):
            part.load_state_dict(tree[name])


def _parts(engine: Any) -> dict[str, Any]:
    """What has a ``state_dict`` of its own, where it is in use."""
    sampler = getattr(getattr(engine, "training_dataloader", None), "data_sampler", None)
    parts = {
        "lr_scheduler": engine.lr_scheduler,
        "random_ltd": getattr(engine, "random_ltd_scheduler", None),
        "data_sampler": sampler if hasattr(sampler, "state_dict") else None,
        "gradient_scaler": getattr(engine.optimizer, "torch_autocast_gradscaler", None),
    }
    return {name: part for name, part in parts.items() if part is not None}
