"""Arguments of transformers' Trainer mean what they always meant."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers.trainer
from transformers import Trainer, TrainerCallback, TrainerState
from transformers.trainer_callback import ExportableState

from llmtailor.checkpoint import open_checkpoint
from llmtailor.errors import IncompleteError, LockedError, NotFoundError, QuarantineWarning, SupersededWarning
from llmtailor.integrations.transformers import TailorMixin, tailor
from llmtailor.verify import verify_checkpoint
from tiny_models import (
    KeepStates,
    assert_same,
    build_llama,
    build_trainer,
    losses,
    scripted_trainer,
    snapshot_model,
    token_examples,
)


class MixedTrainer(TailorMixin, Trainer):
    pass


def tailored_script(directory: Path, script: list[float], strategy: str = "full", **options: Any) -> Any:
    return tailor(scripted_trainer(directory, script, **options), strategy=strategy)


def steps_in(directory: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("checkpoint-")) for path in directory.glob("checkpoint-*"))


def test_save_steps(tmp_path: Path) -> None:
    trainer = tailor(build_trainer(tmp_path, max_steps=10, save_steps=4))
    trainer.train()
    assert steps_in(tmp_path) == [4, 8, 10]
    assert all(verify_checkpoint(tmp_path / f"checkpoint-{step}").is_good for step in (4, 8, 10))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"save_strategy": "epoch", "num_train_epochs": 2, "max_steps": -1}, [24, 48]),
        ({"save_strategy": "no"}, []),
    ],
    ids=["epoch", "no"],
)
def test_save_strategy(options: dict[str, Any], expected: list[int], tmp_path: Path) -> None:
    tailor(build_trainer(tmp_path, **options)).train()
    assert steps_in(tmp_path) == expected


def test_save_strategy_best(tmp_path: Path) -> None:
    trainer = tailored_script(tmp_path, [3.0, 4.0, 1.0, 2.0], save_strategy="best")
    trainer.train()
    assert steps_in(tmp_path) == [5, 15]
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-15")


@pytest.mark.parametrize(("limit", "expected"), [(1, [30]), (2, [25, 30]), (None, [5, 10, 15, 20, 25, 30])])
def test_save_total_limit(limit: int | None, expected: list[int], tmp_path: Path) -> None:
    tailor(build_trainer(tmp_path, save_total_limit=limit)).train()
    assert steps_in(tmp_path) == expected


def test_save_total_limit_leaves_whole_checkpoints_whole(tmp_path: Path) -> None:
    tailor(build_trainer(tmp_path, save_total_limit=2), strategy="parity", keep_consistent=False).train()
    assert steps_in(tmp_path) == [25, 30]
    for step in (25, 30):
        assert verify_checkpoint(tmp_path / f"checkpoint-{step}").is_good
        assert not open_checkpoint(tmp_path / f"checkpoint-{step}").manifest.is_consistent


@pytest.mark.parametrize(("limit", "expected"), [(1, [10]), (2, [10, 20]), (3, [10, 15, 20])])
def test_save_total_limit_keeps_the_best_model(limit: int, expected: list[int], tmp_path: Path) -> None:
    trainer = tailored_script(tmp_path, [3.0, 1.0, 2.0, 4.0], save_total_limit=limit)
    trainer.train()
    assert steps_in(tmp_path) == expected


def test_save_total_limit_keeps_the_best_model_of_a_run_that_was_moved(tmp_path: Path) -> None:
    tailored_script(tmp_path / "here", [1.0, 2.0], save_total_limit=2).train()
    (tmp_path / "here").rename(tmp_path / "there")

    trainer = tailored_script(tmp_path / "there", [3.0, 4.0], save_total_limit=2, max_steps=20)
    trainer.train(resume_from_checkpoint=True)

    assert steps_in(tmp_path / "there") == [5, 20]
    assert trainer.state.best_model_checkpoint == str(tmp_path / "there/checkpoint-5")


@pytest.mark.parametrize("strategy", ["full", "parity"])
def test_best_model_is_loaded_at_the_end(strategy: str, tmp_path: Path) -> None:
    trainer = tailored_script(tmp_path, [3.0, 1.0, 2.0, 4.0], strategy)
    states = KeepStates()
    trainer.add_callback(states)
    trainer.train()

    best = tmp_path / "checkpoint-10"
    manifest = open_checkpoint(best).manifest
    step_of = {layer.name: layer.step for layer in manifest.layers}
    expected = {each.fqn: states.models[step_of[each.layer]][each.fqn] for each in manifest.tensors}
    assert_same(snapshot_model(trainer.model), expected)
    assert trainer.state.best_model_checkpoint == str(best)
    for step in (10, 15, 20):
        state = TrainerState.load_from_json(str(tmp_path / f"checkpoint-{step}" / "trainer_state.json"))
        assert state.best_model_checkpoint == str(best), "the published path, never one in staging"
        assert state.best_global_step == 10


def test_save_only_model_leaves_the_optimizer_out_and_cannot_be_resumed(tmp_path: Path) -> None:
    trainer = tailor(build_trainer(tmp_path, max_steps=10, save_only_model=True))
    trainer.train()
    names = set(os.listdir(tmp_path / "checkpoint-10"))
    assert not names & {"optimizer", "optimizer.pt", "scheduler.pt", "rng_state.pth"}
    assert_same(snapshot_model(build_loaded(tmp_path / "checkpoint-10")), snapshot_model(trainer.model))

    again = tailor(build_trainer(tmp_path, max_steps=20))
    for wanted in (True, str(tmp_path / "checkpoint-10")):
        with pytest.raises(IncompleteError) as caught:
            again.train(resume_from_checkpoint=wanted)
        assert caught.value.kind == "weights-only"


def build_loaded(path: Path) -> torch.nn.Module:
    return transformers.AutoModelForCausalLM.from_pretrained(path)


def test_resume_from_a_path_takes_that_checkpoint(tmp_path: Path) -> None:
    whole = tailor(build_trainer(tmp_path / "whole"))
    whole.train()
    tailor(build_trainer(tmp_path / "run", stop=20)).train()

    resumed = tailor(build_trainer(tmp_path / "run"))
    with pytest.warns(SupersededWarning):
        resumed.train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-10"))

    assert losses(resumed) == losses(whole)
    assert_same(snapshot_model(resumed.model), snapshot_model(whole.model))
    assert (tmp_path / "run/_checkpoint-15.superseded").is_dir()


def test_resume_with_nothing_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError) as caught:
        tailor(build_trainer(tmp_path)).train(resume_from_checkpoint=True)
    assert caught.value.kind == "empty-run"
    assert str(tmp_path) in str(caught.value)


def test_resume_from_a_stock_checkpoint_goes_on_exactly_and_saves_in_full_first(tmp_path: Path) -> None:
    whole = build_trainer(tmp_path / "whole", stop=30)
    whole.train()
    build_trainer(tmp_path / "run", stop=10).train()

    resumed = tailor(build_trainer(tmp_path / "run"), strategy="parity")
    resumed.train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-10"))

    assert losses(resumed) == losses(whole)
    assert_same(snapshot_model(resumed.model), snapshot_model(whole.model))
    first = open_checkpoint(tmp_path / "run/checkpoint-15").manifest
    assert first.is_consistent
    assert first.parent is None
    assert not open_checkpoint(tmp_path / "run/checkpoint-20").manifest.is_consistent
    assert not (tmp_path / "run/checkpoint-10/tailor.json").exists(), "the stock checkpoint was left alone"


def test_resume_true_does_not_take_a_stock_checkpoint(tmp_path: Path) -> None:
    build_trainer(tmp_path, max_steps=5).train()
    with pytest.warns(QuarantineWarning, match="no manifest"), pytest.raises(NotFoundError) as caught:
        tailor(build_trainer(tmp_path)).train(resume_from_checkpoint=True)
    assert "path" in str(caught.value.hint)


def test_resume_falls_back_past_a_damaged_checkpoint(tmp_path: Path) -> None:
    whole = tailor(build_trainer(tmp_path))
    whole.train()
    victim = tmp_path / "checkpoint-30/model-norm.safetensors"
    victim.chmod(0o644)
    victim.write_bytes(victim.read_bytes()[:-1] + b"x")

    resumed = tailor(build_trainer(tmp_path))
    with pytest.warns(QuarantineWarning, match="checkpoint-30"):
        resumed.train(resume_from_checkpoint=True)
    assert_same(snapshot_model(resumed.model), snapshot_model(whole.model))


class Counting(TrainerCallback, ExportableState):
    def __init__(self, start: int = 0) -> None:
        self.start = start
        self.count = 0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.count += 1

    def state(self) -> dict[str, Any]:
        return {"args": {"start": self.start}, "attributes": {"count": self.count}}


def test_callback_states_are_restored(tmp_path: Path) -> None:
    tailor(build_trainer(tmp_path, callbacks=[Counting(3)], stop=10)).train()
    resumed = tailor(build_trainer(tmp_path, callbacks=[Counting()], restore_callback_states_from_checkpoint=True))
    resumed.train(resume_from_checkpoint=True)
    found = next(each for each in resumed.callback_handler.callbacks if isinstance(each, Counting))
    assert (found.start, found.count) == (3, 30)


@pytest.mark.filterwarnings("ignore::llmtailor.errors.SupersededWarning")
def test_train_twice_on_the_same_object(tmp_path: Path) -> None:
    trainer = tailor(build_trainer(tmp_path, max_steps=10), strategy="parity")
    trainer.train()
    first = open_checkpoint(tmp_path / "checkpoint-10").manifest
    trainer.train()
    second = open_checkpoint(tmp_path / "checkpoint-10").manifest
    assert first.run_id != second.run_id
    assert open_checkpoint(tmp_path / "checkpoint-5").manifest.is_consistent, "a new run begins in full"

    trainer.args.max_steps = 20
    trainer.train(resume_from_checkpoint=True)
    third = open_checkpoint(tmp_path / "checkpoint-20").manifest
    assert third.run_id == second.run_id
    assert third.save_index == 3


@pytest.mark.filterwarnings("ignore::llmtailor.errors.SupersededWarning")
def test_checkpoint_saved_by_hand_after_training_goes_on_the_run(tmp_path: Path) -> None:
    trainer = tailor(build_trainer(tmp_path, max_steps=10, save_steps=4), strategy="parity")
    trainer.train()
    trainer.state.global_step = 11
    trainer._save_checkpoint(trainer.model, trial=None)
    manifest = open_checkpoint(tmp_path / "checkpoint-11").manifest
    assert manifest.parent is not None
    assert manifest.parent.step == 10
    assert trainer.train().global_step == 10, "the run was let go of"


@pytest.mark.filterwarnings("ignore::llmtailor.errors.SupersededWarning")
@pytest.mark.parametrize("make", ["tailor", "mixin"])
def test_training_evaluation_and_logs_are_those_of_the_stock_trainer(make: str, tmp_path: Path) -> None:
    options = {"max_steps": 10, "eval_strategy": "steps", "eval_steps": 5}
    extra = {"eval_dataset": token_examples(8)}
    stock = build_trainer(tmp_path / "stock", extra=extra, **options)
    stock.train()
    if make == "tailor":
        ours = tailor(build_trainer(tmp_path / "ours", extra=extra, **options), strategy="parity")
    else:
        ours = build_trainer(
            tmp_path / "ours", trainer_class=MixedTrainer, extra={**extra, "strategy": "parity"}, **options
        )
    ours.train()

    def logs(trainer: Trainer) -> list[dict[str, Any]]:
        timings = ("runtime", "per_second")
        return [
            {key: value for key, value in entry.items() if not key.endswith(timings)}
            for entry in trainer.state.log_history
            if "checkpoint_step" not in entry
        ]

    assert logs(ours) == logs(stock)
    costs = [entry for entry in ours.state.log_history if "checkpoint_step" in entry]
    assert [entry["checkpoint_step"] for entry in costs] == [5, 10]
    assert all(entry["checkpoint_stall_secs"] > 0 and entry["checkpoint_gb_per_sec"] > 0 for entry in costs)
    assert_same(snapshot_model(ours.model), snapshot_model(stock.model))
    names = {path.name for path in (tmp_path / "stock/checkpoint-10").iterdir()}
    names -= {"model.safetensors", "optimizer.pt"}
    assert names <= {path.name for path in (tmp_path / "ours/checkpoint-10").iterdir()}


def test_model_with_frozen_layers(tmp_path: Path) -> None:
    def build() -> torch.nn.Module:
        model = build_llama()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("layers.0." not in name and "embed" not in name)
        return model

    whole = tailor(build_trainer(tmp_path / "whole", model=build()))
    whole.train()
    tailor(build_trainer(tmp_path / "run", model=build(), stop=10)).train()
    resumed = tailor(build_trainer(tmp_path / "run", model=build()))
    resumed.train(resume_from_checkpoint=True)
    assert losses(resumed) == losses(whole)
    assert_same(snapshot_model(resumed.model), snapshot_model(whole.model))
    manifest = open_checkpoint(tmp_path / "run/checkpoint-30").manifest
    assert {layer.name for layer in manifest.layers if layer.optimizer is None} == {"layers.0", "embed_tokens"}
    assert build_loaded(tmp_path / "run/checkpoint-30") is not None


@pytest.mark.slow
def test_torch_compile(tmp_path: Path) -> None:
    options = {"torch_compile": True, "torch_compile_backend": "eager"}
    whole = tailor(build_trainer(tmp_path / "whole", **options))
    whole.train()
    tailor(build_trainer(tmp_path / "run", stop=10, **options)).train()
    resumed = tailor(build_trainer(tmp_path / "run", **options))
    resumed.train(resume_from_checkpoint=True)
    assert losses(resumed) == losses(whole)
    assert_same(snapshot_model(build_loaded(tmp_path / "run/checkpoint-30")), snapshot_model(resumed.model))


@pytest.mark.slow
def test_second_process_on_the_same_directory_is_refused(tmp_path: Path) -> None:
    script = (
        "import sys\n"
        "from tiny_models import build_trainer\n"
        "from llmtailor.errors import LockedError\n"
        "from llmtailor.integrations.transformers import tailor\n"
        "try:\n"
        "    tailor(build_trainer(sys.argv[1])).train()\n"
        "except LockedError as err:\n"
        "    print(err)\n"
    )
    path = os.pathsep.join(entry for entry in sys.path if entry)
    heard = []

    class StartSecond(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            command = [sys.executable, "-c", script, str(tmp_path)]
            done = subprocess.run(
                command, check=True, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}
            )
            heard.append(done.stdout)

    tailor(build_trainer(tmp_path, max_steps=5, callbacks=[StartSecond()])).train()
    assert f"held by process {os.getpid()} on host {os.uname().nodename}" in heard[0]


def test_two_trainers_of_one_process_on_the_same_directory_are_refused(tmp_path: Path) -> None:
    class StartSecond(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            with pytest.raises(LockedError):
                tailor(build_trainer(tmp_path, max_steps=5)).train()

    tailor(build_trainer(tmp_path, max_steps=5, callbacks=[StartSecond()])).train()
    assert steps_in(tmp_path) == [5]


def test_saves_show_no_progress_bar_and_leave_the_setting_as_it_was(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from transformers.utils import logging

    assert logging.is_progress_bar_enabled()
    tailor(build_trainer(tmp_path, max_steps=5)).train()
    assert logging.is_progress_bar_enabled()
    assert "Writing model shards" not in capfd.readouterr().err


class FakeHub:
    """Remembers what a Trainer sends to the hub."""

    def __init__(self) -> None:
        self.pushes: list[tuple[str | None, dict[str, bytes]]] = []
        self.ignored: list[str] = []

    def create_repo(self, name: str, **kwargs: Any) -> Any:
        return SimpleNamespace(repo_id=f"me/{name}")

    def upload_folder(self, *, folder_path: str, path_in_repo: str | None = None, **kwargs: Any) -> Any:
        files = {path.name: path.read_bytes() for path in Path(folder_path).iterdir() if path.is_file()}
        self.pushes.append((path_in_repo, files))
        self.ignored = kwargs.get("ignore_patterns", self.ignored)
        return SimpleNamespace(done=lambda: True, is_done=lambda: True, result=lambda: None)


@pytest.fixture
def users_directory() -> Iterator[Path]:
    """A directory, and for the test no root's rights: root may write to read-only files, a user may not."""
    with tempfile.TemporaryDirectory() as name:
        is_root = os.geteuid() == 0
        if is_root:
            os.chmod(name, 0o777)
            os.seteuid(65534)
        yield Path(name)
        if is_root:
            os.seteuid(0)


