"""Models that benchmarks save: with optimizer state, and layers as Llama-3.1-8B has them."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM, LlamaConfig


def llama_of_35_layers(
    hidden_size: int, vocab_size: int, device: str = "cpu"
) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """32 blocks, embedding, norm and head, 291 tensors; the MLP 3.5 times as wide as the rest; AdamW in fp32."""
    return llama(hidden_size, vocab_size, num_blocks=32, device=device)


def llama(
    hidden_size: int, vocab_size: int, *, num_blocks: int, device: str = "cpu"
) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """The same with as many blocks."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=hidden_size * 7 // 2,
        num_hidden_layers=num_blocks,
        num_attention_heads=8,
        num_key_value_heads=2,
    )
    model = AutoModelForCausalLM.from_config(config).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    tokens = torch.randint(0, vocab_size, (1, 8), device=device)
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    return model, optimizer
