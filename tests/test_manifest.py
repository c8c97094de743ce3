from __future__ import annotations

import json
import random
from typing import Any

import pytest
from pydantic import ValidationError

from faults import LAYERS, fake_manifest, fake_optimizer, fake_record, fake_tensor
from llmtailor.errors import FormatError, IntegrityError
from llmtailor.manifest import (
    FORMAT_VERSION,
    MANIFEST_NAME,
    EncodingRecord,
    FileRecord,
    GroupRecord,
    LayerRecord,
    Manifest,
    OptimizerRecord,
    Parent,
    PartRecord,
    World,
    decode_manifest,
    digest_of,
    encode_manifest,
)
from llmtailor.writer import WrittenLayer

DIGEST = "xxh3_128:" + "0123456789abcdef" * 2


def file(path: str, nbytes: int = 4096) -> FileRecord:
    return FileRecord(path=path, bytes=nbytes, digest=DIGEST)


def layer(name: str, *, step: int = 10, **changes: Any) -> LayerRecord:
    written = WrittenLayer(
        weights=file(f"model-{name}.safetensors"), optimizer=file(f"optimizer/{name}.safetensors"), update_count=step
    )
    return fake_record(name, step, 1, written).model_copy(update=changes)


def manifest(**changes: Any) -> Manifest:
    return fake_manifest(20, [layer(name) for name in LAYERS], **changes)


def reseal(body: bytes) -> bytes:
    """Close a changed body as if it had been written that way: what a hostile author would do."""
    return body + f',\n"digest": "{digest_of(body)}"\n}}\n'.encode()


def rewrite(**changes: Any) -> bytes:
    """A manifest with other fields, digest and all right."""
    fields = json.loads(encode_manifest(manifest())[0]) | changes
    del fields["digest"]
    fields = {key: value for key, value in fields.items() if value is not ...}
    return reseal(json.dumps(fields).encode()[:-1])


def refuse(text: bytes) -> FormatError:
    with pytest.raises(FormatError) as caught:
        decode_manifest(text, "run/checkpoint-20/tailor.json")
    assert caught.value.path == "run/checkpoint-20/tailor.json"
    return caught.value


def dig(fields: Any, *path: str | int) -> Any:
    for part in path:
        fields = fields[part]
    return fields


def change(path: str, value: Any) -> bytes:
    """A manifest with one value replaced (removed for ``...``), written with the right digest."""
    fields = json.loads(encode_manifest(manifest(files=(file("a.json"), file("b.json"))))[0])
    *above, last = [int(part) if part.isdecimal() else part for part in path.split(".")]
    if value is ...:
        del dig(fields, *above)[last]
    else:
        dig(fields, *above)[last] = value
    del fields["digest"]
    return reseal(json.dumps(fields).encode()[:-1])


def test_decode_is_the_inverse_of_encode() -> None:
    written = manifest(
        parent=Parent(step=10, digest=DIGEST),
        files=(file("config.json"), file("tokenizer/vocab-\u00e9.txt", 0)),
        optimizers=(
            OptimizerRecord.model_validate(
                {
                    "class": "AdamW",
                    "groups": (
                        GroupRecord(
                            parameters=("norm.weight",),
                            options={"lr": 1e-3, "betas": {"tuple": [0.9, 0.999]}, "eps": {"float": "inf"}, "x": None},
                        ),
                    ),
                }
            ),
        ),
    )
    text, digest = encode_manifest(written)
    assert decode_manifest(text, "x") == (written, digest)


def test_encode_ends_with_a_digest_of_all_before_it() -> None:
    text, digest = encode_manifest(manifest())
    body, trailer = text[: -len(digest) - 17], text[-len(digest) - 17 :]
    assert trailer.decode() == f',\n"digest": "{digest}"\n}}\n'
    assert digest == digest_of(body)
    assert text.isascii()
    assert json.loads(text)["digest"] == digest


