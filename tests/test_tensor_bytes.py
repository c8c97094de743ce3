from __future__ import annotations

import gc
import mmap
from pathlib import Path

import pytest
import torch

from llmtailor.errors import IntegrityError, UnsupportedError
from llmtailor.tensor_bytes import dtype_name, host_bytes, meta_of, tensor_from_bytes, torch_dtype, why_not_plain
from llmtailor.tensors import DTYPE_BITS, TensorMeta


class TaggedTensor(torch.Tensor):
    pass


def random_tensor(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Random bits, thus NaNs with payloads too; bool has just two values."""
    meta = TensorMeta(dtype=name, shape=shape)
    bits = torch.randint(0, 2 if name == "BOOL" else 256, (meta.nbytes,), dtype=torch.uint8)
    return bits.view(torch_dtype(name)).reshape(shape)


@pytest.mark.parametrize("name", DTYPE_BITS)
def test_dtype_name_is_the_inverse_of_torch_dtype(name: str) -> None:
    assert dtype_name(torch_dtype(name)) == name
    assert torch_dtype(name).itemsize * 8 == DTYPE_BITS[name]


def test_dtype_name_refuses_unknown_type() -> None:
    with pytest.raises(UnsupportedError) as caught:
        dtype_name(torch.complex128)
    assert caught.value.kind == "dtype"
    assert "torch.complex128" in str(caught.value)


def test_torch_dtype_refuses_unknown_name() -> None:
    with pytest.raises(UnsupportedError) as caught:
        torch_dtype("F4")
    assert "F4" in str(caught.value)


def test_meta_of_tensor() -> None:
    assert meta_of(torch.zeros(2, 3, dtype=torch.bfloat16)) == TensorMeta(dtype="BF16", shape=(2, 3))


@pytest.mark.parametrize("shape", [(), (1,), (5,), (3, 4), (2, 0, 3), (0,)])
@pytest.mark.parametrize("name", DTYPE_BITS)
def test_bytes_round_trip(name: str, shape: tuple[int, ...]) -> None:
    tensor = random_tensor(name, shape)
    content = host_bytes(tensor)
    assert len(content) == meta_of(tensor).nbytes
    again = tensor_from_bytes(bytes(content), meta_of(tensor))
    assert (again.dtype, again.shape) == (tensor.dtype, tensor.shape)
    assert bytes(host_bytes(again)) == bytes(content)


def test_host_bytes_is_the_numpy_layout() -> None:
    tensor = torch.arange(6, dtype=torch.int32).reshape(2, 3)
    assert bytes(host_bytes(tensor)) == tensor.numpy().astype("<i4").tobytes()


def test_host_bytes_of_transposed_tensor_is_row_major() -> None:
    tensor = torch.arange(6.0).reshape(2, 3).T
    assert bytes(host_bytes(tensor)) == bytes(host_bytes(tensor.contiguous()))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_host_bytes_of_every_other_element(dtype: torch.dtype) -> None:
    tensor = torch.arange(6).to(dtype)[::2]
    assert bytes(host_bytes(tensor)) == bytes(host_bytes(tensor.clone()))


def test_host_bytes_of_conjugated_view_has_the_conjugated_values() -> None:
    tensor = torch.tensor([1 + 2j], dtype=torch.complex64)
    assert bytes(host_bytes(tensor.conj())) == bytes(host_bytes(torch.tensor([1 - 2j], dtype=torch.complex64)))


def test_host_bytes_of_contiguous_tensor_is_a_read_only_view() -> None:
    tensor = torch.nn.Parameter(torch.zeros(2))
    content = host_bytes(tensor)
    assert content.readonly
    with torch.no_grad():
        tensor.fill_(1.0)
    assert bytes(content) == bytes(host_bytes(torch.ones(2)))


def test_host_bytes_keeps_the_memory_alive() -> None:
    content = host_bytes(torch.full((1000,), 7, dtype=torch.uint8))
    gc.collect()
    assert bytes(content) == bytes([7]) * 1000


def test_tensor_from_bytes_maps_a_read_only_file_without_a_copy(tmp_path: Path) -> None:
    path = tmp_path / "tensor"
    path.write_bytes(bytes(range(64)))
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 64, access=mmap.ACCESS_READ)
    tensor = tensor_from_bytes(memoryview(mapped)[16:32], TensorMeta(dtype="U8", shape=(4, 4)))
    with pytest.raises(BufferError):
        mapped.close()  # the tensor looks at it
    del mapped
    gc.collect()
    assert tensor.flatten().tolist() == list(range(16, 32))


@pytest.mark.parametrize("nbytes", [0, 7, 9])
def test_tensor_from_bytes_refuses_another_size(nbytes: int) -> None:
    with pytest.raises(IntegrityError) as caught:
        tensor_from_bytes(bytes(nbytes), TensorMeta(dtype="F32", shape=(2,)))
    assert (caught.value.kind, caught.value.expected, caught.value.found) == (
        "tensor-size",
        "8 bytes",
        f"{nbytes} bytes",
    )


@pytest.mark.parametrize(
    ("tensor", "reason"),
    [
        (torch.zeros(2).as_subclass(TaggedTensor), "TaggedTensor"),
        (torch.nn.Parameter(torch.zeros(2).as_subclass(TaggedTensor)), "TaggedTensor"),
        (torch.nn.UninitializedParameter(), "UninitializedParameter"),
        (torch.eye(2).to_sparse(), "sparse"),
        (torch.zeros(2, device="meta"), "meta"),
        (torch.zeros(2, dtype=torch.complex128), "complex128"),
    ],
)
def test_only_plain_tensors_have_bytes(tensor: torch.Tensor, reason: str) -> None:
    assert reason in str(why_not_plain(tensor))
    for function in (meta_of, host_bytes):
        with pytest.raises(UnsupportedError) as caught:
            function(tensor)
        assert caught.value.kind == "tensor-kind"
        assert reason in str(caught.value)


@pytest.mark.filterwarnings("ignore:.*quantized tensor creation functions:UserWarning")  # torch is giving them up
def test_quantized_tensor_is_not_plain() -> None:
    tensor = torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)
    assert "qint8" in str(why_not_plain(tensor))


def test_parameter_is_plain() -> None:
    assert why_not_plain(torch.nn.Parameter(torch.zeros(2))) is None
