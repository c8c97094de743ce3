from __future__ import annotations

import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from torch._subclasses.fake_tensor import FakeTensorMode

from formats.hostile_files import PROTO
from formats.simple_writer import load_ref, part_bytes, write_plan
from formats.torch_trees import PLAIN_TREES, VALUES, is_same, load_tree, stock_load
from llmtailor.errors import FormatError, UnsupportedError
from llmtailor.file_plan import FilePlan
from llmtailor.formats.torch_files import (
    Global,
    Instance,
    Size,
    TorchTensor,
    Tree,
    encode_pickle,
    open_torch_file,
    plan_torch_blob,
    plan_torch_file,
    read_pickle,
)
from llmtailor.tensor_refs import (
    AveragedTensor,
    CastTensor,
    Extent,
    FileTensor,
    InlineTensor,
    ScaledTensor,
    TensorRef,
    TensorSlice,
)
from llmtailor.tensors import DTYPE_BITS, ByteRange, TensorMeta


def inline(*values: float) -> InlineTensor:
    data = np.array(values, "<f4").tobytes()
    return InlineTensor(meta=TensorMeta(dtype="F32", shape=(len(values),)), data=data)


def stored(tensor: torch.Tensor, directory: Path) -> TensorRef:
    path = directory / f"source-{len(list(directory.iterdir()))}.pt"
    torch.save(tensor, path)
    ref: TensorRef = open_torch_file(path).ref
    return ref


def write(tree: Tree, directory: Path, name: str = "new/some.pt") -> Path:
    return write_plan(plan_torch_file(name, tree), directory)


@pytest.mark.parametrize("name", VALUES)
def test_what_was_read_is_written_as_stock_torch_reads_it(name: str, tmp_path: Path) -> None:
    torch.save(VALUES[name](), tmp_path / "some.pt")
    path = write(open_torch_file(tmp_path / "some.pt"), tmp_path)
    with torch.serialization.safe_globals([bytes]):
        expected = stock_load(tmp_path / "some.pt")
    assert is_same(stock_load(path), expected)
    assert is_same(stock_load(path, mmap=True), expected)
    assert is_same(load_tree(open_torch_file(path)), expected)
    assert zipfile.ZipFile(path).testzip() is None


# Of the others, texts that are equal and not the same object are written once, or views got a storage of their own.
@pytest.mark.parametrize(
    "name", sorted(VALUES.keys() - {"state_dict", "views", "channels_last", "windows", "bytes", "long"})
)
def test_file_is_what_torch_writes_byte_for_byte(name: str, tmp_path: Path) -> None:
    torch.save(VALUES[name](), tmp_path / "some.pt")
    path = write(open_torch_file(tmp_path / "some.pt"), tmp_path)
    # But for the last record, a random number.
    end = zipfile.ZipFile(tmp_path / "some.pt").getinfo("some/.data/serialization_id").header_offset
    assert path.read_bytes()[:end] == (tmp_path / "some.pt").read_bytes()[:end]


def test_offsets_are_where_torch_computes_them_without_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    value = {f"{n}": torch.rand(n) for n in (0, 1, 17, 0, 1000, 16)}
    torch.save(value, tmp_path / "some.pt")
    path = write(open_torch_file(tmp_path / "some.pt"), tmp_path)
    # torch then compares with the offsets that it reads.
    monkeypatch.setenv("TORCH_SERIALIZATION_DEBUG", "1")
    with torch.utils.serialization.config.patch("load.calculate_storage_offsets", True):
        assert is_same(stock_load(path, mmap=True), value)
    with FakeTensorMode():
        fakes = torch.load(path, weights_only=True)
    reader = torch._C.PyTorchFileReader(str(path))
    for number, fake in enumerate(fakes.values()):
        offset = fake.untyped_storage()._checkpoint_offset
        assert offset == reader.get_record_offset(f"data/{number}")
        assert offset % 64 == 0


