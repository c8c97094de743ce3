"""How layers move where nobody has measured it: all alike. Pure."""

from __future__ import annotations

from ..drift import LayerDrift

__all__ = ["DEFAULT_DRIFT_PER_STEP", "assume_drift"]

DEFAULT_DRIFT_PER_STEP = 1e-4
"""Relative. An assumption: a hundred steps move a layer by 1 %."""


def assume_drift(*, age: int, numel: int, per_step: float = DEFAULT_DRIFT_PER_STEP) -> LayerDrift:
    """The drift of a layer, were all to move at one speed in one direction.

    So relative drift grows with age; importance with age squared, and with the number of parameters. A layer of which
    nothing is trained stays where it is. Real layers move at speeds of their own, which is what strategies that look at
    drift are for.

    Args:
        age: Steps since it was last saved; before its first save, since the start.
        numel: Its parameters that are trained.
        per_step: Relative drift of a step.
    """
    per_step = per_step if numel else 0.0
    return LayerDrift(
        relative=per_step * age,
        importance=numel * (per_step * age) ** 2,
        update=per_step,
        momentum=None,
        rate=numel * per_step**2,
    )
