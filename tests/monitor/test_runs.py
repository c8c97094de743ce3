"""Runs that measure how their layers move: what users see of it, and that it goes on after a resume."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import llmtailor
from llmtailor.checkpoint import open_checkpoint
from llmtailor.cli.main import app
from llmtailor.drift_log import read_measurements
from llmtailor.errors import IncompleteError, InvalidInputError, SaveFailedWarning, StaleWarning
from llmtailor.integrations.transformers import tailor
from llmtailor.monitor import DRIFT_NAME
from llmtailor.recipe import FlaggedSave, encode_flags, flags_to_layers, read_flags
from llmtailor.strategies import SaveContext
from tiny_models import VOCABULARY, build_llama, build_trainer


class Loop:
    """A training of its own, from its checkpoint on if it has one."""

    def __init__(self, directory: Path, **options: Any) -> None:
        self.model = build_llama(dropout=0.0, width=64)  # wide enough for codes
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        resume = options.pop("resume", {})
        self.run = llmtailor.Run(directory, self.model, self.optimizer, **{"save_steps": 2, "monitor": True, **options})
        try:
            self.step = self.run.resume(**resume)
        except BaseException:
            self.run.close()
            raise
        self.seen: dict[int, dict[str, float]] = {}

    def train(self, until: int) -> Loop:
        while self.step < until:
            torch.manual_seed(self.step)
            tokens = torch.randint(0, VOCABULARY, (2, 8))
            self.model(input_ids=tokens, labels=tokens).loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.step += 1
            if self.run.step(self.step) is not None:
                self.seen[self.step] = self.run.metrics
        return self

    def close(self) -> Loop:
        self.run.close()
        return self


def alternate(context: SaveContext) -> list[str]:
    """One block at every save, and no other layer; in turn."""
    return [f"layers.{context.save_index % 4}"]


def test_metrics_manifest_and_log_say_the_same(tmp_path: Path) -> None:
    loop = Loop(tmp_path, strategy="parity").train(6).close()
    manifest = open_checkpoint(tmp_path / "checkpoint-6").manifest
    (*_, logged) = read_measurements(tmp_path).values()
    assert sorted(read_measurements(tmp_path)) == [2, 4, 6]
    for layer in manifest.layers:
        assert layer.drift == pytest.approx(loop.seen[6][f"drift/{layer.name}"], rel=1e-3)
        assert layer.drift == pytest.approx(logged["layers"][layer.name]["drift"], rel=1e-3)
        assert layer.share == pytest.approx(logged["layers"][layer.name]["share"], rel=1e-3)
        assert layer.drift > 0
    assert sum(layer.share or 0 for layer in manifest.layers) == pytest.approx(1, abs=1e-3)
    stale = sum((layer.share or 0) * (6 - layer.step) for layer in manifest.layers)
    assert loop.seen[6]["expected_loss_steps"] == pytest.approx(stale, rel=1e-2)
    assert 0 < stale < 2


def test_nothing_is_measured_unless_it_is_wanted(tmp_path: Path) -> None:
    loop = Loop(tmp_path, monitor=False).train(2)
    assert loop.run.metrics == {}
    with pytest.raises(InvalidInputError, match="monitor=True"):
        loop.run.measure(2)
    loop.close()
    manifest = open_checkpoint(tmp_path / "checkpoint-2").manifest
    assert {(layer.drift, layer.share) for layer in manifest.layers} == {(None, None)}
    assert not (tmp_path / "drift.jsonl").exists()


def test_between_saves_one_asks(tmp_path: Path) -> None:
    loop = Loop(tmp_path, save_steps=4).train(5)
    after_one = loop.run.measure(5)["layers.0"].relative
    loop.train(6)
    after_two = loop.run.measure(6)["layers.0"].relative
    assert after_one is not None
    assert after_two is not None
    assert 0 < after_one < after_two
    loop.close()


def test_norms_of_gradients_are_taken_if_asked_for(tmp_path: Path) -> None:
    loop = Loop(tmp_path, monitor="gradients", save_steps=100).train(1)
    gradients: dict[str, torch.Tensor] = {}

    def keep(optimizer: torch.optim.Optimizer, *_: object) -> None:
        for fqn, parameter in loop.model.named_parameters():
            assert parameter.grad is not None
            gradients[fqn] = parameter.grad.clone()

    loop.optimizer.register_step_pre_hook(keep)
    loop.train(2)
    found = loop.run.measure(2)["norm"].gradient
    assert found == pytest.approx(float(gradients["model.norm.weight"].norm()), rel=1e-5)
    loop.close()
    assert Loop(tmp_path / "without", save_steps=100).train(2).run.measure(2)["norm"].gradient is None


@pytest.mark.parametrize("rest", ["skip", "q8"])
def test_drift_goes_on_after_a_resume(tmp_path: Path, rest: str) -> None:
    straight = Loop(tmp_path / "straight", strategy=alternate, rest=rest).train(8).close()
    Loop(tmp_path / "cut", strategy=alternate, rest=rest).train(6).close()
    resumed = Loop(tmp_path / "cut", strategy=alternate, rest=rest).train(8).close()
    kept = open_checkpoint(tmp_path / "cut" / "checkpoint-6").manifest
    coded = {layer.name for layer in kept.layers if layer.encoding is not None}
    assert bool(coded) == (rest == "q8")
    assert ((tmp_path / "cut" / "checkpoint-6" / DRIFT_NAME).exists()) == (rest == "q8")
    for layer in kept.layers:
        name = f"drift/{layer.name}"
        if layer.name in coded:  # measured from the exact save all the same, though codes were loaded
            assert resumed.seen[8][name] == pytest.approx(straight.seen[8][name], rel=0.05), name
        else:  # training went on from the layer's last save, whatever it had become since
            assert 0 < resumed.seen[8][name] < straight.seen[8][name] * 1.5, name


def test_stale_layers_are_refused_if_they_are_too_old(tmp_path: Path) -> None:
    Loop(tmp_path, strategy=alternate).train(8).close()
    newest = open_checkpoint(tmp_path / "checkpoint-8").manifest
    assert newest.staleness == 6
    with pytest.raises(IncompleteError) as refused:
        Loop(tmp_path, resume={"checkpoint": tmp_path / "checkpoint-8", "max_staleness": 5})
    assert (refused.value.kind, refused.value.found) == ("too-stale", "6 steps")
    loop = Loop(tmp_path, resume={"max_staleness": 5})
    assert loop.step == 6  # the one before is less stale
    loop.close()


def test_no_checkpoint_is_fresh_enough(tmp_path: Path) -> None:
    Loop(tmp_path, strategy=alternate, keep=1, keep_consistent=False).train(8).close()
    with pytest.raises(IncompleteError, match="at most 5 steps old") as refused:
        Loop(tmp_path, resume={"max_staleness": 5})
    assert refused.value.kind == "too-stale"


def test_very_old_layers_are_warned_of(tmp_path: Path) -> None:
    loop = Loop(tmp_path, strategy=llmtailor.strategies.Custom(lambda context: ["norm"], max_age=10_000)).train(2)
    loop.run.save(1500)
    loop.close()
    with pytest.warns(StaleWarning, match="1498 steps old"):
        Loop(tmp_path).close()
    Loop(tmp_path, resume={"max_staleness": 2000}).close()


def test_the_interval_follows_the_cost(tmp_path: Path) -> None:
    # A failure every half second: what a save takes until it is published is what bounds the interval.
    interval = llmtailor.Interval(mtbf_hours=1e-4, max_overhead=1.0)
    loop = Loop(tmp_path, interval=interval, save_steps=1, monitor=False).train(60).close()
    first, *later = sorted(loop.seen)
    assert first == 20
    assert later
    assert len(later) < 40


@pytest.mark.filterwarnings("ignore::llmtailor.errors.SupersededWarning")
def test_the_monitored_policy_writes_the_log_of_the_original(tmp_path: Path) -> None:
    Loop(tmp_path, strategy="monitored(0.1, first=0, last=0)").train(6).close()
    saves = read_flags((tmp_path / "flags.jsonl").read_bytes(), tmp_path)
    assert [save.step for save in saves] == [2, 4, 6]
    assert saves[0].units == (6, 1, 2, 3, 4, 0, 5)  # the first save writes all: embedding, blocks, norm, head
    for save in saves:
        manifest = open_checkpoint(tmp_path / f"checkpoint-{save.step}").manifest
        written = {layer.name for layer in manifest.layers if layer.step == save.step}
        assert set(flags_to_layers(save.units, 4, False)) == written
    Loop(tmp_path, strategy="monitored(0.1)", resume={"checkpoint": tmp_path / "checkpoint-4"}).train(6).close()
    again = read_flags((tmp_path / "flags.jsonl").read_bytes(), tmp_path)
    assert [save.step for save in again] == [2, 4, 6]  # the line of the branch that was left is gone


def test_lines_of_the_log_are_parsed_again_only_if_somebody_changed_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parsed: list[int] = []

    def count_lines(text: bytes, path: Path) -> tuple[FlaggedSave, ...]:
        saves = read_flags(text, path)
        parsed.append(len(saves))
        return saves

    monkeypatch.setattr("llmtailor.flag_log.read_flags", count_lines)
    log = tmp_path / "flags.jsonl"
    loop = Loop(tmp_path, strategy="monitored(0.1)").train(8)
    loop.run._checkpointer.drain()
    assert parsed == []
    log.write_bytes(encode_flags(save for save in read_flags(log.read_bytes(), log) if save.step != 4))
    loop.train(12).close()
    assert parsed == [3]
    assert [save.step for save in read_flags(log.read_bytes(), log)] == [2, 6, 8, 10, 12]
    Loop(tmp_path, strategy="monitored(0.1)").train(14).close()  # a process of its own looks at all of it, once
    assert parsed == [3, 5]


def test_a_log_that_is_not_ours_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "flags.jsonl").write_text("mine\n")
    loop = Loop(tmp_path, strategy="monitored(0.1)").train(2)
    loop.run._checkpointer.drain()
    with pytest.warns(SaveFailedWarning, match="flags.jsonl was not written"):
        loop.close()
    assert (tmp_path / "flags.jsonl").read_text() == "mine\n"
    assert open_checkpoint(tmp_path / "checkpoint-2").manifest.step == 2


def test_a_line_that_was_cut_off_is_passed_over(tmp_path: Path) -> None:
    Loop(tmp_path).train(2).close()
    with (tmp_path / "drift.jsonl").open("a") as file:
        file.write('{"step": 3, "lay')
    Loop(tmp_path).train(4).close()
    assert sorted(read_measurements(tmp_path)) == [2, 4]


def test_the_trainer_logs_drift(tmp_path: Path) -> None:
    trainer = build_trainer(tmp_path, save_steps=2, max_steps=4)
    tailor(trainer, strategy="parity", monitor=True).train()
    logged = [entry for entry in trainer.state.log_history if "drift/layers.0" in entry]
    assert [entry["step"] for entry in logged] == [2, 4]
    assert all(entry["drift/layers.0"] > 0 and "expected_loss_steps" in entry for entry in logged)


def test_the_trainer_saves_when_the_interval_says(tmp_path: Path) -> None:
    trainer = build_trainer(tmp_path, save_steps=2, max_steps=22)
    tailor(trainer, interval="auto").train()
    saved = sorted(int(path.name.rpartition("-")[2]) for path in tmp_path.glob("checkpoint-*"))
    assert saved[0] == 20


def show(*arguments: object) -> str:
    result = CliRunner().invoke(app, ["show", *map(str, arguments), "--drift"])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_show_tells_how_layers_move(tmp_path: Path) -> None:
    Loop(tmp_path, strategy="parity").train(6).close()
    record = json.loads(show(tmp_path, "--json"))
    assert [each["step"] for each in record["measurements"]] == [2, 4, 6]
    assert {each["name"]: each["drift"] for each in record["layers"]}["layers.0"] > 0
    assert record["expected_loss_steps"] > 0
    text = show(tmp_path)
    assert "steps of progress" in text
    assert "█" in text
    Loop(tmp_path / "without", monitor=False).train(2).close()
    assert "monitor=True" in show(tmp_path / "without")
