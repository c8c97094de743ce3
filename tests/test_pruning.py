from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from faults import Fault, FaultyFileSystem, flip_bit
from llmtailor import Run, export
from llmtailor.checkpoint import open_checkpoint
from llmtailor.errors import IncompleteError, InvalidInputError, NotFoundError, WriteError
from llmtailor.integrations.transformers import tailor
from llmtailor.pruning import _remembered_of, apply_retention, read_metrics, thin_checkpoint
from llmtailor.retention import METRICS_NAME, Keep, encode_metrics
from llmtailor.save_history import recipe_of_run
from llmtailor.storage import PINS_NAME, RunDirectory, add_pin, list_checkpoints
from llmtailor.verify import verify_checkpoint
from ranks.part_files import boxes, cut_checkpoint, save_whole
from tiny_models import assert_same, build_llama, scripted_trainer, snapshot_model, snapshot_optimizer, token_rows
from writer.first_tiers import Training, save_run


@pytest.fixture
def run(tmp_path: Path) -> Iterator[RunDirectory]:
    """Checkpoints 1 to 5; all layers of 1 are of one step."""
    save_run(tmp_path / "run", range(1, 6))
    run = RunDirectory(tmp_path / "run")
    yield run
    run.close()


def steps_of(run: RunDirectory) -> list[int]:
    return [entry.step for entry in list_checkpoints(run.path)]


@pytest.mark.parametrize(
    ("options", "left"),
    [
        ({"keep": None}, [1, 2, 3, 4, 5]),
        ({"keep": 0}, [1, 2, 3, 4, 5]),
        ({"keep": 5}, [1, 2, 3, 4, 5]),
        ({"keep": 3}, [1, 4, 5]),
        ({"keep": 3, "keep_consistent": False}, [3, 4, 5]),
        ({"keep": 2, "pinned": {2}}, [1, 2, 5]),
        ({"keep": 1, "keep_consistent": False}, [5]),
    ],
)
def test_what_may_go_goes_and_the_rest_stays_whole(run: RunDirectory, options: dict[str, Any], left: list[int]) -> None:
    assert apply_retention(run, **options) is None
    assert steps_of(run) == left
    assert all(verify_checkpoint(entry.path).is_good for entry in list_checkpoints(run.path))


def test_directory_without_a_manifest_neither_counts_nor_goes(run: RunDirectory) -> None:
    (run.path / "checkpoint-0").mkdir()
    assert apply_retention(run, keep=2, keep_consistent=False) is None
    assert steps_of(run) == [0, 4, 5]


def test_damaged_manifest_does_not_count_as_consistent(run: RunDirectory) -> None:
    flip_bit(run.path / "checkpoint-1" / "tailor.json", 800)
    assert apply_retention(run, keep=2) is None
    assert steps_of(run) == [4, 5]


def test_removal_that_fails_is_returned_and_the_next_one_goes_on(tmp_path: Path) -> None:
    save_run(tmp_path, range(1, 4))
    filesystem: Any = FaultyFileSystem()
    run = RunDirectory(tmp_path, filesystem)
    filesystem.fault = Fault(at=len(filesystem.calls) + 1, errno=errno.EIO)
    error = apply_retention(run, keep=1, keep_consistent=False)
    assert isinstance(error, WriteError)
    assert (error.kind, steps_of(run)) == ("io", [1, 3])
    assert apply_retention(run, keep=1, keep_consistent=False) is None
    assert steps_of(run) == [3]
    run.close()


