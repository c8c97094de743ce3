"""Which files beside weights and optimizer are carried along, by name alone."""

from __future__ import annotations

import re

__all__ = ["is_carried", "is_tokenizer", "is_trainer_state"]

# Source: transformers 5.23, trainer.py and trainer_callback.py (file names at the top), trainer_pt_utils.py.
_TRAINER = re.compile(r"trainer_state\.json|training_args\.bin|scheduler\.pt|scaler\.pt|rng_state(?:_\d+)?\.pth")
# Source: transformers 5.23, tokenization_utils_base.py (file names at the top) and VOCAB_FILES_NAMES of the models.
_TOKENIZER = re.compile(
    r"tokenizer.*|special_tokens_map\.json|added_tokens\.json|vocab.*\.(?:json|txt|bpe)|merges\.txt|bpe\.codes"
    r"|.*\.(?:model|spm|tiktoken)|chat_template\.(?:json|jinja)|spiece.*|sentencepiece.*"
)
_SUFFIXES = (".json", ".jinja", ".txt", ".model", ".tiktoken", ".spm", ".bpe", ".codes")
# Of weights that are written anew, and manifests of other formats.
_REPLACED = re.compile(r".*\.index\.json|tailor\.json|adapter_config\.json")


def is_trainer_state(name: str) -> bool:
    """Whether only a training that resumes reads the file."""
    return _TRAINER.fullmatch(name) is not None


def is_tokenizer(name: str) -> bool:
    """Whether the file is of a tokenizer."""
    return _TOKENIZER.fullmatch(name) is not None


def is_carried(name: str) -> bool:
    """Whether the file goes into a new checkpoint as it is; never weights or optimizer state."""
    if _REPLACED.fullmatch(name):
        return False
    return is_trainer_state(name) or name.endswith(_SUFFIXES)
