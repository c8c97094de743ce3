"""``llmtailor demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from ._output import AsJson, IsQuiet, Output

__all__ = ["demo"]


def demo(
    steps: Annotated[int, typer.Option(help="Training steps.")] = 120,
    size: Annotated[
        Literal["tiny", "small", "medium"],
        typer.Option(help="Of the model: 3, 57 or 280 MB a full save; medium takes many minutes."),
    ] = "small",
    strategy: Annotated[str, typer.Option(help="Which layers a save writes.")] = "parity",
    save_steps: Annotated[int, typer.Option(help="A save every so many steps.")] = 8,
    seed: Annotated[int, typer.Option(help="Of weights, data order and dropout; the same for both runs.")] = 0,
    output: Annotated[
        Path | None,
        typer.Option(help="Directory to write to, new or empty; llmtailor-demo-<n> if left out.", show_default=False),
    ] = None,
    keep: Annotated[bool, typer.Option(help="Keep the checkpoints; picture, report and logs always stay.")] = True,
    as_json: AsJson = False,
    is_quiet: IsQuiet = False,
) -> None:
    """Train, crash in the middle of a save, resume and compare; on this machine, in about a minute."""
    from ..demo.options import DemoOptions
    from ..demo.progress import Bars
    from ..demo.run import run_demo

    options = DemoOptions(steps=steps, size=size, strategy=strategy, save_steps=save_steps, seed=seed)
    with Bars(is_quiet=is_quiet) as bars:
        report = run_demo(options, output, keep=keep, listener=bars)
    Output(as_json=as_json, is_quiet=is_quiet).show(report)