def test_encode_gives_one_line_for_each_tensor_and_layer() -> None:
    lines = encode_manifest(manifest())[0].decode().splitlines()
    assert sum('"fqn"' in line for line in lines) == len(LAYERS)
    assert sum('"weights"' in line for line in lines) == len(LAYERS)


@pytest.mark.parametrize("number", [float("inf"), float("-inf"), float("nan")])
def test_encode_refuses_a_number_json_cannot_say(number: float) -> None:
    """pydantic would write null."""
    group = GroupRecord(parameters=("norm.weight",), options={"lr": number})
    optimizer = OptimizerRecord.model_validate({"class": "SGD", "groups": (group,)})
    with pytest.raises(ValueError, match="not JSON compliant"):
        encode_manifest(manifest(optimizers=(optimizer,)))


# Each breaks one rule of the specification, section 4; text is what the error must say.
BROKEN: dict[str, tuple[dict[str, Any], str]] = {
    "tensor twice": ({"tensors": (*map(fake_tensor, LAYERS), fake_tensor("norm"))}, "tensor 'norm.weight' occurs 2"),
    "layer twice": ({"layers": (*map(layer, LAYERS), layer("norm"))}, "layer 'norm' occurs 2 times"),
    "small file twice": ({"files": (file("a.json"), file("a.json"))}, "path 'a.json' occurs 2 times"),
    "paths that differ in case alone": ({"files": (file("A.json"), file("a.json"))}, "path 'a.json' occurs 2 times"),
    "small file over a layer file": ({"files": (file("model-norm.safetensors"),)}, "occurs 2 times"),
    "layers that share a file": (
        {"layers": (*map(layer, LAYERS[:-1]), layer("norm", weights=file("model-layers.0.safetensors")))},
        "occurs 2 times",
    ),
    "tensor of a layer that is not there": ({"layers": tuple(map(layer, LAYERS[:-1]))}, "'norm', which is not there"),
    "layer without a tensor": ({"tensors": tuple(map(fake_tensor, LAYERS[:-1]))}, "layer 'norm' has no tensor"),
    "no layer and no tensor of one": ({"layers": ()}, "which is not there"),
    "tied to nothing": (
        {"tensors": (*map(fake_tensor, LAYERS), fake_tensor("norm", fqn="head", tied_to="nobody"))},
        "tied to 'nobody', which holds no bytes",
    ),
    "tied to one that is tied": (
        {
            "tensors": (
                *map(fake_tensor, LAYERS),
                fake_tensor("norm", fqn="b", tied_to="norm.weight"),
                fake_tensor("norm", fqn="c", tied_to="b"),
            )
        },
        "tied to 'b', which holds no bytes",
    ),
    "tied to itself": (
        {"tensors": (*map(fake_tensor, LAYERS), fake_tensor("norm", fqn="b", tied_to="b"))},
        "tied to 'b', which holds no bytes",
    ),
    "layer of a later step": (
        {"layers": (*map(layer, LAYERS[:-1]), layer("norm", step=21))},
        "saved at step 21, after the checkpoint's 20",
    ),
    "layer of a later save": ({"save_index": 0}, "after the checkpoint's"),
    "parameter in two groups": (
        {
            "optimizers": (
                OptimizerRecord.model_validate(
                    {
                        "class": "AdamW",
                        "groups": tuple(GroupRecord(parameters=("norm.weight",), options={}) for _ in range(2)),
                    }
                ),
            )
        },
        "'norm.weight' occurs 2 times",
    ),
    "group with an unknown parameter": ({"optimizers": (fake_optimizer(["nobody"]),)}, "not a parameter of the model"),
    "group with a buffer": (
        {"tensors": (*map(fake_tensor, LAYERS[:-1]), fake_tensor("norm", kind="buffer"))},
        "'norm.weight', which is not a parameter",
    ),
    "update count without optimizer file": (
        {"layers": (*map(layer, LAYERS[:-1]), layer("norm", optimizer=None))},
        "update count and no optimizer file",
    ),
    "weights with an optimizer": (
        {"contents": "weights", "layers": tuple(layer(name, optimizer=None, update_count=None) for name in LAYERS)},
        "a checkpoint of weights has an optimizer",
    ),
    "weights with an optimizer file": (
        {"contents": "weights", "optimizers": ()},
        "optimizer file in a checkpoint of weights",
    ),
    "block without an index": (
        {"layers": (*map(layer, LAYERS[:-1]), layer("norm", kind="block"))},
        "must have a stack and an index",
    ),
    "index without a block": (
        {"layers": (*map(layer, LAYERS[:-1]), layer("norm", stack="layers", index=3))},
        "must have a stack and an index",
    ),
    "stack without an index": (
        {"layers": (*map(layer, LAYERS[:-1]), layer("norm", stack="layers"))},
        "must have a stack and an index",
    ),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_manifest_that_breaks_a_rule_cannot_be_built(fault: str) -> None:
    changes, text = BROKEN[fault]
    with pytest.raises(ValidationError) as caught:
        manifest(**changes)
    assert text in str(caught.value)


@pytest.mark.parametrize("fault", BROKEN)
def test_manifest_that_breaks_a_rule_is_refused_when_read(fault: str) -> None:
    changes, text = BROKEN[fault]
    fields = manifest().model_dump() | {
        key: [each.model_dump(by_alias=True) for each in value] if isinstance(value, tuple) else value
        for key, value in changes.items()
    }
    fields["optimizers"] = [
        each if "class" in each else {"class": each.pop("name"), **each} for each in fields["optimizers"]
    ]
    error = refuse(reseal(json.dumps(fields).encode()[:-1]))
    assert error.kind == "manifest-schema"
    assert text in str(error)


# Layers in parts


def part(rank: int, *, weights: bool = True, optimizer: bool = True) -> PartRecord:
    return PartRecord(
        rank=rank,
        weights=file(f"model-norm.rank-{rank:05}.safetensors") if weights else None,
        optimizer=file(f"optimizer/norm.rank-{rank:05}.safetensors") if optimizer else None,
    )


SHARDED = World(size=2, sharding="sharded", layout=DIGEST)


def in_parts(*parts: PartRecord, world: World = SHARDED, **changes: Any) -> Manifest:
    last = layer("norm", **{"weights": None, "optimizer": None, "parts": parts, **changes})
    return manifest(layers=(*map(layer, LAYERS[:-1]), last), world=world)


@pytest.mark.parametrize(
    ("parts", "changes"),
    [
        ((part(0), part(1)), {}),
        ((part(1),), {}),
        ((part(0, optimizer=False), part(1, weights=False)), {}),
        ((part(0, weights=False), part(1, weights=False)), {"weights": file("model-norm.safetensors")}),
        ((part(0, optimizer=False),), {"optimizer": file("optimizer/norm.safetensors")}),
        ((part(0, optimizer=False),), {"update_count": None}),
    ],
    ids=["both", "one rank", "one of each", "weights are whole", "state is whole", "no state"],
)
def test_a_layer_may_be_in_parts(parts: tuple[PartRecord, ...], changes: dict[str, Any]) -> None:
    written = in_parts(*parts, **changes)
    text, digest = encode_manifest(written)
    assert decode_manifest(text, "x") == (written, digest)
    assert [each for each in written.all_files if "rank" in each.path] == [
        *(each.weights for each in parts if each.weights),
        *(each.optimizer for each in parts if each.optimizer),
    ]


def test_a_manifest_without_parts_does_not_mention_them() -> None:
    text, _ = encode_manifest(manifest())
    assert b"parts" not in text
    assert b"layout" not in text


UNSORTED, TWICE = (part(1), part(0)), (part(0), part(0, optimizer=False))
BROKEN_PARTS: dict[str, tuple[tuple[PartRecord, ...], dict[str, Any], str]] = {
    "no weights": ((part(0, weights=False),), {}, "layer 'norm' has no weights"),
    "no file at all": ((), {"update_count": None}, "layer 'norm' has no weights"),
    "a part without a file": (
        (part(0), part(1, weights=False, optimizer=False)),
        {},
        "a part of layer 'norm' has no file",
    ),
    "weights whole and in parts": ((part(0),), {"weights": file("model-norm.safetensors")}, "both whole and in parts"),
    "state whole and in parts": (
        (part(0),),
        {"optimizer": file("optimizer/norm.safetensors")},
        "its optimizer state both whole and in parts",
    ),
    "unsorted": (UNSORTED, {}, "must be in order of ranks"),
    "twice": (TWICE, {}, "must be in order of ranks"),
    "a rank that is not there": ((part(2),), {}, "each below 2"),
    "not sharded": ((part(0),), {"world": World(size=2, sharding="none", layout=DIGEST)}, "the world is not sharded"),
    "no layout": ((part(0),), {"world": World(size=2, sharding="sharded")}, "or has no layout"),
    "codes": (
        (part(0),),
        {
            "encoding": EncodingRecord(
                step=20, save_index=1, update_count=20, rest="q8", base="exact", codes=file("codes/norm"), errors={}
            )
        },
        "both parts and codes",
    ),
    "an update count and no state": ((part(0, optimizer=False),), {}, "update count and no optimizer file"),
}


@pytest.mark.parametrize("fault", BROKEN_PARTS)
def test_parts_that_break_a_rule_are_refused(fault: str) -> None:
    parts, changes, text = BROKEN_PARTS[fault]
    with pytest.raises(ValidationError) as caught:
        in_parts(*parts, **changes)
    assert text in str(caught.value)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("layers.3.parts.0.rank", -1),
        ("layers.3.parts.0.rank", "0"),
        ("layers.3.parts.0.rank", True),
        ("layers.3.parts.0.weights.path", "../model.safetensors"),
        ("layers.3.parts.0.more", 1),
        ("layers.3.parts", {}),
        ("world.size", 0),
        ("world.sharding", "some"),
        ("world.layout", "digest"),
    ],
)
def test_words_about_parts_that_cannot_be_are_refused(path: str, value: Any) -> None:
    fields = json.loads(encode_manifest(in_parts(part(0), part(1)))[0])
    *above, last = [int(each) if each.isdecimal() else each for each in path.split(".")]
    dig(fields, *above)[last] = value
    del fields["digest"]
    assert refuse(reseal(json.dumps(fields).encode()[:-1])).kind == "manifest-schema"


