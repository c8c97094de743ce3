"""Our own dialect: layers by name.

base: runs/a/checkpoint-300
layers:
  "layers.0-15, norm": runs/a/checkpoint-200
  lm_head: {from: [runs/a/checkpoint-200, runs/b/checkpoint-200], weights: [0.7, 0.3]}
state_from: runs/a/checkpoint-300
output: {format: hf, dtype: bfloat16, shard_size: 5GB, weights_only: false}
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from .faults import Faults
from .patterns import find_range, split_patterns
from .reading import Reader
from .records import LayerChoice, NamedRecipe, Output
from .yaml_text import Item

__all__ = ["DTYPES", "NAMED_KEYS", "parse_named", "parse_size"]

NAMED_KEYS = ("base", "layers", "state_from", "output")
DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
"""As recipes write element types -> as safetensors does."""
_FORMATS = ("hf", "tailored", "deepspeed", "dcp")
_OUTPUT_KEYS = ("format", "dtype", "shard_size", "weights_only")
_CHOICE_KEYS = ("from", "weights")

_FORM = "base: PATH, layers: {PATTERNS: PATH}, state_from: PATH, output: {...}"
_LAYERS_FORM = 'layers: {"layers.0-15, norm": PATH, lm_head: PATH}'
_PATTERNS_FORM = "names, ranges and globs with commas between: layers.0-15, norm"
_CHOICE_FORM = "a path, or {from: [PATH, PATH], weights: [0.5, 0.5]}"
_SIZE_FORM = "a size of at least 1 MB, as in 5GB, 500MB or 2GiB"

_SIZE = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,3})?) ?([kKMGT]?i?)B")
_MIN_SHARD_BYTES = 10**6
_MAX_PATTERNS = 10_000


def parse_size(text: str) -> int | None:
    """Bytes of ``5GB`` (5 * 1000**3) or ``2GiB`` (2 * 1024**3); None if the text is no size."""
    found = _SIZE.fullmatch(text)
    if found is None or found[2] == "i":
        return None
    prefix = found[2].upper()
    power = " KMGT".index(prefix[:1] or " ")
    # Through a whole number of thousandths, since 4.7 is no float.
    whole, _, part = found[1].partition(".")
    thousandths = int(whole) * 1000 + int(part.ljust(3, "0"))
    return int(thousandths * (1024 if prefix.endswith("I") else 1000) ** power // 1000)


def parse_named(root: Item, *, path: str, faults: Faults) -> NamedRecipe:
    """Parse a document of our own dialect; what is wrong with it is added to ``faults``."""
    reader = Reader(faults)
    entries = reader.fields(root, NAMED_KEYS, form=_FORM)
    base = reader.path(entries["base"]) if "base" in entries else None
    recipe = NamedRecipe(
        path=path,
        base=base,
        choices=_parse_layers(entries["layers"], reader) if "layers" in entries else (),
        state_from=reader.path(entries["state_from"]) if "state_from" in entries else None,
        output=_parse_output(entries["output"], reader) if "output" in entries else Output(),
    )
    if base is None and "layers" not in entries:
        faults.add("missing-key", "neither 'base' nor 'layers' is there", place=root.place, expected=_FORM)
    return recipe


def _parse_layers(item: Item, reader: Reader) -> tuple[LayerChoice, ...]:
    if not isinstance(item.value, Mapping) or not item.value:
        reader.refuse(item, "type", "expected a mapping of layers to paths", expected=_LAYERS_FORM)
        return ()
    choices = tuple(_parse_choice(key, entry, reader) for key, entry in item.value.items())
    num_patterns = sum(len(choice.patterns) for choice in choices)
    if num_patterns > _MAX_PATTERNS:
        what = f"{num_patterns:,} names, ranges and globs are too many"
        reader.faults.add("pattern", what, place=item.place, expected=f"at most {_MAX_PATTERNS:,}")
    return choices


def _parse_choice(key: str, entry: Item, reader: Reader) -> LayerChoice:
    patterns = split_patterns(key)
    for pattern in patterns:
        wanted = find_range(pattern)
        if not pattern:
            what = "a layer without a name" if len(patterns) == 1 else "a comma without a layer before and after it"
            reader.faults.add("pattern", what, place=entry.key_place, expected=_PATTERNS_FORM)
        elif wanted is not None and wanted.first > wanted.last:
            reader.faults.add(
                "pattern",
                f"the range {pattern} ends before it starts",
                place=entry.key_place,
                expected=f"{wanted.prefix}{wanted.last}-{wanted.first}",
            )
    sources, weights = _parse_sources(entry, reader)
    return LayerChoice(patterns=patterns, sources=sources, weights=weights, place=entry.key_place)


def _parse_sources(entry: Item, reader: Reader) -> tuple[tuple[str, ...], tuple[float, ...]]:
    if isinstance(entry.value, str):
        return (reader.path(entry),), (1.0,)
    if not isinstance(entry.value, Mapping):
        reader.refuse(entry, "type", "expected where the layers come from", expected=_CHOICE_FORM)
        return ("",), (1.0,)
    parts = reader.fields(entry, _CHOICE_KEYS, required=["from"], form=_CHOICE_FORM)
    if "from" not in parts:
        return ("",), (1.0,)
    paths = tuple(reader.path(each) for each in reader.items(parts["from"], form=_CHOICE_FORM)) or ("",)
    if len(set(paths)) < len(paths):
        reader.faults.add(
            "source-twice", "a checkpoint stands here twice", place=parts["from"].place, expected="each path once"
        )
    return paths, _parse_weights(parts.get("weights"), len(paths), reader)


def _parse_weights(item: Item | None, num_sources: int, reader: Reader) -> tuple[float, ...]:
    equal = (1.0,) * num_sources
    if item is None:
        return equal
    weights = tuple(reader.number(each, form=_CHOICE_FORM) for each in reader.items(item, form=_CHOICE_FORM))
    if len(weights) != num_sources:
        reader.faults.add(
            "weights",
            "there are not as many weights as checkpoints",
            place=item.place,
            expected=f"{num_sources} numbers",
            found=f"{len(weights)}",
        )
        return equal
    if abs(sum(weights)) < 1e-8:
        reader.faults.add(
            "weights", "the weights add up to 0", place=item.place, expected="numbers whose sum they can be divided by"
        )
        return equal
    return weights


def _parse_output(item: Item, reader: Reader) -> Output:
    entries = reader.fields(item, _OUTPUT_KEYS, form="output: {format: hf, dtype: bfloat16, shard_size: 5GB}")
    return Output(
        format=reader.choice(entries["format"], _FORMATS) if "format" in entries else None,
        dtype=DTYPES[reader.choice(entries["dtype"], tuple(DTYPES))] if "dtype" in entries else None,
        shard_nbytes=_parse_shard_size(entries["shard_size"], reader) if "shard_size" in entries else None,
        weights_only=reader.truth(entries["weights_only"]) if "weights_only" in entries else False,
    )


def _parse_shard_size(item: Item, reader: Reader) -> int:
    size = parse_size(item.value) if isinstance(item.value, str) else None
    if size is None or size < _MIN_SHARD_BYTES:
        reader.refuse(item, "size", "expected a size", expected=_SIZE_FORM)
        return _MIN_SHARD_BYTES
    return size
