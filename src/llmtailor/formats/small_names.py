"""What a small file of a checkpoint is, by its name alone: training state, the tokenizer's, or others' weights.

What is none of these belongs to the model: configuration, model card, licence.
"""

from __future__ import annotations

import re

__all__ = ["TEMPLATES_DIRECTORY", "is_tokenizer", "is_training_state", "is_weights"]

TEMPLATES_DIRECTORY = "additional_chat_templates"
"""Of a tokenizer or processor, with one ``.jinja`` file for each further template.

Source: transformers 5.23, utils/hub.py (CHAT_TEMPLATE_DIR).
"""

# Source: transformers 5.23, tokenization_utils_base.py, processing_utils.py, utils/__init__.py (names of saved files)
# and VOCAB_FILES_NAMES of the models; mistral-common 1.8 (tekken.json, tokenizer.model.v3).
_TOKENIZER = re.compile(
    r"tokenizer[^/]*|vocab[^/]*|[^/]*[_-]vocab[^/]*\.(?:json|txt)|special_tokens_map\.json|added_tokens\.json|merges\.txt"
    r"|bpe\.codes|tekken\.json|spiece[^/]*|sentencepiece[^/]*|[^/]*\.(?:model|spm|tiktoken|tokenizer)"
    r"|dict\.txt|emoji\.json|byte_maps\.json|normalizer\.json|word_(?:shape|pronunciation)\.json"
    rf"|chat_template[^/]*\.json|(?:{TEMPLATES_DIRECTORY}/)?[^/]*\.jinja"
    r"|(?:[a-z]+_)?(?:pre)?processor_config\.json|audio_tokenizer_config\.json"
)
# Source: transformers 5.23, utils/__init__.py (WEIGHTS_NAME and the like); peft 0.21, utils/constants.py, and
# peft_model.py (save_pretrained: a directory for each further adapter).
_WEIGHTS = re.compile(
    r"(?:.*/)?(?:(?:pytorch_model[^/]*|(?:model|adapter_model|consolidated)(?:[.-][^/]*)?)\.(?:bin|pth|safetensors)"
    r"|[^/]*\.(?:bin|safetensors)\.index\.json|[^/]*\.(?:h5|msgpack|gguf))"
)
# Tensors and pickles beside a checkpoint are somebody's state: a scheduler's, a loader's, an average's, ...
# Source: transformers 5.23, trainer.py (names ending in _NAME); accelerate 1.15, utils/constants.py; our integrations.
_STATE = re.compile(
    r".*\.(?:pt|pth|pkl|pickle|bin|npy|npz|safetensors)|latest|metrics\.json|[^/]*_state\.json|dcp/.*"
    r"|(?!.*config)(?:rng_state|random_states|scheduler|sampler|dl_state_dict|custom_checkpoint|data(?:_\d+)?\.).*"
)


def is_tokenizer(name: str) -> bool:
    """Whether the file is of a tokenizer, or of another processor of inputs."""
    return _TOKENIZER.fullmatch(name) is not None


def is_weights(name: str) -> bool:
    """Whether the file has weights as other programs read them, a model's or an adapter's, or their index."""
    return _WEIGHTS.fullmatch(name) is not None


def is_training_state(name: str) -> bool:
    """Whether the file belongs to a moment of training rather than to the model."""
    return _STATE.fullmatch(name) is not None and not is_tokenizer(name) and not is_weights(name)
