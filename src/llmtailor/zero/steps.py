"""One step count for all parameters of a flat, which may come from saves of different steps.

As where checkpoints are merged (``formats.deepspeed.common_steps``): the largest count counts, and moments that were
saved at a smaller one are rescaled, so that Adam makes the same of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from ..catalog import StateRef
from ..formats.deepspeed.common_steps import STEP, CommonSteps
from ..formats.numbers import inline_number
from ..tensor_bytes import dtype_name
from ..tensor_refs import InlineTensor, ScaledTensor, TensorRef
from ..tensors import TensorMeta

__all__ = ["STEP", "moment_factors", "unify"]


def unify(
    numbers: Mapping[str, Mapping[str, torch.Tensor]],
    moments: Mapping[str, Mapping[str, torch.Tensor]],
    options: Mapping[str, object],
) -> dict[str, tuple[str, torch.Tensor]]:
    """Bring the parameters of a flat to one step.

    Args:
        numbers: fqn -> leaf -> 0-dim tensor, of every parameter that has some; not changed.
        moments: leaf -> fqn -> elements on this rank; rescaled in place.
        options: Of the group, as JSON, see ``optimizer_values``.

    Returns:
        leaf -> the parameter with the largest step (of several the first), and its number, for all.

    Raises:
        IncompatibleError: Steps differ, and the group does not say its betas.
    """
    if not numbers:
        return {}
    steps = {fqn: float(each[STEP]) for fqn, each in numbers.items() if STEP in each}
    latest = max(steps, key=steps.__getitem__) if steps else next(iter(numbers))
    for fqn, step in steps.items():
        for leaf, factor in moment_factors([*moments], options, step, steps[latest]).items():
            if fqn in moments[leaf]:
                elements = moments[leaf][fqn]
                elements.copy_(elements.double() * factor)
    return {leaf: (latest, number) for leaf, number in numbers[latest].items()}


def moment_factors(leaves: list[str], options: Mapping[str, object], own: float, common: float) -> dict[str, float]:
    """What moments saved after ``own`` updates are multiplied by to go on after ``common``; of no change, none.

    Raises:
        IncompatibleError: The counts differ, and the group does not say its betas.
    """
    if own == common:
        return {}
    # The rule speaks of what is in files: here of a state with nothing in it.
    empty = InlineTensor(meta=TensorMeta(dtype=dtype_name(torch.float32), shape=(0,)), data=b"")
    tensors: dict[str, TensorRef] = dict.fromkeys(leaves, empty)
    state = StateRef(tensors={**tensors, STEP: inline_number(own, "F64")})
    adjusted = CommonSteps(Path(), own_steps=False).adjust("", state, common, options)
    return {leaf: ref.factor for leaf, ref in adjusted.items() if isinstance(ref, ScaledTensor)}
