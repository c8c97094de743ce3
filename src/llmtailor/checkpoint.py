"""A checkpoint as a value: where it is, what its manifest says, and that in words. Opens no tensor."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from .drift import mean_age
from .errors import IncompleteError
from .formats.manifest_file import read_manifest
from .layers import ROOT_STACK
from .manifest import EncodingRecord, LayerRecord, Manifest

__all__ = [
    "Checkpoint",
    "LayerGroup",
    "describe_layers",
    "expected_loss_steps",
    "open_checkpoint",
    "require_optimizer",
    "summarize_steps",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A checkpoint whose manifest was checked."""

    path: Path
    manifest: Manifest
    digest: str
    """Of the manifest; the next checkpoint is chained to it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerGroup:
    """Layers of a checkpoint whose states are of one step, and all exact or all codes of one policy."""

    step: int
    """Whose state a resume finds."""
    names: tuple[str, ...]
    """In model order; consecutive blocks are joined (``layers.0-3``)."""
    rest: str | None
    """The policy; None if the layers are exact."""
    exact_steps: tuple[int, ...]
    """Of the exact files that lie beside codes, ascending, each once."""
    errors: Mapping[str, float]
    """Component -> the largest relative L2 error of a layer; components that are exact in all are left out."""
    drifts: tuple[float, ...]
    """Of its layers, where they were measured: see ``LayerRecord.drift``."""


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
            hint="load it with from_pretrained, or resume from one that has optimizer state (save_only_model and "
            "keep_optimizer leave weights alone)",
        )


def summarize_steps(manifest: Manifest) -> tuple[LayerGroup, ...]:
    """Layers by the step of their states, newest first, and by what they are: exact ones first, then codes."""
    grouped: dict[tuple[int, str], list[LayerRecord]] = defaultdict(list)
    for layer in manifest.layers:
        grouped[-layer.state_step, "" if layer.encoding is None else layer.encoding.rest].append(layer)
    return tuple(
        LayerGroup(
            step=-newness,
            names=tuple(_join_blocks(layers)),
            rest=rest or None,
            exact_steps=tuple(
                sorted({each.step for each in layers if each.encoding and each.encoding.base == "exact"})
            ),
            errors=_worst_errors([each.encoding for each in layers if each.encoding is not None]),
            drifts=tuple(each.drift for each in layers if each.drift is not None),
        )
        for (newness, rest), layers in sorted(grouped.items())
    )


def _join_blocks(layers: Sequence[LayerRecord]) -> list[str]:
    names: list[str] = []
    stack, first, last = None, 0, 0
    for layer in layers:
        if layer.stack is not None and layer.stack == stack and layer.index == last + 1:
            last = layer.index
            names[-1] = f"{first}-{last}" if stack == ROOT_STACK else f"{stack}.{first}-{last}"
            continue
        names.append(layer.name)
        stack = layer.stack
        if layer.index is not None:
            first = last = layer.index
    return names


def _worst_errors(encodings: Iterable[EncodingRecord]) -> dict[str, float]:
    worst: dict[str, float] = {}
    for encoding in encodings:
        for component, error in encoding.errors.items():
            worst[component] = max(error.l2, worst.get(component, 0.0))
    return worst


def describe_layers(checkpoint: Checkpoint) -> str:
    """Which step the state of each layer of a checkpoint is of, and how near to it codes are, for people."""
    manifest = checkpoint.manifest
    lines = [f"resuming from {checkpoint.path} (step {manifest.step})"]
    for group in summarize_steps(manifest):
        staleness = manifest.step - group.step
        age = "newest" if staleness == 0 else f"{staleness} steps old{_describe_drift(group)}"
        codes = "" if group.rest is None else f", {_describe_codes(group, manifest)}"
        lines.append(f"  step {group.step:>7} ({age}{codes}): {', '.join(group.names)}")
    loss = expected_loss_steps(manifest)
    if loss:
        how = "importance" if any(layer.share is not None for layer in manifest.layers) else "size"
        lines.append(f"  about {loss:.3g} steps of progress are lost (mean age of the layers, weighted by {how})")
    return "\n".join(lines)


def expected_loss_steps(manifest: Manifest) -> float:
    """Steps of training that a resume loses by layers that are older than the checkpoint, about.

    Weighted by what each layer achieves in a step if that was measured, else by its bytes.
    """
    ages = {layer.name: manifest.step - layer.state_step for layer in manifest.layers}
    shares = {layer.name: layer.share for layer in manifest.layers if layer.share is not None}
    if len(shares) < len(ages) or not sum(shares.values()):
        sizes = {layer.name: sum(file.bytes for file in layer.plain_files) for layer in manifest.layers}
        total = sum(sizes.values()) or 1
        shares = {name: size / total for name, size in sizes.items()}
    return mean_age(ages, shares)


def _describe_drift(group: LayerGroup) -> str:
    """``, drift 2.1 % to 5.6 %``: of the layers of a group, where it was measured."""
    if not group.drifts:
        return ""
    least, most = _percent(min(group.drifts)), _percent(max(group.drifts))
    return f", drift {most}" if least == most else f", drift {least} to {most}"


def _describe_codes(group: LayerGroup, manifest: Manifest) -> str:
    """``as q8 codes, exact 100 steps ago; weights within 2.1e-05, moments 0.6 %, 2.3 %``: of each the worst."""
    rest = group.rest or ""
    text = f"as {rest}" if rest.startswith("codes(") else f"as {rest} codes"
    if group.exact_steps:
        ages = sorted({manifest.step - step for step in (group.exact_steps[-1], group.exact_steps[0])})
        text += f", exact {' to '.join(map(str, ages))} {'step' if ages[-1] == 1 else 'steps'} ago"
    weights = group.errors.get("weights")
    text += "; weights exact" if weights is None else f"; weights within {weights:.2g}"
    moments = {name: group.errors[name] for name in ("first", "second") if name in group.errors}
    if moments:
        name = "moments" if len(moments) == 2 else f"{next(iter(moments))} moments"
        text += f", {name} {', '.join(map(_percent, moments.values()))}"
    elif manifest.contents == "full":
        text += ", moments exact"
    return text


def _percent(share: float) -> str:
    """Two digits, and no exponent where it is large."""
    return f"{100 * share:.0f} %" if share > 0.995 else f"{100 * share:.2g} %"