def test_several_faults_are_told_together() -> None:
    with pytest.raises(ValidationError) as caught:
        manifest(files=tuple(file(name) for name in "aabbccddeeffgg"))
    assert "path 'a' occurs 2 times; path 'b'" in str(caught.value)
    assert "and 2 more" in str(caught.value)


GOOD_PATHS = ["a", "a.b", "a/b/c.d", "a..b", "a b", "\u00e9", "checkpoint-1/tailor.json", "x" * 1024]
BAD_PATHS = ["", "/", "/a", "a/", "a//b", "..", "../a", "a/../b", "a/..", ".", "./a", "a/.", ".hidden", "a/.b"]
BAD_PATHS += ["a\\b", "..\\a", "a\0b", "a\nb", "a\n", "a\x7fb", "a\x1fb", MANIFEST_NAME, "x" * 1025]


@pytest.mark.parametrize("path", GOOD_PATHS)
def test_path_of_plain_components(path: str) -> None:
    assert file(path).path == path


@pytest.mark.parametrize("path", BAD_PATHS)
def test_other_paths_are_refused(path: str) -> None:
    with pytest.raises(ValidationError):
        file(path)
    for where in ("files.0.path", "layers.0.weights.path", "layers.1.optimizer.path"):
        error = refuse(change(where, path))
        assert error.kind == "manifest-schema"
        assert f"$.{where.split('.')[0]}" in str(error)


