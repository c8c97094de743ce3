"""``flags.jsonl`` in a run's directory: which layers each save wrote, by LLMTailor's numbers, for its tools."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from .errors import SaveFailedWarning, TailorError
from .formats.manifest_file import read_manifest
from .formats.tailored import layers_of
from .recipe import FlaggedSave, encode_flags, layers_to_flags, read_flags
from .storage import RunDirectory
from .tiers import Tiers

__all__ = ["FLAG_LOG_NAME", "log_flags_and"]

FLAG_LOG_NAME = "flags.jsonl"


def log_flags_and(then: Callable[[Path], None] | None, tiers: Tiers) -> Callable[[Path], None]:
    """What adds each published checkpoint to the run's log, and calls the next in line.

    What stops it (a model whose layers have no numbers, a log that is not ours) costs a line and no checkpoint.
    """

    def on_published(checkpoint: Path) -> None:
        try:
            _log_flags(tiers.run, checkpoint)
        except (TailorError, OSError) as err:
            tiers.notices.append(SaveFailedWarning(f"{FLAG_LOG_NAME} was not written: {err}"))
        if then is not None:
            then(checkpoint)

    return on_published


def _log_flags(run: RunDirectory, checkpoint: Path) -> None:
    path = run.path / FLAG_LOG_NAME
    manifest, _ = read_manifest(checkpoint)
    written = [layer.name for layer in manifest.layers if layer.step == manifest.step]
    units = layers_to_flags(written, layers_of(manifest))
    known = read_flags(path.read_bytes(), path) if path.exists() else ()
    # Lines of this step and later ones are of a branch that was left.
    kept = [save for save in known if save.step < manifest.step]
    text = encode_flags([*kept, FlaggedSave(step=manifest.step, units=units)])
    run.write_pointer(FLAG_LOG_NAME, text.decode())
