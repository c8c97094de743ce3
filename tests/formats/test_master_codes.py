"""What a codes file may say of masters and of weights that are their rounding, and what it may not."""

from __future__ import annotations

import pytest

from faults import fake_tensor
from formats.test_tailored_codes import DIGEST, HALF, OF_BASE, OTHER, PATH, WEIGHT, layer_of, manifest_of, read
from llmtailor.codecs import BASE_KEY, CODES_KEY, STATE_BASE_KEY, StoredCodes, record_codes
from llmtailor.errors import FormatError, IntegrityError
from llmtailor.formats.safetensors import parse_header, plan_layout
from llmtailor.formats.tailored.codes import LayerCodes, check_state_base, read_codes_header, weights_metas
from llmtailor.manifest import Manifest
from llmtailor.tensors import TensorMeta

HALF_NAME = "layers.0.half"
MASTER = f"state.{HALF_NAME}.master_param"
META = TensorMeta(dtype="F32", shape=HALF.shape)

Changes = dict[str, StoredCodes | None]


def coded(codec: str, meta: TensorMeta = META) -> StoredCodes:
    return StoredCodes(codec=codec, meta=meta)


OF_MASTER: dict[str, Changes] = {
    "exact": {MASTER: coded("delta8"), HALF_NAME: coded("round", HALF)},
    "rounded": {MASTER: coded("tail4")},
    "none": {MASTER: coded("exact")},
}


def codes_of(base: str, changes: Changes) -> dict[str, StoredCodes]:
    together = OF_BASE[base] | OF_MASTER[base] | changes  # type: ignore[operator]
    return {key: each for key, each in together.items() if each is not None}


def read_masters(
    base: str, changes: Changes, manifest: Manifest | None = None, state_base: str | None = DIGEST
) -> LayerCodes:
    told = {STATE_BASE_KEY: state_base if base == "exact" else None}
    return read(base, codes_of(base, changes), told, manifest)


@pytest.mark.parametrize("base", OF_MASTER)
def test_masters_are_relative_to_what_weights_are(base: str) -> None:
    found = read_masters(base, {})
    assert {**found.weights, **found.states} == codes_of(base, {})
    assert found.masters == {HALF_NAME: MASTER}
    assert found.is_relative_to_state == (base == "exact")
    manifest = manifest_of(base)
    # What has a master is in the weights file as it is.
    assert weights_metas(manifest, manifest.layers[0], found)[HALF_NAME] == HALF


@pytest.mark.parametrize("codec", ["delta4", "exact"])
def test_a_weight_is_the_rounding_of_whatever_its_master_is(codec: str) -> None:
    state_base = None if codec == "exact" else DIGEST
    assert read_masters("exact", {MASTER: coded(codec)}, state_base=state_base).masters == {HALF_NAME: MASTER}


SECOND = f"state.{HALF_NAME}.master"
MISFITS: dict[str, tuple[str, Changes, str]] = {
    "a rounding of nothing": ("exact", {MASTER: None}, HALF_NAME),
    "a rounding of two": ("exact", {SECOND: coded("exact")}, HALF_NAME),
    "one of two masters": ("exact", {SECOND: coded("exact"), HALF_NAME: coded("xor", HALF)}, HALF_NAME),
    "a rounding of something smaller": (
        "exact",
        {MASTER: coded("exact", TensorMeta(dtype="F32", shape=(7,)))},
        MASTER,
    ),
    "a rounding of a rounding": ("exact", {MASTER: coded("exact", HALF)}, MASTER),
    "a rounding where weights are": ("rounded", {HALF_NAME: coded("round", HALF)}, HALF_NAME),
    "a rounding where there are none": ("none", {HALF_NAME: coded("round", HALF)}, HALF_NAME),
    "a tail beside earlier weights": ("exact", {MASTER: coded("tail8")}, MASTER),
    "a difference beside rounded weights": ("rounded", {MASTER: coded("delta8")}, MASTER),
    "a difference to nothing": ("none", {MASTER: coded("delta8")}, MASTER),
    "a master of another shape": ("rounded", {MASTER: coded("tail8", TensorMeta(dtype="F32", shape=(7, 10)))}, MASTER),
    "a moment that is relative": (
        "exact",
        {f"state.{HALF_NAME}.exp_avg": coded("delta8")},
        f"state.{HALF_NAME}.exp_avg",
    ),
    "a master of an F32 weight": (
        "rounded",
        {"state.layers.0.weight.master_param": coded("tail8", WEIGHT)},
        "state.layers.0.weight.master_param",
    ),
    "state that is rounded": ("exact", {f"state.{HALF_NAME}.x": coded("round", HALF)}, f"state.{HALF_NAME}.x"),
}


