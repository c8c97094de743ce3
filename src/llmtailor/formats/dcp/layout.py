"""How a DCP checkpoint is laid out: which dict of which directory is the model, and which the optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from .contents import Root
from .metadata import Item

__all__ = ["ACCELERATE", "FULL", "METADATA_NAME", "MODEL_DIRECTORY", "OPTIMIZER_DIRECTORY", "SINGLE", "DcpLayout"]

METADATA_NAME = ".metadata"
# Source: accelerate 1.15, utils/constants.py (FSDP_MODEL_NAME, OPTIMIZER_NAME), utils/fsdp_utils.py (save_fsdp_model).
MODEL_DIRECTORY = "pytorch_model_fsdp_0"
OPTIMIZER_DIRECTORY = "optimizer_0"


@dataclass(frozen=True, slots=True, kw_only=True)
class DcpLayout:
    """What only a DCP checkpoint has; ``Catalog.native``."""

    model: Root
    optimizer: Root | None = None
    is_flat: bool = False
    """Optimizer state as ``flatten_optimizer_state_dict=True`` gives it."""
    rest: tuple[Item, ...] = ()
    """Scheduler, data loader, counters."""
    spellings: Mapping[str, str] = field(default_factory=dict)
    """Canonical name -> name in the checkpoint, where they differ (``_orig_mod.``)."""
    num_ranks: int = 1
    """Shard files of the model."""
    is_full: bool = False
    """FULL_STATE_DICT of accelerate: no DCP at all, but two torch files."""


SINGLE = DcpLayout(model=Root(directory="", path=("model",)), optimizer=Root(directory="", path=("optim",)))
"""One directory, as torch's examples save it."""
ACCELERATE = DcpLayout(
    model=Root(directory=MODEL_DIRECTORY, path=("model",)),
    optimizer=Root(directory=OPTIMIZER_DIRECTORY, path=("optimizer",)),
)
"""As the HF Trainer and accelerate save it."""
FULL = DcpLayout(model=Root(directory="", path=()), is_full=True)
"""As the HF Trainer and accelerate save it where ranks do not save their own shards."""
