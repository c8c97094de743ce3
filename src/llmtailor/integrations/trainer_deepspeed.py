"""The Trainer's engine under DeepSpeed: read by name, and loaded by us where stock code calls ``load_checkpoint``.

The Trainer makes its engine in the middle of ``train`` and has it load at once, so it is bound when it is assigned.
Stock code looks for ``global_step*`` before it calls the engine; each checkpoint has a small file of that name.

Source: transformers 5.23, trainer.py (_prepare_for_training), integrations/deepspeed.py (deepspeed_load_checkpoint).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..checkpoint import open_checkpoint
from ..checkpointer import Checkpointer
from ..zero import EngineState, ZeroLoad, ZeroReader, read_engine_state, write_engine_state
from .trainer_files import is_ours

__all__ = ["EngineOfTrainer", "save_engine"]

_MARKER = "A checkpoint of LLMTailor. For one of DeepSpeed: llmtailor export CHECKPOINT OUT --to deepspeed --ranks N\n"


class EngineOfTrainer:
    """Mixin of a Trainer: ``deepspeed`` is its engine, bound to our checkpoints while ``train`` runs."""

    _tailor_options: Any
    _tailor_checkpointer: Checkpointer | None
    _tailor_together: Callable[[Callable[[], None]], None]

    @property
    def deepspeed(self) -> Any:
        """The engine; None without DeepSpeed."""
        return self.__dict__.get("deepspeed")

    @deepspeed.setter
    def deepspeed(self, engine: Any) -> None:
        self.__dict__["deepspeed"] = engine
        self._tailor_bind_engine()

    def _tailor_bind_engine(self) -> None:
        engine, checkpointer = self.deepspeed, self._tailor_checkpointer
        if engine is None or checkpointer is None:
            return
        reader = ZeroReader(
            engine,
            seat=checkpointer.seat,
            split_experts=self._tailor_options.get("split_experts", False),
            overrides=self._tailor_options.get("layer_overrides"),
        )
        checkpointer.read_with(reader)
        if not hasattr(engine, "_tailor_stock_load"):
            engine._tailor_stock_load = engine.load_checkpoint
        engine.load_checkpoint = self._tailor_load_engine

    def _tailor_load_engine(self, load_dir: str, *args: Any, **options: Any) -> tuple[str | None, dict[str, Any]]:
        """As the engine's, which it is for a checkpoint of stock code."""
        engine = self.deepspeed
        if not is_ours(load_dir):
            result: tuple[str | None, dict[str, Any]] = engine._tailor_stock_load(load_dir, *args, **options)
            return result
        loads: list[tuple[ZeroLoad, EngineState]] = []

        def fill() -> None:
            found = open_checkpoint(Path(load_dir))
            load = ZeroLoad(engine, found, has_optimizer=found.manifest.contents == "full")
            loads.append((load, read_engine_state(found.path)))
            load.fill(lambda record: None)

        self._tailor_together(fill)
        load, state = loads[0]
        load.finish(state)
        return load_dir, {}


def save_engine(engine: Any, staged: Path) -> bool:
    """Put the engine's small files into a checkpoint; on rank 0.

    Returns:
        True if the learning rate schedule is among them: it is the engine's, not the Trainer's own.
    """
    write_engine_state(engine, staged)
    (staged / f"global_step{int(engine.global_steps)}").write_text(_MARKER, encoding="utf-8")
    return engine.lr_scheduler is not None
