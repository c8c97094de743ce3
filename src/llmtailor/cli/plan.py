"""``llmtailor plan``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated

import typer

from ._merge_options import (
    OPTION_NAMES,
    CopyTokenizer,
    DType,
    OwnSteps,
    ParameterNames,
    Ranks,
    ShardSize,
    To,
    WeightsOnly,
    ZeroStage,
    build_options,
    check_recipe_path,
    given_options,
)
from ._output import AsJson, IsQuiet, Output

__all__ = ["plan"]


def plan(
    target: Annotated[
        Path,
        typer.Argument(
            metavar="RECIPE|RUN",
            help="A recipe, to see what it would do; or a directory of checkpoints, to get a recipe for it.",
            show_default=False,
        ),
    ],
    step: Annotated[
        int | None,
        typer.Option(min=0, help="Of a run: newest version of each layer at or before it.", show_default="the newest"),
    ] = None,
    flags: Annotated[
        Path | None,
        typer.Option(help="Of a run: log of saved layers (flags.jsonl of LLMTailor, StreamCheck).", show_default=False),
    ] = None,
    default: Annotated[
        Path | None,
        typer.Option(help="Of a run: checkpoint for layers that were never saved.", show_default=False),
    ] = None,
    recipe_path: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Of a run: file for the recipe; as a rule stdout.", show_default=False),
    ] = None,
    to: To = None,
    weights_only: WeightsOnly = None,
    dtype: DType = None,
    out_shard_size: ShardSize = None,
    copy_tokenizer: CopyTokenizer = True,
    ranks: Ranks = None,
    zero_stage: ZeroStage = None,
    own_steps: OwnSteps = False,
    parameter_names: ParameterNames = None,
    as_json: AsJson = False,
    is_quiet: IsQuiet = False,
) -> None:
    """Show what a recipe would do, layer by layer; or write the recipe that puts a run's newest layers together.

    Reads names, places and step counts of the sources; no tensor.
    """
    from ..merging import plan_merge, read_recipe
    from ..reports.merging import Merging

    out = Output(as_json=as_json, is_quiet=is_quiet)
    of_run = {"--step": step, "--flags": flags, "--default": default, "--output": recipe_path}
    options = build_options(
        to=to,
        weights_only=weights_only,
        dtype=dtype,
        out_shard_size=out_shard_size,
        copy_tokenizer=copy_tokenizer,
        ranks=ranks,
        zero_stage=zero_stage,
        own_steps=own_steps,
        parameter_names=parameter_names,
    )
    if target.is_dir():
        _refuse_idle(target, "a run", given_options(options), of_run)
        _write_recipe(target, step, flags, default, recipe_path, out)
        return
    check_recipe_path(target)
    _refuse_idle(
        target, "a recipe", [name for name, value in of_run.items() if value is not None], OPTION_NAMES.values()
    )
    out.show(Merging(plan_merge(read_recipe(target), options)))


def _refuse_idle(target: Path, what: str, idle: Sequence[str], known: Iterable[str]) -> None:
    """An option that would do nothing was meant to do something."""
    from ..errors import InvalidInputError

    if idle:
        raise InvalidInputError(
            f"options that do not apply to {what}",
            kind="idle-option",
            path=target,
            expected=f"of {', '.join(known)}",
            found=", ".join(idle),
            hint="plan RUN -o recipe.yaml writes a recipe; plan recipe.yaml, with merge's options, shows what it does",
        )


def _write_recipe(
    run: Path, step: int | None, flags: Path | None, default: Path | None, path: Path | None, out: Output
) -> None:
    from ..errors import AlreadyExistsError, NotFoundError
    from ..reports.composed import ComposedRecipe
    from ..save_history import recipe_of_flags, recipe_of_run

    if flags is None:
        text = recipe_of_run(run, step, default=default)
    else:
        text = recipe_of_flags(run, flags, step, default=default)
    if path is not None:
        try:
            with path.open("x", encoding="utf-8") as file:
                file.write(text)
        except FileExistsError as err:
            raise AlreadyExistsError(
                "there is a file already",
                kind="exists",
                path=path,
                expected="a name that is free",
                found="a directory" if path.is_dir() else "a file",
                hint="choose another name, or remove it",
            ) from err
        except FileNotFoundError as err:
            raise NotFoundError(
                "there is no directory for the recipe",
                kind="missing-path",
                path=path.parent,
                expected="a directory",
                found="nothing",
                hint="make it, or choose another name with -o",
            ) from err
    out.show(ComposedRecipe(text, path))
