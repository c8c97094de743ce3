"""Merging and exporting checkpoints: from a recipe to a new directory.

    recipe --open sources--> catalogs --plan--> catalog --target's planner--> files to be --write--> the new checkpoint

``plan_merge`` does all but the last step and reads no tensor; ``write_merge`` does the last. ``merge`` and ``export``
are both.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from . import __version__
from .assembly import execute
from .catalog import Catalog, SmallFile
from .errors import InvalidInputError, NotFoundError, TailorError, UnsupportedError
from .file_plan import CheckpointPlan, FilePlan, WrittenFile
from .formats import FORMATS, open_catalog
from .formats.hf.config import parse_config
from .formats.hf.json_files import read_text
from .formats.source_files import list_small_files, read_number
from .hub import locate_source
from .layers import LayerMap, map_names
from .mergekit_process import merged_by_mergekit
from .plan import (
    PROVENANCE_NAME,
    LayerRow,
    drop_optimizer,
    fit_small_files,
    is_tokenizer_file,
    merge_catalogs,
    tabulate_layers,
)
from .recipe import (
    MAX_NBYTES,
    MergekitRecipe,
    Recipe,
    Resolution,
    SourceLayers,
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
    """Element type of the weights, safetensors spelling."""
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


_CONFIG_NAME = "config.json"
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
    sources = _open_all(sources_of(recipe), options, with_optimizer=not weights_only)
    return _plan(resolve(recipe, {name: _as_recipe_sees_it(each) for name, each in sources.items()}), sources, options)


def _as_recipe_sees_it(source: Catalog) -> SourceLayers:
    config = next((file for file in source.files if file.name == _CONFIG_NAME), None)
    said = None if config is None else parse_config(read_text(config.path), config.path)
    return SourceLayers(
        layers=source.layers,
        num_blocks=None if said is None else said.num_blocks,
        is_tied=None if said is None else said.is_tied,
        step=source.step,
        layer_steps=source.layer_steps,
    )


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


def _open_all(names: Sequence[str], options: MergeOptions, *, with_optimizer: bool) -> dict[str, Catalog]:
    sources: dict[str, Catalog] = {}
    faults: list[TailorError] = []
    for name in names:
        try:
            sources[name] = open_catalog(
                locate_source(name),
                parameter_names=options.parameter_names,
                with_optimizer=with_optimizer,
                allow_partial=True,
            )
        except TailorError as err:
            faults.append(err)
    if faults:
        raise _join(faults)
    return _cut_alike(sources)


def _cut_alike(sources: Mapping[str, Catalog]) -> dict[str, Catalog]:
    """Give a layer one name in all sources: one that holds a few layers alone does not show how the model is built."""
    shapes = {
        fqn: tensor.meta.shape
        for source in sources.values()
        if source.cut is None
        for fqn, tensor in source.weights.items()
    }
    whole = map_names(shapes)
    return {
        name: source if source.cut is not None else replace(source, cut=_restrict(whole, source))
        for name, source in sources.items()
    }


def _restrict(layers: LayerMap, source: Catalog) -> LayerMap:
    held = (replace(layer, fqns=tuple(fqn for fqn in layer.fqns if fqn in source.weights)) for layer in layers.layers)
    return LayerMap(tuple(layer for layer in held if layer.fqns), source.ties)


def _join(faults: Sequence[TailorError]) -> TailorError:
    """One error for all that is wrong with sources, of the class of the first."""
    first = faults[0]
    if len(faults) == 1:
        return first
    listed = (str(fault).replace("\n", "\n            ") for fault in faults)
    return type(first)(
        f"sources cannot be used: {len(faults)} faults",
        kind=first.kind,
        path=first.path,
        found="\n            ".join(listed),
        hint=first.hint,
    )


def _plan(resolution: Resolution, sources: Mapping[str, Catalog], options: MergeOptions) -> MergePlan:
    wanted = options.weights_only if options.weights_only is not None else resolution.output.weights_only
    weights_only = wanted or not any(source.has_optimizer for source in sources.values())
    _touch(resolution, sources)
    tokenizer = _tokenizer_files(resolution, options)
    catalog = merge_catalogs(resolution, sources, weights_only=weights_only, tokenizer=tokenizer)
    if weights_only:
        catalog = drop_optimizer(catalog)
    to = (
        options.to
        or resolution.output.format
        or ("hf" if weights_only and catalog.format != "tailored" else catalog.format)
    )
    if to not in FORMATS:
        raise InvalidInputError(
            "there is no such format to write", kind="target", expected=", ".join(FORMATS), found=to
        )
    _check_depth(resolution, sources, to)
    catalog, notes = fit_small_files(catalog, to)
    files = _plan_target(catalog, to, resolution, options, weights_only=weights_only)
    rows = tabulate_layers(resolution, catalog)
    notes = (*notes, *_method_notes(resolution), *files.notes)
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


def _touch(resolution: Resolution, sources: Mapping[str, Catalog]) -> None:
    """Look at everything that will be needed of every source, so that all that is wrong with them is told at once."""
    faults: dict[str, TailorError] = {}
    for each in (each for layer in resolution.layers for each in layer.contributions):
        source = sources[each.source]
        try:
            for fqn in source.layers[each.layer].fqns:
                source.weights.get(fqn)
                source.states.get(fqn)
        except TailorError as err:
            faults[str(err)] = err
    if faults:
        raise _join([*faults.values()])


def _tokenizer_files(resolution: Resolution, options: MergeOptions) -> tuple[SmallFile, ...] | None:
    """The tokenizer's files; None for those of ``base``."""
    if not options.copy_tokenizer:
        return ()
    if resolution.tokenizer_from is None:
        return None
    root = locate_source(resolution.tokenizer_from)
    if not root.is_dir():
        raise NotFoundError("there is no directory to take the tokenizer from", kind="missing-tokenizer", path=root)
    return list_small_files(root, is_tokenizer_file)


