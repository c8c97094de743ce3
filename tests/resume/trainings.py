"""Trainings with a Trainer, by name, so that another process can resume what this one began.

python trainings.py <directory> <case>...     resumes <directory>/<case> and writes what came of it beside it
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer

from llmtailor.integrations.transformers import TailorMixin, tailor
from tiny_models import (
    BatchRecorder,
    KeepStates,
    build_llama,
    build_qwen2,
    build_trainer,
    losses,
    snapshot_model,
    snapshot_optimizer,
)

STOP = 10
OUTCOME = "outcome.pt"


class MixedTrainer(TailorMixin, Trainer):
    pass


@dataclass(frozen=True, kw_only=True)
class Case:
    build_model: Callable[[], torch.nn.Module] = build_llama
    options: dict[str, Any] = field(default_factory=dict)
    """Of TrainingArguments."""
    is_mixin: bool = False


CASES = {
    "llama": Case(),
    "mixin": Case(is_mixin=True),
    "accumulation": Case(options={"gradient_accumulation_steps": 2}),
    "bf16": Case(build_model=lambda: build_llama(dtype=torch.bfloat16)),
    "cosine": Case(options={"lr_scheduler_type": "cosine"}),
    "tied": Case(build_model=lambda: build_llama(tied=True)),
    "qwen2": Case(build_model=build_qwen2),
    "adafactor": Case(options={"optim": "adafactor"}),
    "epoch-end": Case(options={"per_device_train_batch_size": 4, "save_steps": 12}),
}


@dataclass(kw_only=True)
class Training:
    trainer: Trainer
    batches: BatchRecorder
    states: KeepStates

    def outcome(self, *, since: int = 0) -> dict[str, Any]:
        """All that must be the same after a resume; ``since`` leaves out the steps up to it."""
        trainer = self.trainer
        assert trainer.model is not None
        optimizer: Any = trainer.optimizer
        per_step = trainer.args.gradient_accumulation_steps
        taken = trainer.state.global_step - since
        return {
            "losses": losses(trainer)[since:],
            "batches": self.batches.seen[-taken * per_step :],
            "model": snapshot_model(trainer.model),
            "optimizer": snapshot_optimizer(trainer.model, optimizer.optimizer),
            "groups": [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups],
            "scheduler": trainer.lr_scheduler.state_dict(),
        }


def prepare(case: str, directory: Path, *, stop: int | None = None, strategy: str = "full") -> Training:
    setting = CASES[case]
    model = setting.build_model()
    batches, states = BatchRecorder(), KeepStates()
    batches.watch(model)
    options: dict[str, Any] = {"model": model, "stop": stop, "callbacks": [states], **setting.options}
    if setting.is_mixin:
        trainer = build_trainer(directory, trainer_class=MixedTrainer, extra={"strategy": strategy}, **options)
    else:
        trainer = tailor(build_trainer(directory, **options), strategy=strategy)
    return Training(trainer=trainer, batches=batches, states=states)


def main(root: Path, cases: list[str]) -> None:
    for case in cases:
        # As after a crash: nothing of the first process is here, not even its random numbers.
        torch.manual_seed(987)
        training = prepare(case, root / case)
        training.trainer.train(resume_from_checkpoint=True)
        torch.save(training.outcome(since=STOP), root / f"{case}-{OUTCOME}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
