"""``llmtailor ls``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ._output import AsJson, IsQuiet, Output

__all__ = ["ls"]


def ls(
    run: Annotated[Path, typer.Argument(help="Directory that holds checkpoint-<step>.", show_default=False)],
    as_json: AsJson = False,
    is_quiet: IsQuiet = False,
) -> None:
    """List the checkpoints of a run, and what they take on disk."""
    from ..inventory import take_inventory
    from ..reports.listing import Listing

    Output(as_json=as_json, is_quiet=is_quiet).show(Listing(take_inventory(run)))
