"""How many bytes does a parameter take in a checkpoint, exactly and as codes?

A Llama trained by transformers' Trainer, which saves at every step: in fp32 with AdamW, and in bf16 with an AdamW that
keeps fp32 masters in its state (TransformerEngine's name for them). ``round_robin(20)`` writes a twentieth of the
layers exactly at every save and all others as codes. Counted from the manifests of twenty saves, once round, after the
first:

* codes: the codes files of a save, headers and exact small tensors included, by the parameters of their layers (of
  ``compact`` with the weights files that belong to them);
* a save: all that it wrote, with the exact twentieth and the Trainer's small files, by all parameters;
* on disk: all files of one checkpoint, so with the exact ones that the codes are relative to.

    python benchmarks/bench_coded_bytes.py [hidden size]
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from environment import publish
from masters import MasterAdamW
from torch.utils.data import Dataset
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import llmtailor
from llmtailor.integrations.transformers import tailor
from llmtailor.manifest import LayerRecord, Manifest

SAVES = 21
RESTS = ("skip", "q8", "q4", "compact", "compact4")


class Tokens(Dataset[dict[str, torch.Tensor]]):
    """Random ones."""

    def __init__(self, vocab_size: int) -> None:
        self._rows = torch.randint(0, vocab_size, (64, 16), generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self._rows[index], "labels": self._rows[index]}


def build_model(hidden_size: int, dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=hidden_size,
        intermediate_size=hidden_size * 7 // 2,
        num_hidden_layers=18,
        num_attention_heads=8,
        num_key_value_heads=2,
    )
    return AutoModelForCausalLM.from_config(config).to(dtype)


def train(directory: Path, hidden_size: int, dtype: torch.dtype, strategy: str, rest: str) -> list[Manifest]:
    """Manifests of all saves, oldest first."""
    model = build_model(hidden_size, dtype)
    arguments = TrainingArguments(
        output_dir=str(directory),
        max_steps=SAVES,
        save_steps=1,
        save_total_limit=1,
        per_device_train_batch_size=2,
        learning_rate=1e-4,
        logging_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        seed=0,
    )
    optimizers = (MasterAdamW(model.parameters(), lr=1e-4), None) if dtype != torch.float32 else (None, None)
    trainer = Trainer(model=model, args=arguments, train_dataset=Tokens(8192), optimizers=optimizers)
    manifests: list[Manifest] = []
    tailor(trainer, strategy=strategy, rest=rest, keep_consistent=False)
    trainer.add_callback(Collector(trainer, manifests))
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return manifests


class Collector(TrainerCallback):
    """Waits for every save, and keeps its manifest."""

    def __init__(self, trainer: Any, manifests: list[Manifest]) -> None:
        self._trainer = trainer
        self._manifests = manifests

    def on_save(self, *_: Any, **__: Any) -> None:
        self._manifests.append(llmtailor.open_checkpoint(self._trainer.last_save.result()).manifest)


def numel_of(manifest: Manifest, layers: set[str]) -> int:
    held = [tensor for tensor in manifest.tensors if tensor.kind == "parameter" and tensor.tied_to is None]
    return sum(tensor.meta.numel for tensor in held if tensor.layer in layers)


def codes_nbytes(layer: LayerRecord) -> int:
    """What a coded layer wrote."""
    return layer.written_nbytes(layer.state_step)


def count(manifests: Sequence[Manifest]) -> dict[str, float]:
    """Bytes a parameter; see the top of this file."""
    later = manifests[1:]
    total = numel_of(later[0], {layer.name for layer in later[0].layers})
    per_code = []
    for manifest in later:
        coded = [layer for layer in manifest.layers if layer.encoding is not None and layer.state_step == manifest.step]
        if coded:
            per_code.append(sum(map(codes_nbytes, coded)) / numel_of(manifest, {layer.name for layer in coded}))
    errors = [
        error
        for manifest in later
        for layer in manifest.layers
        if layer.encoding is not None
        for error in layer.encoding.errors.items()
    ]
    rows = {
        "save_bytes_per_parameter": statistics.mean(each.written_nbytes for each in later) / total,
        "disk_bytes_per_parameter": statistics.mean(each.nbytes for each in later) / total,
        "layers_over_limit": sum(layer.reason == "error limit" for each in later for layer in each.layers),
    }
    if per_code:
        rows["codes_bytes_per_parameter"] = statistics.mean(per_code)
    for component in ("weights", "first", "second"):
        if found := [error.l2 for name, error in errors if name == component]:
            rows[f"{component}_l2_max"] = max(found)
    return {name: float(f"{value:.4g}") for name, value in rows.items()}


def main() -> None:
    hidden_size = int(sys.argv[1]) if len(sys.argv) > 1 else 128
    rows: dict[str, Any] = {"hidden_size": hidden_size, "saves": SAVES}
    with tempfile.TemporaryDirectory() as root:
        for name, dtype in (("fp32", torch.float32), ("bf16_with_fp32_masters", torch.bfloat16)):
            exact = train(Path(root) / f"{name}-exact", hidden_size, dtype, "full", "skip")
            manifest = exact[-1]
            rows["parameters"] = numel_of(manifest, {layer.name for layer in manifest.layers})
            rows[name] = {"exact": count(exact)}
            for rest in RESTS:
                rows[name][rest] = count(
                    train(Path(root) / f"{name}-{rest}", hidden_size, dtype, "round_robin(20)", rest)
                )
    publish("coded_bytes", rows)


if __name__ == "__main__":
    main()
