"""Fused kernels make the codes that the reference makes, and where they cannot be had the reference is used."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch

from coded_tensors import CODECS_AND_DTYPES, TORCH_DTYPES, Coded, bits_of, encode, numbers, widen
from llmtailor.codecs.encoding import KERNELS
from llmtailor.codecs.kernels import KernelKey, Kernels

CPU = torch.device("cpu")
ENOUGH = 2**24
"""Elements from which on it pays to compile."""
STRIP = 2**17
SHORT_STRIP = 2**15
SHORTEST = 2**14
"""Elements from which on a fused kernel is used."""
KEY: KernelKey = ("int8", torch.float32, CPU)


def compiles(test: Callable[..., None]) -> Callable[..., None]:
    """Marks a test that calls a compiler."""
    for mark in (
        pytest.mark.slow,
        pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler"),
        # torch 2.13 imports torch.utils.mkldnn, which warns of itself.
        pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
    ):
        test = mark(test)
    return test


def spread(seed: int, low: float, high: float) -> torch.Tensor:
    """Numbers of either sign with all exponents in between."""
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand(STRIP, generator=generator)
    sign = torch.where(torch.rand(STRIP, generator=generator) < 0.5, -1.0, 1.0)
    return sign * torch.exp2(uniform * (high - low) + low)


def make_strips(codec: str, dtype: str) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
    """Whole strips, and what they are relative to."""
    normal = torch.randn(STRIP, generator=torch.Generator().manual_seed(3))
    heavy = normal * (2 * normal.roll(1)).exp()
    wide = spread(1, -24, 15) if dtype == "F16" else spread(1, -140, 110)
    strips = [normal, heavy.clamp(-6e4, 6e4), wide, torch.where(normal < 0.3, 0.0, normal), torch.full((STRIP,), -0.0)]
    # Whole numbers over a power of two: half of them are ties.
    strips.append(torch.arange(STRIP) % 509 / 2.0)
    if codec.startswith("log"):
        strips = [strip.abs() for strip in strips[:-2]] + strips[-2:]
    strips = [strip.to(TORCH_DTYPES[dtype]) for strip in strips]
    if codec.startswith("delta"):
        return [(strip, strip + 1e-3 * strip.roll(7)) for strip in strips] + [(normal, normal.bfloat16().float())]
    return [(strip, None) for strip in strips]


def fuse(codec: str, dtype: str, device: torch.device = CPU) -> Kernels:
    kernels = Kernels()
    kernels.compile([(codec, TORCH_DTYPES[dtype], device)], ENOUGH)
    return kernels


def check_same(fused: Coded, reference: Coded, values: torch.Tensor) -> None:
    """The same arrays, but for codes of ties."""
    for name, array in reference.arrays.items():
        assert name == "codes" or (fused.arrays[name] == array).all(), name
    one, other = (widen(each.decode("F32"), "F32") for each in (fused, reference))
    true = numbers(values)
    if reference.codec.startswith("log"):
        assert ((one == 0) == (other == 0)).all()
        one, other, true = bits_of(one), bits_of(other), bits_of(true)
    differ = one != other
    assert differ.mean() < 1e-3
    step, errors = np.abs(one - other)[differ], [np.abs(each - true)[differ] for each in (one, other)]
    assert (np.abs(errors[0] - errors[1]) <= 1e-3 * step).all()
    assert (np.maximum(*errors) <= 0.51 * step).all()
    assert fused.measures.tolist() == pytest.approx(reference.measures.tolist(), rel=1e-4, abs=0)


@compiles
@pytest.mark.parametrize(("codec", "dtype"), CODECS_AND_DTYPES)
def test_fused_kernels_are_like_the_reference(codec: str, dtype: str, caplog: pytest.LogCaptureFixture) -> None:
    kernels = fuse(codec, dtype)
    assert kernels.are_fused, caplog.text
    for values, base in make_strips(codec, dtype):
        kernel = kernels.get(codec, values)
        assert kernel is not KERNELS[codec]
        check_same(encode(codec, values, base, kernel), encode(codec, values, base), values)


@compiles
@pytest.mark.parametrize(("codec", "dtype"), CODECS_AND_DTYPES)
def test_fused_kernels_measure_what_codes_cannot_stand_for(codec: str, dtype: str) -> None:
    kernels = fuse(codec, dtype)
    for bad in (np.nan, np.inf, -np.inf, *([-1.0] if codec.startswith("log") else [])):
        values = torch.ones(STRIP).to(TORCH_DTYPES[dtype])
        values[-70] = bad
        base = torch.ones(STRIP) if codec.startswith("delta") else None
        coded = encode(codec, values, base, kernels.get(codec, values))
        assert not coded.measures.isfinite().all(), bad


@compiles
@pytest.mark.parametrize(("codec", "dtype"), CODECS_AND_DTYPES)
def test_fused_kernels_are_not_compiled_again_while_training(codec: str, dtype: str) -> None:
    kernels = fuse(codec, dtype)
    whole = torch.ones(STRIP, dtype=TORCH_DTYPES[dtype])
    with torch.compiler.set_stance("fail_on_recompile"), ThreadPoolExecutor(1) as capture, torch.no_grad():
        for part in (slice(STRIP), slice(STRIP - 448), slice(SHORTEST), slice(64, SHORTEST + 71), slice(1, STRIP - 62)):
            values = whole[part]
            for each in (values, torch.nn.Parameter(values).view(-1)):
                base = values.clone() if codec.startswith("delta") else None
                capture.submit(torch.no_grad()(encode), codec, each, base, kernels.get(codec, each)).result()


@compiles
@pytest.mark.parametrize("codec", ["int8", "int4", "log8", "log4"])
def test_fused_kernels_measure_what_f16_cannot_hold(codec: str) -> None:
    values = torch.tensor([65504.0, 1e-3, 0.3, 60000.0] * (STRIP // 4)).half()
    assert not encode(codec, values, None, fuse(codec, "F16").get(codec, values)).measures.isfinite().all()


def test_the_check_sees_codes_that_are_no_ties() -> None:
    values, _ = make_strips("int8", "F32")[0]
    good, bad = encode("int8", values), encode("int8", values)
    check_same(bad, good, values)
    bad.arrays["codes"][5] += 1 if bad.arrays["codes"][5] < 0 else -1
    with pytest.raises(AssertionError):
        check_same(bad, good, values)


@pytest.mark.gpu
@compiles
@pytest.mark.parametrize(("codec", "dtype"), CODECS_AND_DTYPES)
def test_fused_kernels_on_a_gpu_are_like_the_reference(
    codec: str, dtype: str, caplog: pytest.LogCaptureFixture
) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    kernels = fuse(codec, dtype, device)
    assert kernels.are_fused, caplog.text

    def kernel(values: torch.Tensor, base: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        values = values.to(device)
        found = kernels.get(codec, values)
        assert found is not KERNELS[codec]
        return tuple(each.cpu() for each in found(values, None if base is None else base.to(device)))

    for values, base in make_strips(codec, dtype):
        check_same(encode(codec, values, base, kernel), encode(codec, values, base), values)


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[Callable[..., Any]]:
    """What was given to ``torch.compile``, which returns it as it is."""
    given: list[Callable[..., Any]] = []

    def take(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        given.append(function)
        return lambda *args: function(*args)

    monkeypatch.setattr(torch, "compile", take)
    return given


@pytest.mark.usefixtures("compiled")
def test_long_strips_take_the_fused_kernel_and_others_the_reference() -> None:
    kernels = Kernels()
    kernels.compile([KEY], ENOUGH)
    assert kernels.are_fused
    assert kernels.strip_numel(CPU) == STRIP
    assert kernels.get("int8", torch.ones(STRIP)) is not KERNELS["int8"]
    assert kernels.get("int8", torch.ones(SHORTEST)) is not KERNELS["int8"]
    assert kernels.get("int8", torch.ones(SHORTEST - 64)) is KERNELS["int8"]
    assert kernels.get("int8", torch.ones(STRIP).bfloat16()) is KERNELS["int8"]
    assert kernels.get("int4", torch.ones(STRIP)) is KERNELS["int4"]


def test_each_kernel_is_compiled_once(compiled: list[Callable[..., Any]]) -> None:
    kernels = Kernels()
    kernels.compile([KEY, ("log8", torch.bfloat16, CPU), KEY], ENOUGH)
    assert sorted(map(id, compiled)) == sorted(map(id, (KERNELS["int8"], KERNELS["log8"])))
    kernels.compile([("int4", torch.float32, CPU)], ENOUGH)
    assert len(compiled) == 2


@pytest.mark.parametrize(("capability", "codecs"), [("AVX512", {"log8", "log4", "tail8", "tail4"}), ("AVX2", set())])
def test_bits_go_through_the_stack_in_vectors_that_come_back_at_once(
    monkeypatch: pytest.MonkeyPatch, capability: str, codecs: set[str]
) -> None:
    narrow: set[int] = set()

    def take(function: Callable[..., Any], *, fullgraph: bool, options: dict[str, Any]) -> Callable[..., Any]:
        assert options.pop("cpp.threads") == 1
        if options:
            assert options == {"cpp.simdlen": 256}
            narrow.add(id(function))
        return lambda *args: function(*args)

    monkeypatch.setattr(torch, "compile", take)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    Kernels().compile([(codec, torch.float32, CPU) for codec in KERNELS], ENOUGH)
    assert narrow == {id(KERNELS[codec]) for codec in codecs}


def test_little_is_not_worth_a_compilation(
    compiled: list[Callable[..., Any]], caplog: pytest.LogCaptureFixture
) -> None:
    kernels = Kernels()
    kernels.compile([KEY], ENOUGH - 1)
    # Once decided it stays so: a run does not stop later for a compiler.
    kernels.compile([KEY], ENOUGH)
    assert not compiled
    assert not kernels.are_fused
    assert kernels.strip_numel(CPU) == SHORT_STRIP
    assert kernels.get("int8", torch.ones(STRIP)) is KERNELS["int8"]
    assert not caplog.records


def fail(*args: object, **options: object) -> torch.Tensor:
    raise RuntimeError("no compiler\nand much more")


def fail_as_a_backend(*args: object, **options: object) -> torch.Tensor:
    raise torch._dynamo.exc.BackendCompilerFailed(print, RuntimeError("no compiler\nand much more"), None)


@pytest.mark.parametrize(
    "compile",
    [fail, fail_as_a_backend, lambda *args, **options: fail],
    ids=["at once", "in a backend", "when called"],
)
def test_a_compiler_that_fails_is_told_of_and_done_without(
    compile: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch, "compile", compile)
    kernels = Kernels()
    kernels.compile([KEY], ENOUGH)
    kernels.compile([KEY], ENOUGH)
    assert [(record.levelno, record.getMessage()) for record in caplog.records] == [
        (logging.WARNING, "codes are made without torch.compile, which is slower: no compiler")
    ]
    assert not kernels.are_fused
    assert kernels.strip_numel(CPU) == SHORT_STRIP
    assert kernels.get("int8", torch.ones(STRIP)) is KERNELS["int8"]


def test_one_kernel_that_fails_is_enough_to_do_without(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **options: fail if function is KERNELS["log8"] else function)
    kernels = Kernels()
    kernels.compile([KEY, ("log8", torch.float32, CPU)], ENOUGH)
    assert not kernels.are_fused
    assert len(caplog.records) == 1
