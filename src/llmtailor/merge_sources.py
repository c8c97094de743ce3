"""Opening the sources of a merge: all of them, with all that is wrong with them in one error."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

from .catalog import Catalog, SmallFile
from .errors import NotFoundError, TailorError
from .formats import open_catalog
from .formats.hf.config import parse_config
from .formats.hf.json_files import read_text
from .formats.small_files import list_small_files
from .formats.small_names import is_tokenizer
from .hub import locate_source
from .layers import LayerMap, map_names
from .recipe import Resolution, SourceLayers

__all__ = ["as_recipe_sees_it", "open_sources", "tokenizer_files", "touch"]

_CONFIG_NAME = "config.json"


def open_sources(
    names: Sequence[str], *, parameter_names: Sequence[str] | None, with_optimizer: bool
) -> dict[str, Catalog]:
    """Open every source of a recipe; they may hold some of the layers only.

    Args:
        names: As the recipe has them.
        parameter_names: Of ``optimizer.pt``, where they cannot be told.
        with_optimizer: Whether optimizer state has to be understood.

    Returns:
        By name; a layer has the same name in all of them.

    Raises:
        TailorError: What is wrong with them, of the class of the first fault.
    """
    sources: dict[str, Catalog] = {}
    faults: list[TailorError] = []
    with _paused_collector():
        for name in names:
            try:
                sources[name] = open_catalog(
                    locate_source(name),
                    parameter_names=parameter_names,
                    with_optimizer=with_optimizer,
                    allow_partial=True,
                )
            except TailorError as err:
                faults.append(err)
    if faults:
        raise _join(faults)
    return _cut_alike(sources)


@contextmanager
def _paused_collector() -> Iterator[None]:
    """Parsed trees are many objects without a cycle; the collector walks them over and over, a fifth of the time."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


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


def as_recipe_sees_it(source: Catalog) -> SourceLayers:
    """What resolving a recipe needs to know of a source.

    Raises:
        FormatError: Its config.json is none.
    """
    config = next((file for file in source.files if file.name == _CONFIG_NAME), None)
    said = None if config is None else parse_config(read_text(config.path), config.path)
    return SourceLayers(
        layers=source.layers,
        num_blocks=None if said is None else said.num_blocks,
        is_tied=None if said is None else said.is_tied,
        step=source.step,
        layer_steps=source.layer_steps,
    )


def touch(resolution: Resolution, sources: Mapping[str, Catalog]) -> None:
    """Look at everything that will be needed of every source, so that all that is wrong with them is told at once.

    Raises:
        TailorError: What is wrong with them, of the class of the first fault.
    """
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


def tokenizer_files(resolution: Resolution) -> tuple[SmallFile, ...] | None:
    """The tokenizer's files that a recipe names; None for those of ``base``.

    Raises:
        NotFoundError: There is no such directory.
    """
    if resolution.tokenizer_from is None:
        return None
    root = locate_source(resolution.tokenizer_from)
    if not root.is_dir():
        raise NotFoundError("there is no directory to take the tokenizer from", kind="missing-tokenizer", path=root)
    return list_small_files(root, is_tokenizer)