# What a field may not hold: one of each way to be wrong.
WRONG_VALUES = [
    ("run_id", "0" * 31), ("run_id", "0" * 32 + "\n"), ("run_id", "G" * 32), ("run_id", 5), ("run_id", ...),
    ("step", -1), ("step", 1.0), ("step", "20"), ("step", True), ("step", None), ("step", ...),
    ("save_index", -1), ("created", "2026-01-01"), ("created", "\u0662026-01-01T00:00:00Z"), ("created", ...),
    ("parent", {}), ("parent", {"step": 1}), ("parent", {"step": 1, "digest": "md5:0"}), ("parent", ...),
    ("contents", "some"), ("strategy", ""), ("strategy", None),
    ("world", {"size": 0, "sharding": "none"}), ("world", {"size": 1, "sharding": "fsdp"}), ("world", {"size": 1}),
    ("writer", {}), ("writer.pid", "1"), ("writer.more", 1),
    ("tensors", {}), ("tensors.0.fqn", ""), ("tensors.0.fqn", "x" * 1025), ("tensors.0.kind", "gradient"),
    ("tensors.0.dtype", "F31"), ("tensors.0.dtype", "f32"), ("tensors.0.shape", [-1]), ("tensors.0.shape", [1.5]),
    ("tensors.0.shape", [True]), ("tensors.0.shape", [1] * 65), ("tensors.0.shape", 3), ("tensors.0.trainable", 1),
    ("tensors.0.tied_to", ...), ("tensors.0.extra", 1),
    ("optimizers.0.class", ""), ("optimizers.0.groups", None), ("optimizers.0.groups.0.parameters", [1]),
    ("optimizers.0.groups.0.options", []), ("optimizers.0.name", "AdamW"),
    ("layers.0.name", ""), ("layers.0.kind", "neck"), ("layers.0.step", -1), ("layers.0.drift", "1"),
    ("layers.0.reason", ""), ("layers.0.reason", ...), ("layers.0.update_count", 1.5),
    ("layers.0.weights.bytes", -1), ("layers.0.weights.digest", "xxh3_128:" + "A" * 32),
    ("layers.0.weights.digest", DIGEST + "\n"), ("layers.0.optimizer", ...), ("layers.0.secret", 1),
    ("files", None), ("files.0", "a.json"), ("files.0.bytes", "4"), ("files.0.mode", 0o777), ("unknown", 1),
]  # fmt: skip


