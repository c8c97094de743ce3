"""Trainings go on from checkpoints in which some layers are codes: what is exact is exact, what is not is near."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import TrainerCallback

from coded_runs import check_errors, keys_of
from faults import memory_directory
from llmtailor.checkpoint import Checkpoint, open_checkpoint
from llmtailor.errors import (
    IncompleteError,
    SupersededWarning,
)
from llmtailor.integrations.transformers import tailor
from llmtailor.load import load_model
from llmtailor.model_state import read_model
from llmtailor.storage import list_checkpoints
from resume.coded_loops import ALL_RESTS, WIDTH, Loop, Record, at, check, coded, nothing, train
from tiny_models import (
    KeepStates,
    Snapshot,
    assert_same,
    build_llama,
    build_trainer,
    snapshot_model,
)
from writer.first_tiers import assert_same_checkpoint
from writer.trainings import state_of


@pytest.mark.parametrize(
    ("rest", "strategy"),
    [
        ("q8", "parity"),
        ("q8", nothing),
        ("compact", "parity"),
        pytest.param("compact", nothing, marks=pytest.mark.slow),
        pytest.param("q4", "parity", marks=pytest.mark.slow),
        pytest.param("compact4", "parity", marks=pytest.mark.slow),
    ],
)
def test_a_loop_goes_on_from_codes_and_from_codes_again(rest: str, strategy: Any, tmp_path: Path) -> None:
    record = Record()
    train(tmp_path, 4, record, rest=rest, strategy=strategy)
    for until in (9, 14):
        # As after a crash: nothing of the first process is here, not even its random numbers.
        torch.manual_seed(987)
        with Loop(tmp_path, record, rest=rest, strategy=strategy, seed=until) as loop:
            found, loaded = at(tmp_path, until - 5), loop.state()
            assert loop.step == until - 5
            assert len(coded(found)) >= 3
            assert_same(loaded, check(found, record))
            check_errors(found.manifest, loaded, record.states)
            check_exact_ones(found, loaded, record.states[loop.step])
            check_moments(found, loaded, record.states[loop.step])
            loop.train(until)
    for step in (8, 13, 14):
        check(at(tmp_path, step), record)
        if strategy is nothing and rest == "q8":
            assert {layer.step for layer in coded(at(tmp_path, step))} == {1}, "the base is the last exact save"


def check_exact_ones(checkpoint: Checkpoint, loaded: Snapshot, live: Snapshot) -> None:
    """Layers that were written exactly are, bit for bit; the others are something else."""
    for layer in checkpoint.manifest.layers:
        keys = list(keys_of(checkpoint.manifest, layer, live))
        same = [torch.equal(loaded[key], live[key]) for key in keys]
        assert all(same) == (layer.encoding is None), layer.name
        assert layer.state_step == checkpoint.manifest.step
        assert layer.state_update_count == checkpoint.manifest.step


def check_moments(checkpoint: Checkpoint, loaded: Snapshot, live: Snapshot) -> None:
    """No second moment is zero or negative that was not; every parameter's own count is what it was."""
    seconds = [key for key in live if key.endswith(".exp_avg_sq")]
    assert len(seconds) == len([key for key in live if key.endswith(".exp_avg")]) > 0
    for key in seconds:
        assert bool(((loaded[key] == 0) == (live[key] == 0)).all())
        assert bool((loaded[key] >= 0).all())
    counts = [key for key in live if key.endswith(".step")]
    assert len(counts) == len(seconds)
    assert all(loaded[key].item() == checkpoint.manifest.step for key in counts)


def test_each_parameter_keeps_its_own_update_count(tmp_path: Path) -> None:
    """In one layer, where one is frozen for a while, and one gets no state at all."""

    def freeze(model: torch.nn.Module) -> None:
        model.get_parameter("model.layers.0.self_attn.o_proj.weight").requires_grad_(False)

    def gate(loop: Loop, *, is_open: bool) -> None:
        loop.model.get_parameter("model.layers.0.mlp.up_proj.weight").requires_grad_(is_open)

    record = Record()
    with Loop(tmp_path, record, rest="q8", strategy=nothing, prepare=freeze) as loop:
        loop.train(2)
        gate(loop, is_open=False)
        # The record of the model changes with it; then files from before are another model's.
        loop.train(3)
        loop.train(5)
    counts = {key: value.item() for key, value in record.states[5].items() if key.endswith(".step")}
    assert set(counts.values()) == {2, 5}
    assert "state.model.layers.0.self_attn.o_proj.weight.step" not in counts
    with Loop(tmp_path, record, rest="q8", strategy=nothing, prepare=freeze, seed=4) as loop:
        assert coded(at(tmp_path, 5))
        expected = check(at(tmp_path, 5), record)
        assert_same(loop.state(), expected)
        assert {key: value.item() for key, value in loop.state().items() if key.endswith(".step")} == counts


