"""Simulated runs against real ones: what is written, what stays on the disk, how old layers are."""

from __future__ import annotations

from pathlib import Path

import pytest

from estimate.real_runs import NUM_SAVES, build, disk_nbytes, tensors_of, train, written_nbytes
from llmtailor.codecs import parse_rest
from llmtailor.drift import LayerDrift
from llmtailor.errors import InvalidInputError
from llmtailor.estimate import (
    LayerSize,
    Schedule,
    SimulatedSave,
    Training,
    assume_drift,
    measure_layers,
    simulate,
)
from llmtailor.layers import LayerKind
from llmtailor.retention import Keep, parse_keep
from llmtailor.strategies import SaveContext, parse_strategy

EVERY_STEP = Schedule(steps=NUM_SAVES, every=1)


def measure(name: str, directory: Path, *, rest: str = "skip") -> tuple[LayerSize, ...]:
    return measure_layers(tensors_of(name, directory), Training(precision="fp32"), rest=parse_rest(rest))


@pytest.mark.parametrize("strategy", ["parity", "filter(first=1, last=1, every=2)", "round_robin(3)", "full"])
def test_saves_write_what_those_of_a_real_run_wrote(strategy: str, tmp_path: Path) -> None:
    manifests = train(tmp_path / "run", build("tied llama"), strategy=strategy)
    saves = simulate(parse_strategy(strategy), measure("tied llama", tmp_path), EVERY_STEP)
    assert [save.step for save in saves] == [manifest.step for manifest in manifests]
    assert [save.written_nbytes for save in saves] == [written_nbytes(manifest) for manifest in manifests]
    assert [save.num_exact for save in saves] == [
        sum(layer.step == manifest.step for layer in manifest.layers) for manifest in manifests
    ]
    assert [save.max_staleness for save in saves] == [
        max(manifest.step - layer.step for layer in manifest.layers) for manifest in manifests
    ]
    assert saves[-1].disk_nbytes == disk_nbytes(tmp_path / "run")


@pytest.mark.parametrize("rest", ["q8", "compact4"])
def test_codes_take_what_those_of_a_real_run_took(rest: str, tmp_path: Path) -> None:
    manifests = train(tmp_path / "run", build("llama"), strategy="parity", rest=rest)
    saves = simulate(parse_strategy("parity"), measure("llama", tmp_path, rest=rest), EVERY_STEP, is_coded=True)
    real = [written_nbytes(manifest) for manifest in manifests]
    assert [save.written_nbytes for save in saves] == pytest.approx(real, rel=0.01)
    assert [save.num_coded for save in saves] == [
        sum(layer.encoding is not None for layer in manifest.layers) for manifest in manifests
    ]
    assert sum(save.num_coded for save in saves) > 0
    assert {save.max_staleness for save in saves} == {0}
    assert saves[-1].max_exact_age == 1
    assert saves[-1].disk_nbytes == pytest.approx(disk_nbytes(tmp_path / "run"), rel=0.01)


def test_layers_without_gain_are_written_exactly_where_others_are_coded(tmp_path: Path) -> None:
    def choose_nothing(context: SaveContext) -> list[str]:
        return []

    manifests = train(tmp_path / "run", build("llama"), strategy=choose_nothing, rest="q8")
    layers = measure("llama", tmp_path, rest="q8")
    assert [layer.name for layer in layers if layer.coded is None] == ["norm"]
    saves = simulate(parse_strategy(choose_nothing), layers, EVERY_STEP, is_coded=True)
    assert [save.num_exact for save in saves] == [
        sum(layer.encoding is None for layer in manifest.layers) for manifest in manifests
    ]
    assert saves[-1].num_exact == 1


def test_codes_of_earlier_saves_go_with_their_checkpoints(tmp_path: Path) -> None:
    train(tmp_path / "run", build("llama"), strategy="round_robin(6)", rest="q8", keep=2)
    schedule = Schedule(steps=NUM_SAVES, every=1, keep=Keep(limit=2))
    layers = measure("llama", tmp_path, rest="q8")
    saves = simulate(parse_strategy("round_robin(6)"), layers, schedule, is_coded=True)
    assert saves[-1].disk_nbytes == pytest.approx(disk_nbytes(tmp_path / "run"), rel=0.01)


