"""A checkpoint as a value: where it is, what its manifest says, and that in words. Opens no tensor."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from .errors import IncompleteError
from .formats.tailored import read_manifest
from .manifest import Manifest

__all__ = ["Checkpoint", "describe_layers", "open_checkpoint", "require_optimizer", "summarize_steps"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A checkpoint whose manifest was checked."""

    path: Path
    manifest: Manifest
    digest: str
    """Of the manifest; the next checkpoint is chained to it."""


def open_checkpoint(path: Path | str) -> Checkpoint:
    """Open a checkpoint by its directory; checks the manifest, opens no other file.

    Raises:
        NotFoundError: It is not a checkpoint of ours.
        FormatError: The manifest is damaged or of another version.
    """
    manifest, digest = read_manifest(Path(path))
    return Checkpoint(path=Path(path), manifest=manifest, digest=digest)


def require_optimizer(checkpoint: Checkpoint) -> None:
    """Raise unless training can be resumed from a checkpoint.

    Raises:
        IncompleteError: It holds weights alone.
    """
    if checkpoint.manifest.contents != "full":
        raise IncompleteError(
            "the checkpoint holds weights alone; training cannot be resumed from it",
            kind="weights-only",
            path=checkpoint.path,
            hint="load it with from_pretrained, or resume from one that was not saved with save_only_model",
        )


def summarize_steps(manifest: Manifest) -> dict[int, list[str]]:
    """Layers by the step at which they were saved, newest first; consecutive blocks are joined (``layers.0-3``)."""
    by_step: dict[int, list[str]] = defaultdict(list)
    runs: dict[int, tuple[str, int, int]] = {}
    for layer in manifest.layers:
        names = by_step[layer.step]
        stack, first, last = runs.get(layer.step, ("", 0, 0))
        if layer.stack is not None and layer.index is not None and layer.stack == stack and layer.index == last + 1:
            names[-1] = f"{stack}.{first}-{layer.index}"
            runs[layer.step] = (stack, first, layer.index)
        else:
            names.append(layer.name)
            if layer.stack is not None and layer.index is not None:
                runs[layer.step] = (layer.stack, layer.index, layer.index)
            else:
                runs.pop(layer.step, None)
    return dict(sorted(by_step.items(), reverse=True))


def describe_layers(checkpoint: Checkpoint) -> str:
    """Which step each layer of a checkpoint is of, for people."""
    manifest = checkpoint.manifest
    lines = [f"resuming from {checkpoint.path} (step {manifest.step})"]
    for step, names in summarize_steps(manifest).items():
        staleness = manifest.step - step
        age = "newest" if staleness == 0 else f"{staleness} steps old"
        lines.append(f"  step {step:>7} ({age}): {', '.join(names)}")
    return "\n".join(lines)
