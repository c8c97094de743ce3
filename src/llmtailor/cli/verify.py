"""``llmtailor verify``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ._output import AsJson, IsQuiet, Output

__all__ = ["verify"]


def verify(
    paths: Annotated[
        list[Path], typer.Argument(metavar="PATH...", help="Checkpoints, or runs: all of theirs.", show_default=False)
    ],
    as_json: AsJson = False,
    is_quiet: IsQuiet = False,
) -> None:
    """Read every byte of checkpoints and tell what is not as it was published. Exit code 5 if anything is."""
    from ..errors import IntegrityError
    from ..manifest import MANIFEST_NAME
    from ..reports.verification import total_nbytes, verify_all
    from ..targets import find_checkpoints, find_passed_over

    out = Output(as_json=as_json, is_quiet=is_quiet)
    checkpoints = find_checkpoints(paths)
    with out.file_progress(lambda: total_nbytes(checkpoints)) as on_file:
        verification = verify_all(checkpoints, on_file=on_file)
    out.show(verification)
    for path in find_passed_over(paths):
        out.note(f"passed over: {path}, no {MANIFEST_NAME}: another tool's, or half a checkpoint")
    if verification.num_bad:
        raise typer.Exit(IntegrityError.exit_code)
