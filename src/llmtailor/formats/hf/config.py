"""What ``config.json`` says of a model, and the same file for a changed model."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ...errors import FormatError, InvalidInputError, UnsupportedError
from .json_files import parse_json_object

__all__ = ["DTYPE_NAMES", "HEAD_NAME", "ModelConfig", "find_ties", "parse_config", "read_dtype", "rewrite_config"]

# safetensors spelling -> as transformers writes it into config.json; those that weights may be cast to.
DTYPE_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}

# How configurations call the number of blocks. Source: transformers 5.23, configuration files (attribute_map).
_BLOCK_COUNT_KEYS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
# Lists with one entry for each block. Source: transformers 5.23, configuration_utils.py (layer_types),
# models/smollm3/configuration_smollm3.py (no_rope_layers).
_PER_BLOCK_KEYS = ("layer_types", "mlp_layer_types", "no_rope_layers")
_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight")
HEAD_NAME = "lm_head.weight"
# No configuration nests deeper than a few levels; what walks one need not fear for the stack.
_MAX_DEPTH = 100

_Value = TypeVar("_Value")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """A parsed ``config.json``."""

    path: Path
    text: bytes
    """As it stands in the file."""
    model_type: str | None
    """``llama``; None if it is not said."""
    architecture: str | None
    """Class of the model: ``LlamaForCausalLM``; None if it is not said."""
    num_blocks: int | None
    is_tied: bool | None
    """``tie_word_embeddings``; None if it is not said, and the class's default holds."""


def parse_config(text: bytes, path: Path) -> ModelConfig:
    """Read ``config.json``.

    Raises:
        FormatError: Not JSON, or one of the values used here has another type.
    """
    value = parse_json_object(text, what="config.json", path=path)
    architectures = value.get("architectures")
    if architectures is not None and not (
        isinstance(architectures, list) and all(isinstance(name, str) for name in architectures)
    ):
        raise _refuse(path, "architectures", "a list of class names", architectures)
    text_part = _text_part(value)
    return ModelConfig(
        path=path,
        text=text,
        model_type=_typed(value, "model_type", str, path),
        architecture=architectures[0] if architectures else None,
        num_blocks=_count_of(text_part, path),
        is_tied=_typed(value, "tie_word_embeddings", bool, path),
    )


def _text_part(value: dict[str, Any]) -> dict[str, Any]:
    """Where the language model's sizes stand: a model of text and images nests them."""
    nested = value.get("text_config")
    return nested if isinstance(nested, dict) and not any(key in value for key in _BLOCK_COUNT_KEYS) else value


def _count_of(part: Mapping[str, Any], path: Path) -> int | None:
    for key in _BLOCK_COUNT_KEYS:
        if part.get(key) is not None:
            count = part[key]
            if type(count) is not int or not 0 <= count < 2**31:
                raise _refuse(path, key, "a number of blocks", count)
            return count
    return None


def _typed(value: Mapping[str, Any], key: str, kind: type[_Value], path: Path) -> _Value | None:
    found = value.get(key)
    if found is not None and not isinstance(found, kind):
        raise _refuse(path, key, kind.__name__, found)
    return found


def _refuse(path: Path, key: str, expected: str, found: object) -> FormatError:
    return FormatError(
        f"config.json has a malformed {key}",
        kind="bad-config",
        path=path,
        expected=expected,
        found=repr(found)[:200],
    )


def find_ties(config: ModelConfig | None, names: Iterable[str], *, is_tied_by_default: bool | None) -> dict[str, str]:
    """The head's name -> the embedding's, where the file leaves the head out because the two are one tensor.

    Args:
        config: None where there is no ``config.json``: then nothing is known to be tied.
        names: Of the tensors in the weights files.
        is_tied_by_default: ``tie_word_embeddings`` where the configuration does not say; None: a head that is not in
            the file is tied.

    Source:
        transformers 5.23, modeling_utils.py (save_pretrained leaves out what ``tie_weights`` makes again).
    """
    held = set(names)
    if config is None or HEAD_NAME in held or not _has_head(config):
        return {}
    is_tied = is_tied_by_default if config.is_tied is None else config.is_tied
    embeddings = [name for name in held if name.endswith(_EMBEDDINGS)]
    if is_tied is False or len(embeddings) != 1:
        return {}
    return {HEAD_NAME: embeddings[0]}


