"""``rest`` as text: what is read, what is refused and how, and which codec it means for a tensor."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmtailor.codecs import SKIP, Component, Rest, component_of, parse_rest
from llmtailor.errors import InvalidInputError
from llmtailor.tensors import TensorMeta

Q8 = Rest(weights="delta8", first="int8", second="log8")
PRESETS = {
    "q8": Q8,
    "q4": Rest(weights="delta4", first="int4", second="log4"),
    "compact": Rest(weights="tail8", first="int8", second="log8"),
    "compact4": Rest(weights="tail4", first="int4", second="log4"),
}
ALL_EXACT = "codes(weights=exact, first=exact, second=exact"


@pytest.mark.parametrize(("text", "rest"), PRESETS.items())
def test_presets(text: str, rest: Rest) -> None:
    assert parse_rest(text) == rest
    assert rest.text == text


@pytest.mark.parametrize("value", [None, SKIP, "skip"])
def test_skip_leaves_layers_as_they_are(value: str | None) -> None:
    assert parse_rest(value) is None


def test_a_rest_is_left_alone() -> None:
    rest = dataclasses.replace(Q8, first="exact")
    assert parse_rest(rest) is rest


@pytest.mark.parametrize(
    ("text", "rest"),
    [
        ("codes(weights=delta8, first=int8, second=log8)", Q8),
        (" codes(second='log8',first=\"int8\",\n weights=delta8,) ", Q8),
        (ALL_EXACT + ")", Rest(weights="exact", first="exact", second="exact")),
        (
            "codes(weights=tail4, first=int8, second=log4, weights_limit=0.001, first_limit=1, second_limit=2e-1)",
            Rest(weights="tail4", first="int8", second="log4", weights_limit=0.001, first_limit=1, second_limit=0.2),
        ),
        (ALL_EXACT + ", weights_limit=0)", Rest(weights="exact", first="exact", second="exact", weights_limit=0)),
    ],
)
def test_calls(text: str, rest: Rest) -> None:
    assert parse_rest(text) == rest


@pytest.mark.parametrize(
    ("rest", "text"),
    [
        (dataclasses.replace(Q8, first="int4"), "codes(weights=delta8, first=int4, second=log8)"),
        (
            dataclasses.replace(Q8, weights_limit=0.5),
            "codes(weights=delta8, first=int8, second=log8, weights_limit=0.5)",
        ),
        (
            Rest(weights="exact", first="exact", second="log4", first_limit=0.5, second_limit=1e-9),
            "codes(weights=exact, first=exact, second=log4, first_limit=0.5, second_limit=1e-09)",
        ),
    ],
)
def test_text_is_canonical(rest: Rest, text: str) -> None:
    assert rest.text == text
    assert parse_rest(text) == rest


LIMITS = st.floats(0, allow_infinity=False) | st.integers(0, 10**15)


@given(
    st.builds(
        Rest,
        weights=st.sampled_from(["delta8", "delta4", "tail8", "tail4", "exact"]),
        first=st.sampled_from(["int8", "int4", "exact"]),
        second=st.sampled_from(["log8", "log4", "exact"]),
        weights_limit=LIMITS | st.just(0.01),
        first_limit=LIMITS | st.just(0.25),
        second_limit=LIMITS | st.just(0.5),
    )
)
def test_text_comes_back_as_it_went(rest: Rest) -> None:
    assert parse_rest(rest.text) == rest


@pytest.mark.parametrize(
    ("text", "kind", "said"),
    [
        ("", "rest", "skip, q8, q4, compact, compact4, or codes"),
        ("Q8", "rest", r"did you mean q8\?"),
        ("Compact", "rest", r"did you mean compact\?"),
        ("skp", "rest", r"did you mean skip\?"),
        ("everything", "rest", 'write for example rest="q8"'),
        ("q8()", "rest", "q8"),
        ("codes", "rest", "codes"),
        ("codes(", "rest", "codes"),
        ("codes(delta8, int8, log8)", "rest", "codes"),
        ("code(weights=delta8, first=int8, second=log8)", "rest", "codes"),
        ("a.codes(weights=delta8, first=int8, second=log8)", "rest", "codes"),
        ("codes(weights=delta8, first=int8, second=log8)()", "rest", "codes"),
        ("codes(weights=delta8, first=int8, second=log8) or 1", "rest", "codes"),
        ("lambda: 1", "rest", "codes"),
        ("q8\0", "rest", "codes"),
        ("q8\ud800", "rest", "codes"),
        ("codes(" + "(" * 10_000, "rest", "10006 characters"),
        ("codes(weights=" + "-" * 900 + "1, first=int8, second=log8)", "rest", "characters"),
        ("codes(weights=" + "a." * 5000 + "a)", "rest", "characters"),
        ("codes()", "rest", "each of weights, first, second once"),
        ("codes(weights=delta8, first=int8)", "rest", "each of weights, first, second once"),
        ("codes(weights=delta8, weights=delta8, first=int8, second=log8)", "rest", "once"),
        (
            "codes(weights=delta8, first=int8, second=log8, third=log8)",
            "rest",
            "first_limit, second_limit",
        ),
        ("codes(weights=delta8, first=int8, second=log8, **x)", "rest", "once"),
        ("codes(*x, weights=delta8, first=int8, second=log8)", "rest", "codes"),
        ("codes(weights=delta9, first=int8, second=log8)", "rest-codec", "'delta9'"),
        ("codes(weights=int8, first=int8, second=log8)", "rest-codec", "delta8 or delta4 or tail8 or tail4 or exact"),
        ("codes(weights=xor, first=int8, second=log8)", "rest-codec", "'xor'"),
        ("codes(weights=delta8, first=log8, second=log8)", "rest-codec", "int8 or int4 or exact"),
        ("codes(weights=delta8, first=int8, second=int8)", "rest-codec", "log8 or log4 or exact"),
        ("codes(weights=8, first=int8, second=log8)", "rest-codec", "8"),
        ("codes(weights=None, first=int8, second=log8)", "rest-codec", "None"),
        ("codes(weights=[delta8], first=int8, second=log8)", "rest-codec", r"\[delta8\]"),
        ("codes(weights=__import__('os'), first=int8, second=log8)", "rest-codec", "__import__"),
        ("codes(weights=" + "-" * 140 + "1, first=int8, second=log8)", "rest-codec", "---1"),
        (ALL_EXACT + ", weights_limit=-1)", "rest-limit", "'-1'"),
        (ALL_EXACT + ", weights_limit=1e999)", "rest-limit", "a number >= 0"),
        (ALL_EXACT + ", first_limit=True)", "rest-limit", "True"),
        (ALL_EXACT + ", first_limit=None)", "rest-limit", "None"),
        (ALL_EXACT + ", second_limit='0.1')", "rest-limit", "'0.1'"),
        (ALL_EXACT + ", second_limit=nan)", "rest-limit", "nan"),
        (ALL_EXACT + ", second_limit=1+1)", "rest-limit", "1\\+1"),
        (ALL_EXACT + ", second_limit=1j)", "rest-limit", "1j"),
    ],
)
def test_bad_texts_are_refused(text: str, kind: str, said: str) -> None:
    with pytest.raises(InvalidInputError, match=said) as caught:
        parse_rest(text)
    error = caught.value
    assert error.kind == kind
    assert None not in (error.expected, error.found, error.hint)
    assert len(str(error)) < 1000


@pytest.mark.parametrize("value", [8, True, ["q8"], {"weights": "delta8"}, Rest])
def test_other_things_are_refused(value: object) -> None:
    with pytest.raises(InvalidInputError) as caught:
        parse_rest(value)  # type: ignore[arg-type]
    assert caught.value.kind == "rest"


@pytest.mark.parametrize("call", ["open('x', 'w')", "[open('x', 'w')][0]", "f'{open(chr(120), chr(119))}'"])
def test_texts_are_never_evaluated(call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for text in (
        f"codes(weights={call}, first=int8, second=log8)",
        f"{ALL_EXACT}, weights_limit={call})",
        f"codes({call})",
        call,
        f"{call} or q8",
    ):
        with pytest.raises(InvalidInputError):
            parse_rest(text)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("limit", [float("nan"), float("inf"), -1.0, -1, True, None, "1", 1j])
@pytest.mark.parametrize("name", ["weights_limit", "first_limit", "second_limit"])
def test_limits_that_make_no_sense_are_refused(name: str, limit: object) -> None:
    with pytest.raises(InvalidInputError, match=name) as caught:
        dataclasses.replace(Q8, **{name: limit})
    assert caught.value.kind == "rest-limit"


@pytest.mark.parametrize(("name", "codec"), [("weights", "int8"), ("first", "log8"), ("second", "int8"), ("first", [])])
def test_codecs_that_make_no_sense_are_refused(name: str, codec: object) -> None:
    with pytest.raises(InvalidInputError, match=name) as caught:
        dataclasses.replace(Q8, **{name: codec})
    assert caught.value.kind == "rest-codec"


@given(st.text(max_size=40) | st.text("codes(weights=delta8,fi int."))
def test_no_text_raises_anything_else(text: str) -> None:
    try:
        rest = parse_rest(text)
    except InvalidInputError:
        return
    assert rest is None or parse_rest(rest.text) == rest


def test_limits_are_by_component() -> None:
    rest = dataclasses.replace(Q8, weights_limit=1, first_limit=2, second_limit=3)
    assert [rest.limit(each) for each in Component] == [1, 2, 3, 1, 0]


@pytest.mark.parametrize(
    ("key", "component"),
    [
        ("layers.0.weight", Component.WEIGHTS),
        ("exp_avg", Component.WEIGHTS),
        ("state.layers.0.weight.exp_avg", Component.FIRST),
        ("state.w.momentum_buffer", Component.FIRST),
        ("state.w.exp_avg_sq", Component.SECOND),
        ("state.w.square_avg", Component.SECOND),
        ("state.w.master_param", Component.MASTER),
        ("state.w.master", Component.MASTER),
        ("state.w.step", Component.OTHER),
        ("state.exp_avg.step", Component.OTHER),
        ("state.w.something", Component.OTHER),
    ],
)
def test_component_of(key: str, component: Component) -> None:
    assert component_of(key) is component


@pytest.mark.parametrize(
    ("rest", "key", "dtype", "numel", "codec"),
    [
        ("q8", "w", "F32", 4096, "delta8"),
        ("q8", "w", "F32", 4095, "exact"),
        ("q8", "w", "BF16", 4096, "xor"),
        ("q8", "w", "F16", 4096, "xor"),
        ("q8", "w", "F64", 4096, "exact"),
        ("q8", "w", "I64", 4096, "exact"),
        ("q8", "w", "F8_E4M3", 4096, "exact"),
        ("q4", "w", "F32", 4096, "delta4"),
        ("compact", "w", "F32", 4096, "tail8"),
        ("compact", "w", "BF16", 4096, "exact"),
        ("compact4", "w", "F32", 4096, "tail4"),
        (ALL_EXACT + ")", "w", "BF16", 4096, "exact"),
        ("q8", "state.w.exp_avg", "F32", 4096, "int8"),
        ("q4", "state.w.exp_avg", "BF16", 4096, "int4"),
        ("q4", "state.w.exp_avg", "BF16", 100, "exact"),
        ("compact", "state.w.exp_avg_sq", "F32", 4096, "log8"),
        ("compact4", "state.w.exp_avg_sq", "F16", 4096, "log4"),
        ("q8", "state.w.exp_avg_sq", "F64", 4096, "exact"),
        ("q8", "state.w.step", "F32", 4096, "exact"),
        (ALL_EXACT + ")", "state.w.exp_avg_sq", "F32", 4096, "exact"),
    ],
)
def test_a_rest_has_a_codec_for_each_tensor(rest: str, key: str, dtype: str, numel: int, codec: str) -> None:
    parsed = parse_rest(rest)
    assert parsed is not None
    meta = TensorMeta(dtype=dtype, shape=(numel,))
    codes = parsed.codes_for(key, meta)
    assert (codes.codec, codes.meta) == (codec, meta)


@pytest.mark.parametrize(("text", "is_relative"), [("q8", True), ("q4", True), ("compact", False), ("compact4", False)])
def test_only_differences_need_the_files_they_are_from(text: str, is_relative: bool) -> None:
    rest = parse_rest(text)
    assert rest is not None
    assert rest.is_relative is is_relative