def test_one_that_cannot_be_removed_keeps_no_other(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    remove = RunDirectory.remove

    def refuse(run: RunDirectory, path: Path) -> None:
        if path.name in ("checkpoint-1", "checkpoint-3"):
            raise WriteError("no such luck", kind="io", path=path)
        remove(run, path)

    monkeypatch.setattr(RunDirectory, "remove", refuse)
    error = apply_retention(run, keep=Keep(last=1, optimizer=1, consistent=False))
    assert isinstance(error, WriteError)
    assert error.path == str(run.path / "checkpoint-1"), "the first"
    assert steps_of(run) == [1, 3, 5]


def test_device_that_fails_is_returned_too(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path) -> None:
        raise OSError(errno.EIO, "no such luck")

    monkeypatch.setattr("llmtailor.pruning.read_manifest", fail)
    error = apply_retention(run, keep=1)
    assert isinstance(error, OSError)
    assert error.errno == errno.EIO
    assert steps_of(run) == [1, 2, 3, 4, 5]


# Rules


def measure(run: RunDirectory, values: dict[int, float]) -> None:
    """Note a metric beside each checkpoint's files."""
    for step, value in values.items():
        (run.path / f"checkpoint-{step}" / METRICS_NAME).write_text(encode_metrics({"eval_loss": value}))


@pytest.mark.parametrize(
    ("keep", "left"),
    [
        ("last=1", [1, 5]),
        ("every=2", [1, 2, 4, 5]),
        ("best=1, consistent=no", [3, 5]),
        (Keep(last=1, best=1, every=2, consistent=False), [2, 3, 4, 5]),
        ("best=1, metric=accuracy", [1, 2, 3, 4, 5]),
        ("pinned=2", [1, 2, 3, 4, 5]),
    ],
)
def test_rules_are_carried_out(run: RunDirectory, keep: Any, left: list[int]) -> None:
    measure(run, {1: 0.5, 2: 0.4, 3: 0.1, 4: 0.2})
    assert apply_retention(run, keep=keep) is None
    assert steps_of(run) == left


def test_pinned_steps_of_the_run_stay(run: RunDirectory) -> None:
    add_pin(run.path, 2)
    assert apply_retention(run, keep=Keep(last=1, optimizer=1), keep_consistent=False) is None
    assert steps_of(run) == [2, 5]
    assert open_checkpoint(run.path / "checkpoint-2").manifest.contents == "full"


def test_pin_that_names_no_step_stops_everything(run: RunDirectory) -> None:
    (run.path / PINS_NAME).mkdir()
    (run.path / PINS_NAME / "the good one").touch()
    error = apply_retention(run, keep=1)
    assert isinstance(error, InvalidInputError)
    assert steps_of(run) == [1, 2, 3, 4, 5]


def test_rules_that_make_no_sense_are_returned(run: RunDirectory) -> None:
    assert isinstance(apply_retention(run, keep="lats=3"), InvalidInputError)
    assert steps_of(run) == [1, 2, 3, 4, 5]


def test_a_checkpoint_is_looked_at_once(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    assert apply_retention(run, keep=4) is None
    monkeypatch.setattr("llmtailor.pruning.read_manifest", lambda path: pytest.fail(f"{path} was read again"))
    assert apply_retention(run, keep=3) is None
    assert steps_of(run) == [1, 4, 5]


def test_a_checkpoint_is_looked_at_once_however_many_stay(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = run.path / "checkpoint-1" / "tailor.json"
    for step in range(10, 4200):
        (run.path / f"checkpoint-{step}").mkdir()
        (run.path / f"checkpoint-{step}" / "tailor.json").hardlink_to(manifest)
    assert apply_retention(run, keep=Keep(last=1, every=1)) is None
    monkeypatch.setattr("llmtailor.pruning.read_manifest", lambda path: pytest.fail(f"{path} was read again"))
    assert apply_retention(run, keep=Keep(last=1, every=1)) is None


def test_what_is_remembered_of_checkpoints_that_are_gone_is_forgotten(run: RunDirectory) -> None:
    assert apply_retention(run, keep=Keep(last=1, every=1)) is None
    assert len(_remembered_of(run.path)) == 5
    shutil.rmtree(run.path / "checkpoint-2")
    assert apply_retention(run, keep=Keep(last=1, every=1)) is None
    assert len(_remembered_of(run.path)) == 4


# Metrics


@pytest.mark.parametrize(
    ("trainer_state", "metrics", "found"),
    [
        (None, None, {}),
        (None, '{"eval_loss": 2, "is_best": true, "note": "x"}', {"eval_loss": 2.0}),
        (None, '{"eval_loss": NaN, "f1": 0.5, "g": Infinity}', {"f1": 0.5}),
        ('{"log_history": [{"step": 5, "a": 1}, {"step": 6, "a": 2}, {"step": 6, "b": 3}]}', None, {"a": 2, "b": 3}),
        ('{"log_history": [{"step": 6, "a": 2}]}', '{"a": 4}', {"a": 4}),
        ('{"log_history": [{"step": 6, "a": NaN, "b": 1}]}', None, {"b": 1}),
        ('{"log_history": 5}', "[]", {}),
        ('{"log_history": [5]}', "{", {}),
        ("{}", "[" * 100_000, {}),
    ],
)
def test_metrics_are_those_of_the_step(
    tmp_path: Path, trainer_state: str | None, metrics: str | None, found: dict[str, float]
) -> None:
    for name, text in (("trainer_state.json", trainer_state), (METRICS_NAME, metrics)):
        if text is not None:
            (tmp_path / name).write_text(text)
    assert {name: value for name, value in read_metrics(tmp_path, 6).items() if name != "step"} == found


def test_metrics_that_are_no_file_count_as_nothing(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / METRICS_NAME)
    (tmp_path / "trainer_state.json").mkdir()
    assert read_metrics(tmp_path, 6) == {}


def test_the_trainer_notes_its_evaluations_by_itself(tmp_path: Path) -> None:
    trainer = tailor(scripted_trainer(tmp_path, [2.0, 1.0, 3.0, 4.0]), strategy="parity")
    trainer.train()
    found = {entry.step: read_metrics(entry.path, entry.step) for entry in list_checkpoints(tmp_path)}
    assert {step: metrics["eval_loss"] for step, metrics in found.items()} == {5: 2.0, 10: 1.0, 15: 3.0, 20: 4.0}
    run = RunDirectory(tmp_path)
    assert apply_retention(run, keep="best=2, consistent=no") is None
    assert steps_of(run) == [5, 10, 20]
    run.close()


# Optimizer state


def contents_of(run: RunDirectory) -> list[str]:
    return [open_checkpoint(entry.path).manifest.contents for entry in list_checkpoints(run.path)]


def test_old_optimizer_state_goes_and_all_stay_whole(run: RunDirectory) -> None:
    assert apply_retention(run, keep=Keep(optimizer=2)) is None
    assert contents_of(run) == ["full", "weights", "weights", "full", "full"]
    assert all(verify_checkpoint(entry.path).is_good for entry in list_checkpoints(run.path))
    assert not any(verify_checkpoint(entry.path).unlisted for entry in list_checkpoints(run.path))
    digests = [open_checkpoint(entry.path).digest for entry in list_checkpoints(run.path)]
    assert apply_retention(run, keep=Keep(optimizer=2)) is None
    assert digests == [open_checkpoint(entry.path).digest for entry in list_checkpoints(run.path)]


def test_damaged_checkpoint_keeps_its_state_and_the_others_are_thinned(run: RunDirectory) -> None:
    path = run.path / "checkpoint-2" / "model-norm.safetensors"
    path.unlink()
    error = apply_retention(run, keep=Keep(optimizer=2))
    assert isinstance(error, NotFoundError)
    assert error.path == str(path)
    assert contents_of(run) == ["full", "full", "weights", "full", "full"]


def test_disk_that_fails_stops_thinning(tmp_path: Path) -> None:
    save_run(tmp_path, range(1, 5))
    filesystem: Any = FaultyFileSystem(refused={"exchange": errno.EIO})
    run = RunDirectory(tmp_path, filesystem)
    error = apply_retention(run, keep=Keep(optimizer=1, consistent=False))
    assert isinstance(error, WriteError)
    assert filesystem.calls.count("exchange") == 1
    assert contents_of(run) == ["full"] * 4
    run.close()


@pytest.mark.parametrize(("rest", "expected"), [("q8", "full"), ("compact", "weights")])
def test_weights_in_codes_keep_their_state(tmp_path: Path, rest: str, expected: str) -> None:
    """Codes of q8 hold what the newest weights differ by; those of compact, of BF16 weights, nothing but state."""
    model = build_llama(num_layers=2, width=64, dtype=torch.bfloat16)
    save_run(tmp_path, range(1, 4), model=model, rest=rest)
    coded = open_checkpoint(tmp_path / "checkpoint-2").manifest
    assert {layer.encoding.base for layer in coded.layers if layer.encoding is not None} == {
        "exact" if rest == "q8" else "none"
    }
    run = RunDirectory(tmp_path)
    assert apply_retention(run, keep=Keep(optimizer=1)) is None
    run.close()
    assert contents_of(run) == ["full", expected, "full"]
    assert verify_checkpoint(tmp_path / "checkpoint-2").is_good
    assert load_weights(tmp_path / "checkpoint-2").keys()


def load_weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in checkpoint.glob("model-*") for name, tensor in load_file(path).items()}


def test_stock_tools_read_a_thinned_checkpoint(tmp_path: Path) -> None:
    training = Training(tmp_path, strategy="full")
    expected = {}
    for step in (1, 2, 3):
        training.save(step)
        expected[step] = snapshot_model(training.model)
    training.close()
    run = RunDirectory(tmp_path)
    assert apply_retention(run, keep=Keep(optimizer=1, consistent=False)) is None
    run.close()
    assert contents_of(run) == ["weights", "weights", "full"]
    for step in (1, 2):
        path = tmp_path / f"checkpoint-{step}"
        training.model.config.save_pretrained(path)
        assert_same(snapshot_model(AutoModelForCausalLM.from_pretrained(path)), expected[step])


@pytest.mark.parametrize("kinds", [("weights", "optimizer"), ("optimizer",)], ids=["all in parts", "state in parts"])
def test_a_checkpoint_in_parts_is_thinned(tmp_path: Path, kinds: tuple[str, ...]) -> None:
    whole = save_whole(tmp_path / "whole")
    run = RunDirectory(tmp_path / "run")
    parts = cut_checkpoint(whole, run.path / "checkpoint-7", boxes(2, 2), kinds=kinds)
    assert any(part.optimizer for layer in parts.manifest.layers for part in layer.parts)
    thin_checkpoint(run, parts.path)
    run.close()
    report = verify_checkpoint(parts.path)
    assert (report.problems, report.unlisted) == ((), ())
    assert not (parts.path / "optimizer").exists()
    thinned = open_checkpoint(parts.path).manifest
    assert (thinned.contents, thinned.world) == ("weights", parts.manifest.world)
    assert any(layer.parts for layer in thinned.layers) == ("weights" in kinds)
    export(parts.path, tmp_path / "of parts", to="tailored")
    assert_same(load_weights(tmp_path / "of parts"), load_weights(whole.path))


def test_thinning_what_is_thin_changes_nothing(run: RunDirectory) -> None:
    path = run.path / "checkpoint-2"
    thin_checkpoint(run, path)
    inode = path.stat().st_ino
    thin_checkpoint(run, path)
    assert path.stat().st_ino == inode


class Resuming:
    """A training that goes on from a run."""

    def __init__(self, directory: Path) -> None:
        self.model = build_llama(num_layers=2)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        self.run = Run(directory, self.model, self.optimizer)

    def train_to(self, step: int) -> None:
        rows = token_rows(2)
        self.model(input_ids=rows, labels=rows).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.run.save(step).result()


def test_a_run_goes_on_from_the_newest_that_has_its_state(tmp_path: Path) -> None:
    first = Resuming(tmp_path)
    for step in (1, 2, 3):
        first.train_to(step)
    expected = snapshot_model(first.model) | snapshot_optimizer(first.model, first.optimizer)
    first.run.close()
    run = RunDirectory(tmp_path)
    assert apply_retention(run, keep=Keep(optimizer=1, consistent=False)) is None
    run.close()

    again = Resuming(tmp_path)
    with pytest.raises(IncompleteError, match="holds weights alone") as caught:
        again.run.resume(tmp_path / "checkpoint-2")
    assert caught.value.kind == "weights-only"
    assert again.run.resume() == 3
    assert_same(snapshot_model(again.model) | snapshot_optimizer(again.model, again.optimizer), expected)
    again.train_to(4)
    again.run.close()
    parent = open_checkpoint(tmp_path / "checkpoint-4").manifest.parent
    assert parent is not None
    assert (parent.step, parent.digest) == (3, open_checkpoint(tmp_path / "checkpoint-3").digest)
    assert all(verify_checkpoint(entry.path).is_good for entry in list_checkpoints(tmp_path))
    # A recipe over the run takes weights from wherever they are.
    assert "checkpoint-4" in recipe_of_run(tmp_path, None)