def test_push_to_hub_sends_the_published_checkpoint(users_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = FakeHub()
    monkeypatch.setattr(transformers.trainer, "hf_api", lambda: hub)
    out = users_directory / "run"
    options = {"push_to_hub": True, "hub_strategy": "all_checkpoints", "hub_model_id": "me/run", "hub_token": "x"}
    trainer = tailor(build_trainer(out, max_steps=15, **options), strategy="parity")
    trainer.train()
    trainer.save_model()  # writes what was copied from read-only files

    checkpoints = {path: files for path, files in hub.pushes if path is not None}
    assert set(checkpoints) == {"checkpoint-5", "checkpoint-10", "checkpoint-15"}
    for name, files in checkpoints.items():
        assert files["tailor.json"] == (out / name / "tailor.json").read_bytes(), "it was published before the push"
    last = [files for path, files in hub.pushes if path is None][2]
    for file in (out / "checkpoint-15").glob("model-*.safetensors"):
        assert last[file.name] == file.read_bytes()


@pytest.mark.filterwarnings("ignore::llmtailor.errors.SupersededWarning")
def test_what_was_set_aside_is_never_removed(tmp_path: Path) -> None:
    tailored_script(tmp_path, [2.0, 1.0]).train()
    tailored_script(tmp_path, [2.0, 1.0, 3.0], save_total_limit=1).train()
    assert (tmp_path / "_checkpoint-5.superseded").is_dir()


def test_push_to_hub_leaves_the_lock_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.utils import filter_repo_objects

    hub = FakeHub()
    monkeypatch.setattr(transformers.trainer, "hf_api", lambda: hub)
    tailor(build_trainer(tmp_path, max_steps=5, push_to_hub=True, hub_model_id="me/run", hub_token="x")).train()
    present = [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()]
    pushed = list(filter_repo_objects(present, ignore_patterns=hub.ignored))
    assert "config.json" in pushed
    assert not [name for name in pushed if "staging" in name]
