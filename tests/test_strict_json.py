from __future__ import annotations

import contextlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmtailor.errors import FormatError
from llmtailor.strict_json import parse_object


def refuse(text: bytes) -> str:
    with pytest.raises(FormatError) as caught:
        parse_object(text, what="manifest", path="here/tailor.json")
    assert caught.value.kind == "bad-json"
    assert caught.value.path == "here/tailor.json"
    return str(caught.value)


def test_parse_object_gives_what_was_written() -> None:
    text = b'{"a": [1, -2.5e3, true, null, "\\u00e9"], "b": {}}'
    assert parse_object(text, what="it", path="x") == {"a": [1, -2500.0, True, None, "\u00e9"], "b": {}}


@pytest.mark.parametrize("text", [b"", b"{", b'{"a": 1', b"{'a': 1}", b'{"a": 1,}', b"{} {}", b'{"a": 01}', b"\x00"])
def test_parse_object_refuses_what_is_not_json(text: bytes) -> None:
    assert "cannot read manifest" in refuse(text)


@pytest.mark.parametrize("text", [b"[]", b"1", b'"a"', b"null"])
def test_parse_object_refuses_another_type(text: bytes) -> None:
    assert "expected an object" in refuse(text)


@pytest.mark.parametrize(
    "text", [b'{"a": 1, "b": 2, "a": 1}', b'{"x": {"a": 1, "a": 2}}', b'{"x": [{"a": 1, "\\u0061": 2}]}']
)
def test_parse_object_refuses_a_duplicate_key(text: bytes) -> None:
    assert "'a' stands there twice" in refuse(text)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "-1e999", "1" + "0" * 400 + ".0"])
def test_parse_object_refuses_a_number_that_is_none(number: str) -> None:
    refuse(f'{{"a": {number}}}'.encode())


def test_parse_object_refuses_an_integer_of_a_million_digits() -> None:
    refuse(b'{"a": 1' + b"0" * 10**6 + b"}")


@pytest.mark.parametrize("text", [b'{"a": "\xff"}', b'{"a": "\xc3"}', b"\xef\xbb\xbf{}", '{"a": 1}'.encode("utf-16")])
def test_parse_object_refuses_other_encodings(text: bytes) -> None:
    refuse(text)


@pytest.mark.parametrize("opening", [b'{"a":', b"["])
def test_parse_object_refuses_deep_nesting(opening: bytes) -> None:
    refuse(b'{"a":' + opening * 100_000)


def test_parse_object_refuses_control_characters_in_text() -> None:
    refuse(b'{"a": "x\ny"}')


@given(st.binary(max_size=60))
def test_parse_object_raises_nothing_else(text: bytes) -> None:
    with contextlib.suppress(FormatError):
        assert isinstance(parse_object(text, what="it", path="x"), dict)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)


@given(st.dictionaries(st.text(), JSON, max_size=4))
def test_parse_object_is_the_inverse_of_dumps(value: dict[str, object]) -> None:
    assert parse_object(json.dumps(value).encode(), what="it", path="x") == value
