"""The model, the data and the Trainer of a training child; the only file of the demo that needs torch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments, set_seed

from ..checkpoint import open_checkpoint
from ..errors import TailorError
from ..integrations.transformers import TailorMixin
from ..storage import checkpoint_name
from ..writer import SaveHandle
from .events import ChildSpec, Event, FinishedEvent, LossEvent, ReadyEvent, ResumedEvent, SaveEvent, SaveFailedEvent
from .options import SIZES, ModelSize
from .text import VOCABULARY_SIZE, cut_sequences, read_text, split_text

__all__ = ["train"]

Emit = Callable[[Event], None]


class _TailoredTrainer(TailorMixin, Trainer):
    """The real Trainer with our checkpoints; tells of each save when it ended."""

    emit: Emit

    def save_ended(self, handle: SaveHandle) -> None:
        super().save_ended(handle)
        if handle.stats is None:
            what = handle.error.what if isinstance(handle.error, TailorError) else str(handle.error)
            self.emit(SaveFailedEvent(step=handle.step, what=what))
            return
        self.emit(
            SaveEvent(
                step=handle.step,
                written_nbytes=handle.stats.written_nbytes,
                stall_secs=handle.stats.stall_secs,
                total_secs=handle.stats.total_secs,
                num_layers_written=handle.stats.num_layers_written,
                num_layers=handle.stats.num_layers,
            )
        )


def train(spec: ChildSpec, emit: Emit) -> None:
    """Train to the end, from the start or from the newest checkpoint that verifies, and evaluate."""
    torch.set_num_threads(spec.threads)
    set_seed(spec.seed)
    size = SIZES[spec.size]
    model = _build_model(size)
    training, validation = split_text(read_text())
    trainer = _TailoredTrainer(
        model=model,
        args=_arguments(spec, size),
        train_dataset=_examples(cut_sequences(training, size.sequence)),
        eval_dataset=_examples(cut_sequences(validation, size.sequence, size.validation_sequences)),
        callbacks=[_Reporter(Path(spec.run), emit)],
        strategy=spec.strategy,
    )
    trainer.emit = emit
    emit(ReadyEvent(num_parameters=sum(parameter.numel() for parameter in model.parameters())))
    trainer.train(resume_from_checkpoint=spec.resume)
    emit(FinishedEvent(validation_loss=trainer.evaluate()["eval_loss"]))


def _build_model(size: ModelSize) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.blocks,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads,
        max_position_embeddings=size.sequence,
        attention_dropout=0.1,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config)


def _arguments(spec: ChildSpec, size: ModelSize) -> TrainingArguments:
    return TrainingArguments(
        output_dir=spec.run,
        max_steps=spec.steps,
        save_steps=spec.save_steps,
        save_total_limit=spec.keep,
        per_device_train_batch_size=size.batch,
        per_device_eval_batch_size=size.batch * 2,
        learning_rate=size.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=spec.steps // 10,
        weight_decay=0.1,
        seed=spec.seed,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )


def _examples(sequences: list[bytes]) -> list[dict[str, torch.Tensor]]:
    tokens = [torch.tensor(list(sequence)) for sequence in sequences]
    return [{"input_ids": each, "labels": each} for each in tokens]


class _Reporter(TrainerCallback):
    """Tells the parent what happens."""

    def __init__(self, run: Path, emit: Emit) -> None:
        self._run = run
        self._emit = emit

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        step = state.global_step
        if step > 0:
            layers = open_checkpoint(self._run / checkpoint_name(step)).manifest.layers
            self._emit(ResumedEvent(step=step, layer_steps={layer.name: layer.state_step for layer in layers}))

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        logs = kwargs["logs"]
        if "loss" in logs:
            self._emit(LossEvent(step=state.global_step, loss=float(logs["loss"])))
