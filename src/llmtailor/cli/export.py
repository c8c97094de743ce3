"""``llmtailor export``."""

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
)
from ._output import AsJson, IsQuiet, Output, collect_warnings

__all__ = ["export"]


def export(
    source: Annotated[Path, typer.Argument(help="A checkpoint of any format.", show_default=False)],
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
    """Write a checkpoint in another format, or for another number of ranks.

    The source may be a checkpoint of LLMTailor, the HF Trainer, DeepSpeed ZeRO or PyTorch DCP or FSDP. It is never
    changed and never trusted: no pickle is run, and programs (*.py) are not copied. The result appears whole or not
    at all.
    """
    import time

    from ..merging import plan_export, write_merge
    from ..reports.merging import Merging

    out = Output(as_json=as_json, is_quiet=is_quiet)
    begin = time.monotonic()
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
    plan = plan_export(source, options)
    if is_dry_run:
        out.show(Merging(plan))
        return
    with out.byte_progress("export", plan.work_nbytes) as on_bytes, collect_warnings() as warned:
        write_merge(plan, output, on_bytes=on_bytes)
    out.show(Merging(plan, output, time.monotonic() - begin, tuple(warned)))
