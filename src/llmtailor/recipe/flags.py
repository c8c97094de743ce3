"""``flags.jsonl`` of LLMTailor and StreamCheck: which layers a run saved at which step.

    {"step": 160, "flag": [0, 3, 29]}

One object per line; ``units`` says what the numbers mean. Read, and written for tools that read it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import FormatError, InvalidInputError, UnsupportedError
from ..layers import Layer, LayerKind, LayerMap
from ..strict_json import parse_object
from .units import Role, find_role, role_of_unit

__all__ = ["FlaggedSave", "encode_flags", "flags_to_layers", "layers_to_flags", "read_flags"]

_FORM = '{"step": 160, "flag": [0, 3, 29]}'
_KEYS = {"step", "flag"}
_MAX_NBYTES = 64 * 1024**2
_MAX_LINE_NBYTES = 1024**2
_MAX_SHOWN = 25
_INDENT = "\n" + " " * 12
# As Llama, Qwen, Mistral and Gemma of transformers 5.23 name them.
_NAMES = {Role.NORM: "norm", Role.HEAD: "lm_head", Role.EMBEDDING: "embed_tokens"}
_STACK = "layers"


@dataclass(frozen=True, slots=True, kw_only=True)
class FlaggedSave:
    """A line: what was saved at a step."""

    step: int
    units: tuple[int, ...]
    """As in ``units``; may be empty."""


def read_flags(text: bytes, path: str | Path) -> tuple[FlaggedSave, ...]:
    """Parse a ``flags.jsonl``; blank lines are skipped.

    Args:
        text: The file's bytes.
        path: Where they were read, for errors.

    Raises:
        FormatError: Kind ``bad-flags``: with every line that is not of the form above, or whose step is not higher
            than that of the line before.
    """
    if len(text) > _MAX_NBYTES:
        raise _error("the file is too large", path, found=f"{len(text):,} bytes")
    faults: list[str] = []
    saves: list[FlaggedSave] = []
    for number, line in enumerate(text.split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            save = _read_line(line, path)
        except FormatError as err:
            faults.append(f"line {number}: {err.what}")
            continue
        if saves and save.step <= saves[-1].step:
            faults.append(f"line {number}: step {save.step} does not come after step {saves[-1].step}")
        saves.append(save)
    if faults:
        shown = [*faults[:_MAX_SHOWN], *([f"... and {len(faults) - _MAX_SHOWN} more"] if faults[_MAX_SHOWN:] else [])]
        raise _error("these lines do not say what was saved", path, found=_INDENT.join(shown))
    return tuple(saves)


def _error(what: str, path: str | Path, *, found: str) -> FormatError:
    return FormatError(
        f"cannot read the flags: {what}",
        kind="bad-flags",
        path=path,
        expected=f"lines like {_FORM}, with rising steps",
        found=found,
        hint="remove a line that was cut off; of a run that was resumed, keep the lines of the checkpoints that exist",
    )


def _read_line(line: bytes, path: str | Path) -> FlaggedSave:
    def refuse(what: str) -> FormatError:
        return FormatError(what, kind="bad-flags", path=path)

    if len(line) > _MAX_LINE_NBYTES:
        raise refuse("too long")
    try:
        record = parse_object(line, what="it", path=path)
    except FormatError as err:
        raise refuse(err.what) from err
    if set(record) != _KEYS:
        raise refuse(f"expected the keys step and flag, found {', '.join(map(repr, sorted(record)))[:80] or 'none'}")
    if not _is_count(record["step"]):
        raise refuse(f"step must be a whole number, 0 or more, not {record['step']!r:.40}")
    flag = record["flag"]
    if not isinstance(flag, list) or not all(_is_count(unit) for unit in flag):
        raise refuse("flag must be a list of whole numbers, 0 or more")
    if len(set(flag)) < len(flag):
        raise refuse("flag holds a number twice")
    return FlaggedSave(step=record["step"], units=tuple(flag))


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def flags_to_layers(
    flag: Sequence[int], num_blocks: int, tied: bool, *, layers: LayerMap | None = None
) -> tuple[str, ...]:
    """The layers that a line's numbers stand for, in its order.

    Args:
        flag: Units of LLMTailor; see ``units``.
        num_blocks: L, the number of the model's blocks.
        tied: The head shares the embedding's weights.
        layers: A checkpoint of the run, for models that call their layers otherwise than Llama.

    Raises:
        FormatError: Kind ``bad-flags``: a number that stands for no layer of such a model.
    """
    names, stack = (_NAMES, _STACK) if layers is None else (_names_in(layers), _stack_in(layers))
    found = [_unit_name(unit, num_blocks, tied, names, stack) for unit in flag]
    unknown = [str(unit) for unit, name in zip(flag, found, strict=True) if name is None]
    if unknown:
        last = num_blocks + (1 if tied else 2)
        raise FormatError(
            "cannot read the flags: a number stands for no layer of this model",
            kind="bad-flags",
            expected=f"0 to {last}, as the model is {'tied' if tied else 'untied'} and has {num_blocks} blocks",
            found=", ".join(unknown[:_MAX_SHOWN]),
            hint="give the number of blocks and whether head and embedding are tied as the run had them",
        )
    return tuple(name for name in found if name is not None)


def encode_flags(saves: Iterable[FlaggedSave]) -> bytes:
    """A ``flags.jsonl``, which ``read_flags`` reads back.

    Args:
        saves: By rising step; ``layers_to_flags`` gives their units.

    Raises:
        InvalidInputError: Kind ``bad-flags``: a step that is not higher than the one before.
    """
    lines: list[str] = []
    last = -1
    for save in saves:
        if save.step <= last:
            raise InvalidInputError(
                "cannot write the flags: steps have to rise",
                kind="bad-flags",
                expected=f"a step above {last}",
                found=save.step,
                hint="of a run that was resumed, give the saves of the checkpoints that exist",
            )
        last = save.step
        lines.append(json.dumps({"step": save.step, "flag": list(save.units)}) + "\n")
    return "".join(lines).encode()


def layers_to_flags(names: Iterable[str], layers: LayerMap) -> tuple[int, ...]:
    """The numbers that stand for layers, in the order given; inverse of ``flags_to_layers``.

    The numbers are those of a tied model if ``layers`` has no head, as is so where the head shares the embedding's
    weights.

    Args:
        names: Layers of the model.
        layers: The whole model.

    Raises:
        UnsupportedError: Kind ``no-unit``: the model has layers that no number stands for; names them.
        NotFoundError: Kind ``unknown-layer``: a name that is no layer.
    """
    units = _units_of(layers)
    unnumbered = [name for name in layers.names if name not in units]
    if unnumbered:
        more = f" and {len(unnumbered) - _MAX_SHOWN} more" if unnumbered[_MAX_SHOWN:] else ""
        raise UnsupportedError(
            "cannot write the flags: no number stands for some layers of this model",
            kind="no-unit",
            layer=unnumbered[0],
            expected="one stack of blocks from 0, one final norm, one embedding, at most one head",
            found=f"also {', '.join(unnumbered[:_MAX_SHOWN])}{more}",
            hint="name layers in a recipe instead, which can say of any layer where it comes from",
        )
    return tuple(units[layers[name].name] for name in names)


def _units_of(layers: LayerMap) -> dict[str, int]:
    """Layer -> its number, of those that have one."""
    num_blocks, stack, names = len(layers.blocks), _stack_in(layers), _names_in(layers)
    numbers = {f"{stack}.{index}": index + 1 for index in range(num_blocks)}
    for unit in (0, num_blocks + 1, num_blocks + 2):
        role = role_of_unit(unit, num_blocks, is_tied=Role.HEAD not in names)
        if role in names:
            numbers[names[role]] = unit
    return {name: numbers[name] for name in layers.names if name in numbers}


def _unit_name(unit: int, num_blocks: int, tied: bool, names: dict[Role, str], stack: str) -> str | None:
    if 1 <= unit <= num_blocks:
        return f"{stack}.{unit - 1}"
    role = role_of_unit(unit, num_blocks, is_tied=tied)
    return names.get(role) if role is not None else None


def _names_in(layers: LayerMap) -> dict[Role, str]:
    auxiliary = [layer for layer in layers if layer.kind is not LayerKind.BLOCK]
    return dict(_found_roles(auxiliary))


def _found_roles(auxiliary: Sequence[Layer]) -> Iterator[tuple[Role, str]]:
    for role in Role:
        layer = find_role(role, auxiliary)
        if layer is not None:
            yield role, layer.name


def _stack_in(layers: LayerMap) -> str:
    stacks = [layer.stack for layer in layers if layer.stack is not None]
    return max(stacks, key=stacks.count, default=_STACK)
