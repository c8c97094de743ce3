"""Bytes of a recipe -> what it says: which dialect it is of, and all that is wrong with it at once."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from .faults import Faults
from .mergekit import MERGEKIT_KEYS, parse_mergekit
from .named import NAMED_KEYS, parse_named
from .records import Recipe
from .yaml_text import Item, parse_yaml

__all__ = ["parse_recipe"]

_FORM = "slices: and merge_method: (mergekit's dialect), or base: and layers: (our own)"


def parse_recipe(text: bytes, path: str | Path) -> Recipe:
    """Parse a recipe of either dialect.

    Args:
        text: The file's bytes; more than ``MAX_NBYTES`` are refused.
        path: Where they were read, for errors; nothing is opened.

    Raises:
        InvalidInputError: Not the strict YAML of ``parse_yaml``; or kinds ``dialect``, ``unknown-key``,
            ``missing-key``, ``type``, ``text``, ``unknown-value``, ``pattern``, ``source-twice``, ``weights``,
            ``size``, ``content``, ``unknown-parameter``, ``layer-range``, ``one-source``, ``slice-lengths``,
            ``missing-weight``, ``tokenizer``; or ``recipe-faults`` for several.
    """
    file = str(path)
    root = parse_yaml(text, path=file)
    faults = Faults("the recipe is wrong", file)
    if _is_mergekit(root, faults):
        recipe: Recipe = parse_mergekit(root, path=file, faults=faults)
    else:
        recipe = parse_named(root, path=file, faults=faults)
    faults.raise_any()
    return recipe


def _is_mergekit(root: Item, faults: Faults) -> bool:
    """Which dialect it is; raises at once where that cannot be told, as everything else depends on it."""
    if not isinstance(root.value, Mapping):
        found = "nothing" if root.value is None else "something else"
        faults.add("dialect", "expected a mapping", place=root.place, expected=_FORM, found=found)
        faults.raise_any()
        return False
    theirs = [key for key in root.value if key in MERGEKIT_KEYS]
    ours = [key for key in root.value if key in NAMED_KEYS]
    if bool(theirs) != bool(ours):
        return bool(theirs)
    if theirs:
        faults.add(
            "dialect",
            "keys of two dialects",
            place=root.value[ours[0]].key_place,
            expected=_FORM,
            found=f"{', '.join(ours)} beside {', '.join(theirs)}",
        )
    else:
        key = next(iter(root.value), None)
        faults.add(
            "dialect",
            "this is no recipe",
            place=root.place,
            expected=_FORM,
            found="an empty mapping" if key is None else f"the key {key[:80]!r}",
            hint=key and faults.near(key, (*NAMED_KEYS, *MERGEKIT_KEYS)),
        )
    faults.raise_any()
    return False
