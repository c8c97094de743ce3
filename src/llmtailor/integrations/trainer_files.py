"""What stock transformers leaves in a checkpoint's directory, and what it does beside that."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers.trainer import SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.utils import logging as transformers_logging

from ..checkpoint import Checkpoint
from ..errors import IncompleteError
from ..formats.deepspeed.engine_state import ENGINE_STATE_NAME
from ..manifest import MANIFEST_NAME

__all__ = ["is_ours", "is_stock", "make_writable", "require_trainer", "without_progress_bars"]


def is_ours(path: str) -> bool:
    """True for a directory that has a manifest of ours."""
    return os.path.isfile(os.path.join(path, MANIFEST_NAME))


def is_stock(path: str) -> bool:
    """True for a directory that may be a checkpoint of transformers, and is no half of ours."""
    return os.path.isfile(os.path.join(path, TRAINER_STATE_NAME)) and not os.path.isdir(os.path.join(path, "optimizer"))


def require_trainer(checkpoint: Checkpoint) -> None:
    """Raise unless a Trainer saved a checkpoint.

    Raises:
        IncompleteError: It lacks what stock code reads when it resumes.
    """
    has_engine = (checkpoint.path / ENGINE_STATE_NAME).is_file()  # DeepSpeed's may have the scheduler
    names = (TRAINER_STATE_NAME,) if has_engine else (TRAINER_STATE_NAME, SCHEDULER_NAME)
    missing = [name for name in names if not (checkpoint.path / name).is_file()]
    if missing:
        raise IncompleteError(
            "the checkpoint was not saved by a Trainer",
            kind="other-trainer",
            path=checkpoint.path,
            expected=f"{TRAINER_STATE_NAME} and {SCHEDULER_NAME}",
            found=f"no {' and no '.join(missing)}",
            hint="resume it with the loop that saved it",
        )


def make_writable(checkpoint: Path, output_dir: Path) -> None:
    """Let stock code write again what the push copied: copies of our read-only files are read-only, too."""
    for name in os.listdir(checkpoint):
        copy = output_dir / name
        if copy.is_file() and not copy.is_symlink():
            copy.chmod(copy.stat().st_mode | stat.S_IWUSR)


@contextlib.contextmanager
def without_progress_bars() -> Iterator[None]:
    """Stock ``save_pretrained`` shows a bar, even for no weights at all."""
    bars: Any = transformers_logging  # its functions have no annotations
    were_enabled = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        yield
    finally:
        if were_enabled:
            bars.enable_progress_bar()