def _has_head(config: ModelConfig) -> bool:
    return config.architecture is not None and config.architecture.endswith(("ForCausalLM", "LMHeadModel"))


def read_dtype(name: str) -> str:
    """The safetensors spelling of an element type that weights can be cast to.

    Args:
        name: ``BF16`` or ``bfloat16``.

    Raises:
        InvalidInputError: There is no such type.
    """
    spelled = {word: dtype for dtype, word in DTYPE_NAMES.items()}.get(name, name)
    if spelled not in DTYPE_NAMES:
        raise InvalidInputError(
            "weights cannot be written in this element type",
            kind="unknown-dtype",
            expected=", ".join(DTYPE_NAMES.values()),
            found=repr(name),
        )
    return spelled


def rewrite_config(
    text: bytes, *, num_hidden_layers: int | None, dtype: str | None, path: Path | str = "config.json"
) -> bytes:
    """``config.json`` for a model with another number of blocks or another element type.

    Entries that name code (``auto_map``) are dropped: the code is not copied, and whoever loads the result should
    not be asked to trust it. Where nothing changes, the bytes are those given.

    Args:
        text: The source's ``config.json``.
        num_hidden_layers: Blocks of the new model; None: as before.
        dtype: safetensors spelling of the new weights' type; None: as before.
        path: For the error.

    Raises:
        FormatError: The text is not such a configuration.
        UnsupportedError: The blocks are of several kinds (``layer_types``), so that another number of them would
            need to be told which.
    """
    value = parse_json_object(text, what="config.json", path=path)
    _drop_code(value, path)
    if num_hidden_layers is not None:
        _set_block_count(_text_part(value), num_hidden_layers, path)
    if dtype is not None:
        # Source: transformers 5.23, configuration_utils.py: ``dtype``; ``torch_dtype`` before 4.56, read still.
        value["torch_dtype" if "torch_dtype" in value and "dtype" not in value else "dtype"] = DTYPE_NAMES[dtype]
    if json.dumps(value) == json.dumps(parse_json_object(text, what="config.json", path=path)):
        return text
    return (json.dumps(value, indent=2) + "\n").encode()


def _drop_code(value: dict[str, Any], path: Path | str) -> None:
    level: list[Any] = [value]
    for _ in range(_MAX_DEPTH):
        for item in level:
            if isinstance(item, dict):
                item.pop("auto_map", None)
        level = [
            child
            for item in level
            if isinstance(item, dict | list)
            for child in (item.values() if isinstance(item, dict) else item)
        ]
        if not level:
            return
    raise FormatError("config.json is nested too deeply", kind="bad-config", path=path)


def _set_block_count(part: dict[str, Any], count: int, path: Path | str) -> None:
    key = next((key for key in _BLOCK_COUNT_KEYS if part.get(key) is not None), _BLOCK_COUNT_KEYS[0])
    if part.get(key) == count:
        return
    part[key] = count
    for name in _PER_BLOCK_KEYS:
        kinds = part.get(name)
        if not isinstance(kinds, list) or len(kinds) == count:
            continue
        if any(kind != kinds[0] for kind in kinds):
            raise UnsupportedError(
                "the model's blocks are of several kinds, and their number changes",
                kind="layer-types",
                path=path,
                expected=f"one kind in {name}, or as many blocks as before",
                found=f"{len(kinds)} blocks before, {count} now",
                hint="keep the number of blocks of the source that config.json is taken from",
            )
        part[name] = kinds[:1] * count
