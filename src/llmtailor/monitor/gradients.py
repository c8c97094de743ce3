"""Norms of gradients, taken when an optimizer is about to use them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, MutableMapping

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from ..local_parts import local_part, memory_of

__all__ = ["GradientNorms"]


class GradientNorms:
    """One pass over the gradients at each step, on their devices; nothing waits for it.

    After gradients were unscaled and clipped, as the optimizer sees them.
    """

    def __init__(self) -> None:
        # Every optimizer of the process tells of its steps, also those of models that come and go.
        self._norms: MutableMapping[torch.Tensor, torch.Tensor] = WeakTensorKeyDictionary()

    def note(self, optimizer: torch.optim.Optimizer) -> None:
        """An optimizer is about to step; its parameters without a gradient now have none known."""
        dense = []
        for each in (each for group in optimizer.param_groups for each in group["params"]):
            if each.grad is not None and each.grad.layout == torch.strided:
                dense.append(each)
            else:
                self._norms.pop(each, None)
        grads = [memory_of(each.grad).detach() for each in dense]
        if grads:
            self._norms.update(zip(dense, torch._foreach_norm(grads), strict=True))

    def squares(self, named: Iterable[tuple[str, torch.Tensor]]) -> Mapping[str, float]:
        """fqn -> sum of squares of the gradient that this rank is the first to hold; waits for the devices."""
        known = {fqn: self._norms[each] for fqn, each in named if each in self._norms and local_part(each).is_first}
        if not known:
            return {}
        norms = torch.stack([norm.float().cpu() for norm in known.values()]).double()
        return dict(zip(known, norms.square().tolist(), strict=True))
