from __future__ import annotations

import contextlib
import json
import os
import random
import socket
import struct
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st

from llmtailor.errors import FormatError, NotFoundError, UnsupportedError
from llmtailor.formats.safetensors import DATA_ALIGNMENT, Header, Layout, open_file, parse_header, plan_layout
from llmtailor.tensors import DTYPE_BITS, TensorMeta

NUMPY_TYPES = {
    "BOOL": "?", "U8": "u1", "I8": "i1", "I16": "<i2", "U16": "<u2", "F16": "<f2", "I32": "<i4", "U32": "<u4",
    "F32": "<f4", "F64": "<f8", "I64": "<i8", "U64": "<u8",
}  # fmt: skip


def build(header: Any, data: bytes = b"", *, length: int | None = None) -> bytes:
    """A file from any header, valid or not."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype: Any = "U8", shape: Any = (4,), offsets: Any = (0, 4)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def parse(content: bytes) -> Header:
    return parse_header(content, "some.safetensors")


def refuse(content: bytes) -> FormatError:
    with pytest.raises(FormatError) as caught:
        parse(content)
    assert caught.value.path == "some.safetensors"
    return caught.value


def fill(layout: Layout, contents: dict[str, bytes]) -> bytes:
    return layout.prefix + b"".join(contents[tensor.name] for tensor in layout.tensors)


# plan_layout


def test_plan_layout_orders_by_element_size_then_name() -> None:
    dtypes = {"e": "U8", "d": "F64", "c": "BF16", "b": "F32", "a": "F64"}
    metas = [(name, TensorMeta(dtype=dtype, shape=(2,))) for name, dtype in dtypes.items()]
    layout = plan_layout(metas, {})
    assert [tensor.name for tensor in layout.tensors] == ["a", "d", "b", "c", "e"]


def test_plan_layout_does_not_depend_on_the_order_of_its_arguments() -> None:
    metas = [(f"t{number}", TensorMeta(dtype="F32", shape=(number,))) for number in range(20)]
    shuffled = random.Random(0).sample(metas, len(metas))
    one, other = plan_layout(metas, {"a": "1", "b": "2"}), plan_layout(shuffled, {"b": "2", "a": "1"})
    assert one == other


@pytest.mark.parametrize("num_tensors", [0, 1, 40, 50, 51, 52, 53, 200])
def test_data_starts_at_a_multiple_of_the_alignment(num_tensors: int) -> None:
    layout = plan_layout([(f"tensor.{n:05d}", TensorMeta(dtype="F32", shape=(3,))) for n in range(num_tensors)], {})
    assert len(layout.prefix) % DATA_ALIGNMENT == 0
    assert layout.nbytes == len(layout.prefix) + 12 * num_tensors
    header = json.loads(layout.prefix[8:])
    assert len(layout.prefix) - len(json.dumps(header, separators=(",", ":"))) - 8 < DATA_ALIGNMENT


def test_header_that_fills_the_alignment_exactly_gets_no_padding() -> None:
    used = 8 + len(plan_layout([], {"": ""}).prefix[8:].rstrip())
    layout = plan_layout([], {"": "x" * (DATA_ALIGNMENT - used)})
    assert len(layout.prefix) == DATA_ALIGNMENT
    assert layout.prefix.endswith(b"}")
    assert len(plan_layout([], {"": "x" * (DATA_ALIGNMENT - used + 1)}).prefix) == 2 * DATA_ALIGNMENT


def test_plan_layout_refuses_a_tensor_twice() -> None:
    meta = TensorMeta(dtype="F32", shape=())
    with pytest.raises(AssertionError):
        plan_layout([("a", meta), ("a", meta)], {})


@pytest.mark.parametrize("name", ["", "a\nb", "a\0", "a\u00a0b", "a\ud800", "__metadata__", "x" * 1025])
def test_plan_layout_refuses_a_name_that_could_not_be_read(name: str) -> None:
    with pytest.raises(UnsupportedError) as caught:
        plan_layout([(name, TensorMeta(dtype="F32", shape=()))], {})
    assert caught.value.kind == "tensor-layout"


def test_plan_layout_refuses_more_dimensions_than_can_be_read() -> None:
    plan_layout([("a", TensorMeta(dtype="F32", shape=(1,) * 64))], {})
    with pytest.raises(UnsupportedError):
        plan_layout([("a", TensorMeta(dtype="F32", shape=(1,) * 65))], {})


def test_plan_layout_refuses_a_header_too_large_to_be_read() -> None:
    with pytest.raises(UnsupportedError) as caught:
        plan_layout([], {"notes": "x" * 25 * 2**20})
    assert "layer_overrides" in str(caught.value)


# parse_header: one test for each way to be wrong


def test_parse_header_of_a_file_without_tensors() -> None:
    assert parse(build({})).tensors == {}
    assert parse(build({"__metadata__": {"a": "b"}})).metadata == {"a": "b"}


def test_parse_header_gives_absolute_ranges_in_file_order() -> None:
    content = build({"b": entry("F32", [1], [4, 8]), "a": entry()}, bytes(8))
    header = parse(content)
    assert list(header.tensors) == ["a", "b"]
    assert header.tensors["b"].byte_range.start == len(content) - 4
    assert header.nbytes == len(content)


@pytest.mark.parametrize("content", [b"", b"\0" * 7])
def test_shorter_than_a_length_is_refused(content: bytes) -> None:
    assert refuse(content).kind == "header-length"


@pytest.mark.parametrize("length", [3, 2**32, 2**63, 2**64 - 1])
def test_header_longer_than_the_file_is_refused(length: int) -> None:
    assert refuse(build(b"{}", length=length)).kind == "header-length"


def test_header_over_the_limit_is_refused_though_it_is_there() -> None:
    assert refuse(build(b"{}".ljust(25 * 2**20 + 1))).kind == "header-length"


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"\0\0", b'{"a": 1, "a": 2}', b'{"a": NaN}', b"\xff\xff", b"{}{}"])
def test_header_that_is_not_strict_json_is_refused(text: bytes) -> None:
    assert refuse(build(text)).kind == "bad-json"


@pytest.mark.parametrize("metadata", [None, [], "x", {"a": 1}, {"a": None}, {"a": {}}, {"a": "\ud800"}])
def test_metadata_that_is_not_text_to_text_is_refused(metadata: Any) -> None:
    assert refuse(build({"__metadata__": metadata})).kind == "header-metadata"


@pytest.mark.parametrize("name", ["", "a\nb", "a\0b", "\x1b[31m", "x" * 1025, "a\u2028b"])
def test_unusable_name_is_refused(name: str) -> None:
    error = refuse(build({name: entry()}, bytes(4)))
    assert error.kind == "tensor-name"
    assert str(error).isprintable() or "\n  " in str(error)


@pytest.mark.parametrize(
    "value",
    [None, 1, [], {}, entry() | {"more": 1}, {"dtype": "U8", "shape": [4]}, {"shape": [4], "data_offsets": [0, 4]}],
)
def test_malformed_entry_is_refused(value: Any) -> None:
    assert refuse(build({"a": value}, bytes(4))).kind == "tensor-entry"


@pytest.mark.parametrize("dtype", ["u8", "F4", "", None, 8, [], "F32 "])
def test_unknown_dtype_is_refused(dtype: Any) -> None:
    assert refuse(build({"a": entry(dtype)}, bytes(4))).kind == "tensor-dtype"


@pytest.mark.parametrize("shape", [None, 4, "4", [-4], [4.0], ["4"], [True] * 4, [[4]], [2**63], [1] * 65, {}])
def test_malformed_shape_is_refused(shape: Any) -> None:
    assert refuse(build({"a": entry(shape=shape)}, bytes(4))).kind == "tensor-entry"


@pytest.mark.parametrize("offsets", [None, [], [0], [0, 4, 4], [4, 0], [-4, 0], [0, 4.0], [False, 4], "04", [0, 2**64]])
def test_malformed_offsets_are_refused(offsets: Any) -> None:
    assert refuse(build({"a": entry(offsets=offsets)}, bytes(4))).kind == "tensor-entry"


@pytest.mark.parametrize(
    ("dtype", "shape"), [("U8", [3]), ("F32", [4]), ("U8", [2**62, 2**62]), ("U8", [0]), ("I64", [])]
)
def test_shape_and_bytes_that_differ_are_refused(dtype: str, shape: list[int]) -> None:
    assert refuse(build({"a": entry(dtype, shape)}, bytes(4))).kind == "tensor-size"


OVERLAPPING = [
    ({"a": entry(offsets=[1, 5])}, 5),
    ({"a": entry(), "b": entry()}, 4),
    ({"a": entry(), "b": entry(offsets=[2, 6])}, 6),
    ({"a": entry(), "b": entry(offsets=[5, 9])}, 9),
    ({"a": entry(), "b": entry(shape=[0], offsets=[2, 2])}, 4),
]


@pytest.mark.parametrize(("header", "nbytes"), OVERLAPPING)
def test_holes_and_overlaps_are_refused(header: dict[str, Any], nbytes: int) -> None:
    assert refuse(build(header, bytes(nbytes))).kind == "tensor-gap"


@pytest.mark.parametrize("nbytes", [0, 3, 5, 4096])
def test_file_that_is_not_as_long_as_its_tensors_is_refused(nbytes: int) -> None:
    assert refuse(build({"a": entry()}, bytes(nbytes))).kind == "file-size"


def test_empty_tensors_may_stand_between_others() -> None:
    header = {
        "a": entry(),
        "e": entry("F32", [0, 7], [4, 4]),
        "z": entry("F32", [0], [0, 0]),
        "b": entry(offsets=[4, 8]),
    }
    assert set(parse(build(header, bytes(8))).tensors) == set("aezb")


def test_hostile_shape_does_not_take_an_hour() -> None:
    started = time.perf_counter()
    assert refuse(build({"a": entry(shape=[2**62] * 1_000_000)}, bytes(4))).kind == "tensor-entry"
    assert time.perf_counter() - started < 10


@given(st.binary(max_size=80))
def test_any_bytes_raise_nothing_else(content: bytes) -> None:
    for text in (content, build(content), build(b'{"a":' + content + b"}", bytes(4))):
        with contextlib.suppress(FormatError):
            parse(text)


def test_changed_headers_raise_nothing_else() -> None:
    layout = plan_layout([(f"t{n}", TensorMeta(dtype="F32", shape=(n, 2))) for n in range(6)], {"format": "pt"})
    good = layout.prefix.rstrip() + bytes(layout.nbytes - len(layout.prefix))
    chance = random.Random(0)
    num_refused = 0
    for _ in range(5000):
        changed = bytearray(good)
        changed[chance.randrange(len(layout.prefix.rstrip()))] = chance.choice(b'{}[]",:0129-. eE\xff\0ntF3')
        try:
            parse(bytes(changed))
        except FormatError:
            num_refused += 1
    assert num_refused > 4000


# Against the library


names = st.text(st.characters(codec="utf-8", exclude_categories=["C", "Z"]), min_size=1, max_size=12)
shapes = st.lists(st.integers(0, 5), max_size=4).map(tuple)


@given(
    st.dictionaries(
        names.filter(lambda name: name != "__metadata__"),
        st.tuples(st.sampled_from(sorted(NUMPY_TYPES)), shapes),
        max_size=6,
    ),
    st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=3),
    st.randoms(use_true_random=False),
)
def test_the_library_reads_what_we_lay_out(
    tensors: dict[str, tuple[str, tuple[int, ...]]], metadata: dict[str, str], chance: random.Random
) -> None:
    metas = {name: TensorMeta(dtype=dtype, shape=shape) for name, (dtype, shape) in tensors.items()}
    layout = plan_layout(list(metas.items()), metadata)
    contents = {name: chance.randbytes(meta.nbytes) for name, meta in metas.items()}
    contents = {
        name: bytes(b & 1 for b in raw) if tensors[name][0] == "BOOL" else raw for name, raw in contents.items()
    }
    content = fill(layout, contents)
    assert len(content) == layout.nbytes
    arrays = safetensors.numpy.load(content)
    assert arrays.keys() == metas.keys()
    for name, array in arrays.items():
        assert array.shape == metas[name].shape
        assert array.dtype == np.dtype(NUMPY_TYPES[metas[name].dtype])
        assert array.tobytes() == contents[name]
    header = parse(content)
    assert dict(header.metadata) == metadata
    assert tuple(header.tensors.values()) == layout.tensors


@given(
    st.dictionaries(
        names.filter(lambda name: name != "__metadata__"),
        st.tuples(st.sampled_from(sorted(NUMPY_TYPES)), shapes),
        max_size=6,
    ),
    # Not empty: safetensors 0.8 writes broken JSON for no tensors and empty metadata.
    st.none() | st.dictionaries(st.text(max_size=5), st.text(max_size=5), min_size=1, max_size=3),
)
def test_we_read_what_the_library_writes(
    tensors: dict[str, tuple[str, tuple[int, ...]]], metadata: dict[str, str] | None
) -> None:
    arrays = {name: np.ones(shape, dtype=NUMPY_TYPES[dtype]) for name, (dtype, shape) in tensors.items()}
    content = safetensors.numpy.save(arrays, metadata=metadata)
    header = parse(content)
    assert {name: (tensor.meta.dtype, tensor.meta.shape) for name, tensor in header.tensors.items()} == tensors
    assert dict(header.metadata) == (metadata or {})
    for name, tensor in header.tensors.items():
        assert content[tensor.byte_range.start : tensor.byte_range.end] == arrays[name].tobytes()


def test_every_dtype_is_the_librarys_too() -> None:
    """numpy has no name for some; the header alone tells."""
    for dtype in DTYPE_BITS:
        layout = plan_layout([("a", TensorMeta(dtype=dtype, shape=(2, 3)))], {"format": "pt"})
        found = safetensors.deserialize(layout.prefix + bytes(6 * DTYPE_BITS[dtype] // 8))
        assert [(name, each["dtype"], each["shape"]) for name, each in found] == [("a", dtype, [2, 3])]


# open_file


def test_open_file_maps_a_file(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    layout = plan_layout([("a", TensorMeta(dtype="F32", shape=(2,))), ("b", TensorMeta(dtype="U8", shape=(3,)))], {})
    path.write_bytes(fill(layout, {"a": b"12345678", "b": b"abc"}))
    opened = open_file(path)
    assert bytes(opened.tensor_bytes("a")) == b"12345678"
    assert bytes(opened.tensor_bytes("b")) == b"abc"
    assert opened.buffer.readonly
    view = opened.tensor_bytes("b")
    del opened
    path.unlink()
    assert bytes(view) == b"abc"


def test_open_file_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError) as caught:
        open_file(tmp_path / "nowhere")
    assert caught.value.kind == "missing-file"


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    "make",
    [
        lambda path: os.mkfifo(path),
        lambda path: path.mkdir(),
        lambda path: path.symlink_to("/etc/passwd"),
        lambda path: path.symlink_to("nowhere"),
        lambda path: path.write_bytes(b""),
        make_socket,
    ],
    ids=["pipe", "directory", "symlink", "dangling symlink", "empty", "socket"],
)
def test_open_file_refuses_what_is_no_file(tmp_path: Path, make: Any) -> None:
    make(tmp_path / "x")
    before = os.listdir("/proc/self/fd")
    with pytest.raises(FormatError) as caught:
        open_file(tmp_path / "x")
    assert caught.value.kind == "not-regular"
    assert os.listdir("/proc/self/fd") == before


def test_open_file_lets_go_of_a_file_it_refuses(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"\xff" * 100)
    before = os.listdir("/proc/self/fd")
    for _ in range(5):
        with pytest.raises(FormatError):
            open_file(tmp_path / "x")
    assert len(os.listdir("/proc/self/fd")) <= len(before) + 1
