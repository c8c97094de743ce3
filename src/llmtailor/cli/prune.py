"""``llmtailor prune``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ._output import AsJson, IsQuiet, Output

if TYPE_CHECKING:
    from ..inventory import RunEntry
    from ..reports.removal import Removal
    from ..storage import RunDirectory

__all__ = ["prune"]

_Run = Annotated[Path, typer.Argument(help="Directory that holds checkpoint-<step>.", show_default=False)]
_Keep = Annotated[
    int | None, typer.Option(min=1, help="Keep this many checkpoints, the newest first.", show_default=False)
]
_Every = Annotated[int | None, typer.Option(min=1, help="Keep steps that this number divides.", show_default=False)]
_Best = Annotated[
    int | None, typer.Option(min=1, help="Keep this many, the best by --metric first.", show_default=False)
]
_Metric = Annotated[str, typer.Option(help="A name in metrics.json, or logged by the Trainer.")]
_IsAscending = Annotated[
    bool | None,
    typer.Option(
        "--greater-is-better/--lower-is-better",
        help="Of the metric; without it greater is, unless the name ends with loss.",
        show_default=False,
    ),
]
_KeepOptimizer = Annotated[
    int | None, typer.Option(min=1, help="Keep optimizer state in this many, the newest first.", show_default=False)
]
_KeepConsistent = Annotated[
    bool, typer.Option(help="Keep the newest checkpoint whose layers are all of one step, exactly.")
]
_Pin = Annotated[list[int] | None, typer.Option(metavar="STEP", help="Keep this step, from now on; may be repeated.")]
_Unpin = Annotated[list[int] | None, typer.Option(metavar="STEP", help="Let a pinned step go again; may be repeated.")]
_Bad = Annotated[bool, typer.Option("--bad", help="Remove quarantined checkpoints (*.bad) too.")]
_Superseded = Annotated[
    bool, typer.Option("--superseded", help="Remove those of abandoned branches (*.superseded) too.")
]
_IsDryRun = Annotated[bool, typer.Option("--dry-run", help="Only tell what would go, and why the rest stays.")]
_IsSure = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]


def prune(
    run: _Run,
    keep: _Keep = None,
    every: _Every = None,
    best: _Best = None,
    metric: _Metric = "eval_loss",
    greater_is_better: _IsAscending = None,
    keep_optimizer: _KeepOptimizer = None,
    keep_consistent: _KeepConsistent = True,
    pin: _Pin = None,
    unpin: _Unpin = None,
    bad: _Bad = False,
    superseded: _Superseded = False,
    is_dry_run: _IsDryRun = False,
    is_sure: _IsSure = False,
    as_json: AsJson = False,
    is_quiet: IsQuiet = False,
) -> None:
    """Remove old checkpoints of a run that nobody is writing, or of some of them the optimizer state.

    --pin and --unpin work while the run is being written, too.
    """
    from contextlib import closing

    from ..inventory import State, take_inventory
    from ..reports.removal import plan_removal
    from ..retention import Keep
    from ..storage import RunDirectory, read_pins

    out = Output(as_json=as_json, is_quiet=is_quiet)
    states = {state for state, is_wanted in ((State.BAD, bad), (State.SUPERSEDED, superseded)) if is_wanted}
    is_union = every is not None or best is not None
    rules = Keep(
        limit=None if is_union else keep,
        last=keep if is_union else None,
        every=every,
        best=best,
        metric=metric,
        greater_is_better=greater_is_better,
        optimizer=keep_optimizer,
        pinned=tuple(pin or ()),
        consistent=keep_consistent,
    )
    removes = not rules.is_idle or bool(states)
    if not removes and not pin and not unpin:
        raise _nothing_asked(run)

    def plan() -> Removal:
        return plan_removal(take_inventory(run), rules, pinned=read_pins(run).difference(unpin or ()), states=states)

    # Also before the lock is taken: a wish that cannot be granted, or where there is nothing to do, must not leave a
    # lock file in a strange directory.
    removal = plan()
    if not is_dry_run:
        _pin(run, pin or (), unpin or (), out)
    if is_dry_run or not removes or not removal.has_work:
        out.show(removal)
        return
    with closing(RunDirectory(run)) as directory:
        _remove(plan(), directory, out, is_sure=is_sure)


def _nothing_asked(run: Path) -> Exception:
    from ..errors import InvalidInputError

    return InvalidInputError(
        "prune was not told what may go",
        kind="nothing-asked",
        path=run,
        expected="--keep N, --every N, --best N, --keep-optimizer N, --bad or --superseded; or --pin or --unpin STEP",
        found="none of them",
        hint=f"llmtailor prune {run} --keep 3 --dry-run",
    )


def _pin(run: Path, pin: Sequence[int], unpin: Sequence[int], out: Output) -> None:
    from ..storage import add_pin, checkpoint_name, remove_pin

    for step in unpin:
        remove_pin(run, step)
        out.note(f"{checkpoint_name(step)} is not pinned any more")
    for step in pin:
        add_pin(run, step)
        out.note(f"{checkpoint_name(step)} is pinned")


def _remove(removal: Removal, directory: RunDirectory, out: Output, *, is_sure: bool) -> None:
    """Show, ask, verify what stays, and only then remove."""
    from dataclasses import replace

    from ..pruning import thin_checkpoint

    if not out.as_json and not out.is_quiet:
        out.show(removal)
    if removal.has_work:
        successors = removal.successors
        if not is_sure:
            _ask(removal, out)
        _verify(successors, out)
        for entry in removal.doomed:
            directory.remove(entry.path)
        for entry in removal.thinned:
            thin_checkpoint(directory, entry.path)
        names = " and ".join(entry.path.name for entry in successors)
        out.note(
            f"removed {removal.summary()} freed; {names} {'was' if len(successors) == 1 else 'were'} verified first"
        )
    if out.as_json or out.is_quiet:
        out.show(replace(removal, is_done=removal.has_work))


def _verify(entries: Sequence[RunEntry], out: Output) -> None:
    """See to it that what stays is good.

    Raises:
        IntegrityError: It is not.
    """
    from ..errors import IntegrityError
    from ..verify import FileState, verify_checkpoint

    digests: dict[FileState, str] = {}
    with out.file_progress(lambda: sum(entry.nbytes for entry in entries)) as on_file:
        for entry in entries:
            report = verify_checkpoint(entry.path, on_file=on_file, digests=digests)
            try:
                report.raise_if_bad()
            except IntegrityError as err:
                hint = "resume the run first: it sets the checkpoint aside as *.bad; then prune again"
                raise IntegrityError(
                    **{**err.fields(), "what": f"nothing was removed: {err.what}", "hint": hint}
                ) from err


def _ask(removal: Removal, out: Output) -> None:
    from ..errors import InvalidInputError

    if not sys.stdin.isatty():
        raise InvalidInputError(
            "cannot ask whether to remove them; nothing was removed",
            kind="not-confirmed",
            path=(removal.doomed or removal.thinned)[0].path.parent,
            expected="--yes, or an answer on a terminal",
            found="no terminal",
            hint="add --yes; --dry-run shows what would go",
        )
    if not out.confirm(f"remove {removal.summary()}?"):
        out.note("nothing was removed")
        raise typer.Exit(1)
