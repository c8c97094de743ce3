"""The ``llmtailor`` command: puts the commands together.

Importing it must stay cheap, so a command imports what it needs when it runs.
"""

from __future__ import annotations

from typing import Annotated

import typer

from .. import __version__
from ._errors import reported
from .demo import demo
from .diff import diff
from .estimate import estimate
from .export import export
from .ls import ls
from .merge import merge
from .plan import plan
from .prune import prune
from .show import show
from .verify import verify

__all__ = ["app", "main"]

app = typer.Typer(
    name="llmtailor",
    help="Checkpoints of LLM training, layer by layer: list, inspect, verify, compare, merge, remove.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    # In frames, help is cut to the width of the terminal, names of options included.
    rich_markup_mode=None,
)

for _command in (ls, show, verify, diff, estimate, plan, merge, export, prune, demo):
    app.command()(reported(_command))


def _print_version(is_wanted: bool) -> None:
    if is_wanted:
        typer.echo(f"llmtailor {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Console entry."""
    app(prog_name="llmtailor")
