from __future__ import annotations

import copy
import os
import pickle
import socket
import struct
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given

from formats.hostile_files import LEGACY_STORAGE, legacy, tensor, text
from formats.torch_trees import PLAIN_TREES, VALUES, a_model, an_optimizer, is_same, load_tree, stock_load
from llmtailor.errors import FormatError, NotFoundError, TailorError, UnsupportedError
from llmtailor.formats.torch_files import (
    Global,
    Instance,
    Size,
    TorchStorage,
    TorchTensor,
    metadata_of,
    open_torch_file,
    read_pickle,
)
from llmtailor.tensor_refs import FileTensor
from llmtailor.tensors import ByteRange

Save = Callable[[Any, Path], None]


def save_zip(value: Any, path: Path) -> None:
    torch.save(value, path)


def save_legacy(value: Any, path: Path) -> None:
    torch.save(value, path, _use_new_zipfile_serialization=False)


@pytest.fixture(params=[save_zip, save_legacy], ids=["zip", "legacy"])
def save(request: pytest.FixtureRequest) -> Save:
    found: Save = request.param
    return found


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "some.pt"


@pytest.mark.parametrize("name", VALUES)
def test_file_is_read_as_torch_reads_it(name: str, save: Save, path: Path) -> None:
    save(VALUES[name](), path)
    with torch.serialization.safe_globals([bytes]):
        expected = stock_load(path)
    assert is_same(load_tree(open_torch_file(path)), expected)


@pytest.mark.parametrize(
    "dtype",
    [torch.bool, torch.uint8, torch.int8, torch.int16, torch.uint16, torch.float16, torch.bfloat16, torch.int32,
     torch.uint32, torch.float32, torch.complex64, torch.float64, torch.int64, torch.uint64, torch.float8_e5m2,
     torch.float8_e4m3fn, torch.float8_e8m0fnu, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz],
    ids=str,
)  # fmt: skip
def test_every_element_type_is_read(dtype: torch.dtype, save: Save, path: Path) -> None:
    value = torch.arange(24, dtype=torch.uint8).view(-1).repeat(dtype.itemsize)
    value = (value % 2).bool() if dtype == torch.bool else value.view(dtype)
    saved = [value[3:11].reshape(2, 4), value]
    save(saved, path)
    # Not compared with what torch loads: of a legacy file, it cannot load its own newer types.
    assert is_same(load_tree(open_torch_file(path)), saved)


def test_equal_views_are_one_reference_and_others_are_not(save: Save, path: Path) -> None:
    weight = torch.rand(4, 4)
    save({"embed": weight, "head": weight.view(4, 4), "row": weight[0], "clone": weight.clone()}, path)
    tree = open_torch_file(path)
    assert tree["embed"] is not tree["head"]
    assert tree["embed"].ref is tree["head"].ref
    assert len({id(node.ref) for node in tree.values()}) == 3


def test_shared_object_stays_one_object(save: Save, path: Path) -> None:
    shared = [1]
    save([shared, {"a": shared}, shared], path)
    tree = open_torch_file(path)
    assert tree[0] is tree[1]["a"] is tree[2]


def test_contiguous_tensor_is_one_extent_at_the_place_torch_gives(path: Path) -> None:
    torch.save([torch.zeros(3), torch.arange(100.0)[10:]], path)
    ref = open_torch_file(path)[1].ref
    reader = torch._C.PyTorchFileReader(str(path))
    (extent,) = ref.extents
    assert (extent.path, extent.offset) == (path, reader.get_record_offset("data/1") + 40)
    assert (extent.start, extent.numel) == (0, 90)


@pytest.mark.parametrize(
    ("view", "runs"),
    [
        (lambda t: t, 1),
        (lambda t: t[:, :5], 8),
        (lambda t: t[::2], 4),
        (lambda t: t[2:5], 1),
        (lambda t: t[:, 0], 8),
        (lambda t: t.t(), 48),
        (lambda t: t.reshape(8, 3, 2)[:, 1], 8),
        (lambda t: t.reshape(2, 4, 6).transpose(0, 1), 8),
        (lambda t: t[:1, None, :], 1),
    ],
)
def test_view_is_cut_into_as_few_runs_as_there_are(
    view: Callable[[torch.Tensor], torch.Tensor], runs: int, path: Path
) -> None:
    torch.save(view(torch.rand(8, 6)), path)
    ref = open_torch_file(path).ref
    assert isinstance(ref, FileTensor)
    assert len(ref.extents) == runs
    assert is_same(load_tree(TorchTensor(ref=ref)), stock_load(path).contiguous())


def test_scattered_tensor_is_refused_with_a_way_out(path: Path) -> None:
    torch.save(torch.zeros(400, 400).t(), path)
    with pytest.raises(UnsupportedError) as caught:
        open_torch_file(path)
    assert caught.value.kind == "tensor-scattered"
    assert "contiguous()" in str(caught.value)


def test_many_scattered_tensors_are_refused(path: Path) -> None:
    base = torch.zeros(300, 300)
    torch.save([base.t()[: 300 - n] for n in range(10)], path)
    with pytest.raises(UnsupportedError):
        open_torch_file(path)