@pytest.mark.parametrize(
    "keep",
    [Keep(limit=2), Keep(limit=1, consistent=False), parse_keep("last=1,every=3"), Keep(limit=4, optimizer=2)],
    ids=lambda keep: keep.text,
)
def test_what_stays_on_the_disk_is_what_stays_of_a_real_run(keep: Keep, tmp_path: Path) -> None:
    train(tmp_path / "run", build("llama"), strategy="parity", keep=keep)
    schedule = Schedule(steps=NUM_SAVES, every=1, keep=keep)
    saves = simulate(parse_strategy("parity"), measure("llama", tmp_path), schedule)
    assert saves[-1].disk_nbytes == disk_nbytes(tmp_path / "run")
    assert (
        saves[-1].disk_nbytes
        < simulate(parse_strategy("parity"), measure("llama", tmp_path), EVERY_STEP)[-1].disk_nbytes
    )


def test_optimizer_state_that_codes_need_stays(tmp_path: Path) -> None:
    keep = Keep(limit=4, optimizer=1)
    train(tmp_path / "run", build("llama"), strategy="parity", rest="q8", keep=keep)
    schedule = Schedule(steps=NUM_SAVES, every=1, keep=keep)
    saves = simulate(parse_strategy("parity"), measure("llama", tmp_path, rest="q8"), schedule, is_coded=True)
    assert saves[-1].disk_nbytes == pytest.approx(disk_nbytes(tmp_path / "run"), rel=0.01)


@pytest.mark.parametrize("rest", ["compact", "compact4"])
def test_optimizer_state_that_codes_of_state_alone_need_goes(rest: str, tmp_path: Path) -> None:
    # bfloat16 weights without masters lie in the weights file as they are.
    keep = Keep(limit=4, optimizer=1)
    train(tmp_path / "run", build("llama").bfloat16(), strategy="parity", rest=rest, keep=keep)
    tensors = tensors_of("llama", tmp_path)
    layers = measure_layers(tensors, Training(precision="bf16"), rest=parse_rest(rest))
    schedule = Schedule(steps=NUM_SAVES, every=1, keep=keep)
    saves = simulate(parse_strategy("parity"), layers, schedule, is_coded=True)
    assert saves[-1].disk_nbytes == pytest.approx(disk_nbytes(tmp_path / "run"), rel=0.01)


@pytest.mark.parametrize("strategy", ['top_k(1, by="drift")', "monitored(0.00001, end=1e-6)"])
def test_frozen_layers_are_left_out_as_in_a_real_run(strategy: str, tmp_path: Path) -> None:
    model = build("llama")
    for fqn, parameter in model.named_parameters():
        parameter.requires_grad_(any(part in fqn for part in (".layers.2.", ".layers.3.", "lm_head")))
    manifests = train(tmp_path / "run", model, strategy=strategy)
    training = Training(precision="fp32", trainable=("*.layers.2.*", "*.layers.3.*", "lm_head.*"))
    saves = simulate(parse_strategy(strategy), measure_layers(tensors_of("llama", tmp_path), training), EVERY_STEP)
    assert [save.written_nbytes for save in saves] == [written_nbytes(manifest) for manifest in manifests]
    assert saves[1].num_exact == 6  # of 7: layers.1 is frozen


def layer(name: str, *, nbytes: int = 100, numel: int = 10, kind: LayerKind = LayerKind.BLOCK) -> LayerSize:
    index = int(name.rpartition(".")[2]) if kind is LayerKind.BLOCK else None
    return LayerSize(
        name=name,
        kind=kind,
        stack=None if index is None else "layers",
        index=index,
        numel=numel,
        nbytes=nbytes,
        weights_nbytes=nbytes // 2,
        optimizer_nbytes=nbytes - nbytes // 2,
        rank_nbytes=nbytes,
        coded=None,
    )


BLOCKS = tuple(layer(f"layers.{number}") for number in range(8))


def run(strategy: str, schedule: Schedule, layers: tuple[LayerSize, ...] = BLOCKS) -> tuple[SimulatedSave, ...]:
    return simulate(parse_strategy(strategy), layers, schedule)


