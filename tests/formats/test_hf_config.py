"""``config.json``: what is read of it, and what a changed model makes of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from llmtailor.errors import FormatError, InvalidInputError, UnsupportedError
from llmtailor.formats.hf import rewrite_config
from llmtailor.formats.hf.config import find_ties, parse_config, read_dtype

LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}


def text_of(**values: Any) -> bytes:
    return json.dumps(values).encode()


def rewritten(text: bytes, *, num_hidden_layers: int | None = None, dtype: str | None = None) -> dict[str, Any]:
    return dict(json.loads(rewrite_config(text, num_hidden_layers=num_hidden_layers, dtype=dtype)))


@pytest.mark.parametrize("text", [b'{ "num_hidden_layers":2,"x":1e400 }', b'{"a": NaN, "dtype": "float32"}'])
def test_configuration_that_does_not_change_keeps_its_bytes(text: bytes) -> None:
    assert rewrite_config(text, num_hidden_layers=None, dtype=None) == text
    assert rewrite_config(text, num_hidden_layers=None, dtype="F32")[:1] == b"{"


@pytest.mark.parametrize("key", ["num_hidden_layers", "n_layer", "num_layers", "n_layers"])
def test_number_of_blocks_is_changed_under_its_own_name(key: str) -> None:
    assert rewritten(text_of(**{key: 4, "other": 1}), num_hidden_layers=6) == {key: 6, "other": 1}


def test_number_of_blocks_of_a_nested_language_model_is_changed() -> None:
    text = text_of(text_config={"num_hidden_layers": 4}, vision_config={"num_hidden_layers": 9})

    assert parse_config(text, Path("c")).num_blocks == 4
    assert rewritten(text, num_hidden_layers=3)["text_config"] == {"num_hidden_layers": 3}
    assert rewritten(text, num_hidden_layers=3)["vision_config"] == {"num_hidden_layers": 9}


def test_list_of_one_kind_of_blocks_follows_their_number() -> None:
    text = text_of(num_hidden_layers=3, layer_types=["full_attention"] * 3)

    assert rewritten(text, num_hidden_layers=5)["layer_types"] == ["full_attention"] * 5
    assert rewritten(text, num_hidden_layers=1)["layer_types"] == ["full_attention"]


def test_list_of_several_kinds_of_blocks_is_refused() -> None:
    text = text_of(num_hidden_layers=2, layer_types=["full_attention", "sliding_attention"])

    assert rewritten(text, num_hidden_layers=2)["layer_types"] == ["full_attention", "sliding_attention"]
    with pytest.raises(UnsupportedError, match="several kinds"):
        rewrite_config(text, num_hidden_layers=3, dtype=None)


def test_real_configuration_with_other_blocks_is_read_by_transformers(tmp_path: Path) -> None:
    text = transformers.Qwen2Config(num_hidden_layers=3).to_json_string().encode()
    (tmp_path / "config.json").write_bytes(rewrite_config(text, num_hidden_layers=7, dtype="BF16"))

    config = transformers.AutoConfig.from_pretrained(tmp_path)

    assert (config.num_hidden_layers, len(config.layer_types), str(config.dtype)) == (7, 7, "torch.bfloat16")


def test_element_type_is_written_under_the_key_that_is_there() -> None:
    assert rewritten(text_of(torch_dtype="float32"), dtype="BF16") == {"torch_dtype": "bfloat16"}
    assert rewritten(text_of(dtype="float32"), dtype="F16") == {"dtype": "float16"}
    assert rewritten(text_of(), dtype="F32") == {"dtype": "float32"}


def test_entries_that_name_code_are_dropped_at_any_depth() -> None:
    text = text_of(auto_map={"AutoModel": "evil.Model"}, text_config={"auto_map": {}, "a": [{"auto_map": 1}, 2]})

    assert rewritten(text) == {"text_config": {"a": [{}, 2]}}


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"[]",
        b"\xff",
        b'{"a": 1, "a": 2}',
        b'{"a": ' + b"[" * 100_000,
        b'{"a": ' + b"[" * 400 + b"]" * 400 + b"}",
        b'{"a": ' + b"9" * 10_000 + b"}",
    ],
)
def test_malformed_configuration_is_refused(text: bytes) -> None:
    with pytest.raises(FormatError):
        rewrite_config(text, num_hidden_layers=None, dtype=None)


@pytest.mark.parametrize(
    "values",
    [
        {"model_type": 3},
        {"architectures": "LlamaForCausalLM"},
        {"architectures": [1]},
        {"num_hidden_layers": -1},
        {"num_hidden_layers": True},
        {"num_hidden_layers": 2**40},
        {"num_hidden_layers": "4"},
        {"tie_word_embeddings": "yes"},
    ],
)
def test_value_of_another_type_is_refused(values: dict[str, Any]) -> None:
    with pytest.raises(FormatError, match="malformed"):
        parse_config(text_of(**values), Path("config.json"))


@pytest.mark.parametrize(
    ("config", "names", "default", "ties"),
    [
        ({"tie_word_embeddings": True}, ["model.embed_tokens.weight"], False, True),
        ({"tie_word_embeddings": False}, ["model.embed_tokens.weight"], True, False),
        ({}, ["model.embed_tokens.weight"], True, True),
        ({}, ["model.embed_tokens.weight"], False, False),
        ({}, ["model.embed_tokens.weight"], None, True),
        ({"tie_word_embeddings": True}, ["model.embed_tokens.weight", "lm_head.weight"], True, False),
        ({"architectures": ["LlamaModel"], "tie_word_embeddings": True}, ["model.embed_tokens.weight"], True, False),
        ({"tie_word_embeddings": True}, ["a.embed_tokens.weight", "b.embed_tokens.weight"], True, False),
    ],
)
def test_head_is_tied_where_the_file_leaves_it_out(
    config: dict[str, Any], names: list[str], default: bool | None, ties: bool
) -> None:
    parsed = parse_config(text_of(**(LLAMA | config)), Path("config.json"))

    found = find_ties(parsed, names, is_tied_by_default=default)

    assert found == ({"lm_head.weight": "model.embed_tokens.weight"} if ties else {})


def test_element_types_are_known_by_both_spellings() -> None:
    assert [read_dtype(name) for name in ("BF16", "bfloat16", "float32", "F16")] == ["BF16", "BF16", "F32", "F16"]
    with pytest.raises(InvalidInputError, match="element type"):
        read_dtype("int4")