def rng_state() -> list[Any]:
    return [torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()]  # type: ignore[index]


def test_all_but_the_layers_goes_on_as_without_codes(tmp_path: Path) -> None:
    """Scheduler, random numbers and data position, in the middle of an epoch of ten batches."""
    outcomes = {}
    for rest in ("skip", "q8"):
        for generator in (torch.manual_seed, random.seed, np.random.seed):
            generator(1)
        train(tmp_path / rest, 7, Record(), rest=rest)
        torch.manual_seed(987)
        record = Record()
        with Loop(tmp_path / rest, record, rest=rest, seed=5) as loop:
            begun = rng_state(), loop.scheduler.state_dict(), loop.batches.state_dict()
            loop.train(12)
            outcomes[rest] = begun, record.batches, record.rates, rng_state(), loop.scheduler.state_dict()
    expected = outcomes.pop("skip")
    assert len(expected[1]) == 5
    for rest, outcome in outcomes.items():
        for found, wanted in zip(outcome, expected, strict=True):
            assert str(found) == str(wanted), rest


def test_every_layer_of_every_checkpoint_is_the_newest(tmp_path: Path) -> None:
    """Six saves: every half is exact in turn, and the codes of the other half are against its last exact files."""
    record = Record()
    train(tmp_path, 6, record, rest="q8")
    exact = {}
    for step in range(1, 7):
        checkpoint = at(tmp_path, step)
        check(checkpoint, record)
        assert checkpoint.manifest.is_current
        assert {layer.state_step for layer in checkpoint.manifest.layers} == {step}
        for layer in coded(checkpoint):
            assert layer.step == step - 1, "parity never leaves a layer out twice"
            before = at(tmp_path, layer.step)
            assert layer.plain_files == next(each for each in before.manifest.layers if each.name == layer.name).files
            for file in layer.plain_files:
                assert (checkpoint.path / file.path).samefile(before.path / file.path)
        exact[step] = {layer.name for layer in checkpoint.manifest.layers if layer.encoding is None}
    names = {layer.name for layer in at(tmp_path, 1).manifest.layers}
    assert exact[1] == names
    assert exact[2] | exact[3] == exact[4] | exact[5] == exact[5] | exact[6] == names
    assert exact[2] == exact[4] == exact[6] != exact[3] == exact[5]


@pytest.mark.parametrize("rest", ["q8", "compact"])
def test_codes_that_nobody_renews_are_kept_and_linked(rest: str, tmp_path: Path) -> None:
    record = Record()
    train(tmp_path, 3, record, rest=rest)
    kept = {layer.name for layer in coded(at(tmp_path, 3))}
    train(tmp_path, 6, record, rest="skip", strategy=nothing, seed=3)
    first, last = at(tmp_path, 3), at(tmp_path, 6)
    assert {layer.name for layer in coded(last)} == kept
    assert not last.manifest.is_current
    for layer in last.manifest.layers:
        assert (layer.reason, layer.state_step) == ("kept", 3)
        for file in layer.files:
            assert (first.path / file.path).samefile(last.path / file.path)
    assert last.manifest.written_nbytes == sum(file.bytes for file in last.manifest.files)
    with Loop(tmp_path, record, rest="skip", seed=4) as loop:
        assert loop.step == 6
        assert_same(loop.state(), check(last, record))
    # And then written again, with codes against what was exact all the time, or newly exact.
    train(tmp_path, 8, record, rest="q8", strategy=nothing, seed=5)
    assert {layer.reason for layer in at(tmp_path, 7).manifest.layers} == (
        {"coded", "no gain"} if rest == "q8" else {"coded", "no base", "no gain"}
    )
    assert {layer.reason for layer in at(tmp_path, 8).manifest.layers} == {"coded", "no gain"}
    for step in (7, 8):
        check(at(tmp_path, step), record)


