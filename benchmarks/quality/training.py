"""A training that is a function of its settings, its seed and the number of the step; and the base model."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from corpus import Corpus
from safetensors.torch import load_file, save_file
from settings import ModelSize, Regime, Settings
from transformers import LlamaConfig, LlamaForCausalLM

_BASE_SEED = 1000
_VALIDATION_BATCH = 16

State = dict[str, torch.Tensor]


class Training:
    """Model and optimizer of one regime and seed, and the steps they take.

    Args:
        settings: Of the whole experiment.
        regime: What it does.
        corpus: Its tokens.
        seed: Of the batches and, in a regime from scratch, of the weights.
        weights: To begin with, those of the base model; random ones without.
    """

    def __init__(self, settings: Settings, regime: Regime, corpus: Corpus, seed: int, weights: State | None) -> None:
        self.settings = settings
        self.regime = regime
        self.seed = seed
        self.model = build_model(settings.model, seed, settings.sequence_length, settings.device)
        if weights is not None:
            self.model.load_state_dict(weights)
        # The learning rate is that of the step, see `advance`.
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=regime.lr, betas=regime.betas, weight_decay=regime.weight_decay, fused=True
        )
        self._training_tokens = torch.from_numpy(corpus.training[regime.corpus].astype(np.int64))
        held_out = torch.from_numpy(corpus.validation[regime.corpus].astype(np.int64))
        rows = cut_evenly(held_out, settings.sequence_length + 1, settings.validation_sequences)
        self._validation = rows.to(settings.device)

    def advance(self, first: int, last: int, after_step: Callable[[int], None] = lambda step: None) -> list[float]:
        """Take the steps from ``first`` (done before) to ``last`` (done then); returns their losses.

        Args:
            first: Steps done.
            last: Steps done in the end.
            after_step: Told after each step how many are done.
        """
        losses = []
        for step in range(first, last):
            losses.append(self._take_step(step))
            after_step(step + 1)
        return losses

    def _take_step(self, step: int) -> float:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.regime, step)
        loss = loss_of(self.model, self._batch(step))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()

    def _batch(self, step: int) -> torch.Tensor:
        length = self.settings.sequence_length + 1
        generator = np.random.default_rng([self.seed, step])
        starts = generator.integers(0, len(self._training_tokens) - length + 1, self.settings.batch_size)
        rows = torch.stack([self._training_tokens[start : start + length] for start in starts])
        return rows.to(self.settings.device)

    @torch.no_grad()
    def validation_loss(self) -> float:
        """Mean over all held-out tokens that are looked at, in nats."""
        losses = [loss_of(self.model, rows) * len(rows) for rows in self._validation.split(_VALIDATION_BATCH)]
        return float(torch.stack(losses).double().sum()) / len(self._validation)

    @torch.no_grad()
    def snapshot(self) -> State:
        """A copy of weights and optimizer state, by name."""
        state = {f"weights.{name}": value.clone() for name, value in self.model.named_parameters()}
        for name, parameter in self.model.named_parameters():
            for key, value in self.optimizer.state[parameter].items():
                state[f"{key}.{name}"] = value.clone()
        return state

    @torch.no_grad()
    def restore(self, state: State, *, updates: int) -> None:
        """Take over a snapshot, with the optimizer's counts of updates set to ``updates``."""
        for name, parameter in self.model.named_parameters():
            parameter.copy_(state[f"weights.{name}"])
            self.optimizer.state[parameter] = {
                "step": torch.tensor(float(updates), device=parameter.device),
                "exp_avg": state[f"exp_avg.{name}"].clone(),
                "exp_avg_sq": state[f"exp_avg_sq.{name}"].clone(),
            }


def build_model(size: ModelSize, seed: int, sequence_length: int, device: str = "cpu") -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads,
        max_position_embeddings=sequence_length,
        tie_word_embeddings=False,
        initializer_range=size.initializer_range,
        # On CUDA the backward pass of the fused one is not the same twice.
        attn_implementation="sdpa" if device == "cpu" else "eager",
    )
    with torch.device(device):
        return LlamaForCausalLM(config)


def count_parameters(size: ModelSize, sequence_length: int) -> int:
    return sum(parameter.numel() for parameter in build_model(size, 0, sequence_length, "meta").parameters())


def loss_of(model: torch.nn.Module, rows: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy of the next token; rows [B, T + 1]."""
    logits = model(input_ids=rows[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())


def learning_rate(regime: Regime, step: int) -> float:
    if step < regime.warmup:
        return regime.lr * (step + 1) / regime.warmup
    done = (step - regime.warmup) / max(regime.steps - regime.warmup, 1)
    share = 0.5 * (1 + math.cos(math.pi * done))
    return regime.lr * (regime.final_lr_share + (1 - regime.final_lr_share) * share)


def cut_evenly(tokens: torch.Tensor, length: int, limit: int) -> torch.Tensor:
    """At most ``limit`` rows [N, length], evenly spread and without overlap."""
    rows = tokens[: len(tokens) // length * length].reshape(-1, length)
    return rows if len(rows) <= limit else rows[:: len(rows) // limit][:limit]


def load_base(settings: Settings, corpus: Corpus, cache: Path, say: Callable[[str], None]) -> State:
    """Weights of the base model: from the cache, or trained and kept there."""
    shape: list[object] = [settings.sequence_length, settings.batch_size]
    if settings.device != "cpu":
        shape.append(settings.device)
    key = json.dumps([asdict(settings.model), asdict(settings.base), *shape, corpus.digest, torch.__version__])
    path = cache / f"base-{hashlib.sha256(key.encode()).hexdigest()[:16]}.safetensors"
    if not path.exists():
        training = Training(settings, settings.base, corpus, _BASE_SEED, None)

        def report(step: int) -> None:
            if step % 100 == 0:
                say(f"base model: {step} of {settings.base.steps} steps")

        training.advance(0, settings.base.steps, report)
        say(f"base model: validation loss {training.validation_loss():.4f}")
        partial = path.with_suffix(f".{os.getpid()}")
        save_file({name: value.contiguous() for name, value in training.model.state_dict().items()}, partial)
        partial.replace(path)
    return load_file(path)
