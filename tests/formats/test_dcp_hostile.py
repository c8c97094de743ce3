"""``.metadata`` that lies: every one refused with a typed error, nothing run, nothing opened outside."""

from __future__ import annotations

import os
import pickle
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from formats.dcp_files import LOOP, WEIGHTS, index_of, place_of, save, tampered
from llmtailor.errors import FormatError, IncompleteError, TailorError, UnsupportedError
from llmtailor.formats.dcp import open_dcp
from llmtailor.formats.torch_files import Global, Instance, Size, Tree

KEY = "tok_embeddings.weight"
MODULE = "torch.distributed.checkpoint.metadata"


def tensor(fields: dict[str, Tree], key: str = KEY) -> dict[str, Tree]:
    return fields["state_dict_metadata"][key].state


def chunk(fields: dict[str, Tree], number: int = 0) -> dict[str, Tree]:
    return tensor(fields)["chunks"][number].state


def relocate(**changes: Any) -> Callable[[dict[str, Tree]], None]:
    """Change the place of a chunk."""
    return lambda fields: place_of(fields, KEY).state.update(changes)


def move_chunk(offsets: tuple[int, ...], sizes: tuple[int, ...]) -> Callable[[dict[str, Tree]], None]:
    def change(fields: dict[str, Tree]) -> None:
        chunk(fields, 1).update(offsets=Size(offsets), sizes=Size(sizes))
        index_of(fields, KEY, 1).state["offset"] = Size(offsets)

    return change


def drop_chunk(fields: dict[str, Tree]) -> None:
    del tensor(fields)["chunks"][1]


def repeat_chunk(fields: dict[str, Tree]) -> None:
    tensor(fields)["chunks"] *= 2


def grow(fields: dict[str, Tree]) -> None:
    """A tensor of 2^40 elements in one chunk, in the bytes of a small one."""
    tensor(fields).update(size=Size((2**20, 2**20)))
    del tensor(fields)["chunks"][1]
    chunk(fields).update(sizes=Size((2**20, 2**20)))


def share_blobs(fields: dict[str, Tree]) -> None:
    place_of(fields, "norm.weight").state.update(place_of(fields, "norm.bias").state)


def overlap_blobs(fields: dict[str, Tree]) -> None:
    place_of(fields, KEY).state["length"] += 1


def rename_dtype(name: str) -> Callable[[dict[str, Tree]], None]:
    def change(fields: dict[str, Tree]) -> None:
        properties = tensor(fields)["properties"]
        properties.state = (Global("torch", name), *properties.state[1:])

    return change


def other_class(fields: dict[str, Tree]) -> None:
    fields["state_dict_metadata"][KEY].cls = Global(MODULE, "StorageMeta")


def set_field(name: str, value: Tree) -> Callable[[dict[str, Tree]], None]:
    return lambda fields: fields.update({name: value})


def bad_key(key: Any) -> Callable[[dict[str, Tree]], None]:
    def change(fields: dict[str, Tree]) -> None:
        fields["state_dict_metadata"][key] = fields["state_dict_metadata"].pop("freqs")

    return change


def lying_path(path: Any) -> Callable[[dict[str, Tree]], None]:
    return lambda fields: fields["planner_data"].update({KEY: path})


def twice(fields: dict[str, Tree]) -> None:
    index = Instance(Global(MODULE, "MetadataIndex"), state=dict(index_of(fields, KEY).state))
    fields["storage_data"][index] = place_of(fields, KEY)