@pytest.mark.parametrize("name", MISFITS)
def test_masters_that_make_no_sense_are_refused(name: str) -> None:
    base, changes, key = MISFITS[name]
    with pytest.raises(FormatError) as caught:
        read_masters(base, changes)
    assert (caught.value.kind, caught.value.fqn, caught.value.layer) == ("schema", key, "layers.0")


def test_a_tail_is_of_a_weight_in_bf16() -> None:
    half = TensorMeta(dtype="F16", shape=HALF.shape)
    tensors = tuple(
        fake_tensor("layers.0", fqn=HALF_NAME, dtype="F16", shape=HALF.shape) if each.fqn == HALF_NAME else each
        for each in manifest_of("rounded").tensors
    )
    with pytest.raises(FormatError) as caught:
        read_masters("rounded", {}, manifest_of("rounded", tensors=tensors))
    assert caught.value.fqn == MASTER
    manifest = manifest_of("exact", tensors=tensors)
    assert read_masters("exact", {HALF_NAME: coded("round", half)}, manifest).masters


def test_exact_masters_are_not_in_pieces_in_a_codes_file() -> None:
    codes = codes_of("rounded", {MASTER: coded("tail16")})
    arrays = [(f"{key}|{name}", meta) for key, each in codes.items() for name, meta in each.arrays.items()]
    arrays.append((f"{MASTER}|ties", TensorMeta(dtype="I64", shape=(0,))))
    layout = plan_layout(arrays, {CODES_KEY: record_codes(codes)})
    header = parse_header(layout.prefix, PATH, layout.nbytes)
    with pytest.raises(FormatError) as caught:
        read_codes_header(PATH, header, manifest_of("rounded"), layer_of("rounded"))
    assert (caught.value.kind, caught.value.fqn) == ("schema", MASTER)


def test_masters_that_are_relative_to_another_file_are_refused() -> None:
    with pytest.raises(IntegrityError) as caught:
        read_masters("exact", {}, state_base=OTHER)
    assert (caught.value.kind, caught.value.found) == ("codes-base", OTHER)
    assert "optimizer/layers.000.safetensors" in str(caught.value.expected)
    for changes, state_base in [({}, None), ({MASTER: coded("exact")}, DIGEST)]:
        with pytest.raises(FormatError) as refused:
            read_masters("exact", changes, state_base=state_base)
        assert refused.value.kind == "codes-base"
    with pytest.raises(FormatError) as refused:
        read("rounded", codes_of("rounded", {}), {STATE_BASE_KEY: DIGEST, BASE_KEY: None})
    assert refused.value.kind == "codes-base"


def test_what_masters_are_relative_to_has_to_be_there() -> None:
    found, layer = read_masters("exact", {}), layer_of("exact")
    check_state_base(PATH, layer, found, {MASTER: META, "state.x.y": HALF})
    for metas in ({}, {MASTER: HALF}, {MASTER: TensorMeta(dtype="F32", shape=(7, 10))}):
        with pytest.raises(FormatError) as caught:
            check_state_base(PATH, layer, found, metas)
        assert (caught.value.kind, caught.value.fqn) == ("schema", MASTER)
