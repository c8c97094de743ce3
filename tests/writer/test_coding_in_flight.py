"""Codes of several saves in flight: each is relative to what is there when it is written."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from llmtailor.checkpoint import open_checkpoint
from llmtailor.checkpointer import Checkpointer
from llmtailor.errors import SaveFailedWarning, WriteError
from llmtailor.writer.handle import SaveHandle
from tiny_models import assert_same
from writer.coded_trainings import (
    BLOCKS,
    EXACT_WEIGHTS,
    check,
    coded_layers,
    layers_of,
    load,
    new_training,
    nothing,
)
from writer.trainings import Gate, Training


def follow(training: Training, **options: Any) -> Checkpointer:
    """The same training under a run with other options, from its newest checkpoint on."""
    training.checkpointer.close()
    training.checkpointer = Checkpointer(training.directory, **options)
    training.checkpointer.begin(open_checkpoint(training.handles[-1].result()))
    return training.checkpointer


@pytest.mark.parametrize("max_in_flight", [1, 3])
def test_after_rounded_weights_a_layer_is_written_exactly_and_then_coded_again(
    fast_directory: Path, max_in_flight: int
) -> None:
    training = new_training(fast_directory, rest="compact", strategy=nothing)
    for _ in range(2):
        training.train()
        training.save().result()
    assert coded_layers(training.handles[-1].result()) == set(BLOCKS)
    follow(training, rest="q8", strategy=nothing, max_in_flight=max_in_flight)
    for _ in range(3):
        training.train()
        training.save()
    reasons = []
    for handle in training.handles[2:]:
        check(training, handle.result())
        layers = layers_of(handle.result())
        reasons.append({layers[name].reason for name in BLOCKS})
    assert reasons == [{"no base"}, {"coded"}, {"coded"}]
    # The bases of the last are those that were written since.
    assert {layers[name].step for name in BLOCKS} == {3}
    training.close()


def test_weights_that_are_exact_beside_codes_of_the_state_alone_are_a_base(fast_directory: Path) -> None:
    """Codes of no weights leave an exact weights file of their own step; there is no optimizer file then."""
    training = new_training(fast_directory, rest=EXACT_WEIGHTS, strategy=nothing)
    for _ in range(2):
        training.train()
        training.save().result()
    follow(training, rest="q8", strategy=nothing)
    training.train()
    path = training.save().result()
    layers = layers_of(path)
    assert {(layers[name].reason, layers[name].step, layers[name].optimizer) for name in BLOCKS} == {("coded", 2, None)}
    assert_same(load(training, path), check(training, path))
    training.close()


@pytest.fixture
def _third_step_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """Step 3 cannot be saved, as its commit finds out."""
    advance = SaveHandle.advance

    def refuse(handle: SaveHandle, state: Any) -> None:
        if handle.step == 3 and state == "written":
            raise WriteError("no", kind="io")
        advance(handle, state)

    monkeypatch.setattr(SaveHandle, "advance", refuse)


def save_twice_in_flight(training: Training, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Plan two saves before the first of them is captured, which then fails; the path of the second."""
    with monkeypatch.context() as patch:
        gate = Gate(patch)
        failed = training.save()
        training.step += 1
        last = training.save()
        gate.wait_until_reached()
        gate.open()
        path = last.result()
    with pytest.raises(WriteError):
        failed.result()
    with pytest.warns(SaveFailedWarning, match="checkpoint-3 was not saved"):
        training.checkpointer.collect()
    return path


@pytest.mark.usefixtures("_third_step_fails")
def test_a_save_planned_on_one_that_fails_is_relative_to_the_one_before(
    fast_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = new_training(fast_directory, options={"max_in_flight": 2})
    for _ in range(2):
        training.train()
        training.save().result()
    training.train()
    path = save_twice_in_flight(training, monkeypatch)
    # Save 3 was to write blocks 0 and 2; their newest exact files are of step 1 again.
    steps = {name: layer.step for name, layer in layers_of(path).items() if name in BLOCKS}
    assert steps == {"layers.0": 1, "layers.1": 4, "layers.2": 1, "layers.3": 4}
    check(training, path)
    training.close()


@pytest.mark.usefixtures("_third_step_fails")
def test_a_save_planned_on_exact_weights_that_fail_is_exact_where_those_before_are_rounded(
    fast_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks that were to be coded have nothing that codes could be relative to."""
    training = new_training(fast_directory, rest="compact", strategy=nothing)
    for _ in range(2):
        training.train()
        training.save().result()
    follow(training, rest="q8", strategy=nothing, max_in_flight=2)
    training.train()
    path = save_twice_in_flight(training, monkeypatch)
    assert {layers_of(path)[name].reason for name in BLOCKS} == {"no base"}
    check(training, path)
    training.train()
    path = training.save().result()
    assert coded_layers(path) == set(BLOCKS)
    check(training, path)
    training.close()


@pytest.mark.parametrize(("rest", "has_to_wait"), [("q8", True), ("compact", False)])
def test_only_codes_against_earlier_files_wait_for_earlier_saves(
    fast_directory: Path, monkeypatch: pytest.MonkeyPatch, rest: str, has_to_wait: bool
) -> None:
    training = new_training(fast_directory, rest=rest, options={"max_in_flight": 2})
    for _ in range(2):
        training.train()
        training.save().result()
    gate, advance = threading.Event(), SaveHandle.advance

    def wait_and_advance(handle: SaveHandle, state: Any) -> None:
        if handle.step == 3 and state == "written":
            assert gate.wait(60)
        advance(handle, state)

    monkeypatch.setattr(SaveHandle, "advance", wait_and_advance)
    training.train()
    training.save().captured()
    training.train()
    last = training.save()
    if has_to_wait:
        with pytest.raises(TimeoutError):
            last.captured(0.3)
    else:
        last.captured(60)
    gate.set()
    for handle in training.handles:
        check(training, handle.result())
    training.close()
