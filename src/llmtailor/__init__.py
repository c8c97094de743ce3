"""Checkpoints of LLM training, layer by layer.

Save only the layers that need saving, keep every checkpoint whole and resumable all the same, and assemble a
resumable checkpoint out of layers of several others.

Importing this package is cheap: it pulls in neither torch nor numpy. A public name brings its module along when it is
first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .errors import TailorError

if TYPE_CHECKING:
    from .checkpoint import open_checkpoint as open_checkpoint
    from .diff import diff_checkpoints as diff_checkpoints
    from .integrations.torch_loop import Run as Run
    from .interval import Interval as Interval
    from .merging import export as export
    from .merging import merge as merge
    from .retention import Keep as Keep
    from .verify import verify_checkpoint as verify_checkpoint

__version__ = "0.1.0"

__all__ = [
    "Interval",
    "Keep",
    "Run",
    "TailorError",
    "diff_checkpoints",
    "export",
    "merge",
    "open_checkpoint",
    "verify_checkpoint",
]

# Public name -> the module that has it. A new name goes here, into __all__ and into the block above.
_LAZY = {
    "Interval": "llmtailor.interval",
    "Keep": "llmtailor.retention",
    "Run": "llmtailor.integrations.torch_loop",
    "diff_checkpoints": "llmtailor.diff",
    "export": "llmtailor.merging",
    "merge": "llmtailor.merging",
    "open_checkpoint": "llmtailor.checkpoint",
    "verify_checkpoint": "llmtailor.verify",
}
# Public packages, as attributes: ``llmtailor.strategies.Budget("20GB")``.
_LAZY_PACKAGES = frozenset({"strategies"})


def __getattr__(name: str) -> Any:
    if name in _LAZY_PACKAGES:
        return importlib.import_module(f"{__name__}.{name}")  # which makes it an attribute
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_LAZY[name]), name)
    globals()[name] = value  # asked once only
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY, *_LAZY_PACKAGES})
