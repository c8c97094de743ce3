"""Which files beside weights and optimizer are carried along, by name alone."""

from __future__ import annotations

import re

from ..small_names import is_tokenizer, is_weights

__all__ = ["is_carried"]

# Source: transformers 5.23, trainer.py and trainer_callback.py (file names at the top), trainer_pt_utils.py.
_TRAINER = re.compile(r"trainer_state\.json|training_args\.bin|scheduler\.pt|scaler\.pt|rng_state(?:_\d+)?\.pth")
_SUFFIXES = (".json", ".txt")
# Manifests of other formats.
_REPLACED = frozenset({"tailor.json", "adapter_config.json"})


def is_carried(name: str) -> bool:
    """Whether the file goes into a new checkpoint as it is; never weights or optimizer state."""
    if name in _REPLACED or is_weights(name):
        return False
    is_of_trainer = _TRAINER.fullmatch(name) is not None
    return is_tokenizer(name) or ("/" not in name and (is_of_trainer or name.endswith(_SUFFIXES)))
