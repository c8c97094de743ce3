"""What a codes file holds: arrays of each codec, and headers that say something else than there is."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmtailor.codecs import StoredCodes, array_name, parse_codes, record_codes
from llmtailor.codecs.stored import FRAME_NUMEL
from llmtailor.errors import FormatError
from llmtailor.tensors import DTYPE_BITS, TensorMeta

PATH = "codes.safetensors"
DTYPES = {
    "exact": sorted(DTYPE_BITS),
    **{codec: ["F32", "BF16", "F16"] for codec in ("int8", "int4", "log8", "log4")},
    **{codec: ["F32"] for codec in ("delta8", "delta4", "tail8", "tail4")},
    "xor": ["BF16", "F16"],
}


def meta(dtype: str, *shape: int) -> TensorMeta:
    return TensorMeta(dtype=dtype, shape=shape)


def stored(codec: str, dtype: str, *shape: int) -> StoredCodes:
    return StoredCodes(codec=codec, meta=meta(dtype, *shape))


def arrays_of(tensors: Mapping[str, StoredCodes]) -> dict[str, TensorMeta]:
    """What a file of these holds; ``xor`` has taken 7 bytes."""
    arrays = {array_name(key, name): array for key, each in tensors.items() for name, array in each.arrays.items()}
    return arrays | {array_name(key, "planes"): meta("U8", 7) for key, each in tensors.items() if each.codec == "xor"}


@pytest.mark.parametrize(
    ("codec", "dtype", "arrays", "base"),
    [
        ("exact", "I64", {"values": meta("I64", 5, 13)}, None),
        ("int8", "F32", {"codes": meta("I8", 65), "scales": meta("BF16", 2)}, None),
        ("int4", "BF16", {"codes": meta("U8", 64), "scales": meta("BF16", 2)}, None),
        ("log8", "F16", {"codes": meta("U8", 65), "lows": meta("BF16", 2), "steps": meta("U16", 2)}, None),
        ("log4", "F32", {"codes": meta("U8", 64), "lows": meta("BF16", 2), "steps": meta("U16", 2)}, None),
        ("delta8", "F32", {"codes": meta("I8", 65), "scales": meta("BF16", 2)}, "exact"),
        ("delta4", "F32", {"codes": meta("U8", 64), "scales": meta("BF16", 2)}, "exact"),
        ("tail8", "F32", {"codes": meta("I8", 65)}, "rounded"),
        ("tail4", "F32", {"codes": meta("U8", 64)}, "rounded"),
        ("xor", "BF16", {"ends": meta("I64", 1)}, "exact"),
    ],
)
def test_each_codec_has_its_arrays(codec: str, dtype: str, arrays: dict[str, TensorMeta], base: str | None) -> None:
    each = stored(codec, dtype, 5, 13)
    assert each.arrays == arrays
    # In the order in which kernels return them.
    assert list(each.arrays) == list(arrays)
    assert each.base == base
    worst = 2 * 65 if codec == "xor" else 0
    assert each.nbytes == sum(array.nbytes for array in arrays.values()) + worst


@pytest.mark.parametrize(("numel", "blocks"), [(0, 0), (1, 1), (64, 1), (65, 2), (128, 2)])
def test_blocks_are_of_64(numel: int, blocks: int) -> None:
    assert stored("int4", "F32", numel).arrays == {"codes": meta("U8", 32 * blocks), "scales": meta("BF16", blocks)}


@pytest.mark.parametrize(("numel", "frames"), [(1, 1), (FRAME_NUMEL, 1), (FRAME_NUMEL + 1, 2), (0, 0)])
def test_frames_are_of_a_million(numel: int, frames: int) -> None:
    assert stored("xor", "F16", numel).arrays == {"ends": meta("I64", frames)}


def test_a_scalar_is_one_block() -> None:
    assert stored("int8", "F32").arrays == {"codes": meta("I8", 1), "scales": meta("BF16", 1)}


SHAPES = st.lists(st.integers(0, 200), max_size=4).map(tuple)
TENSORS = st.sampled_from([(codec, dtype) for codec in DTYPES for dtype in DTYPES[codec]]).flatmap(
    lambda each: SHAPES.map(lambda shape: stored(*each, *shape))
)


@given(st.dictionaries(st.text(max_size=20) | st.text("a|.", max_size=5), TENSORS, max_size=8))
def test_parse_codes_reads_what_record_codes_wrote(tensors: dict[str, StoredCodes]) -> None:
    assert parse_codes(record_codes(tensors), arrays_of(tensors), PATH) == tensors


def test_record_codes_does_not_depend_on_order() -> None:
    one, other = stored("int8", "F32", 3), stored("xor", "BF16", 4)
    assert record_codes({"b": one, "a": other}) == record_codes({"a": other, "b": one})
    assert json.loads(record_codes({"b": one})) == {"b": {"codec": "int8", "dtype": "F32", "shape": [3]}}


WEIGHT = {"codec": "int8", "dtype": "F32", "shape": [5, 13]}
MOMENT = {"codec": "log4", "dtype": "BF16", "shape": [65]}
PACKED = {"codec": "xor", "dtype": "BF16", "shape": [65]}
FILE = {
    "w|codes": meta("I8", 65),
    "w|scales": meta("BF16", 2),
    "m|codes": meta("U8", 64),
    "m|lows": meta("BF16", 2),
    "m|steps": meta("U16", 2),
    "x|ends": meta("I64", 1),
    "x|planes": meta("U8", 1000),
}
HEADER = {"w": WEIGHT, "m": MOMENT, "x": PACKED}


def header(**changes: Any) -> str:
    """``HEADER`` with other entries; those that are None left out."""
    return json.dumps({key: entry for key, entry in (HEADER | changes).items() if entry is not None})


def test_the_header_that_others_differ_from_is_good() -> None:
    assert parse_codes(header(), FILE, PATH).keys() == HEADER.keys()


@pytest.mark.parametrize(
    ("text", "kind", "said"),
    [
        (None, "codes", "no such entry"),
        ("", "bad-json", "header of a codes file"),
        ("{", "bad-json", "header of a codes file"),
        ("[]", "bad-json", "an object"),
        ("null", "bad-json", "an object"),
        ("[" * 100_000, "bad-json", "header of a codes file"),
        ('{"w": {"codec": "int8", "dtype": "F32", "shape": [NaN]}}', "bad-json", "NaN"),
        ('{"w": {"codec": "int8", "dtype": "F32", "shape": [1' + "0" * 10_000 + "]}}", "bad-json", "header of a codes"),
        (header()[:-1] + ', "w": {}}', "bad-json", "key 'w' stands there twice"),
        ("{}\ud800", "bad-json", "header of a codes file"),
        ("{}", "codes", "m|codes"),
        # Entries of another form.
        (header(w=[]), "codes", "codec, dtype, shape"),
        (header(w="int8"), "codes", "codec, dtype, shape"),
        (header(w={}), "codes", "codec, dtype, shape"),
        (header(w={"codec": "int8", "dtype": "F32"}), "codes", "codec, dtype, shape"),
        (header(w=WEIGHT | {"more": 1}), "codes", "codec, dtype, shape"),
        # Codecs.
        (header(w=WEIGHT | {"codec": "int2"}), "codec", "int2"),
        (header(w=WEIGHT | {"codec": ""}), "codec", "upgrade"),
        (header(w=WEIGHT | {"codec": None}), "codec", "None"),
        (header(w=WEIGHT | {"codec": ["int8"]}), "codec", "int8"),
        (header(w=WEIGHT | {"codec": {"int8": 1}}), "codec", "int8"),
        (header(w=WEIGHT | {"codec": 8}), "codec", "8"),
        # Element types.
        (header(w=WEIGHT | {"dtype": "F64"}), "codes", "an element type that"),
        (header(w=WEIGHT | {"dtype": "f32"}), "codes", "an element type that"),
        (header(w=WEIGHT | {"dtype": None}), "codes", "an element type that"),
        (header(w=WEIGHT | {"dtype": ["F32"]}), "codes", "an element type that"),
        (header(w=WEIGHT | {"dtype": {}}), "codes", "an element type that"),
        (header(w=WEIGHT | {"codec": "delta8", "dtype": "BF16"}), "codes", "an element type that"),
        (header(w=WEIGHT | {"codec": "tail8", "dtype": "F16"}), "codes", "an element type that"),
        (header(x=PACKED | {"dtype": "F32"}), "codes", "an element type that"),
        (header(w=WEIGHT | {"codec": "exact", "dtype": "F128"}), "codes", "an element type that"),
        # Shapes.
        (header(w=WEIGHT | {"shape": 65}), "codes", "a shape"),
        (header(w=WEIGHT | {"shape": "65"}), "codes", "a shape"),
        (header(w=WEIGHT | {"shape": None}), "codes", "a shape"),
        (header(w=WEIGHT | {"shape": {"65": 1}}), "codes", "a shape"),
        (header(w=WEIGHT | {"shape": [65.0]}), "codes", "a shape"),
        (header(w=WEIGHT | {"shape": ["65"]}), "codes", "a shape"),
        (header(w=WEIGHT | {"shape": [True, 65]}), "codes", "a shape"),
        (header(w=WEIGHT | {"shape": [-5, -13]}), "codes", "a shape"),
        (header(w=WEIGHT | {"shape": [2**63]}), "codes", "a shape"),
        (header(w=WEIGHT | {"shape": [1] * 65}), "codes", "a shape"),
        # Sizes that the arrays do not have.
        (header(w=WEIGHT | {"shape": [5, 14]}), "codes", "I8[70]"),
        (header(w=WEIGHT | {"shape": [0]}), "codes", "I8[0]"),
        (header(w=WEIGHT | {"shape": [2**62] * 64}), "codes", "w|codes"),
        (header(m=MOMENT | {"shape": [64]}), "codes", "m|codes"),
        (header(m=MOMENT | {"codec": "log8"}), "codes", "m|codes"),
        (header(m=MOMENT | {"codec": "int4"}), "codes", "m|lows"),
        (header(w=WEIGHT | {"codec": "tail8"}), "codes", "w|scales"),
        (header(x=PACKED | {"shape": [FRAME_NUMEL + 1]}), "codes", "x|ends"),
        # More or fewer tensors than there are.
        (header(w=None), "codes", "w|codes"),
        (header(v=WEIGHT), "codes", "v|codes"),
        (header(v=PACKED), "codes", "v|planes"),
        (header(v=WEIGHT | {"codec": "exact"}), "codes", "v|values"),
        (header(w=None, **{"w|codes": WEIGHT}), "codes", "w|codes"),
    ],
)
def test_headers_that_lie_are_refused(text: str | None, kind: str, said: str) -> None:
    with pytest.raises(FormatError) as caught:
        parse_codes(text, FILE, PATH)
    assert said in str(caught.value)
    assert caught.value.kind == kind
    assert caught.value.path == PATH


@pytest.mark.parametrize(
    ("changes", "fqn"),
    [
        ({"w|codes": None}, "w|codes"),
        ({"w|scales": None}, "w|scales"),
        ({"x|planes": None}, "x|planes"),
        ({"x|ends": None}, "x|ends"),
        ({"w|codes": meta("U8", 65)}, "w|codes"),
        ({"w|codes": meta("I8", 5, 13)}, "w|codes"),
        ({"w|scales": meta("F16", 2)}, "w|scales"),
        ({"w|scales": meta("BF16", 1)}, "w|scales"),
        ({"m|steps": meta("I16", 2)}, "m|steps"),
        ({"x|planes": meta("I8", 1000)}, "x|planes"),
        ({"x|planes": meta("U8", 10, 100)}, "x|planes"),
        ({"x|planes": meta("U8")}, "x|planes"),
        ({"x|ends": meta("I64")}, "x|ends"),
        ({"w": meta("F32", 65)}, "w"),
        ({"w|more": meta("I8", 65)}, "w|more"),
        ({"w|planes": meta("U8", 65)}, "w|planes"),
        ({"v|codes": meta("I8", 65)}, "v|codes"),
    ],
)
def test_arrays_that_no_header_speaks_of_are_refused(changes: dict[str, TensorMeta | None], fqn: str) -> None:
    arrays = {name: array for name, array in (FILE | changes).items() if array is not None}
    with pytest.raises(FormatError) as caught:
        parse_codes(header(), arrays, PATH)
    assert caught.value.kind == "codes"
    assert caught.value.fqn == fqn
    assert None not in (caught.value.expected, caught.value.found)


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(["int8", "F32"]),
    lambda children: (
        st.lists(children, max_size=3)
        | st.dictionaries(st.sampled_from(["codec", "dtype", "shape", "w", ""]), children, max_size=4)
    ),
    max_leaves=10,
)


@given(ANYTHING | st.fixed_dictionaries({"codec": ANYTHING, "dtype": ANYTHING, "shape": ANYTHING}))
def test_no_entry_raises_anything_but_format_error(entry: object) -> None:
    with pytest.raises(FormatError):
        parse_codes(json.dumps({"w": entry, "no such": WEIGHT}), FILE, PATH)
