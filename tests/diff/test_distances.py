"""The numbers of a tensor, against torch on whole tensors in F64, for every element type and every kind of value."""

from __future__ import annotations

import math
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diff.model_directories import FQN, diff_models, diff_tensors
from llmtailor.diff import Distance
from llmtailor.tensor_bytes import torch_dtype
from llmtailor.tensors import DTYPE_BITS

NAN, INF = math.nan, math.inf
SUMS = ("square_a", "square_b", "square_difference", "product")


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def random_bytes(dtype: str, numel: int, seed: int) -> torch.Tensor:
    """Any bits at all, NaN and infinity among them."""
    generator = torch.Generator().manual_seed(seed)
    most = 2 if dtype == "BOOL" else 256
    nbytes = numel * DTYPE_BITS[dtype] // 8
    return torch.randint(0, most, (nbytes,), dtype=torch.uint8, generator=generator).view(torch_dtype(dtype))


def test_measures_are_those_of_whole_tensors(tmp_path: Path) -> None:
    a, b = randn(50, 70, seed=1), randn(50, 70, seed=2)
    b[:10] = a[:10]
    found = diff_tensors(tmp_path, a, b)
    x, y = a.double().flatten(), b.double().flatten()
    assert found.norm_a == pytest.approx(x.norm().item(), rel=1e-14)
    assert found.norm_b == pytest.approx(y.norm().item(), rel=1e-14)
    assert found.l2 == pytest.approx((y - x).norm().item(), rel=1e-14)
    assert found.relative == pytest.approx(((y - x).norm() / x.norm()).item(), rel=1e-14)
    assert found.cosine == pytest.approx(torch.nn.functional.cosine_similarity(x, y, dim=0).item(), rel=1e-12)
    assert found.max_abs == (y - x).abs().max().item()
    assert (found.numel, found.num_equal, found.unchanged) == (3500, 700, 0.2)
    assert (found.num_unread, found.num_not_finite) == (0, 0)


def test_small_differences_of_large_numbers_are_not_lost(tmp_path: Path) -> None:
    """As a difference of sums of squares they would be."""
    a = torch.full((1000,), 1e6, dtype=torch.float64)
    b = a.clone()
    b[3] += 2**-20
    found = diff_tensors(tmp_path, a, b)
    assert found.l2 == found.max_abs == 2**-20
    assert found.num_equal == 999


def test_nan_and_infinity_are_counted_and_left_out(tmp_path: Path) -> None:
    a = torch.tensor([1.0, NAN, INF, 4.0, 5.0, -INF, NAN])
    b = torch.tensor([1.5, 2.0, INF, NAN, 5.0, INF, NAN])
    found = diff_tensors(tmp_path, a, b)
    assert (found.nan_a, found.nan_b, found.inf_a, found.inf_b) == (2, 2, 2, 2)
    assert found.num_not_finite == 8
    assert (found.l2, found.max_abs, found.norm_a) == (0.5, 0.5, math.sqrt(26))
    assert found.num_equal == 3  # infinity, 5.0 and the NaN of the same bits
    assert not found.is_equal


def test_all_nan_has_no_difference_but_is_not_equal(tmp_path: Path) -> None:
    found = diff_tensors(tmp_path, torch.ones(3), torch.full((3,), NAN))
    assert (found.relative, found.l2, found.cosine, found.is_equal) == (0.0, 0.0, None, False)


def test_something_of_nothing_is_infinite_and_nothing_of_nothing_is_zero(tmp_path: Path) -> None:
    zeros = torch.zeros(4)
    something = diff_tensors(tmp_path / "something", zeros, torch.ones(4))
    assert (something.relative, something.l2, something.cosine) == (INF, 2.0, None)
    nothing = diff_tensors(tmp_path / "nothing", zeros, zeros.clone())
    assert (nothing.relative, nothing.cosine, nothing.is_equal) == (0.0, None, True)
    gone = diff_tensors(tmp_path / "gone", torch.ones(4), zeros)
    assert (gone.relative, gone.cosine) == (1.0, None)


def test_zeros_of_either_sign_are_not_the_same_bits(tmp_path: Path) -> None:
    found = diff_tensors(tmp_path, torch.zeros(4), -torch.zeros(4))
    assert (found.relative, found.num_equal) == (0.0, 0)


@pytest.mark.parametrize("wide", [torch.float32, torch.float64], ids=str)
def test_other_types_are_compared_by_value(wide: torch.dtype, tmp_path: Path) -> None:
    a = randn(1000).bfloat16()
    a[7] = NAN
    b = a.to(wide)
    b[7] = -NAN  # another NaN
    assert diff_tensors(tmp_path / "equal", a, b).is_equal
    b[5] += 1
    found = diff_tensors(tmp_path / "other", a, b)
    assert found.num_equal == 999
    assert found.l2 == pytest.approx(1, abs=1e-6)
    assert diff_tensors(tmp_path / "back", b, a).num_equal == 999


def test_rounding_to_16_bits_is_a_difference(tmp_path: Path) -> None:
    a = randn(1000)
    found = diff_tensors(tmp_path, a, a.bfloat16())
    expected = (a.bfloat16().double() - a.double()).norm() / a.double().norm()
    assert found.relative == pytest.approx(expected.item(), rel=1e-12)
    assert 1e-4 < found.relative < 1e-2


