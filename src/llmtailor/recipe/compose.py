"""Recipes that write themselves: the newest version of every layer at or before a step."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from ..errors import IncompleteError, InvalidInputError
from .patterns import summarize_names, write_patterns

__all__ = ["SavedLayers", "choose_newest", "compose_recipe"]

_MAX_KEY = 100
# YAML's limit for a key without a question mark. Source: YAML 1.2.2, section 7.4.2 (implicit keys).
_MAX_IMPLICIT_KEY = 1000
_UNFIT = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedLayers:
    """A checkpoint, whole or partial, and what it saved anew."""

    path: str
    step: int
    layers: tuple[str, ...]


def choose_newest(saves: Sequence[SavedLayers], *, layers: Sequence[str], step: int) -> dict[str, SavedLayers]:
    """Layer -> the newest save of it at or before a step; of equal steps the last given; no entry where there is none.

    Args:
        saves: In any order.
        layers: All of the model, in its order; the result has that order.
        step: Later saves are not looked at.
    """
    newest: dict[str, SavedLayers] = {}
    for save in sorted((save for save in saves if save.step <= step), key=lambda save: save.step):
        newest.update(dict.fromkeys(save.layers, save))
    return {layer: newest[layer] for layer in layers if layer in newest}


def compose_recipe(
    saves: Sequence[SavedLayers], *, layers: Sequence[str], step: int, default: str | None = None
) -> str:
    """A recipe of our own dialect for the newest version of each layer at or before a step, as YAML.

    Trainer state comes from the newest of the checkpoints, or from ``default`` where there is none.

    Args:
        saves: What was saved when, in any order; saves of nothing do not count.
        layers: All of the model, in its order.
        step: That of the failure, say.
        default: Where layers come from that no save holds.

    Raises:
        IncompleteError: Kind ``layers-missing``: layers that no save at or before the step holds, and no default.
        InvalidInputError: Kind ``not-writable``: a path or layer with characters that YAML cannot hold.
    """
    chosen = choose_newest(saves, layers=layers, step=step)
    missing = [layer for layer in layers if layer not in chosen]
    if missing and default is None:
        raise IncompleteError(
            f"no checkpoint at or before step {step} holds these layers",
            kind="layers-missing",
            layer=missing[0] if len(missing) == 1 else None,
            expected="every layer in at least one, or a checkpoint to take the others from",
            found=summarize_names(missing),
            hint="give a checkpoint with all layers as the default, or a later step",
        )
    newest = max(
        (save for save in saves if save.step <= step and save.layers), key=lambda save: save.step, default=None
    )
    lines = [f"# The newest version of each layer at or before step {step}."]
    if default is not None:
        rest = f"{len(missing)} layers" if missing else "configuration only"
        lines.append(f"base: {_quote(default)}  # {rest}")
    state_from = default if newest is None else newest.path
    assert state_from is not None, step
    lines.append(f"state_from: {_quote(state_from)}")
    if chosen:
        lines += ["layers:", *_entries(chosen, step)]
    return "\n".join(lines) + "\n"


def _entries(chosen: Mapping[str, SavedLayers], step: int) -> Iterator[str]:
    groups: dict[tuple[int, str], list[str]] = defaultdict(list)
    for layer, save in chosen.items():
        groups[save.step, save.path].append(layer)
    for (saved, path), names in sorted(groups.items(), key=lambda group: -group[0][0]):
        count = "1 layer" if len(names) == 1 else f"{len(names)} layers"
        age = "" if saved == step else f", {step - saved} steps old" if step - saved > 1 else ", 1 step old"
        yield f"  # step {saved}{age}: {count}"
        for key in _keys(names):
            quoted = _quote(key)
            if len(quoted) <= _MAX_IMPLICIT_KEY:
                yield f"  {quoted}: {_quote(path)}"
            else:
                yield f"  ? {quoted}"
                yield f"  : {_quote(path)}"


def _keys(names: Sequence[str]) -> Iterator[str]:
    """Patterns for the names, with commas between, cut into lines that can be read."""
    line = ""
    for pattern in write_patterns(names):
        if line and len(line) + len(pattern) > _MAX_KEY:
            yield line
            line = ""
        line = f"{line}, {pattern}" if line else pattern
    if line:
        yield line


def _quote(text: str) -> str:
    """A text as YAML's double-quoted scalar.

    Raises:
        InvalidInputError: It holds control characters or bytes that are no text.
    """
    if not text.strip() or _UNFIT.search(text):
        raise InvalidInputError(
            "a recipe cannot hold this name",
            kind="not-writable",
            found=ascii(text),
            expected="text without control characters",
            hint="rename the directory, or reach it by another path",
        )
    return '"' + "".join(_escape(each) for each in text) + '"'


def _escape(each: str) -> str:
    if each in '"\\':
        return f"\\{each}"
    return each if each.isprintable() else f"\\U{ord(each):08x}"
