"""Layers written as codes while training goes on: of the moment of the save, as near as the manifest says, or exact.

A code that is off by one is a torn checkpoint, or a wrong one. One test shows that both would be seen: it takes the
optimizers' hook away.
"""

from __future__ import annotations

import random
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from coded_runs import check_errors
from faults import open_descriptors
from llmtailor import checkpointer
from llmtailor.checkpoint import open_checkpoint
from llmtailor.checkpointer import Checkpointer
from llmtailor.codecs.kernels import Kernels
from llmtailor.manifest import Manifest
from llmtailor.storage import list_checkpoints
from llmtailor.writer.pool import MIN_POOL_NBYTES
from llmtailor.writer.saving import Saving
from tiny_models import assert_same
from writer.coded_trainings import (
    BLOCKS,
    CODECS_OF,
    COMPACT4,
    EXACT_WEIGHTS,
    Q4,
    EncoderGate,
    check,
    coded_layers,
    in_turn,
    load,
    new_training,
    nothing,
)
from writer.trainings import OPTIMIZERS, write_small_file

# The moment of the save

ONE_TENSOR = 96 * 48 * 4

CASES: dict[str, dict[str, Any]] = {
    "one at a time": {},
    "fused": {"optimizer_name": "fused"},
    "plain loop over parameters": {"optimizer_name": "plain"},
    "momentum": {"optimizer_name": "momentum"},
    "amsgrad, three in flight": {"optimizer_name": "amsgrad", "options": {"max_in_flight": 3}},
    "bf16": {"dtype": torch.bfloat16},
    "fused, bf16": {"optimizer_name": "fused", "dtype": torch.bfloat16},
    "momentum, bf16": {"optimizer_name": "momentum", "dtype": torch.bfloat16},
    "smallest pool, fused": {"optimizer_name": "fused", "options": {"pool_nbytes": MIN_POOL_NBYTES}},
    "three in flight, one tensor": {"options": {"max_in_flight": 3, "pool_nbytes": ONE_TENSOR}},
    "callable, three in flight": {"strategy": in_turn, "options": {"max_in_flight": 3}},
    "callable, bf16": {"strategy": in_turn, "dtype": torch.bfloat16},
    "nothing but codes": {"strategy": nothing},
    "q4": {"rest": Q4},
    "q4, bf16, smallest pool": {
        "rest": Q4,
        "dtype": torch.bfloat16,
        "options": {"pool_nbytes": MIN_POOL_NBYTES, "max_in_flight": 2},
    },
    "compact": {"rest": "compact"},
    "compact, fused, smallest pool": {
        "rest": "compact",
        "optimizer_name": "fused",
        "options": {"pool_nbytes": MIN_POOL_NBYTES},
    },
    "compact, three in flight": {"rest": "compact", "options": {"max_in_flight": 3}},
    "compact, bf16": {"rest": "compact", "dtype": torch.bfloat16},
    "compact4, amsgrad": {"rest": COMPACT4, "optimizer_name": "amsgrad", "strategy": in_turn},
    "exact weights": {"rest": EXACT_WEIGHTS},
    "blocking": {"options": {"capture": "blocking"}},
}


def codecs_of(how: dict[str, Any]) -> tuple[str, str, str]:
    """By the policy; ``compact`` leaves nothing but states to be coded where weights have 16 bits."""
    codecs = CODECS_OF[how.get("rest", "q8")]
    if how.get("dtype") is torch.bfloat16 and codecs[0].startswith("tail"):
        return ("exact", *codecs[1:])
    return codecs


def train_and_compare(directory: Path, num_saves: int, **how: Any) -> None:
    """Save after every step but a few, while the optimizer works in place as fast as it can."""
    codecs = codecs_of(how)
    training = new_training(directory, **how)
    chance = random.Random(1)
    for _ in range(num_saves):
        training.train(chance.choice([1, 1, 1, 2]))
        training.save()
    num_coded = 0
    for index, handle in enumerate(training.handles):
        path = handle.result()
        check(training, path, codecs)
        coded = coded_layers(path)
        num_coded += len(coded)
        assert not index or coded <= set(BLOCKS)
        assert handle.stats is not None
        assert handle.stats.num_layers_coded == len(coded)
    training.close()
    assert [entry.step for entry in list_checkpoints(training.directory)] == sorted(training.states)
    assert num_coded >= 1.5 * (num_saves - 1), "hardly anything was coded; the test shows nothing"


@pytest.mark.parametrize("case", CASES)
def test_codes_are_of_the_moment_the_save_was_asked_for(fast_directory: Path, case: str) -> None:
    train_and_compare(fast_directory, 6, **CASES[case])


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_hundred_saves_of_codes_are_of_the_moment_each_was_asked_for(fast_directory: Path, case: str) -> None:
    train_and_compare(fast_directory, 4, **CASES[case])  # what is opened once is open now
    shutil.rmtree(fast_directory / "run")
    before = open_descriptors()
    train_and_compare(fast_directory, 100, **CASES[case])
    assert open_descriptors() == before