def test_expanded_tensor_is_refused_with_a_way_out(path: Path) -> None:
    torch.save(torch.zeros(1).expand(10), path)
    with pytest.raises(UnsupportedError) as caught:
        open_torch_file(path)
    assert caught.value.kind == "tensor-expanded"
    assert "contiguous()" in str(caught.value)


def test_attributes_of_a_tensor_are_dropped(save: Save, path: Path) -> None:
    value, parameter = torch.ones(2), torch.nn.Parameter(torch.ones(2))
    value.ds_id = 7  # type: ignore[attr-defined]
    parameter.tag = "x"  # type: ignore[attr-defined]
    save([value, parameter], path)
    tree = open_torch_file(path)
    assert [type(node) for node in tree] == [TorchTensor, TorchTensor]
    assert [node.is_parameter for node in tree] == [False, True]


class Quantized(torch.Tensor):
    """As torchao's: what its bytes mean only its own class knows."""


def test_tensor_of_another_class_is_a_note_of_its_call(save: Save, path: Path) -> None:
    save([torch.ones(2).as_subclass(Quantized)], path)
    (node,) = open_torch_file(path)
    assert isinstance(node, Instance)
    assert node.arguments[1] == Global(__name__, "Quantized")


def test_versions_of_modules_are_kept(path: Path) -> None:
    state = a_model().state_dict()
    torch.save(state, path)
    assert metadata_of(open_torch_file(path)) == state._metadata  # type: ignore[attr-defined]
    assert metadata_of(OrderedDict()) is None


@pytest.mark.parametrize(
    "value",
    [torch.ones(2, dtype=torch.complex128), torch.ones(2, dtype=torch.complex64).conj(), torch.ones(2).to_sparse()],
    ids=["complex128", "conjugated", "sparse"],
)
def test_unusual_tensor_is_a_note_of_its_call(value: torch.Tensor, path: Path) -> None:
    torch.save({"a": value}, path)
    node = open_torch_file(path)["a"]
    assert isinstance(node, Instance)
    assert node.cls.module == "torch._utils"


def test_bare_storage_is_a_node(save: Save, path: Path) -> None:
    save([torch.arange(3.0).untyped_storage()], path)
    (node,) = open_torch_file(path)
    assert isinstance(node, TorchStorage)
    assert is_same(load_tree(TorchTensor(ref=node.ref)).view(torch.float32), torch.arange(3.0))


class Settings:
    """As DeepSpeed pickles its own classes."""

    def __init__(self) -> None:
        self.scale = 3.0


def test_object_is_a_note_of_its_class_and_state(save: Save, path: Path) -> None:
    save({"a": Settings()}, path)
    node = open_torch_file(path)["a"]
    assert isinstance(node, Instance)
    assert (node.cls, node.state, node.is_call) == (Global(__name__, "Settings"), {"scale": 3.0}, False)


def test_call_is_a_note_of_its_arguments(path: Path) -> None:
    torch.save([np.float32(2.0), torch.device("cuda", 1)], path)
    scalar, device = open_torch_file(path)
    assert (scalar.cls.name, scalar.is_call, scalar.arguments[1]) == ("scalar", True, struct.pack("<f", 2))
    assert (device.cls, device.arguments) == (Global("torch", "device"), ("cuda", 1))


