"""Estimates against the files of real checkpoints: the layouts are the same, so the sizes are."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from estimate.real_runs import MODELS, build, layer_nbytes, tensors_of, train
from llmtailor.codecs import Rest, parse_rest
from llmtailor.errors import InvalidInputError
from llmtailor.estimate import LayerSize, ModelTensors, Training, measure_layers, read_model_tensors
from llmtailor.estimate.sizes import code_layer
from llmtailor.layers import map_names
from llmtailor.tensors import TensorMeta
from llmtailor.writer import coded_images, find_masters, optimizer_image, weights_image
from llmtailor.writer.images import LayerImage
from master_adamw import MasterAdamW

FP32 = Training(precision="fp32")


def exact_nbytes(layers: Iterable[LayerSize]) -> dict[str, int]:
    return {layer.name: layer.exact_nbytes for layer in layers}


@pytest.mark.parametrize("name", MODELS)
def test_files_are_as_large_as_those_of_a_real_checkpoint(name: str, tmp_path: Path) -> None:
    (manifest,) = train(tmp_path / "run", build(name), num_saves=1)
    assert exact_nbytes(measure_layers(tensors_of(name, tmp_path), FP32)) == layer_nbytes(manifest)
    whole = sum(file.bytes for layer in manifest.layers for file in layer.files)
    assert manifest.nbytes == pytest.approx(whole, rel=0.05)  # small files are all that is not counted


@pytest.mark.parametrize(
    ("optimizer", "make"),
    [
        ("adam", torch.optim.Adam),
        ("sgd", partial(torch.optim.SGD, lr=0.1)),
        ("sgd-momentum", partial(torch.optim.SGD, lr=0.1, momentum=0.9)),
        ("adafactor", torch.optim.Adafactor),
    ],
)
def test_optimizers_of_torch_keep_what_is_estimated(optimizer: str, make: Callable[..., Any], tmp_path: Path) -> None:
    (manifest,) = train(tmp_path / "run", build("llama"), make, num_saves=1)
    layers = measure_layers(tensors_of("llama", tmp_path), Training(optimizer=optimizer, precision="fp32"))
    assert exact_nbytes(layers) == layer_nbytes(manifest)


def test_pure_bf16_keeps_its_moments_in_bf16(tmp_path: Path) -> None:
    (manifest,) = train(tmp_path / "run", build("llama").bfloat16(), num_saves=1)
    layers = measure_layers(tensors_of("llama", tmp_path), Training(precision="bf16"))
    assert exact_nbytes(layers) == layer_nbytes(manifest)


def test_masters_in_whole_files_are_packed(tmp_path: Path) -> None:
    make = partial(MasterAdamW, leaf="master")
    (manifest,) = train(tmp_path / "run", build("llama").bfloat16(), make, num_saves=1)
    layers = measure_layers(tensors_of("llama", tmp_path), Training(), packs_masters=True)
    found, real = sum(exact_nbytes(layers).values()), sum(layer_nbytes(manifest).values())
    assert found == pytest.approx(real, rel=0.01)
    assert found < 0.9 * sum(exact_nbytes(measure_layers(tensors_of("llama", tmp_path), Training())).values())


def test_frozen_parameters_are_weights_alone(tmp_path: Path) -> None:
    model = build("llama")
    for fqn, parameter in model.named_parameters():
        parameter.requires_grad_(".layers.3." in fqn)
    (manifest,) = train(tmp_path / "run", model, num_saves=1)
    training = Training(precision="fp32", trainable=("*.layers.3.*",))
    layers = measure_layers(tensors_of("llama", tmp_path), training)
    assert exact_nbytes(layers) == layer_nbytes(manifest)
    assert [layer.name for layer in layers if layer.numel] == ["layers.3"]


def test_a_checkpoint_says_what_it_holds_itself(tmp_path: Path) -> None:
    (manifest,) = train(tmp_path / "run", build("gpt2"), partial(torch.optim.SGD, lr=0.1, momentum=0.9), num_saves=1)
    model = read_model_tensors(str(tmp_path / "run" / "checkpoint-1"))
    assert exact_nbytes(measure_layers(model, None)) == layer_nbytes(manifest)
    # What is said of the training goes before what the checkpoint has.
    with_adam = sum(exact_nbytes(measure_layers(model, FP32)).values())
    assert with_adam > 1.4 * sum(layer_nbytes(manifest).values())


def test_parts_of_ranks_are_the_whole_and_a_header_each(tmp_path: Path) -> None:
    model = tensors_of("llama", tmp_path)
    alone, shared = measure_layers(model, FP32), measure_layers(model, FP32, ranks=4)
    for one, four in zip(alone, shared, strict=True):
        headers = one.exact_nbytes - one.nbytes
        assert four.exact_nbytes == one.nbytes + 4 * headers
        assert four.rank_nbytes == pytest.approx(one.nbytes / 4 + headers, abs=2)
        assert four.nbytes == one.nbytes
    with pytest.raises(InvalidInputError) as caught:
        measure_layers(model, FP32, ranks=0)
    assert caught.value.kind == "ranks"


# Codes


def image_of(weights: dict[str, torch.Tensor], state: dict[str, torch.Tensor]) -> LayerImage:
    files = weights_image("layers.000", weights), optimizer_image("layers.000", state, {})
    return LayerImage(layer="layers.0", weights=files[0], optimizer=files[1], masters=find_masters(*files))


def metas(tensors: dict[str, torch.Tensor]) -> dict[str, TensorMeta]:
    names = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64"}
    return {key: TensorMeta(dtype=names[value.dtype], shape=tuple(value.shape)) for key, value in tensors.items()}


def layer_tensors(
    dtype: torch.dtype, *, has_masters: bool, width: int = 80
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    weights = {"layers.0.up.weight": torch.zeros(width, width, dtype=dtype), "layers.0.norm.weight": torch.zeros(width)}
    state = {f"state.{fqn}.{leaf}": torch.zeros(weights[fqn].shape) for fqn in weights for leaf in ("exp_avg", "sum")}
    state |= {f"state.{fqn}.step": torch.zeros(()) for fqn in weights}
    masters = {"state.layers.0.up.weight.master": torch.zeros(width, width)} if has_masters else {}
    return weights, state | masters


PRESETS = ("q8", "q4", "compact", "compact4")


def rest_of(text: str) -> Rest:
    rest = parse_rest(text)
    assert rest is not None
    return rest


@pytest.mark.parametrize("rest", PRESETS)
@pytest.mark.parametrize(
    ("dtype", "has_masters"),
    [(torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True), (torch.float16, True)],
)
def test_codes_are_those_the_writer_plans(rest: str, dtype: torch.dtype, has_masters: bool) -> None:
    weights, state = layer_tensors(dtype, has_masters=has_masters)
    planned = coded_images.code_layer(image_of(weights, state), rest_of(rest))
    assert planned is not None
    assert code_layer(metas(weights), metas(state), rest_of(rest)) == planned.codes


@pytest.mark.parametrize("rest", [*PRESETS, "codes(weights=exact, first=exact, second=log8)"])
@pytest.mark.parametrize("width", [8, 63, 64, 65, 90])
def test_codes_are_left_out_where_the_writer_sees_no_gain(rest: str, width: int) -> None:
    weights, state = layer_tensors(torch.float32, has_masters=False, width=width)
    planned = coded_images.code_layer(image_of(weights, state), rest_of(rest))
    model = ModelTensors(
        name="made up",
        origin="this test",
        layers=map_names({fqn: meta.shape for fqn, meta in metas(weights).items()}),
        tensors=metas(weights),
        buffers=frozenset(),
        state={fqn: {leaf: metas(state)[f"state.{fqn}.{leaf}"] for leaf in ("exp_avg", "sum")} for fqn in weights},
    )
    (layer,) = measure_layers(model, None, rest=rest_of(rest))
    assert (layer.coded is None) == (planned is None)
    if layer.coded is not None and planned is not None:
        assert layer.coded.nbytes == pytest.approx(planned.nbytes, abs=2 * 4096)


@pytest.mark.parametrize("rest", PRESETS)
@pytest.mark.parametrize(("name", "precision"), [("fp32", "fp32"), ("bf16_with_fp32_masters", "bf16-mixed")])
def test_codes_take_the_bytes_that_were_measured(rest: str, name: str, precision: str) -> None:
    root = Path(__file__).parent.parent.parent
    rows = json.loads((root / "benchmarks" / "results" / "coded_bytes.json").read_text())["rows"]
    width = rows["hidden_size"]
    shapes = {"embed_tokens.weight": (8192, width), "lm_head.weight": (8192, width)}
    for block in range(18):
        for leaf in ("q_proj", "o_proj"):
            shapes[f"layers.{block}.attn.{leaf}.weight"] = (width, width)
        for leaf in ("k_proj", "v_proj"):
            shapes[f"layers.{block}.attn.{leaf}.weight"] = (width // 4, width)
        for leaf in ("gate_proj", "up_proj", "down_proj"):
            shapes[f"layers.{block}.mlp.{leaf}.weight"] = (width * 7 // 2, width)
        shapes[f"layers.{block}.input_layernorm.weight"] = shapes[f"layers.{block}.post_layernorm.weight"] = (width,)
    shapes["norm.weight"] = (width,)
    model = ModelTensors(
        name="the benchmark's",
        origin="this test",
        layers=map_names(shapes),
        tensors={fqn: TensorMeta(dtype="F32", shape=shape) for fqn, shape in shapes.items()},
        buffers=frozenset(),
        state=None,
    )
    assert model.num_parameters == rows["parameters"]
    layers = measure_layers(model, Training(precision=precision), rest=rest_of(rest), packs_masters=True)
    coded = [(layer.coded.nbytes, layer.numel) for layer in layers if layer.coded is not None]
    found = sum(nbytes for nbytes, _ in coded) / sum(numel for _, numel in coded)
    assert found == pytest.approx(rows[name][rest]["codes_bytes_per_parameter"], rel=0.02)
