"""What a codes file of a layer has to hold, and every way in which one does not."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest

from faults import fake_manifest, fake_record, fake_tensor
from llmtailor.codecs import BASE_KEY, CODES_KEY, StoredCodes, array_name, record_codes
from llmtailor.errors import FormatError, IntegrityError
from llmtailor.formats.safetensors import Header, parse_header, plan_layout
from llmtailor.formats.tailored.codes import LayerCodes, read_codes_header, weights_metas
from llmtailor.manifest import EncodingRecord, FileRecord, LayerRecord, Manifest
from llmtailor.state_keys import NOTES_KEY
from llmtailor.tensors import TensorMeta
from llmtailor.writer import WrittenLayer

PATH = "checkpoint-20/codes/layers.000.safetensors"
DIGEST = "xxh3_128:" + "0123456789abcdef" * 2
OTHER = "xxh3_128:" + "f" * 32
# The layer's weights; ``layers.1.weight`` is tied to the first, ``count`` is a buffer.
WEIGHT, HALF, COUNT = (
    TensorMeta(dtype="F32", shape=(10, 13)),
    TensorMeta(dtype="BF16", shape=(70,)),
    TensorMeta(dtype="I64", shape=()),
)
STATE = {
    "state.layers.0.weight.exp_avg": StoredCodes(codec="int8", meta=WEIGHT),
    "state.layers.0.weight.exp_avg_sq": StoredCodes(codec="log4", meta=WEIGHT),
    "state.layers.0.weight.step": StoredCodes(codec="exact", meta=TensorMeta(dtype="F32", shape=())),
}
OF_BASE: dict[str, dict[str, StoredCodes]] = {
    "exact": {
        "layers.0.weight": StoredCodes(codec="delta8", meta=WEIGHT),
        "layers.0.half": StoredCodes(codec="xor", meta=HALF),
        "layers.0.count": StoredCodes(codec="exact", meta=COUNT),
        **STATE,
    },
    "rounded": {"layers.0.weight": StoredCodes(codec="tail4", meta=WEIGHT), **STATE},
    "none": STATE,
}


def layer_of(base: str) -> LayerRecord:
    of_step = 10 if base == "exact" else 20
    optimizer = FileRecord(path="optimizer/layers.000.safetensors", bytes=1, digest=DIGEST)
    weights = FileRecord(path="model-layers.000.safetensors", bytes=1, digest=DIGEST)
    written = WrittenLayer(weights=weights, optimizer=optimizer if base == "exact" else None, update_count=of_step)
    encoding = EncodingRecord(
        step=20,
        save_index=2,
        update_count=20,
        rest="q8",
        base=base,  # type: ignore[arg-type]
        codes=FileRecord(path="codes/layers.000.safetensors", bytes=1, digest=DIGEST),
        errors={},
    )
    return fake_record("layers.0", of_step, 1, written).model_copy(update={"encoding": encoding})


def manifest_of(base: str, **changes: Any) -> Manifest:
    norm = WrittenLayer(
        weights=FileRecord(path="model-norm.safetensors", bytes=1, digest=DIGEST), optimizer=None, update_count=None
    )
    tensors = (
        fake_tensor("layers.0", shape=WEIGHT.shape),
        fake_tensor("layers.0", fqn="layers.0.half", dtype="BF16", shape=HALF.shape),
        fake_tensor("layers.0", fqn="layers.0.count", kind="buffer", dtype="I64", shape=()),
        fake_tensor("layers.0", fqn="layers.1.weight", shape=WEIGHT.shape, tied_to="layers.0.weight"),
        fake_tensor("norm"),
    )
    layers = [layer_of(base), fake_record("norm", 20, 2, norm)]
    return fake_manifest(20, layers, **{"tensors": tensors, "optimizers": (), **changes})


def header_of(codes: Mapping[str, StoredCodes], metadata: Mapping[str, str | None] | None = None) -> Header:
    """The header of a file with these codes; None takes an entry out of its metadata."""
    arrays = [(array_name(key, name), meta) for key, each in codes.items() for name, meta in each.arrays.items()]
    arrays += [
        (f"{key}|planes", TensorMeta(dtype="U8", shape=(9,))) for key, each in codes.items() if each.codec == "xor"
    ]
    told = {CODES_KEY: record_codes(codes), **(metadata or {})}
    layout = plan_layout(arrays, {key: text for key, text in told.items() if text is not None})
    return parse_header(layout.prefix, PATH, layout.nbytes)


def read(
    base: str,
    codes: Mapping[str, StoredCodes] | None = None,
    metadata: Mapping[str, str | None] | None = None,
    manifest: Manifest | None = None,
) -> LayerCodes:
    manifest = manifest or manifest_of(base)
    told = {BASE_KEY: DIGEST if base == "exact" else None, **(metadata or {})}
    return read_codes_header(PATH, header_of(OF_BASE[base] if codes is None else codes, told), manifest, layer_of(base))


@pytest.mark.parametrize("base", ["exact", "rounded", "none"])
def test_codes_of_a_layer_are_told_apart(base: str) -> None:
    notes = {"state.layers.0.weight.step": "int", "state.layers.0.half.x": "none"}
    found = read(base, metadata={NOTES_KEY: json.dumps(notes)})
    assert found.base == base
    assert {**found.weights, **found.states} == OF_BASE[base]
    assert all(key.startswith("state.") for key in found.states)
    assert found.notes == notes


@pytest.mark.parametrize("base", ["exact", "rounded", "none"])
def test_weights_file_holds_bf16_of_what_has_a_tail(base: str) -> None:
    manifest = manifest_of(base)
    found = weights_metas(manifest, manifest.layers[0], read(base))
    expected = {"layers.0.weight": WEIGHT, "layers.0.half": HALF, "layers.0.count": COUNT}
    if base == "rounded":
        expected["layers.0.weight"] = TensorMeta(dtype="BF16", shape=WEIGHT.shape)
    assert found == expected
    if base != "rounded":
        assert weights_metas(manifest, manifest.layers[0], None) == expected


def changed(base: str, changes: Mapping[str, StoredCodes | None]) -> dict[str, StoredCodes]:
    return {key: each for key, each in (OF_BASE[base] | changes).items() if each is not None}  # type: ignore[operator]


def coded(codec: str, meta: TensorMeta = WEIGHT) -> StoredCodes:
    return StoredCodes(codec=codec, meta=meta)


# Each file is one that nobody should write: base, what is changed in it, and the tensor that the error names.
MISFITS: dict[str, tuple[str, dict[str, StoredCodes | None], str]] = {
    "a weight is missing": ("exact", {"layers.0.half": None}, "layers.0.half"),
    "a buffer is missing": ("exact", {"layers.0.count": None}, "layers.0.count"),
    "a weight of another shape": (
        "exact",
        {"layers.0.weight": coded("delta8", TensorMeta(dtype="F32", shape=(13, 10)))},
        "layers.0.weight",
    ),
    "a weight of another type": ("exact", {"layers.0.weight": coded("xor", HALF)}, "layers.0.weight"),
    "a tail on exact weights": ("exact", {"layers.0.weight": coded("tail8")}, "layers.0.weight"),
    "a tied name": ("exact", {"layers.1.weight": coded("delta8")}, "layers.1.weight"),
    "a weight of another layer": ("exact", {"norm.weight": coded("exact")}, "norm.weight"),
    "a difference to rounded weights": ("rounded", {"layers.0.weight": coded("delta8")}, "layers.0.weight"),
    "an exact weight beside the rounded": ("rounded", {"layers.0.half": coded("exact", HALF)}, "layers.0.half"),
    "a tail of another shape": (
        "rounded",
        {"layers.0.weight": coded("tail8", TensorMeta(dtype="F32", shape=(130,)))},
        "layers.0.weight",
    ),
    "a weight where the file has all": ("none", {"layers.0.weight": coded("exact")}, "layers.0.weight"),
    "state of another layer": ("none", {"state.norm.weight.step": coded("exact")}, "state.norm.weight.step"),
    "state of a buffer": ("none", {"state.layers.0.count.step": coded("exact")}, "state.layers.0.count.step"),
    "state of a tied name": ("none", {"state.layers.1.weight.step": coded("exact")}, "state.layers.1.weight.step"),
    "state that is a difference": (
        "exact",
        {"state.layers.0.weight.exp_avg": coded("delta8")},
        "state.layers.0.weight.exp_avg",
    ),
    "state that is a tail": (
        "rounded",
        {"state.layers.0.weight.exp_avg": coded("tail8")},
        "state.layers.0.weight.exp_avg",
    ),
    "a name that is none": ("none", {"state.step": coded("exact")}, "state.step"),
}


@pytest.mark.parametrize("name", list(MISFITS))
def test_codes_that_are_not_the_layers_are_refused(name: str) -> None:
    base, changes, fqn = MISFITS[name]
    with pytest.raises(FormatError) as caught:
        read(base, changed(base, changes))
    assert (caught.value.kind, caught.value.fqn) == ("schema", fqn)
    assert (caught.value.path, caught.value.layer) == (PATH, "layers.0")


def test_notes_on_another_layer_are_refused() -> None:
    with pytest.raises(FormatError) as caught:
        read("none", metadata={NOTES_KEY: json.dumps({"state.norm.weight.step": "int"})})
    assert (caught.value.kind, caught.value.fqn) == ("schema", "state.norm.weight.step")


def test_notes_that_are_no_text_are_refused() -> None:
    with pytest.raises(FormatError) as caught:
        read("none", metadata={NOTES_KEY: '{"\ud800": "int"}'})
    assert caught.value.kind in ("bad-json", "header-metadata")


def test_state_in_a_checkpoint_of_weights_is_refused() -> None:
    layer = layer_of("none")
    assert layer.encoding is not None
    without = layer.model_copy(update={"encoding": layer.encoding.model_copy(update={"update_count": None})})
    manifest = manifest_of("none", contents="weights", layers=(without, manifest_of("none").layers[1]))
    with pytest.raises(FormatError) as caught:
        read("none", manifest=manifest)
    assert caught.value.kind == "schema"


def test_codes_against_other_weights_are_refused() -> None:
    with pytest.raises(IntegrityError) as caught:
        read("exact", metadata={BASE_KEY: OTHER})
    assert caught.value.kind == "codes-base"
    assert (caught.value.found, DIGEST in str(caught.value)) == (OTHER, True)


@pytest.mark.parametrize(("base", "digest"), [("exact", None), ("rounded", DIGEST), ("none", DIGEST)])
def test_codes_that_do_not_say_what_they_are_relative_to_are_refused(base: str, digest: str | None) -> None:
    with pytest.raises(FormatError) as caught:
        read(base, metadata={BASE_KEY: digest})
    assert caught.value.kind == "codes-base"


# What stands under CODES_KEY; None: nothing does.
BAD_TEXTS = {
    "no entry": None,
    "no JSON": "{",
    "a list": "[]",
    "half a character": '{"\ud800": {}}',
    "a key twice": '{"a": {}, "a": {}}',
    "no codec": json.dumps({"a": {"dtype": "F32", "shape": []}}),
    "an unknown codec": json.dumps({"a": {"codec": "int2", "dtype": "F32", "shape": [1]}}),
    "a codec that is no text": json.dumps({"a": {"codec": ["int8"], "dtype": "F32", "shape": [1]}}),
    "a type that is no text": json.dumps({"a": {"codec": "int8", "dtype": ["F32"], "shape": [1]}}),
    "a type that the codec is not of": json.dumps({"a": {"codec": "delta8", "dtype": "BF16", "shape": [1]}}),
    "a negative size": json.dumps({"a": {"codec": "int8", "dtype": "F32", "shape": [-64]}}),
    "a size that is true": json.dumps({"a": {"codec": "int8", "dtype": "F32", "shape": [True]}}),
    "a shape without end": json.dumps({"a": {"codec": "int8", "dtype": "F32", "shape": [1] * 65}}),
    "a huge size": json.dumps({"a": {"codec": "int8", "dtype": "F32", "shape": [2**62, 2**62]}}),
    "arrays that nobody told of": "{}",
    "arrays that are not there": json.dumps({"a": {"codec": "int8", "dtype": "F32", "shape": [64]}}),
    "planes that are not there": json.dumps({"a": {"codec": "xor", "dtype": "BF16", "shape": [64]}}),
}


@pytest.mark.parametrize("name", list(BAD_TEXTS))
def test_headers_that_make_no_sense_are_refused(name: str) -> None:
    with pytest.raises(FormatError) as caught:
        read("none", metadata={CODES_KEY: BAD_TEXTS[name]})
    assert caught.value.kind in ("codes", "codec", "bad-json", "header-metadata")