@pytest.mark.parametrize(("path", "value"), WRONG_VALUES)
def test_wrong_value_is_refused(path: str, value: Any) -> None:
    error = refuse(change(path, value))
    assert error.kind == "manifest-schema"
    assert f"$.{path.split('.')[0]}" in str(error)


@pytest.mark.parametrize("version", [2, 0, -1, 1.0, True, "1", None, [1], ...])
def test_version_we_do_not_know_is_named(version: Any) -> None:
    error = refuse(change("format_version", version))
    assert error.kind == "format-version"
    assert error.expected == FORMAT_VERSION
    assert error.found == (None if version is ... else version)
    assert "upgrade" in str(error)


def test_version_is_told_before_fields_only_that_version_knows() -> None:
    assert refuse(rewrite(format_version=2, layers=..., strata=[])).kind == "format-version"


@pytest.mark.parametrize("value", ["other", None, 5, ["llmtailor-checkpoint"], ...])
def test_another_format_is_refused(value: Any) -> None:
    assert refuse(change("format", value)).kind == "manifest-schema"


def test_cut_off_manifest_is_refused_wherever_it_is_cut() -> None:
    text, _ = encode_manifest(manifest())
    for end in range(len(text)):
        assert isinstance(refuse(text[:end]), IntegrityError)


