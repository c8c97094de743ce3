"""What an engine with our checkpoints behind it saved beside its tensors, for a checkpoint of DeepSpeed's own."""

from __future__ import annotations

from collections.abc import Mapping

from ...catalog import Catalog
from ..torch_files import Tree, open_torch_file

__all__ = ["ENGINE_STATE_NAME", "read_engine_state"]

ENGINE_STATE_NAME = "deepspeed_state.pt"
"""A small file of a checkpoint of ours, by torch.save: ``engine`` (counters, schedules), ``client_state``, ``tag``."""

# As both name them. Source: DeepSpeed 0.19.8, runtime/engine.py (_common_checkpoint_state).
_SHARED = ("lr_scheduler", "random_ltd", "data_sampler", "global_steps", "global_samples", "skipped_steps")


def read_engine_state(catalog: Catalog) -> Mapping[str, Tree]:
    """Entries of a model states file: counters, schedules, and the user's own at its top level; empty if no engine
    saved the source.

    Raises:
        FormatError: The file is damaged.
    """
    found = next((file for file in catalog.files if file.name == ENGINE_STATE_NAME), None)
    if found is None:
        return {}
    content = open_torch_file(found.path)
    engine = content.get("engine") if isinstance(content, dict) else None
    client_state = content.get("client_state") if isinstance(content, dict) else None
    entries = {name: engine[name] for name in _SHARED if name in engine} if isinstance(engine, dict) else {}
    return {**(client_state if isinstance(client_state, dict) else {}), **entries}