@pytest.mark.parametrize("optimizer_name", OPTIMIZERS)
def test_the_optimizer_waits_for_codes_and_nothing_else_does(
    fast_directory: Path, monkeypatch: pytest.MonkeyPatch, optimizer_name: str
) -> None:
    """Forward and backward, which change a buffer that is coded, run meanwhile."""
    training = new_training(fast_directory, optimizer_name=optimizer_name)
    training.train()
    training.save().result()
    training.train()
    gate = EncoderGate(monkeypatch, num_let_through=5)
    handle = training.save()
    gate.wait_until_reached()
    for _ in range(3):
        training.backward()
    assert handle.state == "capturing"
    before, stepped = training.state(), []

    def open_later() -> None:
        time.sleep(0.1)
        after = training.state()
        names = [name for name, _ in training.model.named_parameters()]
        stepped.append(any(not torch.equal(before[name], after[name]) for name in names))
        gate.open()

    opener = threading.Thread(target=open_later)
    opener.start()
    training.optimizer.step()
    opener.join()
    assert stepped == [False], "the step did not wait"
    check(training, handle.result())
    training.close()


class NoHook:
    def remove(self) -> None:
        pass


def test_without_the_hook_codes_are_torn_and_the_comparison_sees_it(
    fast_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpointer, "hold_back", lambda engine, gradients: NoHook())
    monkeypatch.setattr(Saving, "check_unchanged", lambda self: None)
    get = Kernels.get

    def get_slowly(kernels: Kernels, codec: str, values: torch.Tensor) -> Any:
        time.sleep(0.002)
        return get(kernels, codec, values)

    monkeypatch.setattr(Kernels, "get", get_slowly)
    training = new_training(fast_directory, options={"max_in_flight": 5})
    outcomes = []
    for _ in range(5):
        training.train()
        training.save()
    for handle in training.handles:
        try:
            check(training, handle.result())
        except AssertionError:
            outcomes.append("torn")
        else:
            outcomes.append("same")
    training.close()
    assert outcomes.count("torn") >= 3, outcomes


# As far off as the manifest says


ERROR_CASES: dict[str, dict[str, Any]] = {
    "q8": {},
    "q8, amsgrad": {"optimizer_name": "amsgrad"},
    "q8, bf16": {"dtype": torch.bfloat16},
    "q4": {"rest": Q4},
    "compact": {"rest": "compact"},
    "compact4": {"rest": COMPACT4},
    "q4, momentum, bf16": {"rest": Q4, "optimizer_name": "momentum", "dtype": torch.bfloat16},
    "exact weights": {"rest": EXACT_WEIGHTS},
}


@pytest.mark.parametrize("case", ERROR_CASES)
def test_errors_in_the_manifest_are_those_of_what_a_resume_loads(fast_directory: Path, case: str) -> None:
    how = ERROR_CASES[case]
    codecs = codecs_of(how)
    training = new_training(fast_directory, **how)
    for _ in range(3):
        training.train(2)
        training.save().result()
    path = training.handles[-1].result()
    expected, loaded = check(training, path, codecs), load(training, path)
    assert_same(loaded, expected)
    manifest = open_checkpoint(path).manifest
    check_errors(manifest, loaded, training.states)
    records = [layer.encoding for layer in manifest.layers if layer.encoding is not None]
    assert len(records) == 2
    lossless = {"weights"} if codecs[0] == "exact" or how.get("dtype") is torch.bfloat16 else set()
    components = {"first"} if "momentum" in case else {"first", "second"}
    assert all(set(record.errors) == (components | {"weights"}) - lossless for record in records)
    training.close()


# What it is for


@pytest.mark.parametrize(("rest", "share"), [("q8", 0.27), ("q4", 0.15), ("compact", 0.44), ("compact4", 0.32)])
def test_codes_are_a_fraction_of_what_a_full_save_writes(fast_directory: Path, rest: str, share: float) -> None:
    """Of weights and two moments of 4 bytes each: q8 writes 1 byte for each, and scales for 64 of them at a time."""
    torch.manual_seed(0)
    model = torch.nn.ModuleDict({"layers": torch.nn.ModuleList(torch.nn.Linear(256, 256) for _ in range(3))})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    saver = Checkpointer(fast_directory / "run", rest=rest, strategy=nothing)
    manifests: list[Manifest] = []
    for step in range(1, 6):
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
        handle = saver.save(step, model, [optimizer], write_small_file)
        manifests.append(open_checkpoint(handle.result()).manifest)
        assert handle.stats is not None
        assert handle.stats.written_nbytes == manifests[-1].written_nbytes
        on_disk = sum(
            (handle.result() / file.path).stat().st_size
            for layer in manifests[-1].layers
            for file in layer.files
            if (handle.result() / file.path).stat().st_nlink == 1
        )
        small = sum(file.bytes for file in manifests[-1].files)
        assert manifests[-1].written_nbytes == on_disk + small
    saver.close()
    full, *coded = (manifest.written_nbytes for manifest in manifests)
    assert all(layer.encoding is not None for layer in manifests[-1].layers)
    assert all(each < share * full for each in coded), [each / full for each in coded]
