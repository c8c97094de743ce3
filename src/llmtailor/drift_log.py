"""Where measurements of a run's layers are told: ``drift.jsonl`` in its directory, a line for each; and trackers.

    {"step": 400, "expected_loss_steps": 12.5, "layers": {"layers.0": {"age": 100, "drift": 0.021, ...}, ...}}

Nothing depends on it. After a resume the steps since are measured again: of each step the last line counts. A line that
a crash cut off is passed over.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .errors import WriteError
from .storage import append_line, read_lines

__all__ = ["DRIFT_LOG_NAME", "curves_of", "log_measurement", "read_measurements"]

DRIFT_LOG_NAME = "drift.jsonl"


def log_measurement(run: Path, measurement: Mapping[str, Any]) -> WriteError | None:
    """Add a measurement; returns what stopped it, which costs a line and no checkpoint."""
    try:
        append_line(run / DRIFT_LOG_NAME, json.dumps(measurement, allow_nan=False))
    except WriteError as err:
        return err
    return None


def curves_of(metrics: Mapping[str, float]) -> dict[str, float]:
    """What of a measurement a trainer logs by itself: a curve for each layer, and one for the run.

    Args:
        metrics: The measurement, flat, as ``Run.metrics`` has it.
    """
    return {name: value for name, value in metrics.items() if name.startswith(("drift/", "expected_loss"))}


def read_measurements(run: Path) -> dict[int, Mapping[str, Any]]:
    """Step -> measurement, by step; empty if nothing was measured."""
    found: dict[int, Mapping[str, Any]] = {}
    for line in read_lines(run / DRIFT_LOG_NAME):
        try:
            measurement = json.loads(line)
            step, layers = measurement["step"], measurement["layers"]
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
        if type(step) is int and isinstance(layers, dict):
            found[step] = measurement
    return dict(sorted(found.items()))