@given(tree=PLAIN_TREES)
def test_any_plain_tree_comes_back(tree: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("pickles") / "some.pkl"
    path.write_bytes(encode_pickle(tree))
    assert is_same(read_pickle(path), tree)


def read_back(data: bytes, directory: Path) -> Tree:
    (directory / "some.pkl").write_bytes(data)
    return read_pickle(directory / "some.pkl")


def test_instances_come_back(tmp_path: Path) -> None:
    cls = Global("torch.some", "Thing")
    tree = [
        cls,
        Instance(cls),
        Instance(cls, (1, "a", [cls]), is_call=True, state={"x": ()}),
        Instance(cls, ((),), items=list(range(2001)), entries={n: str(n) for n in range(1001)}),
        Instance(Global("collections", "defaultdict"), (Global("builtins", "list"),), is_call=True, entries={"a": [1]}),
        Size([1, 2]),
    ]
    assert is_same(read_back(encode_pickle(tree), tmp_path), tree)


def test_shared_objects_are_written_once(tmp_path: Path) -> None:
    shared, node = [1] * 100, Instance(Global("torch", "Thing"), state={"a": "text" * 100})
    tree = [shared, {"a": shared}, (node, node), (shared,), {"text" * 100: "text" * 100}]
    data = encode_pickle(tree)
    assert len(data) < 1000
    first, second, third, fourth, _ = read_back(data, tmp_path)
    assert first is second["a"] is fourth[0]
    assert third[0] is third[1]


def test_short_lived_objects_do_not_pass_for_each_other(tmp_path: Path) -> None:
    # Sets, sizes and attributes of dicts go through lists and dicts made on the way, which get each other's id.
    tree = []
    for number in range(500):
        versions = OrderedDict(a=1)
        vars(versions)["_metadata"] = {"version": number}
        tree.append([{number}, Size([number]), versions, str(number).encode()])
    assert is_same(read_back(encode_pickle(tree), tmp_path), tree)


def test_order_of_a_set_does_not_depend_on_the_process() -> None:
    data = encode_pickle({f"layer-{n}" for n in range(10, 60)})
    places = [data.index(f"layer-{n}".encode()) for n in range(10, 60)]
    assert places == sorted(places)


def test_one_reference_is_one_storage(tmp_path: Path) -> None:
    ref = inline(1, 2)
    tree = {"embed": TorchTensor(ref=ref), "head": TorchTensor(ref=ref), "copy": TorchTensor(ref=inline(1, 2))}
    loaded = stock_load(write(tree, tmp_path))
    assert loaded["embed"].data_ptr() == loaded["head"].data_ptr() != loaded["copy"].data_ptr()


def test_one_node_is_one_tensor(tmp_path: Path) -> None:
    node = TorchTensor(ref=inline(1), is_parameter=True)
    loaded = stock_load(write([node, node], tmp_path))
    assert loaded[0] is loaded[1]
    assert type(loaded[0]) is torch.nn.Parameter
    assert not loaded[0].requires_grad


@pytest.mark.parametrize("dtype", DTYPE_BITS)
def test_every_element_type_is_written(dtype: str, tmp_path: Path) -> None:
    meta = TensorMeta(dtype=dtype, shape=(2, 1, 3))
    data = bytes(n % 2 for n in range(meta.nbytes))
    ref = InlineTensor(meta=meta, data=data)
    assert is_same(stock_load(write(TorchTensor(ref=ref), tmp_path)), load_ref(ref))


def test_computed_tensors_are_written(tmp_path: Path) -> None:
    a, b = stored(torch.rand(5), tmp_path), stored(torch.rand(5), tmp_path)
    refs = [
        CastTensor(meta=TensorMeta(dtype="BF16", shape=(5,)), source=a),
        ScaledTensor(source=b, factor=0.3),
        AveragedTensor(meta=a.meta, sources=(a, b), weights=(0.25, 0.75)),
    ]
    path = write([TorchTensor(ref=ref) for ref in refs], tmp_path)
    assert is_same(stock_load(path), [load_ref(ref) for ref in refs])
    assert zipfile.ZipFile(path).testzip() is None


def test_scattered_tensor_becomes_contiguous(tmp_path: Path) -> None:
    value = torch.rand(4, 5).t()
    (loaded,) = stock_load(write([TorchTensor(ref=stored(value, tmp_path))], tmp_path))
    assert loaded.is_contiguous()
    assert torch.equal(loaded, value)


def test_checksums_of_known_bytes_are_known_and_others_are_left_open(tmp_path: Path) -> None:
    ref = stored(torch.rand(5), tmp_path)
    empty = stored(torch.rand(0), tmp_path)
    plan = plan_torch_file("a.pt", [TorchTensor(ref=r) for r in (inline(1), ref, empty, ref)])
    (patch,) = plan.crc_patches
    assert patch.byte_range.nbytes == 20
    assert [type(part) for part in plan.parts] == [bytes, TensorSlice, bytes]
    assert part_bytes(plan.parts[1]) == part_bytes(TensorSlice(tensor=ref, start=0, stop=5))


def test_planning_touches_no_file() -> None:
    meta = TensorMeta(dtype="F32", shape=(2**40,))
    extent = Extent(path=Path("/nowhere"), offset=0, start=0, numel=2**40)
    plan = plan_torch_file("a.pt", TorchTensor(ref=FileTensor(meta=meta, extents=(extent,))))
    assert plan.nbytes > 2**42
    assert sum(len(part) for part in plan.parts if isinstance(part, bytes)) < 2000


@pytest.mark.parametrize(
    ("name", "root"),
    [
        ("model.pt", "model"),
        ("global_step3/bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt", "bf16_zero_pp_rank_0_mp_rank_00_optim_states"),
        ("optimizer", "optimizer"),
        ("a.b.pt", "a.b"),
        ("modèle.pt", "archive"),
        ("...", "archive"),
    ],
)
def test_root_is_called_like_the_file(name: str, root: str, tmp_path: Path) -> None:
    path = write([1], tmp_path, name)
    assert {entry.split("/")[0] for entry in zipfile.ZipFile(path).namelist()} == {root}
    assert stock_load(path) == [1]
    assert open_torch_file(path) == [1]


def test_blob_inside_a_file_is_read_by_torch_from_there(tmp_path: Path) -> None:
    import io

    tree = {"a": TorchTensor(ref=stored(torch.arange(7.0), tmp_path)), "b": 3}
    parts, patches = plan_torch_blob(tree)
    blob = write_plan(FilePlan(name="blob", parts=parts, crc_patches=patches), tmp_path).read_bytes()
    assert is_same(torch.load(io.BytesIO(blob), weights_only=True), {"a": torch.arange(7.0), "b": 3})
    (tmp_path / "outer").write_bytes(bytes(640) + blob)
    outer = open_torch_file(tmp_path / "outer", byte_range=ByteRange(start=640, end=640 + len(blob)))
    assert is_same(load_tree(outer), {"a": torch.arange(7.0), "b": 3})


def write_sparse(plan: FilePlan, directory: Path) -> Path:
    """A huge plan of tensors of zeros, with holes for them, and without their CRCs."""
    path = directory / plan.name
    with path.open("xb") as file:
        for part in plan.parts:
            if isinstance(part, bytes):
                file.write(part)
            else:
                file.seek(part.nbytes, 1)
        file.truncate(plan.nbytes)
    return path


def test_files_of_more_than_4_gib_are_laid_out_as_torch_does(tmp_path: Path) -> None:
    numels = [3, 5 * 2**28, 2, 2**30 + 1, 0, 1]
    value = [torch.empty(numel) for numel in numels]  # of which no page is ever touched
    with torch.serialization.skip_data():
        torch.save(value, tmp_path / "stock.pt")
    assert (tmp_path / "stock.pt").stat().st_blocks < 1000, "the file system has no holes"
    tree = open_torch_file(tmp_path / "stock.pt")
    assert [node.ref.meta.numel for node in tree] == numels
    plan = plan_torch_file("stock.pt", tree)
    (tmp_path / "new").mkdir()
    path = write_sparse(plan, tmp_path / "new")

    reread = open_torch_file(path)
    stock, ours = zipfile.ZipFile(tmp_path / "stock.pt"), zipfile.ZipFile(path)
    for number, (old, new) in enumerate(zip(tree, reread, strict=True)):
        assert [extent.offset for extent in old.ref.extents] == [extent.offset for extent in new.ref.extents]
        name = f"stock/data/{number}"
        facts = [
            (i.header_offset, i.file_size, i.compress_size, i.extra) for i in (stock.getinfo(name), ours.getinfo(name))
        ]
        assert facts[0] == facts[1]
    with torch.utils.serialization.config.patch("load.calculate_storage_offsets", True):
        loaded = stock_load(path, mmap=True)
    assert [tensor.numel() for tensor in loaded] == numels
    assert loaded[1][-1] == 0
    # The CRCs' places: behind the bytes, after the descriptor's mark, and in the directory.
    content = path.open("rb")
    for patch in plan.crc_patches:
        behind, listed = patch.offsets
        content.seek(behind - 4)
        assert content.read(4) == b"PK\x07\x08"
        content.seek(listed - 16)
        assert content.read(4) == b"PK\x01\x02"
    content.close()


@pytest.mark.slow
def test_more_records_than_a_small_directory_counts(tmp_path: Path) -> None:
    tree = [TorchTensor(ref=inline(number)) for number in range(70_000)]
    path = write(tree, tmp_path)
    assert len(open_torch_file(path)) == 70_000
    loaded = stock_load(path)
    assert float(loaded[69_999]) == 69_999


# What cannot be written.


def test_tensor_outside_a_torch_file_is_refused() -> None:
    with pytest.raises(UnsupportedError) as caught:
        encode_pickle({"a": TorchTensor(ref=inline(1))})
    assert caught.value.kind == "pickle-tensor"


@pytest.mark.parametrize("value", [object(), 1j, bytearray(), frozenset(), range(3), np.float32(1), torch.zeros(1)])
def test_value_that_is_no_node_is_refused(value: object) -> None:
    with pytest.raises(UnsupportedError) as caught:
        encode_pickle([value])
    assert caught.value.kind == "pickle-type"


def test_number_too_long_is_refused() -> None:
    assert read_long(encode_pickle(2**1000)) == 2**1000
    with pytest.raises(UnsupportedError):
        encode_pickle(2**3000)


def read_long(data: bytes) -> int:
    assert data.startswith(PROTO + b"\x8a")
    return int.from_bytes(data[4:-1], "little", signed=True)


def test_tree_that_holds_itself_is_refused() -> None:
    cyclic: list[Any] = []
    cyclic.append(cyclic)
    with pytest.raises(FormatError):
        encode_pickle(cyclic)


def test_tree_too_deep_is_refused_and_a_deep_one_is_written(tmp_path: Path) -> None:
    deep: Tree = 1
    for level in range(64):
        deep = Instance(Global("torch", "Thing"), (), state=deep) if level % 2 else [deep]
    assert is_same(read_back(encode_pickle(deep), tmp_path), deep)
    with pytest.raises(FormatError):
        encode_pickle([deep])
