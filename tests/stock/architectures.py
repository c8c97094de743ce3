"""One tiny model of each kind of architecture, and the stock class that reads it back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers

from tiny_models import VOCABULARY, build_llama

_HEADS: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4, "num_hidden_layers": 3}
_DECODER: dict[str, Any] = {**_HEADS, "num_key_value_heads": 2, "vocab_size": VOCABULARY}
_ENDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


@dataclass(frozen=True, kw_only=True)
class Architecture:
    build: Callable[[], torch.nn.Module]
    reader: Any
    """Class with ``from_pretrained``."""


def _from(config: Callable[[], Any], reader: Any) -> Architecture:
    def build() -> torch.nn.Module:
        torch.manual_seed(0)
        model: torch.nn.Module = reader.from_config(config())
        # Some start with all their biases and scales equal: a mix-up of those would not be seen.
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.01)
        return model

    return Architecture(build=build, reader=reader)


def _llava() -> Any:
    return transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**_HEADS, image_size=16, patch_size=8),
        text_config=transformers.LlamaConfig(**_DECODER),
        image_token_index=5,
    )


def _clip() -> Any:
    text = transformers.CLIPTextConfig(**_HEADS, vocab_size=VOCABULARY, max_position_embeddings=16, **_ENDS)
    vision = transformers.CLIPVisionConfig(**_HEADS, image_size=16, patch_size=8)
    return transformers.CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=8)


def _qwen2_moe() -> Any:
    return transformers.Qwen2MoeConfig(
        **_DECODER, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8, shared_expert_intermediate_size=8
    )


_lm, _masked = transformers.AutoModelForCausalLM, transformers.AutoModelForMaskedLM
_seq2seq = transformers.AutoModelForSeq2SeqLM

ARCHITECTURES = {
    "llama": Architecture(build=lambda: build_llama(dropout=0.0), reader=_lm),
    "llama-tied": Architecture(build=lambda: build_llama(tied=True, dropout=0.0), reader=_lm),
    "llama-bf16": Architecture(build=lambda: build_llama(dtype=torch.bfloat16), reader=_lm),
    "gpt2": _from(lambda: transformers.GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=3, n_head=4), _lm),
    "bert": _from(lambda: transformers.BertConfig(**_HEADS, vocab_size=VOCABULARY), _masked),
    "t5": _from(
        lambda: transformers.T5Config(
            vocab_size=VOCABULARY, d_model=16, d_ff=24, d_kv=4, num_layers=3, num_heads=4, decoder_start_token_id=0
        ),
        _seq2seq,
    ),
    "gemma2": _from(lambda: transformers.Gemma2Config(**_DECODER, head_dim=4), _lm),
    "gpt-neox": _from(lambda: transformers.GPTNeoXConfig(**_HEADS, vocab_size=VOCABULARY), _lm),
    "opt": _from(
        lambda: transformers.OPTConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            ffn_dim=24,
            num_hidden_layers=3,
            num_attention_heads=4,
            word_embed_proj_dim=16,
            **_ENDS,
        ),
        _lm,
    ),
    "mixtral": _from(lambda: transformers.MixtralConfig(**_DECODER, num_local_experts=4), _lm),
    "qwen2-moe": _from(_qwen2_moe, _lm),
    "mamba": _from(
        lambda: transformers.MambaConfig(vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=3, state_size=4), _lm
    ),
    "vit": _from(
        lambda: transformers.ViTConfig(**_HEADS, image_size=16, patch_size=8),
        transformers.AutoModelForImageClassification,
    ),
    "clip": _from(_clip, transformers.AutoModel),
    "llava": _from(_llava, transformers.AutoModelForImageTextToText),
}
