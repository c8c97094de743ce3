"""Strategies that look at the live model: the layers that changed most since they were last chosen, half of the bytes.

An update monitor as a user would write one: a callable for ``Run(strategy=...)``. Under ``rest`` the change is counted
from the last exact version.
"""

from __future__ import annotations

from typing import Literal

import torch

from llmtailor.layers import map_module
from llmtailor.strategies import SaveContext

Score = Literal["drift", "adam"]


class TopLayers:
    """Choose layers by their score, highest first, as long as they fit into a share of the bytes.

    ``drift``: relative L2 distance of the weights from those last chosen. ``adam``: sum of sqrt(exp_avg_sq) times the
    squared distance, by byte, which is what Adam's own curvature says the distance costs.
    """

    def __init__(
        self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, *, score: Score, share: float = 0.5
    ) -> None:
        parameters = dict(model.named_parameters())
        self._layers = {
            layer.name: [parameters[name] for name in layer.fqns if name in parameters]
            for layer in map_module(model).layers
        }
        self._optimizer = optimizer
        self._score = score
        self._share = share
        self._saved: dict[str, list[torch.Tensor]] = {}

    def begin(self) -> None:
        """After a resume: the weights as they are now are those that were last saved."""
        for layer in self._layers:
            self._remember(layer)

    def __call__(self, context: SaveContext) -> frozenset[str]:
        new = {layer.name for layer in context.layers if layer.saved_step is None}
        sizes = {layer.name: layer.nbytes for layer in context.layers}
        scores = {name: self._score_of(name, sizes[name]) for name in sizes if name not in new}
        left = self._share * sum(sizes.values())
        chosen = set()
        for name in sorted(scores, key=lambda name: scores[name], reverse=True):
            if sizes[name] <= left:
                chosen.add(name)
                left -= sizes[name]
        for name in chosen | new:
            self._remember(name)
        return frozenset(chosen | new)

    def _remember(self, layer: str) -> None:
        self._saved[layer] = [parameter.detach().clone() for parameter in self._layers[layer]]

    @torch.no_grad()
    def _score_of(self, layer: str, nbytes: int) -> float:
        pairs = list(zip(self._layers[layer], self._saved[layer], strict=True))
        if self._score == "drift":
            moved = sum(float((now - then).square().sum()) for now, then in pairs)
            return (moved / sum(float(then.square().sum()) for _, then in pairs)) ** 0.5
        cost = sum(
            float(((now - then).square() * self._optimizer.state[now]["exp_avg_sq"].sqrt()).sum())
            for now, then in pairs
        )
        return cost / nbytes