def test_entries_and_items_of_other_containers_are_noted(path: Path) -> None:
    from collections import Counter, defaultdict, deque

    torch.save([Counter("aab"), defaultdict(list, {"k": [1]}), deque([1, 2, 3])], path)
    counter, default, queue = open_torch_file(path)
    assert counter.arguments == ({"a": 2, "b": 1},)
    assert (default.arguments, default.entries) == ((Global("builtins", "list"),), {"k": [1]})
    assert queue.items == [1, 2, 3]


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@given(value=PLAIN_TREES)
def test_pickle_of_any_plain_value_is_read(protocol: int, value: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("pickles") / "some.pkl"
    path.write_bytes(pickle.dumps(value, protocol))
    assert is_same(read_pickle(path), value)


@pytest.mark.parametrize("protocol", [0, 1])
def test_old_protocol_is_refused_by_name(protocol: int, path: Path) -> None:
    path.write_bytes(pickle.dumps([1], protocol))
    with pytest.raises(UnsupportedError) as caught:
        read_pickle(path)
    assert caught.value.found == "protocol 0 or 1"


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_sets_and_byte_arrays_of_every_protocol(protocol: int, path: Path) -> None:
    path.write_bytes(pickle.dumps([{"a"}, frozenset({1}), bytearray(b"x"), {(1, 2)}], protocol))
    plain, frozen, array, of_tuples = read_pickle(path)
    assert plain == {"a"}
    assert (frozen.cls, frozen.arguments) == (Global("builtins", "frozenset"), ([1],))
    assert (array.cls, array.is_call) == (Global("builtins", "bytearray"), True)
    assert of_tuples == {(1, 2)} or of_tuples.arguments == ([(1, 2)],)


def test_bare_pickle_with_storages_is_refused(path: Path) -> None:
    path.write_bytes(b"\x80\x02" + tensor() + b".")
    with pytest.raises(FormatError):
        read_pickle(path)


def test_archive_inside_a_file_is_read_at_its_place(tmp_path: Path) -> None:
    inner, outer = tmp_path / "inner.pt", tmp_path / "outer.bin"
    value = {"a": torch.rand(5), "b": torch.rand(3)[1:]}
    torch.save(value, inner)
    content = inner.read_bytes()
    outer.write_bytes(b"x" * 1000 + content + b"PK\x05\x06" + bytes(500))
    tree = open_torch_file(outer, byte_range=ByteRange(start=1000, end=1000 + len(content)))
    assert is_same(load_tree(tree), value)
    for start, end in [(999, 1000 + len(content)), (1000, 999 + len(content)), (0, 100)]:
        with pytest.raises(FormatError):
            open_torch_file(outer, byte_range=ByteRange(start=start, end=end))
    with pytest.raises(FormatError) as caught:
        open_torch_file(outer, byte_range=ByteRange(start=1000, end=10**9))
    assert caught.value.expected == "1000000000 bytes or more"


def test_archive_without_checksums_is_read(path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        torch.save([torch.ones(2)], path)
    finally:
        torch.serialization.set_crc32_options(True)
    assert is_same(load_tree(open_torch_file(path)), stock_load(path))


def test_changed_pickle_is_found_by_its_checksum(path: Path) -> None:
    torch.save({"lr": 0.125}, path)
    content = path.read_bytes()
    path.write_bytes(content.replace(struct.pack(">d", 0.125), struct.pack(">d", 0.25)))
    with pytest.raises(FormatError) as caught:
        open_torch_file(path)
    assert caught.value.kind == "torch-zip-crc"


def test_large_pickle_in_front_of_legacy_storages_is_read(path: Path) -> None:
    value = {"text": ["x" * 1000 + str(n) for n in range(3000)], "weight": torch.rand(4)}
    save_legacy(value, path)
    assert is_same(load_tree(open_torch_file(path)), value)


def test_view_of_a_legacy_storage_is_read(path: Path) -> None:
    view = LEGACY_STORAGE.replace(b"NtQ", text("v") + b"K\x01K\x03\x87tQ")
    path.write_bytes(legacy(tensor((2,), (1,), storage=view), data=struct.pack("<4f", 0, 1, 2, 3)))
    assert is_same(load_tree(open_torch_file(path)), torch.tensor([1.0, 2.0]))


def test_only_directory_and_pickle_are_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    value = {f"layers.{n}.weight": torch.zeros(2**20) for n in range(8)}
    torch.save(value, path)
    read = 0
    original = os.pread

    def count(descriptor: int, nbytes: int, offset: int) -> bytes:
        nonlocal read
        data = original(descriptor, nbytes, offset)
        read += len(data)
        return data

    monkeypatch.setattr(os, "pread", count)
    monkeypatch.setattr(os, "read", lambda *_: pytest.fail("read without a place"))
    open_torch_file(path)
    assert 1000 < read < 10_000


def test_limits_leave_room_for_real_files(path: Path) -> None:
    # Of 70 billion parameters: some 700 tensors, each with a step, two moments and a place in a group.
    state = {
        n: {"step": torch.tensor(1.0), "exp_avg": torch.zeros(1), "exp_avg_sq": torch.zeros(1)} for n in range(2000)
    }
    torch.save({"state": state, "param_groups": [{"params": list(range(2000))}]}, path)
    assert len(open_torch_file(path)["state"]) == 2000


def test_missing_file_is_said(tmp_path: Path) -> None:
    for read in (open_torch_file, read_pickle):
        with pytest.raises(NotFoundError):
            read(tmp_path / "nothing.pt")


@pytest.mark.parametrize("kind", ["pipe", "link", "directory", "socket", "device"])
def test_anything_but_a_regular_file_is_refused(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # a socket's name is at most 107 characters
    path = Path("/dev/zero") if kind == "device" else tmp_path / "thing"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "link":
        torch.save(1, tmp_path / "real.pt")
        path.symlink_to(tmp_path / "real.pt")
    elif kind == "directory":
        path.mkdir()
    server = socket.socket(socket.AF_UNIX)
    if kind == "socket":
        server.bind("thing")
    for read in (open_torch_file, read_pickle):
        with pytest.raises(FormatError) as caught:
            read(path)
        assert caught.value.kind == "not-regular"
    server.close()


def test_file_cut_off_anywhere_is_refused(save: Save, path: Path) -> None:
    save({"model": a_model().state_dict(), "optimizer": an_optimizer().state_dict()}, path)
    content = path.read_bytes()
    for part in range(20):
        path.write_bytes(content[: len(content) * part // 20])
        with pytest.raises(TailorError) as caught:
            open_torch_file(path)
        assert caught.value.path == str(path)


def test_nodes_can_be_copied() -> None:
    node = Instance(Global("a", "B"), (Size([1]),), state={"x": 1})
    assert is_same(copy.deepcopy(node), node)
