"""The part of YAML that recipes are written in, and all that is refused."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmtailor.errors import InvalidInputError
from llmtailor.recipe.yaml_text import MAX_NBYTES, Item, parse_yaml


def plain(item: Item) -> Any:
    if isinstance(item.value, Mapping):
        return {key: plain(entry) for key, entry in item.value.items()}
    if isinstance(item.value, tuple):
        return [plain(entry) for entry in item.value]
    return item.value


def read(text: str | bytes) -> Any:
    return plain(parse_yaml(text.encode() if isinstance(text, str) else text, path="r.yaml"))


def refuse(text: str | bytes) -> InvalidInputError:
    with pytest.raises(InvalidInputError) as caught:
        read(text)
    assert caught.value.path == "r.yaml"
    assert len(str(caught.value)) < 12_000
    return caught.value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("no", "no"),
        ("on", "on"),
        ("yes", "yes"),
        ("y", "y"),
        ("1:30", "1:30"),
        ("0777", "0777"),
        ("1_000", "1_000"),
        ("2026-11-21", "2026-11-21"),
        ("0b11", "0b11"),
        ("=", "="),
        ("~/runs", "~/runs"),
        ("160", 160),
        ("-3", -3),
        ("+3", 3),
        ("0", 0),
        ("0o17", 15),
        ("0xff", 255),
        ("1.5", 1.5),
        (".5", 0.5),
        ("5.", 5.0),
        ("1e3", 1000.0),
        ("-1.5e-3", -0.0015),
        ("true", True),
        ("False", False),
        ("TRUE", True),
        ("null", None),
        ("~", None),
        ('"160"', "160"),
        ("'true'", "true"),
        ('"\\u00e9"', "\u00e9"),
    ],
)
def test_plain_scalar_means_what_yaml_1_2_says(text: str, value: object) -> None:
    found = read(f"key: {text}")["key"]
    assert (type(found), found) == (type(value), value)


def test_parse_yaml_reads_block_and_flow_alike() -> None:
    block = "# a comment\na:\n  - b: 1\n    c: [x, y]\n  -\n"
    assert read(block) == read("{a: [{b: 1, c: [x, y]}, null]}") == {"a": [{"b": 1, "c": ["x", "y"]}, None]}


def test_parse_yaml_reads_a_long_text() -> None:
    assert read("a: |\n  one\n  two\n") == {"a": "one\ntwo\n"}


@pytest.mark.parametrize("text", ["", "# nothing\n", "---\n", "\n\n"])
def test_parse_yaml_of_nothing_is_nothing(text: str) -> None:
    assert read(text) is None


def test_items_know_their_places() -> None:
    root = parse_yaml(b"slices:\n  - sources:\n      - {model: a}\n      - {model: b, 'x y': 1}\n", path="r.yaml")
    sources = root.value["slices"].value[0].value["sources"]  # type: ignore[index, union-attr, call-overload]
    model, other = sources.value[1].value["model"], sources.value[1].value["x y"]
    assert (model.place.path, model.place.line, model.place.column) == ("$.slices[0].sources[1].model", 4, 17)
    assert (model.key_place.line, model.key_place.column) == (4, 10)
    assert other.place.path == '$.slices[0].sources[1]["x y"]'


LAUGHS = "a: &a [x, x]\n" + "".join(
    f"{after}: &{after} [{', '.join(['*' + before] * 9)}]\n"
    for before, after in zip("abcdefgh", "bcdefghi", strict=True)
)

HOSTILE = {
    "yaml-anchor": ["a: &x 1", "&x a: 1", "a: &x [1]", "a: &x\n  b: 1"],
    "yaml-tag": [
        "a: !!python/object/apply:os.system [ls]",
        "a: !!python/object:os.path {}",
        "!!python/name:os.system ''",
        "a: !!binary aGk=",
        "a: !!str 1",
        "a: !x 1",
        "a: ! 1",
        "!!set {a}",
        "!!omap [a: 1]",
    ],
    "yaml-merge-key": ["<<: {a: 1}", "a: {<<: {b: 1}}"],
    "yaml-syntax": [
        "a: [1",
        "a: b: c",
        "\ta: 1",
        "a: 'x",
        "a: *nowhere x: 1",
        "]",
        'a: "\\q"',
        'a: "\\U00110000"',
        "%YAML 1.x\n---\na: 1",
        "a: 1\n b: 2",
        "a: @x",
        "a: `x`",
        "a: \x07",
        "a: \x00",
        "\x00",
        "a: \x7f",
        "a: %x",
        "%YAML " + "9" * 5000 + ".1\n--- a",
    ],
    "yaml-depth": ["[" * 100_000, "- " * 1000, "{a: " * 17 + "1" + "}" * 17],
    "yaml-directive": ["%YAML 1.1\n---\na: no", "%TAG ! tag:x,2000:\n---\na: 1"],
    "yaml-documents": ["a: 1\n---\nb: 2", "--- a\n--- b", "a: 1\n...\n---\n"],
    "yaml-key": [
        "a: 1\na: 2",
        "{a: 1, 'a': 2}",
        "1: x",
        "null: x",
        "true: x",
        "1.5: x",
        "? [a]\n: b",
        "{{a: 1}: b}",
        "? \n: x",
        "? " * 500,
    ],
    "yaml-number": ["a: .inf", "a: -.INF", "a: .nan", "a: 1e999", "a: " + "9" * 5000, "a: 0x" + "f" * 100],
    "yaml-text": ['a: "x\\0y"', 'a: "\\e[2J"', 'a: "\\ud800"', '"\\x01": 1', 'a: "\\x85"'],
    "yaml-encoding": [b"\xef\xbb\xbfa: 1", b"a: \xff", b"a: \xc3", "a: 1".encode("utf-16"), b"\xed\xa0\x80: 1"],
    "yaml-size": [b" " * (MAX_NBYTES + 1), b"a: " + b"x" * MAX_NBYTES],
}


@pytest.mark.parametrize(("kind", "text"), [(kind, text) for kind, texts in HOSTILE.items() for text in texts])
def test_parse_yaml_refuses_by_kind(kind: str, text: str | bytes) -> None:
    error = refuse(text)
    assert error.kind == kind
    assert error.expected


def test_billion_laughs_are_refused_at_their_anchors_and_aliases() -> None:
    error = refuse(LAUGHS)
    assert error.kind == "recipe-faults"
    assert "$.a (line 1, column 4): an anchor is not allowed" in str(error)
    assert "$.b[0] (line 2, column 8): an alias is not allowed" in str(error)
    assert "more" in str(error)


def test_an_anchor_that_holds_itself_is_refused() -> None:
    assert "an alias is not allowed" in str(refuse("a: &a [*a]"))


def test_depth_of_16_is_read_and_17_refused() -> None:
    assert read("[" * 16 + "]" * 16) is not None
    error = refuse("[" * 17 + "]" * 17)
    assert (error.kind, "$[0][0]" in str(error)) == ("yaml-depth", True)


def test_syntax_error_names_line_and_path() -> None:
    error = refuse("slices:\n  - sources: [a, b\nmerge_method: linear\n")
    assert "$.slices[0].sources" in error.what
    assert "(line 3, column " in error.what


def test_encoding_error_names_the_line() -> None:
    assert "line 3" in refuse(b"a: 1\nb: 2\nc: \xff\n").what


def test_duplicate_key_names_both_lines() -> None:
    error = refuse("a: 1\nb: 2\na: 3\n")
    assert "(line 3, column 1)" in error.what
    assert error.found == "it is on line 1, too"


@pytest.mark.parametrize(
    "text",
    [
        "[" * (MAX_NBYTES - 1),
        "a: " + "[[],".ljust(1000, "x") * 200,
        "a: 1\n" * 50_000,
        "'" * (MAX_NBYTES - 1),
        "? a\n" * 60_000,
        "&a " * 80_000,
        "!a " * 80_000,
        "\n" * (MAX_NBYTES - 1),
        "#" * (MAX_NBYTES - 1),
        "a: |\n" + " x\n" * 80_000,
    ],
    ids=range(10),
)
@pytest.mark.timeout(30)
def test_large_texts_end_soon(text: str) -> None:
    assert len(text) <= MAX_NBYTES
    with contextlib.suppress(InvalidInputError):
        read(text)


YAML_BITS = st.lists(
    st.sampled_from(
        [*"[]{}:,-?&*!|>'\"%@`#~.0a1 \n\t", "\\", "<<", "---", "...", ": ", "- ", "\n  ", "!!", "\ufeff", "\x00"]
    ),
    max_size=40,
).map("".join)


@given(YAML_BITS | st.text(max_size=40) | st.binary(max_size=40))
def test_parse_yaml_raises_nothing_else(text: str | bytes) -> None:
    with contextlib.suppress(InvalidInputError):
        parse_yaml(text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text, path="r.yaml")
