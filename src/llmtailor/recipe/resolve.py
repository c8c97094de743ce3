"""A recipe and the layers of its sources -> where every layer of the target comes from."""

from __future__ import annotations

from collections.abc import Mapping

from .faults import Faults
from .records import MergekitRecipe, Recipe, sources_of
from .resolution import Resolution
from .resolve_mergekit import resolve_mergekit
from .resolve_named import resolve_named
from .sources import SourceLayers

__all__ = ["resolve"]


def resolve(recipe: Recipe, sources: Mapping[str, SourceLayers]) -> Resolution:
    """Decide where every layer of the target comes from.

    Args:
        recipe: Of either dialect.
        sources: By path as the recipe has it, for each of ``sources_of(recipe)``; others are not looked at.

    Raises:
        UnsupportedError: Kinds ``needs-mergekit`` (see ``MergekitRecipe.needs_mergekit``), ``weights-within-layer``.
        InvalidInputError: Kinds ``layer-twice``, ``auxiliary-twice``, ``not-auxiliary``, ``weights``.
        IncompatibleError: Kinds ``tied-untied``, ``number-of-layers``, ``other-layers``, ``unknown-layer``,
            ``unknown-tensor``, ``layer-range-outside``, ``slice-coverage``, ``zero-length-range``, ``ambiguous-stack``.
        IncompleteError: Kinds ``layers-missing``, ``layer-not-in-source``, ``slice-coverage``.
            Several faults are one error of kind ``recipe-faults``; see ``Faults.raise_any``.
    """
    faults = Faults("the recipe does not fit its checkpoints", recipe.path)
    needed = {path: sources[path] for path in sources_of(recipe)}
    if isinstance(recipe, MergekitRecipe):
        return resolve_mergekit(recipe, needed, faults)
    return resolve_named(recipe, needed, faults)