HOSTILE: dict[str, tuple[Callable[[dict[str, Tree]], Tree | None], type[TailorError]]] = {
    "a file above": (relocate(relative_path="../other/__0_0.distcp"), FormatError),
    "an absolute file": (relocate(relative_path="/etc/passwd"), FormatError),
    "the directory": (relocate(relative_path=".."), FormatError),
    "a hidden file": (relocate(relative_path=".metadata"), FormatError),
    "a file in a subdirectory": (relocate(relative_path="a\\b"), FormatError),
    "an empty name": (relocate(relative_path=""), FormatError),
    "a name that is a number": (relocate(relative_path=3), FormatError),
    "a NUL in the name": (relocate(relative_path="__0_0\0.distcp"), FormatError),
    "no such file": (relocate(relative_path="__7_0.distcp"), IncompleteError),
    "a negative offset": (relocate(offset=-8), FormatError),
    "an offset behind the end": (relocate(offset=10**9), IncompleteError),
    "a huge offset": (relocate(offset=2**70), FormatError),
    "an offset in words": (relocate(offset="0"), FormatError),
    "a length of nothing": (relocate(length=0), FormatError),
    "a length of True": (relocate(length=True), FormatError),
    "a length that reaches out": (relocate(length=10**8), IncompleteError),
    "compressed items": (relocate(transform_descriptors=["zstd"]), UnsupportedError),
    "chunks that overlap": (move_chunk((4, 0), (5, 4)), FormatError),
    "a hole between chunks": (move_chunk((6, 0), (4, 4)), FormatError),
    "a chunk outside": (move_chunk((5, 0), (6, 4)), FormatError),
    "a chunk with other dims": (move_chunk((5,), (5,)), FormatError),
    "a missing chunk": (drop_chunk, FormatError),
    "each chunk twice": (repeat_chunk, FormatError),
    "a tensor larger than the disk": (grow, FormatError),
    "sizes beyond counting": (lambda fields: tensor(fields).update(size=Size((2**62, 2**62))), FormatError),
    "negative sizes": (lambda fields: tensor(fields).update(size=Size((-10, -4))), FormatError),
    "a size that is a list": (lambda fields: tensor(fields).update(size=[10, 4]), FormatError),
    "too many dims": (lambda fields: tensor(fields).update(size=Size((1,) * 65)), FormatError),
    "two items in the same bytes": (share_blobs, FormatError),
    "an item that reaches into the next": (overlap_blobs, FormatError),
    "a chunk in two places": (twice, FormatError),
    "another element type": (rename_dtype("float16"), FormatError),
    "an element type of no name": (rename_dtype("quint8"), UnsupportedError),
    "no element type": (lambda fields: setattr(tensor(fields)["properties"], "state", ()), FormatError),
    "a class of another kind": (other_class, FormatError),
    "a number for a tensor": (lambda fields: fields["state_dict_metadata"].update({KEY: 3}), FormatError),
    "another class for all": (lambda fields: Instance(Global("torch", "Tensor"), state=fields), FormatError),
    "no class at all": (lambda fields: dict(fields), FormatError),
    "a list": (lambda fields: [], FormatError),
    "no description": (set_field("state_dict_metadata", {}), FormatError),
    "a description in a list": (set_field("state_dict_metadata", []), FormatError),
    "no places": (set_field("storage_data", None), FormatError),
    "empty places": (set_field("storage_data", {}), IncompleteError),
    "places by text": (set_field("storage_data", {"key": None}), FormatError),
    "paths in a list": (set_field("planner_data", [1]), FormatError),
    "a path to another place": (lying_path(("model", "lm_head.weight")), FormatError),
    "an empty path": (lying_path(()), FormatError),
    "a path of lists": (lying_path([KEY]), FormatError),
    "a key that is a number": (bad_key(7), FormatError),
    "a key of control characters": (bad_key("a\nb"), FormatError),
    "an endless key": (bad_key("a" * 10_000), FormatError),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_reader_refuses_lying_metadata(name: str, tmp_path: Path) -> None:
    change, expected = HOSTILE[name]
    with pytest.raises(TailorError) as caught:
        read_all(tampered(WEIGHTS, tmp_path, change))
    assert type(caught.value) is expected
    assert caught.value.path


@pytest.mark.parametrize("change", [grow, share_blobs, overlap_blobs])
def test_a_small_file_cannot_claim_to_hold_much(change: Callable[[dict[str, Tree]], None], tmp_path: Path) -> None:
    """Refused before anybody asks where a tensor is: sizes are added up and shown from what is known by then."""
    with pytest.raises(FormatError):
        open_dcp(tampered(WEIGHTS, tmp_path, change))


def read_all(path: Path) -> None:
    for ref in open_dcp(path).weights.values():
        _ = ref.extents  # type: ignore[union-attr]


def test_reader_runs_no_pickle(tmp_path: Path) -> None:
    class Harm:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.system, (f"touch {tmp_path / 'harm'}",)

    shutil.copytree(WEIGHTS, tmp_path / "checkpoint")
    (tmp_path / "checkpoint" / ".metadata").write_bytes(pickle.dumps(Harm()))
    with pytest.raises(FormatError) as caught:
        open_dcp(tmp_path / "checkpoint")
    assert caught.value.kind == "pickle-hostile"
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize("target", ["__0_0.distcp", ".metadata"])
def test_reader_follows_no_link_out_of_the_checkpoint(target: str, tmp_path: Path) -> None:
    shutil.copytree(WEIGHTS, tmp_path / "checkpoint")
    outside = (tmp_path / "checkpoint" / target).rename(tmp_path / "outside")
    (tmp_path / "checkpoint" / target).symlink_to(outside)
    with pytest.raises(FormatError) as caught:
        open_dcp(tmp_path / "checkpoint")
    assert caught.value.kind == "not-regular"


@pytest.mark.parametrize("target", ["__0_0.distcp", ".metadata"])
def test_reader_does_not_wait_for_a_pipe(target: str, tmp_path: Path) -> None:
    shutil.copytree(WEIGHTS, tmp_path / "checkpoint")
    (tmp_path / "checkpoint" / target).unlink()
    os.mkfifo(tmp_path / "checkpoint" / target)
    with pytest.raises(FormatError):
        open_dcp(tmp_path / "checkpoint")


@pytest.mark.parametrize("seed", range(4))
def test_a_changed_byte_never_ends_in_another_error(seed: int, tmp_path: Path) -> None:
    shutil.copytree(LOOP, tmp_path / "checkpoint")
    metadata = tmp_path / "checkpoint" / ".metadata"
    original = metadata.read_bytes()
    chance = random.Random(seed)
    refused = 0
    for _ in range(60):
        data = bytearray(original)
        for _ in range(chance.choice((1, 1, 4))):
            data[chance.randrange(len(data))] = chance.randrange(256)
        metadata.write_bytes(data)
        try:
            read_all(tmp_path / "checkpoint")
        except TailorError:
            refused += 1
    assert refused > 20


def test_options_of_unknown_classes_are_refused(tmp_path: Path) -> None:
    state = {"state": {}, "param_groups": [{"params": ["weight"], "lr": 0.1, "path": {1, 2}}]}
    weights = {"weight": torch.ones(2)}
    with pytest.raises(UnsupportedError) as caught:
        open_dcp(save(tmp_path / "checkpoint", {"model": weights, "optim": state}))
    assert "path" in str(caught.value)