def test_a_consistent_checkpoint_is_one_without_codes(tmp_path: Path) -> None:
    record = Record()
    train(tmp_path, 4, record, rest="q8")
    assert [step for step in range(1, 5) if at(tmp_path, step).manifest.is_consistent] == [1]
    with Loop(tmp_path, record, rest="q8", seed=4, resume={"consistent": True}) as loop:
        assert loop.step == 1
        assert_same(loop.state(), record.states[1])
        loop.train(2)
        with pytest.warns(SupersededWarning):
            loop.run.close()
    shutil.rmtree(tmp_path / "checkpoint-1")
    with pytest.raises(IncompleteError) as caught:
        Loop(tmp_path, record, rest="q8", resume={"consistent": True})
    assert caught.value.kind == "no-consistent"


@pytest.mark.parametrize(("rest", "keep_consistent"), [("q8", True), ("q8", False), ("compact", False)])
def test_retention_leaves_what_codes_are_relative_to(rest: str, keep_consistent: bool, tmp_path: Path) -> None:
    record = Record()
    train(tmp_path, 6, record, rest=rest, keep=2, keep_consistent=keep_consistent)
    steps = [entry.step for entry in list_checkpoints(tmp_path)]
    assert steps == ([1, 6] if keep_consistent else [5, 6])
    for step in steps:
        check(at(tmp_path, step), record)
    with Loop(tmp_path, record, rest=rest, seed=3) as loop:
        assert_same(loop.state(), check(at(tmp_path, 6), record))


@pytest.mark.parametrize("rest", ["q8", pytest.param("compact", marks=pytest.mark.slow)])
def test_removing_any_checkpoint_leaves_the_others_whole(rest: str, tmp_path: Path) -> None:
    record = Record()
    train(tmp_path / "run", 4, record, rest=rest)
    for doomed in range(1, 5):
        shutil.copytree(tmp_path / "run", tmp_path / "copy", copy_function=link)
        shutil.rmtree(tmp_path / "copy" / f"checkpoint-{doomed}")
        for step in {1, 2, 3, 4} - {doomed}:
            check(at(tmp_path / "copy", step), record)
        with Loop(tmp_path / "copy", record, rest=rest, seed=3) as loop:
            assert loop.step == (3 if doomed == 4 else 4)
            assert_same(loop.state(), check(at(tmp_path / "copy", loop.step), record))
        shutil.rmtree(tmp_path / "copy")


def link(source: str, target: str) -> None:
    Path(target).hardlink_to(source)


