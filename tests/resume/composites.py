"""What a composite checkpoint must hold, from copies of the state kept at each save."""

from __future__ import annotations

from typing import Any

from llmtailor.manifest import Manifest
from tiny_models import Snapshot


def expected_composite(
    manifest: Manifest, models: dict[int, Snapshot], optimizers: dict[int, dict[str, Any]]
) -> tuple[Snapshot, dict[str, Any]]:
    """Each tensor, and each value of optimizer state, at the step that the manifest gives its layer."""
    step_of_layer = {layer.name: layer.step for layer in manifest.layers}
    step_of = {tensor.fqn: step_of_layer[tensor.layer] for tensor in manifest.tensors}
    weights = {fqn: models[step][fqn] for fqn, step in step_of.items()}
    moments = {
        key: value
        for fqn, step in step_of.items()
        for key, value in optimizers[step].items()
        if key.rpartition(".")[0] == fqn
    }
    return weights, moments
