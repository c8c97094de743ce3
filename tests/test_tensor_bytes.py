from __future__ import annotations

import pytest
import torch

from llmtailor.errors import UnsupportedError
from llmtailor.tensor_bytes import dtype_name, meta_of, torch_dtype, why_not_plain
from llmtailor.tensors import DTYPE_BITS, TensorMeta


class TaggedTensor(torch.Tensor):
    pass


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
    with pytest.raises(UnsupportedError) as caught:
        meta_of(tensor)
    assert caught.value.kind == "tensor-kind"
    assert reason in str(caught.value)


@pytest.mark.filterwarnings("ignore:.*quantized tensor creation functions:UserWarning")  # torch is giving them up
def test_quantized_tensor_is_not_plain() -> None:
    tensor = torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)
    assert "qint8" in str(why_not_plain(tensor))


def test_parameter_is_plain() -> None:
    assert why_not_plain(torch.nn.Parameter(torch.zeros(2))) is None
