"""Subclasses of the Trainer, and models wrapped by PEFT."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    PreTrainedTokenizerFast,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
)

from llmtailor import Run
from llmtailor.checkpoint import open_checkpoint
from llmtailor.errors import StrategyIgnoredWarning
from llmtailor.integrations.transformers import TailorMixin, tailor
from llmtailor.verify import verify_checkpoint
from tiny_models import (
    ScriptedTrainer,
    StopAt,
    assert_same,
    build_llama,
    build_qwen2,
    build_trainer,
    losses,
    scripted_trainer,
    snapshot_model,
    snapshot_optimizer,
    token_examples,
    token_rows,
)

peft = pytest.importorskip("peft")

# peft 0.21 and trl 1.16 still say "gradient_checkpointing" to transformers.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")


def assert_exact(resumed: Trainer, whole: Trainer) -> None:
    assert losses(resumed) == losses(whole)
    assert len(losses(whole)) == whole.state.max_steps
    assert_same(snapshot_model(resumed.model), snapshot_model(whole.model))
    ours, theirs = (
        snapshot_optimizer(trainer.model, getattr(trainer.optimizer, "optimizer", trainer.optimizer))
        for trainer in (resumed, whole)
    )
    assert_same(ours, theirs)


def assert_resumes(make: Callable[[Path, int | None], Trainer], tmp_path: Path) -> Trainer:
    """Trains whole, and in two halves in another directory; returns the trainer of the second half."""
    whole = make(tmp_path / "whole", None)
    whole.train()
    make(tmp_path / "run", 5).train()
    resumed = make(tmp_path / "run", None)
    resumed.train(resume_from_checkpoint=True)
    assert_exact(resumed, whole)
    return resumed


# ---- Seq2Seq ----


def test_seq2seq_trainer(tmp_path: Path) -> None:
    def make(directory: Path, stop: int | None) -> Trainer:
        torch.manual_seed(0)
        config = T5Config(
            vocab_size=64, d_model=16, d_ff=24, d_kv=4, num_layers=2, num_heads=4, decoder_start_token_id=0
        )
        arguments = Seq2SeqTrainingArguments(
            output_dir=str(directory),
            max_steps=15,
            save_steps=5,
            logging_steps=1,
            per_device_train_batch_size=2,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        trainer = Seq2SeqTrainer(
            model=T5ForConditionalGeneration(config),
            args=arguments,
            train_dataset=token_examples(),
            callbacks=[] if stop is None else [StopAt(stop)],
        )
        return tailor(trainer)

    resumed = assert_resumes(make, tmp_path)
    assert isinstance(resumed, Seq2SeqTrainer)
    loaded = T5ForConditionalGeneration.from_pretrained(tmp_path / "run/checkpoint-15")
    assert_same(snapshot_model(loaded), snapshot_model(resumed.model))


# ---- TRL ----


def word_tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    words = {f"w{number}": number for number in range(61)} | {"<pad>": 61, "<eos>": 62, "<unk>": 63}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tailor", "mixin", "lora"])
def test_sft_trainer(kind: str, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")

    class MixedTrainer(TailorMixin, trl.SFTTrainer):
        pass

    rows = token_rows(24).clamp(max=60).tolist()
    dataset = datasets.Dataset.from_dict({"text": [" ".join(f"w{number}" for number in row) for row in rows]})

    def make(directory: Path, stop: int | None) -> Any:
        arguments = trl.SFTConfig(
            output_dir=str(directory),
            max_steps=15,
            save_steps=5,
            logging_steps=1,
            per_device_train_batch_size=2,
            report_to=[],
            use_cpu=True,
            bf16=False,
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        options: dict[str, Any] = {
            "model": build_llama(),
            "args": arguments,
            "train_dataset": dataset,
            "processing_class": word_tokenizer(),
            "callbacks": [] if stop is None else [StopAt(stop)],
        }
        if kind == "lora":
            options["peft_config"] = lora_config()
        if kind == "mixin":
            return MixedTrainer(**options, strategy="full")
        return tailor(trl.SFTTrainer(**options))

    resumed = assert_resumes(make, tmp_path)
    assert "SFT" in (tmp_path / "run/README.md").read_text(), "its model card is still written"
    checkpoint = tmp_path / "run/checkpoint-15"
    assert (checkpoint / "tokenizer.json").is_file()
    if kind == "lora":
        assert_adapter_is_loaded_by_peft(checkpoint, build_llama(), resumed.model)
    else:
        loaded = AutoModelForCausalLM.from_pretrained(checkpoint)
        assert_same(snapshot_model(loaded), snapshot_model(resumed.model))


# ---- PEFT ----


def lora_config(**options: Any) -> Any:
    defaults = {"r": 2, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", "lora_dropout": 0.1}
    return peft.LoraConfig(**(defaults | options))


def build_lora(**options: Any) -> Any:
    return peft.get_peft_model(build_llama(), lora_config(**options))


def assert_adapter_is_loaded_by_peft(checkpoint: Path, base: torch.nn.Module, trained: Any) -> None:
    loaded = peft.PeftModel.from_pretrained(base, checkpoint)
    expected = peft.get_peft_model_state_dict(trained)
    assert_same(peft.get_peft_model_state_dict(loaded), expected)


def assert_holds_the_adapter_alone(checkpoint: Path, trained: Any) -> None:
    held = {tensor.fqn for tensor in open_checkpoint(checkpoint).manifest.tensors}
    assert held == {name for name, parameter in trained.named_parameters() if parameter.requires_grad}
    assert not (checkpoint / "model.safetensors.index.json").exists()
    assert verify_checkpoint(checkpoint).is_good


@pytest.mark.parametrize("options", [{}, {"modules_to_save": ["lm_head"]}], ids=["lora", "and-a-head"])
def test_lora_in_a_trainer(options: dict[str, Any], tmp_path: Path) -> None:
    def make(directory: Path, stop: int | None) -> Trainer:
        return tailor(build_trainer(directory, model=build_lora(**options), stop=stop, max_steps=15))

    resumed = assert_resumes(make, tmp_path)
    checkpoint = tmp_path / "run/checkpoint-15"
    assert_holds_the_adapter_alone(checkpoint, resumed.model)
    assert_adapter_is_loaded_by_peft(checkpoint, build_llama(), resumed.model)


def test_best_lora_is_loaded_at_the_end(tmp_path: Path) -> None:
    trainer = tailor(scripted_trainer(tmp_path, [1.0, 2.0, 3.0], model=build_lora()))
    trainer.train()
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-5")
    assert_adapter_is_loaded_by_peft(tmp_path / "checkpoint-5", build_llama(), trainer.model)


def test_lora_in_a_plain_loop(tmp_path: Path) -> None:
    def train(directory: Path, until: int) -> tuple[Any, Any]:
        model = build_lora()
        optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=1e-2)
        with Run(directory, model, optimizer, save_steps=4) as run:
            model.train()
            for step in range(run.resume(), until):
                batch = token_rows()[step % 20 : step % 20 + 2]
                model(input_ids=batch, labels=batch).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                run.step(step + 1)
        return model, optimizer

    torch.manual_seed(1)
    whole, whole_optimizer = train(tmp_path / "whole", 12)
    torch.manual_seed(1)
    train(tmp_path / "run", 4)
    resumed, optimizer = train(tmp_path / "run", 12)

    assert_same(snapshot_model(resumed), snapshot_model(whole))
    assert_same(snapshot_optimizer(resumed, optimizer), snapshot_optimizer(whole, whole_optimizer))
    checkpoint = tmp_path / "run/checkpoint-12"
    assert_holds_the_adapter_alone(checkpoint, resumed)
    assert_adapter_is_loaded_by_peft(checkpoint, build_llama(), resumed)


def test_lora_is_saved_whole_whatever_the_strategy(tmp_path: Path) -> None:
    trainer = tailor(build_trainer(tmp_path, model=build_lora(), max_steps=15), strategy="parity")
    with pytest.warns(StrategyIgnoredWarning, match="adapters"):
        trainer.train()
    manifest = open_checkpoint(tmp_path / "checkpoint-15").manifest
    assert manifest.is_consistent
    assert manifest.strategy == "full()"


# ---- In place ----


def test_tailor_keeps_what_the_class_overrides(tmp_path: Path) -> None:
    calls = []

    class OwnTrainer(Trainer):
        def _save_checkpoint(self, model: Any, trial: Any) -> None:
            calls.append("before")
            super()._save_checkpoint(model, trial)

        def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
            super()._save(output_dir, state_dict)
            assert output_dir is not None
            (Path(output_dir) / "extra.txt").write_text("mine")

    trainer = tailor(build_trainer(tmp_path, trainer_class=OwnTrainer, model=build_qwen2(), max_steps=5))
    assert isinstance(trainer, OwnTrainer)
    trainer.train()
    assert calls == ["before"]
    assert (tmp_path / "checkpoint-5/extra.txt").read_text() == "mine"
    assert "extra.txt" in {file.path for file in open_checkpoint(tmp_path / "checkpoint-5").manifest.files}
    assert "model.safetensors" not in os.listdir(tmp_path / "checkpoint-5")


class Faithful(Trainer):
    """Saves something beside what the Trainer saves, wherever it can, and restores it."""

    restored: tuple[str, ...] = ()

    def _note(self, directory: str | None, name: str) -> None:
        assert directory is not None
        (Path(directory) / f"{name}.txt").write_text(str(self.state.global_step))

    def _restore(self, directory: str, name: str) -> None:
        self.restored += (f"{name} {(Path(directory) / f'{name}.txt').read_text()}",)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        super().save_model(output_dir, _internal_call)
        self._note(output_dir, "model")

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        self._note(output_dir, "optimizer")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._restore(resume_from_checkpoint, "model")

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self._restore(checkpoint, "optimizer")


class MixedFaithful(TailorMixin, Faithful):
    pass


@pytest.mark.parametrize("mixed", [False, True], ids=["tailor", "mixin"])
def test_subclass_saves_and_restores_what_is_its_own(mixed: bool, tmp_path: Path) -> None:
    def make(directory: Path, stop: int | None) -> Trainer:
        options: dict[str, Any] = {"stop": stop, "max_steps": 10}
        if mixed:
            return build_trainer(directory, trainer_class=MixedFaithful, **options)
        return tailor(build_trainer(directory, trainer_class=Faithful, **options))

    resumed: Any = assert_resumes(make, tmp_path)
    assert resumed.restored == ("model 5", "optimizer 5")
    files = set(os.listdir(tmp_path / "run/checkpoint-10"))
    assert {"model.txt", "optimizer.txt", "scheduler.pt"} <= files
    assert not {"model.safetensors", "optimizer.pt"} & files
    assert verify_checkpoint(tmp_path / "run/checkpoint-10").is_good


def test_subclass_loads_the_best_model(tmp_path: Path) -> None:
    class Telling(ScriptedTrainer):
        bests: tuple[str, ...] = ()

        def _load_best_model(self) -> None:
            super()._load_best_model()
            self.bests += (str(self.state.best_model_checkpoint),)

    trainer = scripted_trainer(tmp_path, [1.0, 2.0])
    trainer.__class__ = Telling
    tailor(trainer).train()
    assert trainer.bests == (str(tmp_path / "checkpoint-5"),)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-5")
    assert_same(snapshot_model(loaded), snapshot_model(trainer.model))


def test_subclass_that_does_not_load_the_optimizer_is_told_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Forgetful(Trainer):
        def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
            pass

    tailor(build_trainer(tmp_path, trainer_class=Forgetful, max_steps=10, stop=5)).train()
    resumed = tailor(build_trainer(tmp_path, trainer_class=Forgetful, max_steps=10))
    resumed.train(resume_from_checkpoint=True)
    said = [record.getMessage() for record in caplog.records if "does not load" in record.getMessage()]
    assert len(said) == 1
    assert said[0].startswith(f"Forgetful does not load the optimizer of {tmp_path / 'checkpoint-5'}")


def test_tailored_classes_are_trainers() -> None:
    assert [each.__name__ for each in MixedFaithful.__mro__[:-1] if each.__module__ != "builtins"][-3:] == [
        "Faithful",
        "TrainerFloor",
        "Trainer",
    ]

    class Plain(TailorMixin, Trainer):
        pass

    class Again(Plain):
        pass

    assert issubclass(Again, Trainer)
    assert [each.__name__ for each in Again.__mro__].count("TrainerFloor") == 1


def test_tailor_twice_changes_the_options(tmp_path: Path) -> None:
    trainer = tailor(tailor(build_trainer(tmp_path, max_steps=10)), strategy="parity")
    assert type(trainer).__mro__.count(TailorMixin) == 1
    trainer.train()
    assert open_checkpoint(tmp_path / "checkpoint-10").manifest.strategy == "parity()"
