"""What codes cannot stand for, or not nearly enough, is written exactly; the manifest says why."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from coded_runs import CODECS, check_errors, codec_for
from llmtailor.checkpoint import open_checkpoint
from llmtailor.checkpointer import Checkpointer
from llmtailor.load import plan_load
from llmtailor.model_state import read_model
from llmtailor.verify import verify_checkpoint
from tiny_models import assert_same
from writer.coded_trainings import (
    BLOCKS,
    CODECS_OF,
    COMPACT4,
    Q4,
    check,
    coded_layers,
    layers_of,
    load,
    new_training,
    nothing,
)
from writer.trainings import Training, state_of, write_small_file

# What codes cannot stand for


def set_weight(value: float) -> Callable[[Training], str]:
    def spoil(training: Training) -> str:
        with torch.no_grad():
            training.model.layers[0].mlp.weight[17, 31] = value
        return "layers.0.mlp.weight"

    return spoil


def set_state(leaf: str, value: float) -> Callable[[Training], str]:
    def spoil(training: Training) -> str:
        with torch.no_grad():
            training.optimizer.state[training.model.layers[0].back.weight][leaf][-1, -1] = value
        return f"state.layers.0.back.weight.{leaf}"

    return spoil


SPOILS = {
    "NaN in a weight": set_weight(torch.nan),
    "infinity in a weight": set_weight(-torch.inf),
    "huge weight": set_weight(2.0**120),
    "NaN in a first moment": set_state("exp_avg", torch.nan),
    "huge first moment": set_state("exp_avg", -3e38),
    "NaN in a second moment": set_state("exp_avg_sq", torch.nan),
    "infinity in a second moment": set_state("exp_avg_sq", torch.inf),
    "negative second moment": set_state("exp_avg_sq", -1e-30),
    "huge second moment": set_state("exp_avg_sq", 2.0**121),
}


@pytest.mark.parametrize(
    "rest",
    [
        "q8",
        "compact",
        pytest.param(Q4, marks=pytest.mark.slow, id="q4"),
        pytest.param(COMPACT4, marks=pytest.mark.slow, id="compact4"),
    ],
)
def test_a_tensor_that_codes_cannot_stand_for_stays_exact_and_all_else_is_coded(
    fast_directory: Path, rest: str
) -> None:
    """``check`` works out the codec of every tensor by its values."""
    for index, (name, spoil) in enumerate(SPOILS.items()):
        # With momentum of the next step all would be spoiled: each has a run of its own.
        training = new_training(fast_directory / str(index), rest=rest, strategy=nothing)
        training.train()
        training.save().result()
        training.train()
        key = spoil(training)
        path = training.save().result()
        assert coded_layers(path) == set(BLOCKS), name
        live = training.states[2]
        assert codec_for(key, live[key], CODECS_OF[rest]) == "exact"
        expected = check(training, path, CODECS_OF[rest])
        loaded = load(training, path)
        assert_same(loaded, expected)
        assert_same({key: loaded[key]}, {key: live[key]})
        check_errors(open_checkpoint(path).manifest, loaded, training.states)
        training.close()


def test_the_largest_value_that_codes_are_for_is_coded(fast_directory: Path) -> None:
    training = new_training(fast_directory, strategy=nothing)
    training.train()
    training.save().result()
    training.train()
    set_state("exp_avg_sq", 2.0**119)(training)
    key = set_state("exp_avg", -(2.0**119))(training)
    path = training.save().result()
    assert codec_for(key, training.states[2][key], CODECS["q8"]) == "int8"
    assert_same(load(training, path), check(training, path))
    training.close()


@pytest.mark.parametrize("rest", ["q8", "compact"])
def test_weights_that_are_all_no_numbers_are_saved_as_they_are(fast_directory: Path, rest: str) -> None:
    training = new_training(fast_directory, rest=rest, strategy=nothing)
    training.train()
    training.save().result()
    training.train()
    with torch.no_grad():
        for parameter in training.model.parameters():
            parameter.fill_(torch.nan)
        for buffer in training.model.buffers():
            buffer.fill_(2 if buffer.dtype is torch.int64 else torch.nan)
    path = training.save().result()
    assert coded_layers(path) == set(BLOCKS)
    assert_same(load(training, path), check(training, path))
    training.close()


# Exactly instead, and why


def codes(**limits: float) -> str:
    return f"codes(weights=delta8, first=int8, second=log8, {', '.join(f'{k}={v}' for k, v in limits.items())})"


@pytest.mark.parametrize("component", ["weights", "first", "second"])
def test_above_its_limit_a_layer_is_written_exactly(fast_directory: Path, component: str) -> None:
    training = new_training(fast_directory, rest=codes(**{f"{component}_limit": 1e-7}))
    for _ in range(3):
        training.train()
        training.save().result()
    for step, handle in enumerate(training.handles[1:], start=2):
        assert handle.stats is not None
        assert handle.stats.num_layers_coded == 0
        check(training, handle.result())
        layers = layers_of(handle.result())
        chosen = {f"layers.{index}" for index in ((1, 3) if step % 2 == 0 else (0, 2))}
        for name in BLOCKS:
            assert layers[name].step == step
            assert layers[name].encoding is None
            assert layers[name].reason == ("strategy" if name in chosen else "error limit")
            assert layers[name].update_count == step
    training.close()


@pytest.mark.parametrize("rest", ["codes(weights=tail4, first=int4, second=log4, weights_limit=1e-9)", codes()])
def test_limits_are_of_each_layer(fast_directory: Path, rest: str) -> None:
    """With one block far from its last exact files, the others are coded all the same."""
    if "tail4" not in rest:
        rest = codes(weights_limit=1e-3)
    training = new_training(fast_directory, rest=rest, strategy=nothing)
    training.model.eval()  # buffers stay what they are
    training.train()
    training.save().result()
    training.train()
    with torch.no_grad():
        if "tail4" in rest:  # what is a BF16 number loses nothing
            for index in (0, 2, 3):
                for parameter in training.model.layers[index].parameters():
                    parameter.copy_(parameter.bfloat16())
        else:
            training.model.layers[1].mlp.weight.mul_(-3)
    path = training.save().result()
    reasons = {name: layer.reason for name, layer in layers_of(path).items() if name in BLOCKS}
    assert reasons == {"layers.0": "coded", "layers.1": "error limit", "layers.2": "coded", "layers.3": "coded"}
    check(training, path, ("tail4", "int4", "log4") if "tail4" in rest else CODECS["q8"])
    training.close()


def test_a_limit_of_nothing_takes_what_is_exact(fast_directory: Path) -> None:
    """Weights that did not change since their exact file."""
    training = new_training(fast_directory, rest=codes(weights_limit=0), strategy=nothing)
    training.train()
    training.save().result()
    training.step += 1
    path = training.save().result()
    assert coded_layers(path) == set(BLOCKS)
    check(training, path, CODECS["q8"])
    training.close()


def test_layers_that_codes_would_hardly_make_smaller_are_written_exactly(fast_directory: Path) -> None:
    training = new_training(fast_directory, strategy=nothing)
    for _ in range(2):
        training.train()
        training.save().result()
    layers = layers_of(training.handles[-1].result())
    assert {name: layer.reason for name, layer in layers.items()} == {
        **dict.fromkeys(("embed_tokens", "norm", "lm_head"), "no gain"),
        **dict.fromkeys(BLOCKS, "coded"),
    }
    assert all(layers[name].step == 2 for name in ("embed_tokens", "norm", "lm_head"))
    training.close()


@pytest.mark.parametrize("rest", ["q8", "compact"])
def test_weights_that_are_named_like_optimizer_state_are_written_exactly(fast_directory: Path, rest: str) -> None:
    """In a codes file they could not be told apart."""

    def build() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        model = torch.nn.ModuleDict({"state": torch.nn.Linear(80, 80), "out": torch.nn.Linear(80, 80)})
        model["state"].register_module("exp_avg", torch.nn.Linear(80, 80))
        return model, torch.optim.AdamW(model.parameters(), lr=1e-2)

    model, optimizer = build()
    saver = Checkpointer(fast_directory / "run", rest=rest, strategy=nothing)
    states = {}
    for step in range(2):
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        states[step] = state_of(model, optimizer)
        path = saver.save(step, model, [optimizer], write_small_file).result()
    saver.close()
    assert {name: layer.reason for name, layer in layers_of(path).items()} == {
        "state": "no gain",
        "out": "coded",
        "state.exp_avg": "no gain",
    }
    assert verify_checkpoint(path).is_good
    fresh, again = build()
    plan_load(open_checkpoint(path), read_model(fresh), [again]).fill()
    loaded = {key: value for key, value in state_of(fresh, again).items() if "out" not in key}
    assert_same(loaded, {key: states[1][key] for key in loaded})
