"""Checkpoints as the Hugging Face Trainer writes them, and bare model directories.

    checkpoint-N/
      config.json generation_config.json tokenizer...       as they are
      model.safetensors                                      or shards and model.safetensors.index.json, or *.bin
      optimizer.pt                                           state by position: no names in it
      scheduler.pt rng_state*.pth trainer_state.json ...     as they are

``open_hf`` gives the catalog, ``plan_hf`` the way back. The one hard part is the optimizer: which parameter stands at
which position is known to the model alone, so ``parameter_order`` knows the order of common families, ``model_process``
asks transformers for any other, and ``positions`` checks either against the shapes before it is believed.

Source: transformers 5.23.0, trainer.py (_save_checkpoint, _load_from_checkpoint, create_optimizer).
"""

from .config import rewrite_config
from .opening import open_hf
from .planning import DEFAULT_SHARD_NBYTES, plan_hf

__all__ = ["DEFAULT_SHARD_NBYTES", "open_hf", "plan_hf", "rewrite_config"]
