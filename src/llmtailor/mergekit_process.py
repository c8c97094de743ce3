"""Merge methods that only mergekit has, run by an installed mergekit in a process of its own; weights alone."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import UnsupportedError, WriteError
from .storage import OutputDirectory

__all__ = ["merged_by_mergekit"]

# Source: mergekit 0.1, pyproject.toml (project.scripts); usage `mergekit-yaml CONFIG OUT`.
_COMMAND = "mergekit-yaml"
_MAX_SHOWN = 2000


@contextmanager
def merged_by_mergekit(what: str, recipe: Path, output: Path) -> Iterator[Path]:
    """Let mergekit carry out a recipe.

    Args:
        what: What in the recipe only mergekit can do, for the error ("merge_method slerp").
        recipe: The YAML file, handed over as it is.
        output: Where the result will go; directories above it are made. mergekit's own output lies beside it, hidden,
            for as long as the context lasts; what a killed process left of one is removed by the next merge to there.

    Yields:
        A model directory in the format of Hugging Face.

    Raises:
        AlreadyExistsError: There is something at ``output``.
        UnsupportedError: mergekit is not installed.
        WriteError: It failed; the end of what it said is in the error. Or there is no place for its output.
    """
    command = shutil.which(_COMMAND)
    if command is None:
        raise UnsupportedError(
            f"{what} is mergekit's own, and mergekit is not installed",
            kind="needs-mergekit",
            path=recipe,
            expected=f"the command {_COMMAND}, or one of the methods passthrough and linear",
            found="no such command",
            hint="pip install mergekit; it merges weights, not optimizer state",
        )
    # It will never be published; how much mergekit writes, nobody knows.
    place = OutputDirectory(output, nbytes=0, num_files=0)
    try:
        merged = place.path_of("merged")
        # Nothing is downloaded on behalf of a recipe, and no program out of a model's directory is run.
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
        finished = subprocess.run(
            [command, os.fspath(recipe), os.fspath(merged)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            env=environment,
            check=False,
        )
        if finished.returncode != 0:
            raise WriteError(
                f"mergekit failed with exit code {finished.returncode}",
                kind="mergekit-failed",
                path=recipe,
                found=finished.stderr[-_MAX_SHOWN:].strip() or "it said nothing",
            )
        yield merged
    finally:
        place.abandon()
