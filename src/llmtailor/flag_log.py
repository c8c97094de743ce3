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
    log = _FlagLog(tiers.run)

    def on_published(checkpoint: Path) -> None:
        try:
            log.add(checkpoint)
        except (TailorError, OSError) as err:
            tiers.notices.append(SaveFailedWarning(f"{FLAG_LOG_NAME} was not written: {err}"))
        if then is not None:
            then(checkpoint)

    return on_published


class _FlagLog:
    """The log as it was last written here: what somebody else may have put into it is parsed, no line twice."""

    def __init__(self, run: RunDirectory) -> None:
        self._run = run
        self._path = run.path / FLAG_LOG_NAME
        self._written: tuple[int, ...] | None = None
        """Identity of the file; None before the first line."""
        self._last_step = -1

    def add(self, checkpoint: Path) -> None:
        """A checkpoint was published.

        Raises:
            TailorError, OSError: The log is as it was.
        """
        manifest, _ = read_manifest(checkpoint)
        written = [layer.name for layer in manifest.layers if layer.step == manifest.step]
        save = FlaggedSave(step=manifest.step, units=layers_to_flags(written, layers_of(manifest)))
        text = self._text_before(save.step) + encode_flags([save])
        # Whole, and not at its end: a tool that reads it meets no line that a crash cut off.
        self._run.write_pointer(FLAG_LOG_NAME, text.decode())
        self._written, self._last_step = _identity(self._path), save.step

    def _text_before(self, step: int) -> bytes:
        if not self._path.exists():
            return b""
        if self._written == _identity(self._path) and self._last_step < step:
            return self._path.read_bytes()
        # Lines of this step and later ones are of a branch that was left.
        return encode_flags(save for save in read_flags(self._path.read_bytes(), self._path) if save.step < step)


def _identity(path: Path) -> tuple[int, ...]:
    status = path.stat()
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
