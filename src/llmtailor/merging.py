"""Merging and exporting checkpoints: from a recipe to a new directory.

    recipe --open sources--> catalogs --plan--> catalog --target's planner--> files to be --write--> the new checkpoint

``plan_merge`` does all but the last step and reads no tensor; ``write_merge`` does the last. ``merge`` and ``export``
are both.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from . import __version__
from .assembly import check_published, execute, read_paths
from .carried_files import PROVENANCE_NAME, fit_small_files, note_left_out
from .catalog import Catalog
from .errors import InvalidInputError, UnsupportedError
from .file_plan import CheckpointPlan, FilePlan, WrittenFile
from .formats import FORMATS, open_catalog
from .formats.hf.config import read_dtype
from .formats.numbers import read_number
from .hub import locate_source
from .manifest import FileRecord
from .merge_sources import as_recipe_sees_it, open_sources, tokenizer_files, touch
from .mergekit_process import merged_by_mergekit
from .plan import (
    LayerRow,
    drop_optimizer,
    merge_catalogs,
    tabulate_layers,
)
from .recipe import (
    MAX_NBYTES,
    MergekitRecipe,
    Recipe,
    Resolution,
    parse_recipe,
    resolve,
    sources_of,
    whole_checkpoint,
)

__all__ = [
    "MergeOptions",
    "MergePlan",
    "export",
    "merge",
    "open_plan",
    "plan_export",
    "plan_merge",
    "read_recipe",
    "write_merge",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeOptions:
    """What a recipe does not say, or says otherwise than the caller; None leaves it to the recipe."""

    to: str | None = None
    """Format of the result, one of ``formats.FORMATS``; without one that of ``state_from``."""
    weights_only: bool | None = None
    dtype: str | None = None
    """Element type of the weights, ``bfloat16`` or ``BF16``."""
    shard_nbytes: int | None = None
    """Largest weights file of an ``hf`` target."""
    copy_tokenizer: bool = True
    ranks: int | None = None
    """Number of ranks of a ``deepspeed`` or ``dcp`` target."""
    zero_stage: int | None = None
    """Of a ``deepspeed`` target made from another format."""
    own_steps: bool = False
    """Refuse rather than rescale where the target has one step count for several layers."""
    parameter_names: tuple[str, ...] | None = None
    """Names of the parameters in the order of an ``optimizer.pt`` that cannot be told otherwise."""


_DEFAULTS = MergeOptions()


@dataclass(frozen=True, kw_only=True)
class MergePlan:
    """A merge, decided; nothing is written yet."""

    to: str
    catalog: Catalog
    """Of the new checkpoint."""
    files: CheckpointPlan
    rows: tuple[LayerRow, ...]
    state_from: str
    method: str
    notes: tuple[str, ...]
    """What is done to the state on the way, and what is not there."""

    @property
    def nbytes(self) -> int:
        """Size of the new checkpoint; linked files count in full."""
        return self.files.nbytes

    @property
    def linked_nbytes(self) -> int:
        return sum(link.nbytes for link in self.files.links)

    @property
    def checked(self) -> Mapping[Path, FileRecord]:
        """Files whose digests are known, and some bytes of which are taken into new files."""
        published = self.catalog.published
        return {path: published[path] for path in read_paths(self.files.files) if path in published}

    @property
    def work_nbytes(self) -> int:
        """Bytes to write or link, and to read beforehand for a check."""
        return self.nbytes + sum(record.bytes for record in self.checked.values())


def read_recipe(path: Path) -> Recipe:
    """Read a recipe from a file.

    Raises:
        InvalidInputError: It cannot be read, is too large, or is wrong; names each fault by its place.
    """
    try:
        with path.open("rb") as file:
            text = file.read(MAX_NBYTES + 1)
    except OSError as err:
        raise InvalidInputError(
            f"cannot read the recipe: {err.strerror}", kind="recipe-file", path=path, expected="a YAML file"
        ) from err
    return parse_recipe(text, path=path)


def plan_merge(recipe: Recipe, options: MergeOptions = _DEFAULTS) -> MergePlan:
    """Decide a merge; reads names and places of the sources, no tensor.

    Raises:
        TailorError: What is wrong with the recipe, a source, or their fit. Faults of several sources come together.
    """
    weights_only = options.weights_only if options.weights_only is not None else recipe.output.weights_only
    sources = open_sources(sources_of(recipe), parameter_names=options.parameter_names, with_optimizer=not weights_only)
    return _plan(resolve(recipe, {name: as_recipe_sees_it(each) for name, each in sources.items()}), sources, options)


def plan_export(source: Path, options: MergeOptions = _DEFAULTS) -> MergePlan:
    """Decide an export: the merge of one source.

    Raises:
        TailorError: What is wrong with the source, or cannot be done to it.
    """
    name = str(source)
    catalog = open_catalog(
        locate_source(name), parameter_names=options.parameter_names, with_optimizer=not options.weights_only
    )
    return _plan(whole_checkpoint(name, catalog.layers), {name: catalog}, options)


def _plan(resolution: Resolution, sources: Mapping[str, Catalog], options: MergeOptions) -> MergePlan:
    wanted = options.weights_only if options.weights_only is not None else resolution.output.weights_only
    weights_only = wanted or not any(source.has_optimizer for source in sources.values())
    touch(resolution, sources)
    tokenizer = tokenizer_files(resolution) if options.copy_tokenizer else ()
    catalog = merge_catalogs(resolution, sources, weights_only=weights_only, tokenizer=tokenizer)
    if weights_only:
        catalog = drop_optimizer(catalog)
    to = options.to or resolution.output.format or _usual_target(catalog)
    if to not in FORMATS:
        raise InvalidInputError(
            "there is no such format to write", kind="target", expected=", ".join(FORMATS), found=to
        )
    _check_options(options, to)
    _check_depth(resolution, to)
    catalog, notes = fit_small_files(catalog, to)
    files = _plan_target(catalog, to, resolution, options, weights_only=weights_only)
    rows = tabulate_layers(resolution, catalog)
    left_out = note_left_out(sources[resolution.base], catalog)
    uncounted = _uncounted_blocks(resolution, sources)
    notes = (*notes, *left_out, *uncounted, *_recipe_notes(resolution, catalog, to), *files.notes)
    plan = MergePlan(
        to=to,
        catalog=catalog,
        files=files,
        rows=rows,
        state_from=resolution.state_from,
        method=resolution.method,
        notes=notes,
    )
    return replace(plan, files=replace(files, files=(*files.files, _provenance(plan))))


def _usual_target(catalog: Catalog) -> str:
    """The format of the source, unless that is one for training and there is nothing to train on."""
    return catalog.format if catalog.has_optimizer or catalog.format == "tailored" else "hf"


def _plan_target(
    catalog: Catalog, to: str, resolution: Resolution, options: MergeOptions, *, weights_only: bool
) -> CheckpointPlan:
    dtype = None if options.dtype is None else read_dtype(options.dtype)
    if to in _APPLIES_TO["dtype"]:
        dtype = dtype or resolution.output.dtype
    match to:
        case "tailored":
            from .formats.tailored import plan_tailored

            return plan_tailored(count_updates(catalog), dtype=dtype)
        case "hf":
            from .formats.hf import DEFAULT_SHARD_NBYTES, plan_hf

            return plan_hf(
                catalog,
                weights_only=weights_only,
                shard_nbytes=options.shard_nbytes or resolution.output.shard_nbytes or DEFAULT_SHARD_NBYTES,
                dtype=dtype,
                copy_tokenizer=options.copy_tokenizer,
                num_blocks=resolution.new_depth,
            )
        case "deepspeed":
            from .formats.deepspeed import plan_deepspeed

            _require_optimizer(weights_only, to)
            return plan_deepspeed(catalog, ranks=options.ranks, stage=options.zero_stage, own_steps=options.own_steps)
        case _:
            from .formats.dcp import plan_dcp

            return plan_dcp(catalog, ranks=options.ranks)


# Option -> the formats that it says something about.
_APPLIES_TO = {
    "dtype": frozenset({"tailored", "hf"}),
    "shard_nbytes": frozenset({"hf"}),
    "ranks": frozenset({"deepspeed", "dcp"}),
    "zero_stage": frozenset({"deepspeed"}),
    "own_steps": frozenset({"deepspeed"}),
}


def _check_options(options: MergeOptions, to: str) -> None:
    """An option that would do nothing was meant to do something."""
    idle = [name for name, formats in _APPLIES_TO.items() if getattr(options, name) and to not in formats]
    if idle:
        raise InvalidInputError(
            f"options that do not apply to the format {to}",
            kind="idle-option",
            expected="; ".join(f"{name} with {', '.join(sorted(_APPLIES_TO[name]))}" for name in idle),
            found=", ".join(idle),
            hint="leave them out, or choose another format with --to",
        )


def _check_depth(resolution: Resolution, to: str) -> None:
    """A model of another depth needs another configuration, which is written with ``hf`` alone."""
    if to != "hf" and resolution.new_depth is not None:
        raise UnsupportedError(
            "a model of another depth is written in the format of Hugging Face alone",
            kind="other-depth",
            expected=f"{resolution.base_depth} blocks, as in base, for --to {to}",
            found=f"{resolution.new_depth} blocks",
            hint="--to hf, and train on from that",
        )


def _require_optimizer(weights_only: bool, to: str) -> None:
    if weights_only:
        raise UnsupportedError(
            "DeepSpeed checkpoints of weights alone are not written",
            kind="weights-only",
            expected="a target that holds weights alone: hf, tailored or dcp",
            found=to,
            hint="--to hf gives a model that from_pretrained and DeepSpeed start from",
        )


def count_updates(catalog: Catalog) -> Catalog:
    """Fill in how many updates each layer got, where its format does not say so; reads single numbers."""
    counts = dict(catalog.update_counts)
    for layer in catalog.layers:
        if layer.name not in counts:
            steps = (catalog.states[fqn].tensors.get("step") for fqn in layer.fqns if fqn in catalog.states)
            numbers = [int(read_number(step)) for step in steps if step is not None and step.meta.numel == 1]
            counts[layer.name] = max(numbers, default=None)
    return replace(catalog, update_counts=counts)


def _recipe_notes(resolution: Resolution, catalog: Catalog, to: str) -> Iterator[str]:
    if resolution.method == "linear":
        yield "weights are averages; optimizer state is that of each layer's newest source"
    dtype = resolution.output.dtype
    if dtype is not None and to not in _APPLIES_TO["dtype"]:
        others = sorted({ref.meta.dtype for ref in catalog.weights.values()} - {dtype})
        if others:
            yield f"the recipe's dtype is not applied with --to {to}: weights stay {', '.join(others)}"


def _uncounted_blocks(resolution: Resolution, sources: Mapping[str, Catalog]) -> Iterator[str]:
    depth = resolution.base_depth
    if depth is None:
        return
    blocks = (layer for layer in sources[resolution.base].layers.blocks if layer.stack == resolution.stack)
    names = [layer.name for layer in blocks if layer.index is not None and layer.index >= depth]
    if names:
        yield f"blocks that config.json does not count are left out, as no range means them: {', '.join(names)}"


def _provenance(plan: MergePlan) -> FilePlan:
    """What the new checkpoint was made from, for people; no program reads it."""
    record = {
        "llmtailor": __version__,
        "method": plan.method,
        "state_from": plan.state_from,
        "layers": [
            {"layer": row.layer, "source": row.source, "source_layer": row.source_layer, "step": row.step}
            for row in plan.rows
        ],
        "notes": list(plan.notes),
    }
    return FilePlan(name=PROVENANCE_NAME, parts=((json.dumps(record, indent=2) + "\n").encode(),))


def write_merge(
    plan: MergePlan, output: Path, *, on_bytes: Callable[[int], None] = lambda nbytes: None
) -> tuple[WrittenFile, ...]:
    """Write a planned checkpoint: all of it or nothing.

    Args:
        plan: From ``plan_merge`` or ``plan_export``.
        output: The new directory; must not exist.
        on_bytes: Told of bytes as they are done, ``plan.work_nbytes`` in all, from any thread.

    Raises:
        AlreadyExistsError: There is something at ``output``.
        WriteError: Disk, permission or limit; nothing was left behind.
        IntegrityError: A source is damaged, or changed since it was planned.
    """
    if not os.path.lexists(output):  # else the answer is known without reading
        check_published(plan.checked, on_bytes=on_bytes)
    return execute(plan.files, output, on_bytes=on_bytes)


@contextmanager
def open_plan(recipe: Path, output: Path, options: MergeOptions = _DEFAULTS) -> Iterator[MergePlan]:
    """Decide what a recipe's file asks for, whoever has to do it; write it while the context lasts.

    A method that only mergekit has is carried out by an installed mergekit, into a directory that is gone afterwards;
    it makes weights alone.

    Raises:
        TailorError: As ``plan_merge``; mergekit is not installed, or failed.
    """
    parsed = read_recipe(recipe)
    needs = parsed.needs_mergekit if isinstance(parsed, MergekitRecipe) else None
    if needs is None:
        yield plan_merge(parsed, options)
        return
    with merged_by_mergekit(needs, recipe, output) as directory:
        plan = plan_export(directory, replace(options, weights_only=True))
        yield replace(plan, method=needs, notes=(f"mergekit made the weights ({needs})", *plan.notes))


def merge(recipe: Path | str, output: Path | str, **options: Any) -> MergePlan:
    """Merge layers of several checkpoints into one that training resumes from.

    Args:
        recipe: Path of a YAML file; see docs/recipes.md.
        output: The new directory; must not exist.
        **options: Fields of ``MergeOptions``.

    Returns:
        What was done: sources by layer, and notes on what was changed.

    Raises:
        TailorError: It cannot be done; nothing was written.
    """
    with open_plan(Path(recipe), Path(output), MergeOptions(**options)) as plan:
        write_merge(plan, Path(output))
    return plan


def export(source: Path | str, output: Path | str, **options: Any) -> MergePlan:
    """Write a checkpoint in another format, or for another number of ranks.

    Args:
        source: A checkpoint of any format.
        output: The new directory; must not exist.
        **options: Fields of ``MergeOptions``.

    Returns:
        What was done.

    Raises:
        TailorError: It cannot be done; nothing was written.
    """
    plan = plan_export(Path(source), MergeOptions(**options))
    write_merge(plan, Path(output))
    return plan