def _usual_target(catalog: Catalog) -> str:
    """The format of the source, unless that is one for training and there is nothing to train on."""
    return catalog.format if catalog.has_optimizer or catalog.format == "tailored" else "hf"


def _plan_target(
    catalog: Catalog, to: str, resolution: Resolution, options: MergeOptions, *, weights_only: bool
) -> CheckpointPlan:
    dtype = options.dtype or resolution.output.dtype
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
            )
        case "deepspeed":
            from .formats.deepspeed import plan_deepspeed

            _require_optimizer(weights_only, to)
            return plan_deepspeed(catalog, ranks=options.ranks, stage=options.zero_stage, own_steps=options.own_steps)
        case _:
            from .formats.dcp import plan_dcp

            return plan_dcp(catalog, ranks=options.ranks)


def _check_depth(resolution: Resolution, sources: Mapping[str, Catalog], to: str) -> None:
    """A model of another depth needs another configuration, which is written with ``hf`` alone."""
    blocks = sum(layer.stack == resolution.stack for layer in sources[resolution.base].layers.blocks)
    if to != "hf" and resolution.num_blocks not in (None, blocks):
        raise UnsupportedError(
            "a model of another depth is written in the format of Hugging Face alone",
            kind="other-depth",
            expected=f"{blocks} blocks, as in base, for --to {to}",
            found=f"{resolution.num_blocks} blocks",
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


def _method_notes(resolution: Resolution) -> tuple[str, ...]:
    if resolution.method == "linear":
        return ("weights are averages; optimizer state is that of each layer's newest source",)
    return ()


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
        on_bytes: Told of bytes as they are done, from any thread.

    Raises:
        AlreadyExistsError: There is something at ``output``.
        WriteError: Disk, permission or limit; nothing was left behind.
        IntegrityError: A source changed since it was planned.
    """
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