@pytest.mark.parametrize("dtype", [name for name in DTYPE_BITS if name != "C64"])
def test_every_type_is_widened_as_torch_does(dtype: str, tmp_path: Path) -> None:
    a, b = random_bytes(dtype, 3000, seed=1), random_bytes(dtype, 3000, seed=2)
    if dtype == "F64":  # else the squares are too large
        a, b = randn(3000, seed=1).double(), randn(3000, seed=2).double()
    found = diff_tensors(tmp_path, a, b)
    x, y = a.double(), b.double()
    is_finite = x.isfinite() & y.isfinite()
    assert (found.nan_a, found.inf_b) == (int(x.isnan().sum()), int(y.isinf().sum()))
    difference = (y - x)[is_finite]
    assert found.l2 == pytest.approx(difference.norm().item(), rel=1e-12)
    assert found.max_abs == difference.abs().max().item()
    assert found.product == pytest.approx((x[is_finite] * y[is_finite]).sum().item(), rel=1e-9)
    size = DTYPE_BITS[dtype] // 8
    rows = [each.view(torch.uint8).reshape(-1, size) for each in (a, b)]
    assert found.num_equal == int((rows[0] == rows[1]).all(dim=1).sum())


def test_a_complex_number_is_two(tmp_path: Path) -> None:
    a = torch.tensor([1 + 2j, 3j], dtype=torch.complex64)
    found = diff_tensors(tmp_path, a, torch.tensor([1 + 2j, 4 + 3j], dtype=torch.complex64))
    assert (found.numel, found.num_equal, found.l2, found.norm_a) == (4, 3, 4.0, math.sqrt(14))
    (unmatched,) = diff_models(tmp_path / "real", {FQN: a}, {FQN: a.abs()}).unmatched
    assert unmatched.a is not None
    assert unmatched.a.dtype == "C64"


def test_empty_tensors_are_equal(tmp_path: Path) -> None:
    found = diff_tensors(tmp_path, torch.zeros(0, 3), torch.zeros(0, 3))
    assert (found.numel, found.unchanged, found.relative) == (0, 1.0, 0.0)


def test_numbers_too_large_to_square_are_no_error(tmp_path: Path) -> None:
    found = diff_tensors(
        tmp_path, torch.tensor([1e300], dtype=torch.float64), torch.tensor([-1e300], dtype=torch.float64)
    )
    assert (found.l2, found.cosine, found.num_not_finite, found.max_abs) == (INF, None, 0, 2e300)


def assert_alike(found: Distance, expected: Distance) -> None:
    for name in ("numel", "num_equal", "max_abs", "nan_a", "nan_b", "inf_a", "inf_b"):
        assert getattr(found, name) == getattr(expected, name), name
    scale = expected.norm_a * expected.norm_b
    for name in SUMS:
        assert getattr(found, name) == pytest.approx(getattr(expected, name), rel=1e-12, abs=1e-12 * scale), name


@given(
    chunk_nbytes=st.integers(64, 5000),
    numel=st.integers(1, 3000),
    dtypes=st.sampled_from([("F32", "F32"), ("BF16", "F32"), ("F16", "BF16"), ("I64", "F32"), ("F8_E4M3", "F8_E4M3")]),
    seed=st.integers(0, 2**30),
)
def test_the_size_of_a_chunk_does_not_matter(chunk_nbytes: int, numel: int, dtypes: tuple[str, str], seed: int) -> None:
    a, b = (random_bytes(dtype, numel, seed + number) for number, dtype in enumerate(dtypes))
    b[::3] = a[::3].to(b.dtype)
    with TemporaryDirectory() as directory:
        expected = diff_tensors(Path(directory, "whole"), a, b)
        found = diff_tensors(Path(directory, "pieces"), a, b, chunk_nbytes)
    assert_alike(found, expected)


@given(
    dtype=st.sampled_from(list(DTYPE_BITS)),
    numel=st.integers(0, 2000),
    seed=st.integers(0, 2**30),
    chunk_nbytes=st.integers(64, 5000),
)
def test_a_copy_is_identical(dtype: str, numel: int, seed: int, chunk_nbytes: int) -> None:
    values = random_bytes(dtype, numel, seed)
    with TemporaryDirectory() as directory:
        difference = diff_models(Path(directory), {FQN: values}, {FQN: values.clone()}, chunk_nbytes)
    assert difference.is_identical
    (tensor,) = difference.tensors
    assert (tensor.distance.relative, tensor.distance.max_abs, tensor.distance.num_unread) == (0.0, 0.0, 0)


def test_many_threads_give_what_one_gives(tmp_path: Path) -> None:
    a = {f"layers.{number}.up.weight": randn(30, 40, seed=number) for number in range(20)}
    b = {name: values + 0.01 for name, values in a.items()}
    many = diff_models(tmp_path / "many", a, b, 1024)
    one = diff_models(tmp_path / "one", a, b, 2**22)
    assert [tensor.fqn for tensor in many.tensors] == [tensor.fqn for tensor in one.tensors] == list(a)
    for found, expected in zip(many.tensors, one.tensors, strict=True):
        assert_alike(found.distance, expected.distance)