def test_a_resumed_run_has_no_first_full_save() -> None:
    fresh, resumed = (
        run("parity", Schedule(steps=40, every=10, is_resumed=is_resumed)) for is_resumed in (False, True)
    )
    assert [save.written_nbytes for save in fresh] == [800, 400, 400, 400]
    assert [save.written_nbytes for save in resumed] == [400, 400, 400, 400]
    # What it goes on from lies there all the same.
    assert [save.disk_nbytes for save in resumed] == [1200, 1600, 2000, 2400]
    assert [save.max_staleness for save in resumed] == [10, 10, 10, 10]


def test_the_peak_is_before_anything_is_removed() -> None:
    saves = run("full", Schedule(steps=40, every=10, keep=Keep(limit=1)))
    assert [save.peak_disk_nbytes for save in saves] == [800, 1600, 1600, 1600]
    assert [save.disk_nbytes for save in saves] == [800] * 4


def test_a_budget_per_step_says_when_to_save() -> None:
    rate = 5
    saves = run(f"budget_per_step({rate}, first=0, last=0)", Schedule(steps=400, every=7))
    # A tenth of 800 bytes or the largest layer has to accrue: 100 bytes, 20 steps.
    assert [save.step for save in saves] == [*range(20, 401, 20)]
    assert sum(save.written_nbytes for save in saves[1:]) <= rate * 400


def test_a_run_that_ends_before_its_first_save_has_none() -> None:
    assert run("full", Schedule(steps=9, every=10)) == ()


def test_max_age_is_kept() -> None:
    saves = run("drift(0.9, first=0, last=0, max_age=30)", Schedule(steps=200, every=10))
    assert max(save.max_staleness for save in saves) == 30
    assert min(save.num_exact for save in saves) == 0


def test_a_budget_that_is_too_small_is_refused() -> None:
    with pytest.raises(InvalidInputError) as caught:
        run("budget(0.1)", Schedule(steps=20, every=10))
    assert caught.value.kind == "budget-too-small"


@pytest.mark.parametrize("wrong", [{"steps": 0, "every": 1}, {"steps": 1, "every": 0}])
def test_a_schedule_without_steps_is_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(InvalidInputError):
        Schedule(**wrong)


def test_too_many_saves_are_refused_by_whoever_decides() -> None:
    with pytest.raises(InvalidInputError) as caught:
        Schedule(steps=1_000_000, every=1)
    assert caught.value.kind == "steps"
    with pytest.raises(InvalidInputError) as caught:
        run("budget_per_step(800, first=0, last=0)", Schedule(steps=1_000_000, every=1_000))
    assert caught.value.kind == "steps"


# Drift that nobody measured


def test_drift_is_assumed_to_grow_with_age_and_importance_with_its_square() -> None:
    young, old, large = (assume_drift(age=age, numel=numel) for age, numel in ((10, 5), (30, 5), (10, 50)))
    assert old.relative == pytest.approx(3 * (young.relative or 0))
    assert old.importance == pytest.approx(9 * (young.importance or 0))
    assert large.relative == young.relative
    assert large.importance == pytest.approx(10 * (young.importance or 0))
    assert (old.update, old.rate) == (young.update, young.rate)
    assert assume_drift(age=100, numel=1, per_step=0.001).relative == pytest.approx(0.1)
    frozen = assume_drift(age=10, numel=0)
    assert (frozen.relative, frozen.importance, frozen.update, frozen.rate) == (0, 0, 0, 0)


def test_layers_move_as_assumed_since_they_were_saved() -> None:
    seen: list[dict[str, LayerDrift | None]] = []

    class Watching(type(parse_strategy("drift(0.015, first=0, last=0)"))):  # type: ignore[misc]
        def select(self, context: SaveContext) -> frozenset[str]:
            seen.append({each.name: each.drift for each in context.layers})
            return super().select(context) & {"layers.1"}  # type: ignore[no-any-return]

    saves = simulate(Watching(0.015, first=0, last=0), BLOCKS, Schedule(steps=300, every=100), drift_per_step=1e-4)
    assert [save.num_exact for save in saves] == [8, 0, 1]
    assert [each["layers.0"] for each in seen] == [assume_drift(age=age, numel=10) for age in (100, 100, 200)]


def test_strategies_that_do_not_ask_are_not_told_of_drift() -> None:
    def choose(context: SaveContext) -> list[str]:
        assert all(each.drift is None for each in context.layers)
        return []

    assert simulate(parse_strategy(choose), BLOCKS, Schedule(steps=20, every=10))
