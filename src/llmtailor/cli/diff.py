"""``llmtailor diff``."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from ._merge_options import ParameterNames, read_parameter_names
from ._output import AsJson, Output

__all__ = ["diff"]

_EXIT_DIFFERENT = 1


class Kind(StrEnum):
    """What can be compared alone."""

    WEIGHTS = "weights"
    OPTIMIZER = "optimizer"


def diff(
    a: Annotated[
        str,
        typer.Argument(
            metavar="A", help="A checkpoint of any format, or a model of the hub's cache.", show_default=False
        ),
    ],
    b: Annotated[str, typer.Argument(metavar="B", help="Another one.", show_default=False)],
    has_tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor instead of every layer.")] = False,
    only: Annotated[Kind | None, typer.Option("--only", help="Compare one of both.", show_default=False)] = None,
    layers: Annotated[
        list[str] | None,
        typer.Option(
            "--layers",
            metavar="GLOB",
            help="Compare these layers: 'layers.*', layers.0-3, norm; may be repeated.",
            show_default=False,
        ),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Draw a heat map into a .png or .svg file.", show_default=False),
    ] = None,
    parameter_names: ParameterNames = None,
    as_json: AsJson = False,
    is_quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Print the names of what differs alone, one a line.")
    ] = False,
) -> None:
    """Tell how two checkpoints differ: weights and optimizer state, by layer or tensor, whatever their formats.

    Exit code 0 if they are identical, 1 if they differ, more if something is wrong with them.
    """
    from ..diff import compare, plan_diff
    from ..reports.difference import DifferencePage
    from ..reports.heat_map import check_picture, draw_heat_map

    out = Output(as_json=as_json, is_quiet=is_quiet)
    if plot is not None:
        check_picture(plot)
    names = read_parameter_names(parameter_names)
    plan = plan_diff(a, b, only=None if only is None else only.value, layers=layers or (), parameter_names=names)
    with out.byte_progress("diff", plan.nbytes) as on_bytes:
        difference = compare(plan, on_bytes=on_bytes)
    if plot is not None:
        draw_heat_map(difference, plot)
        out.note(f"drew {plot}")
    out.show(DifferencePage(difference=difference, has_tensors=has_tensors))
    if not difference.is_identical:
        raise typer.Exit(_EXIT_DIFFERENT)
