"""Which checkpoint of a run holds which version of each layer, for the recipe that ``llmtailor plan RUN`` writes.

Three kinds of run: ours, whose manifests say at which step each layer was saved; checkpoints of other tools of which
each holds some of the layers; and those of LLMTailor and StreamCheck, where a log says which layers were saved.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from .catalog import Catalog
from .errors import InvalidInputError, NotFoundError
from .formats import open_catalog
from .formats.manifest_file import read_manifest
from .layers import LayerKind, LayerMap, map_names
from .recipe import SavedLayers, compose_recipe, flags_to_layers, read_flags
from .storage import CheckpointEntry, list_checkpoints

__all__ = ["recipe_of_flags", "recipe_of_run"]

_MAX_LOG_NBYTES = 64 * 2**20


def recipe_of_run(run: Path, step: int | None, *, default: Path | None = None) -> str:
    """The recipe of the newest version of each layer at or before a step.

    Codes are a version like any other, of the step they were made at: they are nearer to the layer as it was then than
    exact files of an earlier step.

    Args:
        run: Directory that holds checkpoint-<step>, ours or another tool's.
        step: None for the newest there is.
        default: Where layers come from that no checkpoint holds. Must be a checkpoint or a model.

    Returns:
        YAML text in our dialect.

    Raises:
        NotFoundError: There is no checkpoint at or before the step.
        IncompleteError: Some layer is in no checkpoint.
        TailorError: What is wrong with the default.
    """
    entries = _entries(run, step)
    ours = [entry for entry in entries if entry.has_manifest]
    if ours:
        if default is not None:
            _open_part(default)  # the recipe names it, so it must be one that can be used
        saved = tuple(_read_manifests(ours))
        names = tuple(layer.name for layer in read_manifest(ours[-1].path)[0].layers)
    else:
        saved, names = _read_partial(entries, default)
    return compose_recipe(saved, layers=names, step=_newest(entries), default=None if default is None else str(default))


def recipe_of_flags(run: Path, log: Path, step: int | None, *, default: Path | None = None) -> str:
    """The recipe for checkpoints of LLMTailor or StreamCheck, from the log of what was saved.

    Args:
        run: Directory that holds checkpoint-<step>.
        log: ``flags.jsonl``; a line is ``{"step": 160, "flag": [0, 3, 29]}``.
        step: None for the newest there is.
        default: Where layers come from that no line names; without one the oldest checkpoint.

    Raises:
        InvalidInputError: The log is wrong; names the line.
        NotFoundError: A checkpoint of the log is not there.
        IncompleteError: Some layer is in no checkpoint.
    """
    entries = {entry.step: entry for entry in _entries(run, step)}
    flagged = [save for save in read_flags(_read_log(log), log) if step is None or save.step <= step]
    gone = sorted({save.step for save in flagged} - entries.keys())
    if gone:
        raise NotFoundError(
            "checkpoints that the log names are not there",
            kind="missing-checkpoint",
            path=run,
            expected=", ".join(f"checkpoint-{each}" for each in gone[:8]),
            found=", ".join(entry.path.name for entry in entries.values()),
        )
    first = next(iter(entries.values())).path if default is None else default
    whole = _open_part(first).layers
    is_tied = not any(layer.kind is LayerKind.HEAD for layer in whole)
    saved = [
        SavedLayers(
            path=str(entries[save.step].path),
            step=save.step,
            layers=flags_to_layers(save.units, len(whole.blocks), is_tied, layers=whole),
        )
        for save in flagged
    ]
    return compose_recipe(saved, layers=whole.names, step=max(entries), default=str(first))


def _read_log(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            text = file.read(_MAX_LOG_NBYTES + 1)
    except OSError as err:
        raise InvalidInputError(
            f"cannot read the log of saved layers: {err.strerror}",
            kind="log-file",
            path=path,
            expected="a file such as flags.jsonl, of LLMTailor or StreamCheck",
            hint="check the path given with --flags; checkpoints of ours need no log",
        ) from err
    if len(text) > _MAX_LOG_NBYTES:
        raise InvalidInputError(
            "the log of saved layers is too long",
            kind="log-file",
            path=path,
            expected=f"at most {_MAX_LOG_NBYTES} bytes",
        )
    return text


def _entries(run: Path, step: int | None) -> list[CheckpointEntry]:
    entries = sorted(list_checkpoints(run), key=lambda entry: entry.step) if run.is_dir() else []
    kept = [entry for entry in entries if step is None or entry.step <= step]
    if not kept:
        steps = ", ".join(str(entry.step) for entry in entries[:8])
        raise NotFoundError(
            "there is no checkpoint to plan from",
            kind="missing-checkpoint",
            path=run,
            expected="checkpoint-<step>" + ("" if step is None else f" of step {step} or before"),
            found=f"steps {steps}" if entries else "none",
            hint=_say_where(run, entries),
        )
    return kept


def _say_where(run: Path, entries: Sequence[CheckpointEntry]) -> str:
    if entries:
        return f"llmtailor ls {run} lists what is there"
    inside = run.resolve()
    if run.is_dir() and any(entry.path == inside for entry in list_checkpoints(inside.parent)):
        return f"this is one checkpoint; give the run: llmtailor plan {inside.parent}"
    return "give the directory that holds checkpoint-<step>"


def _newest(entries: Sequence[CheckpointEntry]) -> int:
    return entries[-1].step


def _read_manifests(entries: Sequence[CheckpointEntry]) -> Iterator[SavedLayers]:
    """Of whole checkpoints: the first of those still there that has a layer's version stands for its save."""
    held: dict[str, tuple[int, bool]] = {}
    for entry in entries:
        manifest, _ = read_manifest(entry.path)
        # Exact files of a step are another version than codes of it.
        now = {layer.name: (layer.state_step, layer.encoding is None) for layer in manifest.layers}
        new = tuple(name for name, saved in now.items() if held.get(name) != saved)
        held.update(now)
        yield SavedLayers(path=str(entry.path), step=entry.step, layers=new)


@dataclass(frozen=True, slots=True)
class _Opened:
    entry: CheckpointEntry
    catalog: Catalog


def _read_partial(
    entries: Sequence[CheckpointEntry], default: Path | None
) -> tuple[tuple[SavedLayers, ...], tuple[str, ...]]:
    """Of other tools' checkpoints: those layers of which every tensor is there."""
    # An empty directory is what is left of a save that chose no layer.
    opened = [_Opened(entry, _open_part(entry.path)) for entry in entries if any(entry.path.iterdir())]
    catalogs = [each.catalog for each in opened] + ([] if default is None else [_open_part(default)])
    layers = _cut_together(catalogs)
    saved = tuple(
        SavedLayers(
            path=str(each.entry.path),
            step=each.entry.step,
            layers=tuple(layer.name for layer in layers if all(fqn in each.catalog.weights for fqn in layer.fqns)),
        )
        for each in opened
    )
    return saved, layers.names


def _open_part(path: Path) -> Catalog:
    """Layers are what a recipe is made of; the optimizer is looked at when it is carried out."""
    return open_catalog(path, with_optimizer=False, allow_partial=True)


def _cut_together(catalogs: Sequence[Catalog]) -> LayerMap:
    return map_names({fqn: ref.meta.shape for catalog in catalogs for fqn, ref in catalog.weights.items()})
