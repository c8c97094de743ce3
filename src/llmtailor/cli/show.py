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
    is_drift: Annotated[bool, typer.Option("--drift", help="Show how the layers move instead.")] = False,
    as_json: AsJson = False,
    is_quiet: IsQuiet = False,
) -> None:
    """Show what a checkpoint is made of: layers and the steps they are of, optimizers, files."""
    from ..checkpoint import open_checkpoint
    from ..drift_log import read_measurements
    from ..reports.checkpoint_page import CheckpointPage
    from ..reports.drift_page import DriftPage
    from ..targets import newest_checkpoint

    checkpoint = open_checkpoint(newest_checkpoint(path))
    output = Output(as_json=as_json, is_quiet=is_quiet)
    if is_drift:
        output.show(DriftPage(checkpoint=checkpoint, measurements=read_measurements(checkpoint.path.parent)))
    else:
        output.show(CheckpointPage(checkpoint=checkpoint, has_tensors=has_tensors))