def turn_in_memory(model: torch.nn.Module) -> None:
    """Every matrix transposed in memory, and one with gaps."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.data = parameter.data.t().contiguous().t()
        gapped = model.get_parameter("model.layers.2.self_attn.q_proj.weight")
        gapped.data = torch.stack([gapped.data, gapped.data], dim=-1)[..., 0]


@pytest.mark.parametrize("rest", ["q8", "compact"])
def test_a_model_with_another_memory_layout_gets_the_same_values(rest: str, tmp_path: Path) -> None:
    record = Record()
    train(tmp_path, 3, record, rest=rest)
    with Loop(tmp_path, record, rest=rest, seed=5, prepare=turn_in_memory) as loop:
        assert not loop.model.get_parameter("model.layers.2.self_attn.q_proj.weight").is_contiguous()
        assert_same(loop.state(), check(at(tmp_path, 3), record))
        loop.train(5)
    for step in (4, 5):
        check(at(tmp_path, step), record)


@pytest.mark.parametrize("rest", ["q8", "compact"])
def test_weights_alone_are_loaded_from_codes(rest: str, tmp_path: Path) -> None:
    record = Record()
    train(tmp_path, 3, record, rest=rest)
    expected = {key: value for key, value in check(at(tmp_path, 3), record).items() if not key.startswith("state.")}
    for prepare in (lambda model: None, turn_in_memory):
        model = build_llama(width=WIDTH, seed=9)
        prepare(model)  # type: ignore[no-untyped-call]
        load_model(at(tmp_path, 3), read_model(model))
        assert_same(snapshot_model(model), expected)


# transformers' Trainer


class NoteLoaded(TrainerCallback):
    """What a Trainer begins with."""

    def __init__(self) -> None:
        self.state: Snapshot = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.state = state_of(kwargs["model"], kwargs["optimizer"].optimizer)


def states_of(kept: KeepStates) -> dict[int, Snapshot]:
    return {
        step: {**kept.models[step], **{f"state.{key}": value for key, value in kept.optimizers[step].items()}}
        for step in kept.models
    }


@pytest.mark.parametrize("rest", ALL_RESTS)
def test_a_trainer_goes_on_from_codes(rest: str, tmp_path: Path) -> None:
    def prepare(**options: Any) -> tuple[Any, KeepStates]:
        kept = KeepStates()
        trainer = build_trainer(
            tmp_path, model=build_llama(width=WIDTH), callbacks=[kept], **{"max_steps": 8, "save_steps": 2, **options}
        )
        return tailor(trainer, strategy="parity", rest=rest), kept

    trainer, kept = prepare(stop=4)
    trainer.train()
    record = Record(states=states_of(kept))
    assert len(coded(at(tmp_path, 4))) >= 3
    resumed, kept = prepare()
    noted = NoteLoaded()
    resumed.add_callback(noted)
    resumed.train(resume_from_checkpoint=True)
    expected = check(at(tmp_path, 4), record)
    assert_same(noted.state, expected)
    check_errors(at(tmp_path, 4).manifest, noted.state, record.states)
    check_moments(at(tmp_path, 4), noted.state, record.states[4])
    record.states |= states_of(kept)
    assert resumed.state.global_step == 8
    for step in (6, 8):
        check(at(tmp_path, step), record)
        assert at(tmp_path, step).manifest.is_current
        assert coded(at(tmp_path, step))


@pytest.mark.parametrize("rest", ["q8", "compact"])
def test_a_trainer_that_saves_weights_alone_codes_them(rest: str, tmp_path: Path) -> None:
    kept = KeepStates()
    trainer = build_trainer(
        tmp_path, model=build_llama(width=128), callbacks=[kept], max_steps=6, save_steps=2, save_only_model=True
    )
    tailor(trainer, strategy="parity", rest=rest).train()
    record = Record(states=kept.models)
    checkpoint = at(tmp_path, 6)
    assert checkpoint.manifest.contents == "weights"
    assert len(coded(checkpoint)) >= 2
    expected = check(checkpoint, record)
    check_errors(checkpoint.manifest, expected, record.states)
    model = build_llama(width=128, seed=9)
    load_model(checkpoint, read_model(model))
    assert_same(snapshot_model(model), expected)
    with pytest.raises(IncompleteError):
        tailor(build_trainer(tmp_path, model=model), rest=rest).train(resume_from_checkpoint=True)


# The mirror


# It is on another file system.
@pytest.mark.filterwarnings("ignore::llmtailor.errors.LinkFallbackWarning")
@pytest.mark.parametrize("rest", ["q8", "compact"])
def test_codes_arrive_whole_in_a_mirror_and_a_run_goes_on_from_there(rest: str, tmp_path: Path) -> None:
    record = Record()
    with memory_directory() as memory:
        where = {"directory": tmp_path / "run", "mirror": memory / "mirror"}
        train(record=record, until=4, rest=rest, **where)  # type: ignore[arg-type]
        for step in range(1, 5):
            copy = memory / "mirror" / f"checkpoint-{step}"
            assert_same_checkpoint(copy, tmp_path / "run" / f"checkpoint-{step}")
            check(open_checkpoint(copy), record)
        for entry in list_checkpoints(tmp_path / "run"):
            shutil.rmtree(entry.path)
        with Loop(record=record, rest=rest, seed=6, **where) as loop:  # type: ignore[arg-type]
            assert loop.step == 4
            assert_same(loop.state(), check(at(memory / "mirror", 4), record))
            # The first save reads what its codes are relative to from the mirror, and takes it over from there.
            loop.train(6)
        for step in (5, 6):
            assert coded(at(tmp_path / "run", step))
            check(at(tmp_path / "run", step), record)
            assert_same_checkpoint(memory / f"mirror/checkpoint-{step}", tmp_path / f"run/checkpoint-{step}")
