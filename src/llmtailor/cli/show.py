"""``llmtailor show``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ._output import AsJson, IsQuiet, Output

__all__ = ["show"]


def show(
    path: Annotated[
        Path, typer.Argument(metavar="PATH", help="A checkpoint, or a run: its newest.", show_default=False)
    ],
    has_tensors: Annotated[bool, typer.Option("--tensors", help="List the tensors too.")] = False,
    as_json: AsJson = False,
    is_quiet: IsQuiet = False,
) -> None:
    """Show what a checkpoint is made of: layers and the steps they are of, optimizers, files."""
    from ..checkpoint import open_checkpoint
    from ..reports.checkpoint_page import CheckpointPage
    from ..targets import newest_checkpoint

    page = CheckpointPage(checkpoint=open_checkpoint(newest_checkpoint(path)), has_tensors=has_tensors)
    Output(as_json=as_json, is_quiet=is_quiet).show(page)