@pytest.mark.parametrize("tail", [b"\n", b" ", b"\0", b"}", b"\r\n"])
def test_bytes_after_the_end_are_refused(tail: bytes) -> None:
    assert refuse(encode_manifest(manifest())[0] + tail).kind == "manifest-trailer"


def test_line_ends_of_windows_are_refused() -> None:
    assert isinstance(refuse(encode_manifest(manifest())[0].replace(b"\n", b"\r\n")), IntegrityError)


def test_duplicate_key_is_refused() -> None:
    body = encode_manifest(manifest())[0].rpartition(b",\n")[0]
    assert refuse(reseal(body + b', "step": 20')).kind == "bad-json"
    assert refuse(reseal(body + f', "digest": "{DIGEST}"'.encode())).kind == "bad-json"


@pytest.mark.parametrize("number", [b"NaN", b"Infinity", b"-Infinity", b"1e999"])
def test_number_that_is_none_is_refused(number: bytes) -> None:
    text = change("optimizers.0.groups.0.options", {"lr": "HERE"})
    body = text.rpartition(b",\n")[0].replace(b'"HERE"', number)
    assert refuse(reseal(body)).kind == "bad-json"


@pytest.mark.parametrize("depth", [*range(50, 1100, 50), 10_000, 200_000])
def test_deep_nesting_is_refused_at_any_depth(depth: int) -> None:
    """Three parsers with three limits look at it; none may let its own exception out."""
    text = change("optimizers.0.groups.0.options", {"deep": "HERE"})
    body = text.rpartition(b",\n")[0].replace(b'"HERE"', b"[" * depth + b"]" * depth)
    try:
        decode_manifest(reseal(body), "x")
    except FormatError:
        return
    assert depth < 200


def test_text_outside_unicode_is_refused() -> None:
    text = change("strategy", "HERE").rpartition(b",\n")[0]
    assert refuse(reseal(text.replace(b"HERE", b"\\ud800"))).kind == "manifest-schema"
    assert refuse(reseal(text.replace(b"HERE", b"\xff"))).kind == "bad-json"


@pytest.mark.parametrize("body", [b"", b"{", b"[1", b'"x"', b'{"a": 1}', b'{"a": {"b": 1', b'{"a": "'])
def test_digest_alone_makes_no_manifest(body: bytes) -> None:
    assert refuse(reseal(body)).kind in {"bad-json", "manifest-schema", "format-version"}


def test_every_flipped_bit_is_found() -> None:
    text, _ = encode_manifest(manifest(files=(file("a.json"),)))
    chance = random.Random(0)
    flips = [8 * byte + chance.randrange(8) for byte in range(len(text))]
    flips += [chance.randrange(8 * len(text)) for _ in range(3000)]
    for bit in flips:
        changed = bytearray(text)
        changed[bit // 8] ^= 1 << (bit % 8)
        assert isinstance(refuse(bytes(changed)), IntegrityError)


def test_random_changes_under_a_right_digest_raise_nothing_else() -> None:
    body = encode_manifest(manifest(files=(file("a.json"),)))[0].rpartition(b",\n")[0]
    chance = random.Random(1)
    num_refused = 0
    for _ in range(1500):
        changed = bytearray(body)
        for _ in range(chance.choice([1, 1, 2, 5])):
            changed[chance.randrange(len(changed))] = chance.choice(b'{}[]",:\\019-. eE\xffnut')
        try:
            decode_manifest(reseal(bytes(changed)), "x")
        except FormatError:
            num_refused += 1
    assert num_refused > 1000


def test_what_a_manifest_says_of_itself() -> None:
    mixed = fake_manifest(20, [*map(layer, LAYERS[:-1]), layer("norm", step=20)], files=(file("a.json", 5),))
    assert not mixed.is_consistent
    assert fake_manifest(10, [layer(name) for name in LAYERS]).is_consistent
    assert [record.path for record in mixed.all_files][-1] == "a.json"
    assert mixed.nbytes == 8 * 4096 + 5
    assert mixed.written_nbytes == 2 * 4096 + 5
