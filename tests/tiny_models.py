"""Tiny models, data and trainings that the tests of resume, stock readers and integrations share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

# Tensors of a few hundred elements: a second thread only makes them slower, several times so on a busy machine.
torch.set_num_threads(1)

VOCABULARY = 64

Snapshot = dict[str, torch.Tensor]


def build_llama(
    *,
    num_layers: int = 4,
    width: int = 16,
    tied: bool = False,
    dropout: float = 0.1,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> PreTrainedModel:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=24,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_dropout=dropout,
        tie_word_embeddings=tied,
    )
    return _build(config, dtype=dtype, seed=seed)


def build_qwen2(*, dtype: torch.dtype = torch.float32, seed: int = 0) -> PreTrainedModel:
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_dropout=0.1,
        tie_word_embeddings=True,
    )
    return _build(config, dtype=dtype, seed=seed)


def _build(config: PretrainedConfig, *, dtype: torch.dtype, seed: int) -> PreTrainedModel:
    torch.manual_seed(seed)
    # Eager attention: the only kernel whose dropout is sure to draw from the CPU's generator.
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    return model.to(dtype)


def token_rows(count: int = 48, length: int = 6) -> torch.Tensor:
    """Rows of token ids, all different."""
    generator = torch.Generator().manual_seed(7)
    return torch.randint(3, VOCABULARY, (count, length), generator=generator)


def token_examples(count: int = 48) -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": row, "labels": row.clone()} for row in token_rows(count)]


def snapshot_model(model: torch.nn.Module) -> Snapshot:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def snapshot_optimizer(model: torch.nn.Module, *optimizers: torch.optim.Optimizer) -> dict[str, Any]:
    """``<fqn>.<leaf>`` -> value, for all that the optimizers remember."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    state: dict[str, Any] = {}
    for optimizer in optimizers:
        for parameter, leaves in optimizer.state.items():
            for leaf, value in leaves.items():
                kept = value.detach().clone() if isinstance(value, torch.Tensor) else value
                state[f"{names[parameter]}.{leaf}"] = kept
    return state


def assert_same(found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """The same keys, and every value the same bit for bit."""
    assert found.keys() == expected.keys()
    different = [key for key, value in found.items() if not is_same(value, expected[key])]
    assert not different, f"{len(different)} of {len(found)} differ, first {different[:3]}"


def is_same(found: Any, expected: Any) -> bool:
    if isinstance(expected, torch.Tensor):
        same_kind = isinstance(found, torch.Tensor) and found.dtype == expected.dtype and found.shape == expected.shape
        return bool(same_kind and torch.equal(_bytes(found), _bytes(expected)))
    return bool(type(found) is type(expected) and found == expected)


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


class StopAt(TrainerCallback):
    """Ends training early without a shorter schedule, as a crash would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            control.should_training_stop = True


class KeepStates(TrainerCallback):
    """Copies of the model's state at each save, by step."""

    def __init__(self) -> None:
        self.models: dict[int, Snapshot] = {}
        self.optimizers: dict[int, dict[str, Any]] = {}

    def on_save(self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **_: Any) -> None:
        self.models[state.global_step] = snapshot_model(model)
        self.optimizers[state.global_step] = snapshot_optimizer(model, getattr(optimizer, "optimizer", optimizer))


class BatchRecorder:
    """A collator that notes what it was asked for, for models whose inputs are ``input_ids``."""

    def __init__(self) -> None:
        self.seen: list[list[list[int]]] = []

    def watch(self, model: torch.nn.Module) -> None:
        def note(module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            self.seen.append(kwargs["input_ids"].tolist())

        model.register_forward_pre_hook(note, with_kwargs=True)


def training_arguments(directory: Path | str, **options: Any) -> TrainingArguments:
    defaults: dict[str, Any] = {
        "max_steps": 30,
        "per_device_train_batch_size": 2,
        "save_steps": 5,
        "logging_steps": 1,
        "learning_rate": 1e-3,
        "weight_decay": 0.1,
        "warmup_steps": 3,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(output_dir=str(directory), **(defaults | options))


def build_trainer(
    directory: Path | str,
    *,
    trainer_class: Callable[..., Trainer] = Trainer,
    model: torch.nn.Module | None = None,
    stop: int | None = None,
    callbacks: Iterable[TrainerCallback] = (),
    extra: Mapping[str, Any] | None = None,
    **options: Any,
) -> Trainer:
    """A Trainer over ``token_examples``; ``options`` are of its arguments, ``extra`` of itself."""
    chosen = [*callbacks, *([] if stop is None else [StopAt(stop)])]
    return trainer_class(
        model=build_llama() if model is None else model,
        args=training_arguments(directory, **options),
        train_dataset=token_examples(),
        callbacks=chosen,
        **(extra or {}),
    )


class ScriptedTrainer(Trainer):
    """Its evaluations give the losses it is told, so that a test says which step is the best."""

    script: Iterator[float]

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        metrics = {"eval_loss": next(self.script)}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


def scripted_trainer(directory: Path, script: list[float], **options: Any) -> Any:
    """Saves and evaluates every 5 steps; ``script`` has what each evaluation says."""
    best = {"eval_strategy": "steps", "eval_steps": 5, "load_best_model_at_end": True, "metric_for_best_model": "loss"}
    trainer: Any = build_trainer(
        directory,
        trainer_class=ScriptedTrainer,
        extra={"eval_dataset": token_examples(4)},
        **{"max_steps": 5 * len(script), "greater_is_better": False, **best, **options},
    )
    trainer.script = iter(script)
    return trainer


def losses(trainer: Trainer) -> list[tuple[float, float]]:
    """(loss, learning rate) at each logged step."""
    return [(entry["loss"], entry["learning_rate"]) for entry in trainer.state.log_history if "loss" in entry]


def endless(loader: Iterable[Any]) -> Iterator[Any]:
    """Epoch after epoch."""
    while True:
        yield from loader
