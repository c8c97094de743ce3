"""``llmtailor merge``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ._merge_options import (
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
)
from ._output import AsJson, IsQuiet, Output, collect_warnings

__all__ = ["merge"]


def merge(
    recipe: Annotated[Path, typer.Argument(help="YAML file, in mergekit's dialect or ours.", show_default=False)],
    output: Annotated[Path, typer.Argument(help="The new directory; must not exist.", show_default=False)],
    to: To = None,
    weights_only: WeightsOnly = None,
    dtype: DType = None,
    out_shard_size: ShardSize = None,
    copy_tokenizer: CopyTokenizer = True,
    ranks: Ranks = None,
    zero_stage: ZeroStage = None,
    own_steps: OwnSteps = False,
    parameter_names: ParameterNames = None,
    is_dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show the plan; reads no tensor.")] = False,
    as_json: AsJson = False,
    is_quiet: IsQuiet = False,
) -> None:
    """Merge layers of several checkpoints into one that training resumes from.

    Sources may be checkpoints of LLMTailor, the HF Trainer, DeepSpeed ZeRO and PyTorch DCP or FSDP. They are never
    changed and never trusted: no pickle is run, and programs (*.py) are not copied. The result appears whole or not
    at all.
    """
    import time

    from ..merging import open_plan, plan_merge, read_recipe, write_merge
    from ..reports.merging import Merging

    out = Output(as_json=as_json, is_quiet=is_quiet)
    begin = time.monotonic()
    check_recipe_path(recipe)
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
    if is_dry_run:
        out.show(Merging(plan_merge(read_recipe(recipe), options)))
        return
    with open_plan(recipe, output, options) as plan:
        with out.byte_progress("merge", plan.work_nbytes) as on_bytes, collect_warnings() as warned:
            write_merge(plan, output, on_bytes=on_bytes)
        out.show(Merging(plan, output, time.monotonic() - begin, tuple(warned)))
