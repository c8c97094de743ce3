"""Watches the layers of a run: measures them at its saves, on all ranks together, and goes on after a resume."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors.numpy import save

from ..checkpoint import Checkpoint
from ..drift import LayerDrift, mean_age, shares_of_progress
from ..drift_log import log_measurement
from ..errors import FormatError, SaveFailedWarning, TailorWarning
from ..formats.safetensors import open_file
from ..layers import part_suffix
from ..live_state import LiveLayers
from ..manifest import Manifest
from ..meeting import Meeting
from ..save_plan import SavePlan
from ..strict_json import parse_object
from ..writer import CodedImage
from .gradients import GradientNorms
from .monitor import START, Monitor
from .reading import Floats

__all__ = ["DRIFT_NAME", "Watch"]

DRIFT_NAME = "drift.safetensors"
"""In a checkpoint: of layers that are kept as codes, the picked weights of the exact save that they are measured from.
Of all others those are the weights that a resume loads."""


class Watch:
    """Called by the training thread; on every rank, in the same order.

    Args:
        meeting: The ranks.
        directory: The run, where ``drift.jsonl`` is.
        timeout_secs: How long ranks wait for each other.
        on_warning: Called if a measurement cannot be logged.
        has_gradients: Take the norm of every gradient, too.
    """

    def __init__(
        self,
        meeting: Meeting,
        directory: Path,
        timeout_secs: float,
        on_warning: Callable[[TailorWarning], None],
        has_gradients: bool = False,
    ) -> None:
        self._meeting = meeting
        self._directory = directory
        self._timeout_secs = timeout_secs
        self._on_warning = on_warning
        self._monitor = Monitor()
        self._weights: Mapping[str, Floats] = {}
        """By layer: what was picked of it, at the newest measurement."""
        self.gradients = GradientNorms() if has_gradients else None
        """Told of every optimizer's step; None if nobody asked."""
        self.step: int | None = None
        """Of the newest measurement."""
        self.drifts: Mapping[str, LayerDrift] = {}
        """By layer: the newest measurement; the same on every rank."""
        self.shares: Mapping[str, float] = {}
        """By layer: its share of what a step achieves; see ``drift.shares_of_progress``."""
        self.ages: Mapping[str, int] = {}
        """By layer: steps since its last save."""
        self.expected_loss_steps: float | None = None
        """What a resume from the newest save loses, see ``drift.mean_age``; None before the first."""
        self.has_begun = False

    def begin(self, live: LiveLayers, parent: Checkpoint | None) -> None:
        """Measure from here on: the state is what was loaded from a checkpoint, or what training starts with.

        Args:
            live: The state, before the first step.
            parent: What it was loaded from.
        """
        look = self._monitor.look(live)
        records = {} if parent is None else {record.name: record for record in parent.manifest.layers}
        kept = {} if parent is None else _read_references(parent.path / self._file_name)
        references = {}
        for name, now in look.weights.items():
            record = records.get(name)
            step = START if record is None else record.step
            is_coded = record is not None and record.encoding is not None
            known = kept.get(name) if is_coded else None
            is_fit = known is not None and known[0] == step and known[1].shape == now.shape
            references[name] = (step, known[1] if is_fit and known is not None else now)
        self._monitor.begin(references)
        self.has_begun = True

    def take_over(self, before: Watch) -> None:
        """Measure from what another knew, which measured the same training for the same run."""
        self._monitor, self.has_begun = before._monitor, before.has_begun

    def measure(
        self,
        read: Callable[[], LiveLayers],
        step: int,
        parent: Manifest | None,
        named: Callable[[], Iterable[tuple[str, torch.Tensor]]],
    ) -> LiveLayers:
        """Read the state, and how each layer moved since its last save; waits for the other ranks.

        Args:
            read: Reads it.
            step: Optimizer steps done.
            parent: The checkpoint before.
            named: The model's parameters by fqn, for their gradients.

        Raises:
            TailorError: What ``read`` raised, on this rank or another.
            WriteError: Kind ``rank-late``.
        """
        steps = _saved_steps(parent)
        try:
            live = read()
            look = self._monitor.look(live)
            gradients = {} if self.gradients is None else self.gradients.squares(named())
        except BaseException as err:
            self._meeting.add_up(None, err, self._timeout_secs)
            raise

        def add_up(own: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
            total = self._meeting.add_up(own.tobytes(), None, self._timeout_secs)
            return np.frombuffer(total, dtype=np.float32).reshape(own.shape)

        is_alone = self._meeting.ranks is None
        self.drifts = self._monitor.measure(look, live, steps, gradients, None if is_alone else add_up)
        self.shares = shares_of_progress(self.drifts, live.nbytes)
        self.ages = {name: step - max(steps.get(name, 0), 0) for name in look.picks}
        self.step, self._weights, self.has_begun = step, look.weights, True
        return live

    def note_save(self, plan: SavePlan, directory: Path, parent: Manifest | None) -> None:
        """The state that was last measured is being saved.

        Args:
            plan: The save.
            directory: Where what layers in codes are measured from is kept: the checkpoint, in staging.
            parent: The checkpoint before.
        """
        assert self.step is not None
        steps = _saved_steps(parent)
        stale = {name: self.ages[name] if name in plan.kept else 0 for name in self.ages}
        self.expected_loss_steps = mean_age(stale, self.shares)
        self._monitor.note_save(plan.step, self._weights, steps)
        self.log()
        coded = {image.layer for image in plan.images if isinstance(image, CodedImage)}
        found = self._monitor.references({name: step for name, step in steps.items() if name in coded})
        found = {name: each for name, each in found.items() if each[1].size}
        if found:
            metadata = {"steps": json.dumps({name: step for name, (step, _) in found.items()})}
            tensors = {name: values for name, (_, values) in found.items()}
            (directory / self._file_name).write_bytes(save(tensors, metadata))

    @property
    def _file_name(self) -> str:
        ranks = self._meeting.ranks
        suffix = "" if ranks is None or ranks.is_coordinator else part_suffix(ranks.rank)
        return f"{Path(DRIFT_NAME).stem}{suffix}.safetensors"

    def metrics(self) -> dict[str, float]:
        """The newest measurement, flat, as trackers take it; what is not known is left out."""
        found: dict[str, float] = {}
        for kind in ("relative", "importance", "update", "momentum", "gradient"):
            name = "drift" if kind == "relative" else kind
            for layer, drift in self.drifts.items():
                value = getattr(drift, kind)
                if value is not None:
                    found[f"{name}/{layer}"] = value
        if self.drifts:
            found |= {f"age/{layer}": float(age) for layer, age in self.ages.items()}
        if self.expected_loss_steps is not None:
            found["expected_loss_steps"] = self.expected_loss_steps
        return found

    def log(self) -> None:
        """Add the newest measurement to ``drift.jsonl``; on the coordinator."""
        if not self._meeting.is_coordinator:
            return
        layers = {
            name: {
                "age": self.ages[name],
                "drift": _finite(drift.relative),
                "importance": _finite(drift.importance),
                "update": _finite(drift.update),
                "momentum": _finite(drift.momentum),
                "gradient": _finite(drift.gradient),
                "share": _finite(self.shares[name]),
            }
            for name, drift in self.drifts.items()
        }
        record = {"step": self.step, "expected_loss_steps": _finite(self.expected_loss_steps), "layers": layers}
        if (error := log_measurement(self._directory, record)) is not None:
            self._on_warning(SaveFailedWarning(f"a measurement was not logged: {error}"))


def _saved_steps(parent: Manifest | None) -> dict[str, int]:
    """Layer -> step of its last exact save."""
    return {} if parent is None else {record.name: record.step for record in parent.layers}


def _finite(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else value


def _read_references(path: Path) -> dict[str, tuple[int, npt.NDArray[np.float32]]]:
    """What was kept for layers in codes; nothing if the file is not there, as where no layer is, or nobody measured.

    Raises:
        FormatError: It is no such file.
    """
    if not path.exists():
        return {}
    file = open_file(path)
    steps = parse_object(file.header.metadata.get("steps", "").encode(), what="the steps of references", path=path)
    found = {}
    for name, stored in file.header.tensors.items():
        if stored.meta.dtype != "F32" or type(steps.get(name)) is not int:
            raise FormatError(
                "references of layers do not say of which save they are",
                kind="bad-references",
                path=path,
                layer=name,
                expected="F32 entries, and a step in the metadata",
                found=f"{stored.meta.dtype}, {steps.get(name)!r:.40}",
            )
        found[name] = (steps[name], np.frombuffer(file.tensor_bytes(name), np.float32).copy())
    return found
