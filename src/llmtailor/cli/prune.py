"""``llmtailor prune``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ._output import AsJson, IsQuiet, Output

if TYPE_CHECKING:
    from ..reports.removal import Removal
    from ..storage import RunDirectory

__all__ = ["prune"]


def prune(
    run: Annotated[Path, typer.Argument(help="Directory that holds checkpoint-<step>.", show_default=False)],
    keep: Annotated[
        int | None, typer.Option(min=1, help="Keep this many checkpoints, the newest first.", show_default=False)
    ] = None,
    keep_consistent: Annotated[
        bool, typer.Option(help="Keep the newest checkpoint whose layers are all of one step, exactly.")
    ] = True,
    pin: Annotated[list[int] | None, typer.Option(metavar="STEP", help="Keep this step; may be repeated.")] = None,
    bad: Annotated[bool, typer.Option("--bad", help="Remove quarantined checkpoints (*.bad) too.")] = False,
    superseded: Annotated[
        bool, typer.Option("--superseded", help="Remove those of abandoned branches (*.superseded) too.")
    ] = False,
    is_dry_run: Annotated[bool, typer.Option("--dry-run", help="Only tell what would go.")] = False,
    is_sure: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    as_json: AsJson = False,
    is_quiet: IsQuiet = False,
) -> None:
    """Remove old checkpoints of a run that nobody is writing. Those that stay keep all their files."""
    from contextlib import closing

    from ..inventory import State, take_inventory
    from ..reports.removal import plan_removal
    from ..storage import RunDirectory

    out = Output(as_json=as_json, is_quiet=is_quiet)
    states = {state for state, is_wanted in ((State.BAD, bad), (State.SUPERSEDED, superseded)) if is_wanted}

    def plan() -> Removal:
        return plan_removal(
            take_inventory(run), limit=keep, keep_consistent=keep_consistent, pinned=pin or (), states=states
        )

    # Also before the lock is taken: a wish that cannot be granted must not leave a lock file in a strange directory.
    removal = plan()
    if is_dry_run:
        out.show(removal)
        return
    with closing(RunDirectory(run)) as directory:
        _remove(plan(), directory, out, is_sure=is_sure)


def _remove(removal: Removal, directory: RunDirectory, out: Output, *, is_sure: bool) -> None:
    """Show, ask, verify what stays, and only then remove."""
    from dataclasses import replace

    from ..verify import verify_checkpoint

    if not out.as_json and not out.is_quiet:
        out.show(removal)
    if removal.doomed:
        successor = removal.successor
        if not is_sure:
            _ask(removal, out)
        with out.file_progress(lambda: successor.nbytes) as on_file:
            verify_checkpoint(successor.path, on_file=on_file).raise_if_bad()
        for entry in removal.doomed:
            directory.remove(entry.path)
        out.note(f"removed {removal.summary()} freed; {successor.path.name} was verified first")
    if out.as_json or out.is_quiet:
        out.show(replace(removal, is_done=bool(removal.doomed)))


def _ask(removal: Removal, out: Output) -> None:
    from ..errors import InvalidInputError

    if not sys.stdin.isatty():
        raise InvalidInputError(
            "cannot ask whether to remove them; nothing was removed",
            kind="not-confirmed",
            path=removal.doomed[0].path.parent,
            expected="--yes, or an answer on a terminal",
            found="no terminal",
            hint="add --yes; --dry-run shows what would go",
        )
    if not out.confirm(f"remove {removal.summary()}?"):
        out.note("nothing was removed")
        raise typer.Exit(1)
