"""Write ``tests/compat/data/transformers-<version>``: small real checkpoints of the Hugging Face Trainer.

    python tests/compat/make_hf.py [DIRECTORY]

Run it again, with the version of transformers that the name then says, when a new version writes another layout; the
old data stay, as old checkpoints are read forever. ``training_args.bin`` is left out: it says where it was written.

    llama/checkpoint-{2,4}     untied; weights decay, warm-up, two groups
    qwen2-tied/checkpoint-2    biases in the attention, head tied to the embedding
    gpt2/checkpoint-2          nn.LayerNorm, fused attention, tied: no family of ours
    llama-sharded              the weights of llama/checkpoint-4 in shards, as save_pretrained cuts them
    llama-bin/checkpoint-4     the same with pytorch_model.bin, as older versions wrote it
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

import torch
import transformers

sys.path.insert(0, str(Path(__file__).parent.parent))

from tiny_models import StopAt, build_llama, build_qwen2, build_trainer


def build_gpt2() -> transformers.PreTrainedModel:
    """Without dropout: two blocks of width 16."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=2, n_positions=16, n_inner=24)
    return transformers.AutoModelForCausalLM.from_config(config)


def train(directory: Path, model: transformers.PreTrainedModel, steps: int) -> None:
    """Save every second step."""
    options = {"save_steps": 2, "warmup_steps": 2, "learning_rate": 1e-2}
    build_trainer(directory, model=model, callbacks=[StopAt(steps)], **options).train()
    for file in directory.glob("checkpoint-*/training_args.bin"):
        file.unlink()


def main(target: Path) -> None:
    """Write all of it."""
    shutil.rmtree(target, ignore_errors=True)
    train(target / "llama", build_llama(num_layers=3), 4)
    train(target / "qwen2-tied", build_qwen2(), 2)
    train(target / "gpt2", build_gpt2(), 2)
    newest = target / "llama" / "checkpoint-4"
    model = transformers.AutoModelForCausalLM.from_pretrained(newest)
    model.save_pretrained(target / "llama-sharded", max_shard_size="20KB")
    old = target / "llama-bin" / "checkpoint-4"
    shutil.copytree(newest, old)
    (old / "model.safetensors").unlink()
    torch.save(model.state_dict(), old / "pytorch_model.bin")


if __name__ == "__main__":
    default = Path(__file__).parent / "data" / f"transformers-{transformers.__version__}"
    with tempfile.TemporaryDirectory() as temporary:
        made = Path(temporary) / "made"
        main(made)
        wished = Path(sys.argv[1]) if len(sys.argv) > 1 else default
        shutil.rmtree(wished, ignore_errors=True)
        shutil.copytree(made, wished)
