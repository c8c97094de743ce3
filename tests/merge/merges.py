"""Merges as a user makes them: a recipe, and the Python function."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import llmtailor


def merge_layers(newer: Path, older: Path, layers: Iterable[str], output: Path, **options: Any) -> Path:
    """Some layers of an older checkpoint, the rest and the state of training of a newer one."""
    return _merge(f'base: {newer}\nlayers: {{"{", ".join(layers)}": {older}}}\n', output, options)


def merge_with_itself(source: Path, output: Path, **options: Any) -> Path:
    """Every layer of one checkpoint."""
    return _merge(f'layers: {{"*": {source}}}\n', output, options)


def _merge(text: str, output: Path, options: dict[str, Any]) -> Path:
    output.parent.mkdir(parents=True, exist_ok=True)
    recipe = output.parent / f"{output.name}.yaml"
    recipe.write_text(text)
    llmtailor.merge(recipe, output, **options)
    return output
