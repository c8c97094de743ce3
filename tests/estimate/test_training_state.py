"""What optimizers keep of a parameter, in bytes, and against those that torch has."""

from __future__ import annotations

import pytest
import torch

from llmtailor.errors import InvalidInputError
from llmtailor.estimate import OPTIMIZERS, PRECISIONS, Training
from llmtailor.layers import LayerKind
from llmtailor.tensors import TensorMeta

MATRIX = TensorMeta(dtype="F32", shape=(256, 512))
VECTOR = TensorMeta(dtype="F32", shape=(512,))


def bytes_per_parameter(training: Training, meta: TensorMeta = MATRIX, kind: LayerKind = LayerKind.BLOCK) -> float:
    leaves = training.state(meta, kind)
    # Counters are not of a parameter.
    state = sum(leaf.nbytes for name, leaf in leaves.items() if name != "step")
    return (training.weight(meta).nbytes + state) / meta.numel


@pytest.mark.parametrize(("precision", "expected"), [("bf16-mixed", 14), ("fp16-mixed", 14), ("fp32", 12), ("bf16", 6)])
def test_adamw_takes_the_bytes_everybody_knows(precision: str, expected: int) -> None:
    assert bytes_per_parameter(Training(precision=precision)) == expected


@pytest.mark.parametrize(
    ("optimizer", "expected"),
    [
        ("adam", 12),
        ("sgd", 4),
        ("sgd-momentum", 8),
        ("lion", 8),
        ("adafactor", 4 + 4 * (256 + 512) / (256 * 512)),
        ("muon", 8),
        ("adamw8bit", 4 + 2 + 2 * 4 / 256 + 2 * 4 * 256 / (256 * 512)),
        ("none", 4),
    ],
)
def test_optimizers_differ_in_fp32(optimizer: str, expected: float) -> None:
    assert bytes_per_parameter(Training(optimizer=optimizer, precision="fp32")) == expected


def test_every_optimizer_and_precision_is_tried_here() -> None:
    assert {*OPTIMIZERS} == {
        *("adamw", "adam", "sgd", "sgd-momentum", "lion", "adafactor", "muon", "adamw8bit", "none")
    }
    assert {*PRECISIONS} == {"bf16-mixed", "fp16-mixed", "fp32", "bf16"}


def test_muon_has_momentum_of_the_matrices_of_blocks_alone() -> None:
    muon = Training(optimizer="muon", precision="fp32")
    assert {*muon.state(MATRIX, LayerKind.BLOCK)} == {"momentum_buffer"}
    for meta, kind in ((VECTOR, LayerKind.BLOCK), (MATRIX, LayerKind.EMBEDDING), (MATRIX, LayerKind.HEAD)):
        assert {*muon.state(meta, kind)} == {"step", "exp_avg", "exp_avg_sq"}


def test_muon_of_torch_keeps_the_same() -> None:
    parameter = torch.nn.Parameter(torch.ones(8, 4))
    optimizer = torch.optim.Muon([parameter])
    parameter.grad = torch.ones(8, 4)
    optimizer.step()
    real = {leaf: tuple(value.shape) for leaf, value in optimizer.state[parameter].items()}
    meta = TensorMeta(dtype="F32", shape=(8, 4))
    estimated = Training(optimizer="muon", precision="fp32").state(meta, LayerKind.BLOCK)
    assert {leaf: each.shape for leaf, each in estimated.items()} == real


def test_adafactor_keeps_variances_of_vectors_whole() -> None:
    adafactor = Training(optimizer="adafactor", precision="fp32")
    assert adafactor.state(VECTOR, LayerKind.BLOCK)["variance"] == VECTOR
    stack = adafactor.state(TensorMeta(dtype="F32", shape=(3, 5, 7)), LayerKind.BLOCK)
    assert (stack["row_var"].shape, stack["col_var"].shape) == ((3, 5, 1), (3, 1, 7))


def test_8_bit_state_of_small_tensors_is_exact() -> None:
    small = Training(optimizer="adamw8bit", precision="fp32").state(VECTOR, LayerKind.BLOCK)
    assert {leaf: each.dtype for leaf, each in small.items()} == {"step": "I64", "state1": "F32", "state2": "F32"}


def test_weights_alone_have_no_masters() -> None:
    assert Training(optimizer="none").state(MATRIX, LayerKind.BLOCK) == {}


def test_what_is_no_float_stays_as_it_is() -> None:
    ids = TensorMeta(dtype="I64", shape=(4,))
    assert Training().weight(ids) == ids
    assert Training().state(ids, LayerKind.OTHER) == {}


@pytest.mark.parametrize(
    ("wrong", "kind", "hint"),
    [
        ({"optimizer": "adamW"}, "unknown-optimizer", "did you mean adamw?"),
        ({"precision": "bf16_mixed"}, "unknown-precision", "did you mean bf16-mixed?"),
    ],
)
def test_unknown_words_are_refused(wrong: dict[str, str], kind: str, hint: str) -> None:
    with pytest.raises(InvalidInputError) as caught:
        Training(**wrong)  # type: ignore[arg-type]
    assert (caught.value.kind, caught.value.hint) == (kind, hint)


def test_a_glob_of_no_parameter_is_refused() -> None:
    training = Training(trainable=("layers.0.*", "layer.1.*"))
    training.check_globs(["layers.0.up", "layer.1.up"])
    with pytest.raises(InvalidInputError) as caught:
        training.check_globs(["layers.0.up", "layers.1.up"])
    assert (caught.value.kind, caught.value.found) == ("trainable", "'layer.1.*'")
