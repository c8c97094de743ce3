"""Training on a CUDA device: saves from it are what the state was when they were asked for, exactly or as codes."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

import master_adamw
from coded_runs import check_errors
from llmtailor.checkpoint import open_checkpoint
from llmtailor.codecs import kernels
from llmtailor.verify import verify_checkpoint
from llmtailor.writer.host_memory import HostMemory
from tiny_models import assert_same
from writer.coded_trainings import BLOCKS, COMPACT4, Q4, check, coded_layers, load, new_training, nothing
from writer.test_lazy_capture import CASES, train_and_compare
from writer.test_masters import ERRORS, check_exact, check_near, layers_of
from writer.trainings import Model

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("case", CASES)
def test_a_save_from_a_device_is_the_state_at_the_moment_it_was_asked_for(fast_directory: Path, case: str) -> None:
    training = train_and_compare(fast_directory, 12, model=Model().cuda(), **CASES[case])
    assert training.device.type == "cuda"


@pytest.mark.parametrize("rest", ["q8", "compact"])
def test_codes_are_made_on_the_device_and_are_those_of_the_moment(fast_directory: Path, rest: str) -> None:
    training = new_training(fast_directory, rest=rest, model=Model().cuda())
    for _ in range(6):
        training.train()
        training.save()
    for handle in training.handles[1:]:
        truth = check(training, handle.result())
        assert coded_layers(handle.result())
    assert_same(load(training, training.handles[-1].result()), truth)
    training.close()


@pytest.mark.slow
@pytest.mark.parametrize("rest", ["q8", Q4, "compact", COMPACT4])
def test_fused_codes_of_a_device_load_within_the_error_that_is_said_of_them(
    fast_directory: Path, monkeypatch: pytest.MonkeyPatch, rest: str
) -> None:
    """Not bit for bit: a fused kernel may round ties otherwise."""
    monkeypatch.setattr(kernels, "_MIN_COMPILED_NUMEL", 0)
    monkeypatch.setattr(kernels, "_MIN_FUSED_NUMEL", 0)
    training = new_training(fast_directory, rest=rest, strategy=nothing, model=Model().cuda())
    for _ in range(3):
        training.train()
        path = training.save().result()
    assert training.checkpointer._engine._encoder._kernels.are_fused
    assert coded_layers(path) == set(BLOCKS)
    assert verify_checkpoint(path).is_good
    check_errors(open_checkpoint(path).manifest, load(training, path), training.states)
    training.close()


@pytest.mark.parametrize("rest", ["skip", "q8", "compact"])
def test_masters_of_a_device_are_packed_or_coded(fast_directory: Path, rest: str) -> None:
    how = {} if rest == "skip" else {"rest": rest, "strategy": nothing}
    training = master_adamw.new_training(fast_directory, model=Model().cuda(), **how)
    for _ in range(3):
        training.train()
        path = training.save().result()
    training.close()
    truth = training.states[3]
    found = master_adamw.load(path, training).state()
    if rest == "skip":
        packed = [check_exact(path, layer, truth) for layer in layers_of(path).values()]
        assert sum(map(len, packed)) == 2 * len(BLOCKS)
        assert_same(found, truth)
    else:
        assert coded_layers(path) == set(BLOCKS)
        check_near(found, truth, ERRORS[rest])
        assert not master_adamw.weights_that_are_not_rounded_masters(found)


def test_memory_is_pinned_and_let_go_of_whoever_forgets_to_close_it(caplog: pytest.LogCaptureFixture) -> None:
    """The same addresses are mapped again and again; each time the numbers of the device arrive there."""
    for seed in range(20):
        memory = HostMemory(2**24)
        with caplog.at_level(logging.WARNING):
            memory.pin()
        assert memory.tensor.is_pinned(), caplog.text
        source = torch.full((2**24,), seed, dtype=torch.uint8, device="cuda")
        memory.tensor.copy_(source, non_blocking=True)
        torch.cuda.synchronize()
        assert (memory.bytes == seed).all()
        del memory
    assert not caplog.records


def test_a_training_does_not_end_for_memory_that_cannot_be_pinned(caplog: pytest.LogCaptureFixture) -> None:
    memory = HostMemory(2**20)
    other = HostMemory(2**20)
    other.bytes = memory.bytes  # what is pinned already is not pinned again
    memory.pin()
    with caplog.at_level(logging.WARNING):
        other.pin()
    assert "could not be pinned" in caplog.text
    assert torch.ones(3, device="cuda").sum() == 3
